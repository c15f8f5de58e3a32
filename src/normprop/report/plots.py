"""Draws the plots of diagnostics and reproductions as SVG: text stays text, colours are those of the pages' themes."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from normprop.diagnostics.plot import Figure, Heat, Line, Plot, Reference
from normprop.errors import requires
from normprop.report.marks import DASHES, SHAPES, Mark, marks

with requires("report"):
    import matplotlib as mpl
    import matplotlib.lines
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

_POINTS = 72  # px of an inch in an SVG of matplotlib
_FONTS = "system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
_HEIGHT = 300
_LEGEND = 24  # px of a row of the legend
_MARKERS = dict(zip(SHAPES, ("o", "s", "D", "^", "v", "P", "*", "p", "d", "h"), strict=True))
_STROKES: dict[str, Any] = dict(
    zip(DASHES, ("-", (0, (6, 3)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)), (0, (10, 3))), strict=True)
)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "normprop",
    "font.family": ["DejaVu Sans"],
    "font.size": 12.5,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.14,
    "figure.constrained_layout.h_pad": 0.1,
    "legend.fontsize": 12.5,
}


def svg(figures: Sequence[Figure], width: int = 1080, names: Sequence[str] | None = None) -> str:
    """Draw figures side by side, two to a row, as one SVG document in the light theme.

    Args:
        figures: what to draw.
        width: of the whole, px.
        names: lines' names in the order that gives them their colours; by default as they come.

    Returns:
        The document; equal figures give equal documents.

    Example:
        >>> line = Line("none", [1.0, 2.0], [1.0, 2.0])
        >>> svg([Plot("Growth", "layer", "variance", [line])]).startswith("<svg")
        True
    """
    colors = palette()
    names = list(names or line_names(figures))
    styles = dict(zip(names, marks(names), strict=True))
    columns = 1 if len(figures) == 1 else 2
    rows = -(-len(figures) // columns)
    legend_rows = -(-sum(10 + len(name) for name in names) // (width // 8)) if names else 0
    height = rows * (_HEIGHT + 62) + _LEGEND * legend_rows
    rules: dict[Any, Any] = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), colors["muted"])
    rules |= dict.fromkeys(("text.color", "axes.labelcolor"), colors["text"])
    rules |= {**_STYLE, "grid.color": colors["grid"], "axes.facecolor": "none"}
    with mpl.rc_context(rules):
        canvas = Canvas(figsize=(width / _POINTS, height / _POINTS), layout="constrained", facecolor=colors["page"])
        if names:
            canvas.legend(
                handles=[_handle(name, styles[name], colors) for name in names],
                loc="outside upper left",
                ncols=max(1, -(-len(names) // legend_rows)),
                columnspacing=1.4,
                handlelength=1.9,
            )
        cells = canvas.subplots(rows, columns, squeeze=False).flatten()
        for cell, figure in zip(cells, figures, strict=False):
            if isinstance(figure, Plot):
                _plot(cell, figure, styles, colors)
            else:
                _heat(cell, figure)
        for cell in cells[len(figures) :]:
            cell.set_visible(False)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return _accessible(text[text.index("<svg") :], figures)


def themed(document: str) -> str:
    """Let an SVG document inside a page follow the page's theme: its colours become those of the style sheet.

    Args:
        document: from :func:`svg`.

    Returns:
        The same with variables for colours; it has no colours outside of a page with page.css.

    Example:
        >>> themed("<path style='stroke: #3a5fd0'/>")
        "<path style='stroke: var(--m0)'/>"
    """
    variables = {color: f"var(--{name})" for name, color in reversed(palette().items())}
    return re.sub(r"#[0-9a-f]{6}", lambda match: variables.get(match[0], match[0]), document)


def palette() -> dict[str, str]:
    """Read the light theme of the pages' style sheet.

    Returns:
        Colours by the names of their variables.
    """
    sheet = (files("normprop.report") / "assets" / "page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): light-dark\((#\w+)", sheet))


def line_names(figures: Sequence[Figure]) -> list[str]:
    """Names of the lines of some figures, each once, in the order of the figures."""
    plots = [figure for figure in figures if isinstance(figure, Plot)]
    return list(dict.fromkeys(line.name for plot in plots for line in plot.lines if line.name))


def _plot(axes: Axes, plot: Plot, styles: Mapping[str, Mark], colors: Mapping[str, str]) -> None:
    axes.set_title(plot.title)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    for reference in plot.references:
        _reference(axes, reference, colors)
    for line in plot.lines:
        _line(axes, line, styles.get(line.name), colors)
    for name, scale in (("x", plot.x_scale), ("y", plot.y_scale)):
        if scale != "linear":
            _scale(axes, name, scale, [value for line in plot.lines for value in getattr(line, name)])
    whole = all(float(x).is_integer() for line in plot.lines for x in line.x)
    if whole and plot.x_scale == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if plot.x_ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator([position for position, _ in plot.x_ticks]))
        axes.set_xticklabels([word for _, word in plot.x_ticks])
    axes.margins(x=0.03)


def _scale(axes: Axes, name: str, scale: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic, with numbers at its ticks also where it spans less than a decade."""
    drawn = [abs(value) for value in values if math.isfinite(value) and (value > 0 or (scale == "symlog" and value))]
    if not drawn:
        return
    getattr(axes, f"set_{name}scale")(scale)
    axis = getattr(axes, f"{name}axis")
    axis.set_minor_locator(NullLocator())
    if scale == "log" and max(drawn) < 30 * min(drawn):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _line(axes: Axes, line: Line, mark: Mark | None, colors: Mapping[str, str]) -> None:
    color = colors[f"m{mark.color}"] if mark else colors["muted"]
    style: dict[str, Any] = {"color": color, "linewidth": 2.0, "zorder": 3}
    dash = _STROKES[mark.dash] if mark else "-"
    if line.style == "theory":
        style |= {"linewidth": 1.2, "linestyle": (0, (4, 2.5)), "zorder": 2.5}
    else:
        style["linestyle"] = "none" if line.style == "points" else dash
    if line.style in ("points", "both") and mark:
        crowded = len(line.x) > 24
        style |= {"marker": _MARKERS[mark.shape], "markersize": 3.6 if crowded else 5.6, "markeredgewidth": 0}
    if line.low is not None and line.high is not None:
        if line.style == "points":
            for x, low, high in zip(line.x, line.low, line.high, strict=True):
                axes.plot([x, x], [low, high], color=color, linewidth=1.2, zorder=2.8)
        else:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0, zorder=2)
    axes.plot(line.x, line.y, **style)


def _reference(axes: Axes, reference: Reference, colors: Mapping[str, str]) -> None:
    style: dict[str, Any] = {"color": colors["muted"], "linewidth": 1.0, "linestyle": (0, (1.5, 2.5)), "zorder": 1.5}
    words: dict[str, Any] = {"color": colors["muted"], "fontsize": 11, "textcoords": "offset points"}
    if reference.axis == "y":
        axes.axhline(reference.value, **style)
        place, words["ha"] = (1.0, reference.value), "right"
        axes.annotate(reference.label, place, (0, 3), xycoords=("axes fraction", "data"), **words)
    else:
        axes.axvline(reference.value, **style)
        axes.annotate(
            reference.label, (reference.value, 1.0), (4, -11), xycoords=("data", "axes fraction"), ha="left", **words
        )


def _heat(axes: Axes, heat: Heat) -> None:
    axes.set_title(heat.title)
    axes.set_xlabel(heat.x_label)
    axes.set_ylabel(heat.y_label)
    axes.grid(visible=False)
    values = np.asarray(heat.values, dtype=float)
    largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    least, colors = (-largest, "RdBu_r") if heat.diverging else (float(np.nanmin(values)), "viridis")
    picture = axes.imshow(values, aspect="auto", cmap=colors, vmin=least, vmax=largest, interpolation="nearest")
    bar = axes.figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    for axis, words in ((axes.xaxis, heat.columns), (axes.yaxis, heat.rows)):
        axis.set_major_locator(MaxNLocator(integer=True))
        if words is not None:
            axis.set_major_locator(FixedLocator(range(len(words))))
            axis.set_ticklabels(list(words))


def _handle(name: str, mark: Mark, colors: Mapping[str, str]) -> Any:
    """An entry of the legend."""
    return mpl.lines.Line2D(
        [],
        [],
        color=colors[f"m{mark.color}"],
        linestyle=_STROKES[mark.dash],
        linewidth=2.0,
        marker=_MARKERS[mark.shape],
        markersize=6,
        markeredgewidth=0,
        label=name,
    )


def _accessible(document: str, figures: Sequence[Figure]) -> str:
    """Give the document a name for those who do not see it, the fonts of the pages and a size in pixels."""
    title = html.escape("; ".join(figure.title for figure in figures))
    document = re.sub(r"<metadata>.*?</metadata>", "", document.replace("'DejaVu Sans'", _FONTS), flags=re.DOTALL)
    document = re.sub(r'<g id="[^"]*">', "<g>", document)  # nothing refers to them, and a page holds several plots
    document = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', document, count=2)
    return document.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
