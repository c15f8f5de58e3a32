"""What all figures are built from: plotly traces and axes as plain dictionaries, without colours.

The page paints them: every trace carries in `meta` its method's number and its part ("line", "band", "diverged",
"layer"), and the page's script adds colours for the light or dark theme and hides what is switched off.
"""

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from normprop.errors import requires
from normprop.report.marks import Mark, marks
from normprop.report.results import Results, Row

with requires("report"):
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Figure:
    """One plot of the page.

    Args:
        title: heading above the plot; empty for a section's only plot.
        axis: what the vertical axis shows, written above the plot.
        label: description for people who do not see the plot.
        traces: plotly traces.
        layout: plotly layout without theme and size.
        height: in CSS pixels.
        method: number of the method that the whole plot belongs to, None if it shows several.
        empty: what is written in place of a plot without visible traces.
        group: "layers" or "time" where the page's script sets the vertical axes from what is shown, "ranking" where
            every method is always shown.
    """

    title: str
    axis: str
    label: str
    traces: list[Row]
    layout: Row
    height: int = 300
    method: int | None = None
    empty: str = "Nothing to show yet."
    group: str = field(default="", kw_only=True)


def safe(text: object) -> str:
    """Text that plotly shows as it is: its labels are a small HTML."""
    return html.escape(str(text), quote=False)


def short(text: str, length: int = 24) -> str:
    """Text cut to a length that fits beside a plot.

    Example:
        >>> short("normprop"), short("a" * 30, 5)
        ('normprop', 'aaaa…')
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def styled(results: Results) -> list[tuple[int, str, Mark]]:
    """Each method with its number and mark."""
    return [
        (index, name, mark)
        for index, (name, mark) in enumerate(zip(results.methods, marks(results.methods), strict=True))
    ]


def line(
    number: int,
    name: str,
    mark: Mark,
    x: Sequence[Any],
    y: Sequence[Any],
    hover: list[str],
    *,
    batch: Any = None,
    **style: Any,
) -> Row:
    """A method's line with its markers; `hover` is the label of each point."""
    mode = style.pop("mode", "lines+markers")
    trace = go.Scatter(
        x=list(x),
        y=list(y),
        name=safe(name),
        mode=mode,
        hovertext=hover,
        hoverinfo="text",
        line={"dash": mark.dash, "width": 2},
        marker={"symbol": mark.shape, "size": 9, "opacity": 1, "maxdisplayed": 14},
        meta={"method": number, "part": "line", "batch": batch},
    )
    return dict(trace.update(style).to_plotly_json())


def band(number: int, x: Sequence[Any], low: Sequence[float], high: Sequence[float], *, batch: Any = None) -> Row:
    """The area between two curves."""
    trace = go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        meta={"method": number, "part": "band", "batch": batch},
    )
    return dict(trace.to_plotly_json())


def log_axis(values: Sequence[float], title: str) -> Row:
    """A logarithmic axis with a tick at each value and nowhere else."""
    low, high = _ends(values)
    return {
        "type": "log",
        "title": {"text": title},
        "tickvals": list(values),
        "ticktext": [f"{value:g}" for value in values],
        "range": [low, high],
    }


def dodge(value: float, values: Sequence[float], place: int, count: int, spacing: float) -> float:
    """A value moved sideways on its logarithmic axis so that `count` marks there do not hide each other.

    Neighbours are `spacing` of the axis apart, less where that would carry them half way to the next value.
    """
    low, high = _ends(values)
    step = min(spacing * (high - low), 0.5 * _gap(values) / max(count - 1, 1))
    return value * float(10 ** (step * (place - (count - 1) / 2)))


def _gap(values: Sequence[float]) -> float:
    """The smallest distance of two values on a logarithmic axis."""
    logs = sorted({math.log10(value) for value in values})
    return min((high - low for low, high in itertools.pairwise(logs)), default=0.3)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis with room for what is moved sideways at the outer values."""
    logs = [math.log10(value) for value in values]
    pad = max(0.1 * (max(logs) - min(logs)), 0.32 * _gap(values))
    return min(logs) - pad, max(logs) + pad


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there, None if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
