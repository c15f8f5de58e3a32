"""Curves of the norm-schedule experiment as JSON, a table and a figure.

A row is one epoch of one run: ``arm``, ``seed``, ``epoch``, ``train_loss``, ``test_error`` (a fraction) and
``effective_step``; every arm has the same seeds and epochs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from normprop.errors import requires
from normprop.files import write_content

with requires("report"):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

ARMS = ("decay", "no decay", "corrected rate", "norm schedule", "fixed rate")

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Arms side by side, mean and standard deviation over seeds, as a markdown table.

    Args:
        rows: the curves.

    Returns:
        The table, with the difference in test error from ``decay`` seed by seed.

    Example:
        >>> row = {"seed": 0, "epoch": 1, "train_loss": 1.0, "effective_step": 0.1}
        >>> print(table([{"arm": arm, "test_error": 0.25, **row} for arm in ARMS]).splitlines()[2])
        | decay | 25.00 | +0.00 | 1.000 | 0.1 | 0.1 |
    """
    lines = [
        "| arm | test error, % | less that of decay | training loss | effective step, first epoch | last epoch |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    last = max(row["epoch"] for row in rows)
    base = [row["test_error"] for row in rows if row["arm"] == "decay" and row["epoch"] == last]
    for arm in ARMS:
        first = [row for row in rows if row["arm"] == arm and row["epoch"] == 1]
        final = [row for row in rows if row["arm"] == arm and row["epoch"] == last]
        errors = [100 * row["test_error"] for row in final]
        apart = [error - 100 * other for error, other in zip(errors, base, strict=True)]
        cells = [
            arm,
            _spread(errors, ".2f"),
            _spread(apart, "+.2f"),
            _spread([row["train_loss"] for row in final], ".3f"),
            f"{fmean(row['effective_step'] for row in first):.2g}",
            f"{fmean(row['effective_step'] for row in final):.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], form: str) -> str:
    """Mean and, where there are several, standard deviation."""
    spread = f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{spread}"


def figure(rows: Sequence[Row]) -> Any:
    """Draw test error and effective step against epoch, a line for each arm, means over seeds.

    Args:
        rows: the curves.

    Returns:
        A plotly figure.
    """
    titles = ("test error, %", "effective step, rate / length²")
    drawing = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    epochs = sorted({row["epoch"] for row in rows})
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    shapes = ("circle", "square", "diamond", "triangle-up", "cross")
    colors = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#555555")
    for arm, dash, shape, color in zip(ARMS, dashes, shapes, colors, strict=True):
        for column, (key, scale) in enumerate((("test_error", 100), ("effective_step", 1)), start=1):
            values = [[scale * r[key] for r in rows if r["arm"] == arm and r["epoch"] == epoch] for epoch in epochs]
            line = go.Scatter(
                x=epochs,
                y=[fmean(value) for value in values],
                customdata=[[min(value), max(value)] for value in values],
                hovertemplate=f"<b>{arm}</b><br>epoch %{{x}}<br>%{{y:.4g}}, "
                "seeds from %{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>",
                name=arm,
                legendgroup=arm,
                showlegend=column == 1,
                mode="lines+markers",
                line={"dash": dash, "width": 2, "color": color},
                marker={"symbol": shape, "size": 8},
            )
            drawing.add_trace(line, row=1, col=column)
    drawing.update_xaxes(title_text="epoch", dtick=max(1, len(epochs) // 8))
    drawing.update_yaxes(type="log", exponentformat="power", row=1, col=2)
    return drawing.update_layout(template="plotly_white", height=460, legend={"orientation": "h", "y": -0.2})


def write(settings: Row, rows: Sequence[Row], out: Path) -> None:
    """Write ``curves.json``, ``table.md`` and ``figure.html`` (which loads nothing) into a directory.

    Args:
        settings: what was trained, as JSON has it.
        rows: the curves.
        out: the directory, made if there is none.

    Raises:
        OSError: if a file cannot be written.

    Example:
        >>> import tempfile
        >>> row = {"seed": 0, "epoch": 1, "train_loss": 1.0, "effective_step": 0.1, "test_error": 0.25}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write({"seeds": [0]}, [{"arm": arm, **row} for arm in ARMS], Path(folder))
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['curves.json', 'figure.html', 'table.md']
    """
    document = json.dumps({"settings": settings, "curves": list(rows)}, indent=1)
    page = figure(rows).to_html(include_plotlyjs=True, div_id="norm-schedule")
    for name, text in (("curves.json", document), ("table.md", table(rows)), ("figure.html", page)):
        write_content(out / name, text)
