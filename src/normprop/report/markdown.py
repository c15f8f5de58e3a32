"""The tables of a comparison in Markdown, for pages that are kept with the code."""

from collections.abc import Sequence
from statistics import stdev
from typing import Any

from normprop.report.results import Results, Row, read
from normprop.report.summary import number, percent
from normprop.report.traces import mean

_QUANTITIES = (("validation_error", 100, 1), ("test_error", 100, 1), ("train_loss", 1, 2))


def tables(document: dict[str, Any]) -> str:
    """Write test error by method and batch size, and every rate behind it.

    Args:
        document: the results, from ``normprop.experiments.results.document``.

    Returns:
        Two Markdown tables under headings: errors in %, mean and sample standard deviation over seeds, the chosen rate
        in brackets, marked where it is at the edge of the rates tried; methods that cannot run with their reasons.

    Raises:
        ConfigError: if the document is not one that ``normprop compare`` makes.
    """
    results = read(document)
    sizes = sorted(results.batch_sizes, reverse=True)
    reasons: dict[str, int] = {}
    rows = []
    for method in results.methods:
        rows.append([f"`{method}`", *(_cell(results, method, size, reasons) for size in sizes)])
    parts = [
        "Test error in %, mean ± standard deviation over seeds, with the chosen rate in brackets (`*`: at the edge of "
        "the rates tried).",
        _table(["method", *(f"batch {size}" for size in sizes)], rows),
    ]
    if reasons:
        parts.append("\n".join(f"{count}. {reason}" for reason, count in reasons.items()))
    every = [
        row
        for size in sizes
        for method in results.methods
        for lr in sorted(results.lrs)
        if (row := _rate(results, method, size, lr))
    ]
    heading = ["batch", "method", "rate", "seeds", "validation error", "test error", "training loss", "diverged"]
    return "\n\n".join([*parts, "## Every rate", _table(heading, every)]) + "\n"


def _cell(results: Results, method: str, size: int, reasons: dict[str, int]) -> str:
    cell = results.cell(method, size)
    if cell.get("impossible"):
        return f"cannot run [{reasons.setdefault(cell['impossible'], len(reasons) + 1)}]"
    if cell.get("error_mean") is None:
        return "diverged" if cell.get("diverged_lrs") else ""
    text = percent(cell["error_mean"], results.digits)
    if cell.get("error_std") is not None:
        text += f" ± {percent(cell['error_std'], results.digits)}"
    seeds = "" if cell["seeds"] == max(len(results.seeds), 1) else f", {cell['seeds']} of {len(results.seeds)} seeds"
    return f"{text} ({number(cell['best_lr'])}{'*' if cell.get('edge') else ''}{seeds})"


def _rate(results: Results, method: str, size: int, lr: float) -> list[str] | None:
    runs = [run for run in results.runs_at(method, size, lr) if run["status"] in ("complete", "diverged")]
    if not runs:
        return None
    complete = [run for run in runs if run["status"] == "complete"]
    lost = len(runs) - len(complete)
    numbers = [_spread(complete, key, scale, digits) for key, scale, digits in _QUANTITIES]
    return [str(size), f"`{method}`", number(lr), str(len(runs)), *numbers, f"{lost} of {len(runs)}" if lost else ""]


def _spread(runs: Sequence[Row], key: str, scale: float, digits: int) -> str:
    values = [scale * run[key] for run in runs if run.get(key) is not None]
    if not values:
        return "-"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))
