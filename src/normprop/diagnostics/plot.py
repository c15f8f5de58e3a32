"""Plots as data: what is drawn, not how. :mod:`normprop.report.plots` draws them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log", "symlog"]


@dataclass(frozen=True)
class Line:
    """A line, or points, of a plot.

    Args:
        name: in the legend; lines of one name have one colour in all plots of a page. "" for no entry.
        x: abscissae.
        y: ordinates, as many; values that are not finite leave a gap.
        low: lower ends of a band or of error bars, or ``None``.
        high: upper ends.
        style: "line", "points", "both", or "theory" for what was computed rather than measured: thin and dashed.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: Literal["line", "points", "both", "theory"] = "both"


@dataclass(frozen=True)
class Reference:
    """A thin line across a whole plot, with a word beside it.

    Args:
        value: where it stands.
        label: what it says.
        axis: "y" for a horizontal one, "x" for a vertical one.
    """

    value: float
    label: str = ""
    axis: Literal["x", "y"] = "y"


@dataclass(frozen=True)
class Plot:
    """Lines over one pair of axes.

    Args:
        title: what is shown, a few words.
        x_label: quantity and unit.
        y_label: quantity and unit.
        lines: in the order of the legend.
        x_scale: "linear", "log" or "symlog".
        y_scale: the same.
        references: lines across the plot.
        x_ticks: positions and words of the ticks, or ``None`` for round numbers.

    Example:
        >>> Plot("Growth", "layer", "variance", (Line("none", [1, 2], [1.0, 2.0]),)).y_scale
        'linear'
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    references: Sequence[Reference] = ()
    x_ticks: Sequence[tuple[float, str]] | None = None


@dataclass(frozen=True)
class Heat:
    """A matrix as a picture.

    Args:
        title: what is shown, a few words.
        x_label: what the columns are.
        y_label: what the rows are.
        values: rows of numbers.
        columns: words below the columns, or ``None``.
        rows: words beside the rows, or ``None``.
        diverging: whether 0 is the middle of the colours.
    """

    title: str
    x_label: str
    y_label: str
    values: Sequence[Sequence[float]]
    columns: Sequence[str] | None = None
    rows: Sequence[str] | None = None
    diverging: bool = True


Figure = Plot | Heat
