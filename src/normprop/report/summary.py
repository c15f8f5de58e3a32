"""Words and table cells that the page is generated with: what won, by how much, and at which budget."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from normprop.report.results import FINISHED, Results, Row


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, without the sign.

    Example:
        >>> percent(0.4174)
        '41.7'
    """
    return "–" if value is None else f"{100 * value:.{digits}f}"


def number(value: Any) -> str:
    """A setting's value as people write it.

    Example:
        >>> number(4000), number(0.02), number(("flip", "crop")), number(None)
        ('4,000', '0.02', 'flip, crop', '–')
    """
    if value is None or value == "" or value == [] or value == ():
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(number(item) for item in value)
    return str(value)


def sentence(results: Results) -> str:
    """One sentence that says which method has the lowest test error at which batch size, and where none has."""
    finished = {
        batch: names
        for batch in results.batch_sizes
        if (names := [m for m in results.methods if results.error(m, batch) is not None])
    }
    if not finished:
        return _nothing(results)
    present = {name for names in finished.values() for name in names}
    if len(present) == 1:
        (name,) = present
        scores = [f"{_score(results, name, batch)} at batch size {batch}" for batch in finished]
        return _full_stop(f"{_named(name)} reaches a test error of {_list(scores)}")
    clear: dict[str, list[int]] = {}
    ties = []
    for batch in finished:
        leaders = results.leaders(batch)
        if len(leaders) == 1:
            clear.setdefault(leaders[0], []).append(batch)
        else:
            ties.append(_tie(results, batch, leaders))
    clauses = [_win(results, name, batches, len(finished)) for name, batches in clear.items()] + ties
    text = "; ".join(clauses)
    alone = [results.cell(m, b).get("error_std") is None for b, names in finished.items() for m in names]
    if any(alone):
        whose = "every error is" if all(alone) else "some errors are"
        text += f"; {whose} from a single seed, so small differences may be chance"
    return _full_stop(text)


def progress(results: Results) -> str | None:
    """How far an unfinished comparison is; None when every trial has ended."""
    counts = results.counts()
    done = sum(counts[status] for status in FINISHED)
    if done == len(results.trials):
        return None
    return (
        f"Partial: {done} of {len(results.trials)} trials "
        f"({counts['running']} running, {counts['waiting']} waiting). The numbers below will change."
    )


def remarks(results: Results) -> list[str]:
    """What the sentence leaves out: methods that cannot run or that diverged at every rate, by batch sizes."""
    lines = []
    for kind, words in (("impossible", "Cannot run"), ("diverged", "Diverged at every learning rate")):
        groups: dict[tuple[int, ...], list[str]] = {}
        for method in results.methods:
            where = tuple(batch for batch in results.batch_sizes if state(results, method, batch) == kind)
            if where:
                groups.setdefault(where, []).append(method)
        lines += [
            f"{words} at batch size{'s' if len(where) > 1 else ''} {_list(where)}: {_list(names, most=6)}."
            for where, names in groups.items()
        ]
    return lines


def state(results: Results, method: str, batch_size: int) -> str:
    """What one cell of the table shows: "error", "impossible", "diverged", "waiting" or "missing"."""
    cell = results.cell(method, batch_size)
    if cell.get("error_mean") is not None:
        return "error"
    trials = results.runs(method, batch_size)
    if cell.get("impossible") or any(trial["status"] == "impossible" for trial in trials):
        return "impossible"
    if any(trial["status"] not in FINISHED for trial in trials):
        return "waiting"
    if any(trial["status"] == "diverged" for trial in trials):
        return "diverged"
    return "missing"


def hidden(results: Results, most: int) -> list[int]:
    """Numbers of the methods that the plots leave out at first, so that at most about ``most`` are seen.

    With more methods, those are shown that lead at some batch size and those that people compare with.
    """
    if len(results.methods) <= most:
        return []
    leaders = {name for batch in results.batch_sizes for name in results.leaders(batch)[:3]}
    shown = leaders | {"none", "batch", "group", "layer", "normprop", "normprop-paper"}
    return [index for index, name in enumerate(results.methods) if name not in shown]


def facts(results: Results) -> list[tuple[str, str]]:
    """The budget in short: what was trained, on what, for how long."""
    settings = results.settings
    splits = [
        f"{number(settings[key])} {word}"
        for key, word in (("train", "training"), ("validation", "validation"), ("test", "test images"))
        if settings.get(key) is not None
    ]
    width = settings.get("width")
    epochs = settings.get("epochs")
    lines = [
        ("Data", _join(settings.get("data"), _list(splits))),
        ("Network", _join(settings.get("model"), f"width {number(width)}" if width is not None else "")),
        ("Budget of a trial", f"{number(epochs)} epoch{'s' * (epochs != 1)}" if epochs is not None else ""),
        ("Batch sizes", number(results.batch_sizes)),
        ("Learning rates", number(results.lrs)),
        ("Seeds", number(len(results.seeds))),
        ("Trials", number(len(results.trials))),
    ]
    return [(name, value) for name, value in lines if value]


def date(created: str) -> str:
    """An ISO 8601 time for people; other text as it is.

    Example:
        >>> date("2026-11-20T18:14:03+00:00")
        '20 November 2026, 18:14 UTC'
    """
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {time.tzname()}" if time.tzinfo else ""
    return f"{time.day} {time:%B %Y, %H:%M}{zone}"


def table(results: Results) -> tuple[list[Row], list[str]]:
    """The results table's rows, method by method, and the footnotes that say why a cell is impossible."""
    footnotes: list[str] = []
    leaders = {batch: results.leaders(batch) if len(results.methods) > 1 else [] for batch in results.batch_sizes}
    ratios = {(row["method"], row["batch_size"]): row["ratio"] for row in results.step_time}
    errors = [percent(results.error(*key), results.digits) for key in results.cells]
    length = max(map(len, errors), default=0)
    rows = []
    for index, method in enumerate(results.methods):
        cells = []
        for batch in results.batch_sizes:
            cell = results.cell(method, batch)
            reason = cell.get("impossible")
            if reason and reason not in footnotes:
                footnotes.append(reason)
            ratio = cell.get("step_time") if cell.get("step_time") is not None else ratios.get((method, batch))
            cells.append(
                {
                    "batch": batch,
                    "state": state(results, method, batch),
                    "rank": "best" if leaders[batch][:1] == [method] else "near" if method in leaders[batch] else "",
                    "error": percent(cell.get("error_mean"), results.digits).rjust(length, "\N{FIGURE SPACE}"),
                    "spread": cell.get("error_std") is not None and percent(cell["error_std"], results.digits),
                    "lr": cell.get("best_lr") is not None and number(cell["best_lr"]),
                    "edge": bool(cell.get("edge")),
                    "diverged": number(cell.get("diverged_lrs") or None),
                    "seeds": cell.get("seeds"),
                    "ratio": ratio is not None and f"{ratio:.2f}×",
                    "note": footnotes.index(reason) + 1 if reason else None,
                }
            )
        rows.append({"index": index, "method": method, "cells": cells})
    return rows, footnotes


def _nothing(results: Results) -> str:
    counts = results.counts()
    if not results.trials:
        return "There are no trials."
    for status, words in (("diverged", "diverged"), ("impossible", "was impossible")):
        if counts[status] == len(results.trials):
            return f"Every trial {words}; there is no error to compare."
    return f"No method has a result yet: {counts['complete']} of {len(results.trials)} trials are complete."


def _win(results: Results, name: str, batches: list[int], of: int) -> str:
    """What is said of a method that is alone at the top at some batch sizes."""
    errors = {batch: f"{percent(results.error(name, batch), results.digits)}\N{NO-BREAK SPACE}%" for batch in batches}
    lead = f"{_named(name)} has the lowest test error at"
    if len(batches) == of > 1:
        return f"{lead} every batch size: " + _list(
            [f"{error} at\N{NO-BREAK SPACE}{batch}" for batch, error in errors.items()]
        )
    return f"{lead} batch size{'s' if len(batches) > 1 else ''} " + _list([f"{b} ({e})" for b, e in errors.items()])


def _tie(results: Results, batch: int, leaders: list[str]) -> str:
    """What is said of a batch size whose best methods cannot be told apart."""
    scores = [f"{_named(m)} ({percent(results.error(m, batch), results.digits)}\N{NO-BREAK SPACE}%)" for m in leaders]
    if len(scores) > 3:
        return f"at batch size {batch}, {scores[0]} is lowest with {len(scores) - 1} others within spread"
    return f"at batch size {batch}, {_list(scores)} are within spread of each other"


def _score(results: Results, method: str, batch: int) -> str:
    spread, digits = results.cell(method, batch).get("error_std"), results.digits
    text = percent(results.error(method, batch), digits)
    return text + (f" ± {percent(spread, digits)}" if spread is not None else "") + "\N{NO-BREAK SPACE}%"


def _named(method: str) -> str:
    """A method's name in a sentence, where "none" alone would be misread."""
    return "the plain network (none)" if method == "none" else method


def _full_stop(text: str) -> str:
    """The sentence, with a capital where it starts with a word of ours and not with a method's name."""
    return (text[0].upper() + text[1:] if text.startswith(("at batch size", "the plain")) else text) + "."


def _list(items: Sequence[Any], most: int = 1000) -> str:
    """Items as English lists them: a, b and c; those beyond `most` are counted."""
    words = [str(item) for item in items[:most]]
    if len(items) > most:
        words.append(f"{len(items) - most} others")
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _join(*parts: Any) -> str:
    """The parts that are there, with a separator."""
    return " · ".join(str(part) for part in parts if part)
