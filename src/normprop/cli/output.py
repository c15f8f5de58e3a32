"""What a finished study leaves: a table on the screen, results.json and report.html."""

import json
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normprop.errors import requires
from normprop.files import write_content

with requires("cli"):
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

if TYPE_CHECKING:
    from normprop.experiments.study import Study

_WIDTH = 120  # of output that goes to a file or a pipe


def publish(study: "Study", out: Path, *, as_json: bool) -> None:
    """Write a study's results.json and report.html and print its table, or its document as JSON.

    Args:
        study: the study.
        out: directory to write to.
        as_json: whether to print the document in place of the table and the path.
    """
    from normprop.experiments.results import document
    from normprop.report import html

    results = document(study)
    text = json.dumps(results, indent=2, allow_nan=False)
    write_content(out / "results.json", f"{text}\n")
    page = html.write(results, out / "report.html")
    if as_json:
        print(text)
        return
    console = screen()
    console.print(results_table(results))
    for note in _notes(results):
        console.print(note, style="dim")
    print(page)


def screen() -> Console:
    """Return the console for standard output; output to a file is wide enough for every column.

    Returns:
        A console of rich.
    """
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def results_table(results: Mapping[str, Any]) -> Table:
    """Lay the document's table out, the methods of each batch size together, the best of each in bold.

    Args:
        results: the document of a study.

    Returns:
        A table of rich.
    """
    table = Table(title=results["title"], title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("batch", justify="right")
    table.add_column("method")
    for heading in ("test error %", "best rate", "diverged rates", "step time"):
        table.add_column(heading, justify="right", no_wrap=heading != "diverged rates")
    order = results["methods"]
    rows = sorted(results["table"], key=lambda row: (row["batch_size"], order.index(row["method"])))
    for batch_size, group in groupby(rows, key=lambda row: row["batch_size"]):
        cells = list(group)
        errors = [row["error_mean"] for row in cells if row["error_mean"] is not None]
        for row in cells:
            best = row["error_mean"] is not None and row["error_mean"] == min(errors)
            table.add_row(str(batch_size), *_cells(row), style="bold" if best else None)
        table.add_section()
    return table


def _cells(row: Mapping[str, Any]) -> list[str | Text]:
    """One row's texts, from the method on."""
    if row["impossible"] is not None:
        return [row["method"], Text("impossible", style="yellow"), "", "", ""]
    error = "-"
    if row["error_mean"] is not None:
        error = f"{100 * row['error_mean']:.2f}"
        if row["error_std"] is not None:
            error += f" ± {100 * row['error_std']:.2f}"
    rate = "-" if row["best_lr"] is None else f"{row['best_lr']:g}" + ("*" if row["edge"] else " ")
    step_time = "" if row["step_time"] is None else f"{row['step_time']:.2f}"
    diverged = ", ".join(f"{lr:g}" for lr in row["diverged_lrs"])
    return [row["method"], error, rate, Text(diverged, style="red"), step_time]


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What the table's marks mean, as far as they occur in it."""
    rows = results["table"]
    seeds = sorted({row["seeds"] for row in rows if row["seeds"]})
    notes = []
    if seeds:
        counts = " to ".join(str(count) for count in dict.fromkeys((seeds[0], seeds[-1])))
        spread = "mean ± standard deviation over" if seeds[-1] > 1 else "from"
        notes.append(f"Rates chosen by validation error; test error: {spread} {counts} seed{'s'[: seeds[-1] - 1]}.")
    if any(row["step_time"] is not None for row in rows):
        notes.append("Step time: forward, backward and update, as a ratio to the network without normalisation.")
    if any(row["edge"] for row in rows):
        notes.append("* The best rate is at the edge of the grid: a better one may lie beyond it.")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["impossible"] is not None:
            reasons.setdefault((row["method"], row["impossible"]), []).append(str(row["batch_size"]))
    for (method, reason), sizes in reasons.items():
        notes.append(f"{method} at batch {', '.join(sizes)} is impossible: {reason}")
    left = sum(trial["status"] in ("waiting", "running") for trial in results["trials"])
    if left:
        notes.append(f"{left} of {len(results['trials'])} trials are not finished.")
    return notes
