"""How costs grow, drawn on logarithmic axes as one SVG page that needs neither script nor network."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from normprop.report.marks import DASHES, SHAPES, Mark, marks

_WIDTH, _HEIGHT = 1280, 620
_TOP, _GAP, _LEFT, _PLOT = 150, 70, 62, 236  # px: head of the page, between panels, left margin, width of a plot
_TIME, _RATIO = 250, 110  # heights of the two plots of an axis
_TOOL_MARKS = {"convert": Mark(5, "diamond", "solid"), "inspect": Mark(3, "square", "dash")}
_DASH = dict(zip(DASHES, ("none", "7 4", "2 3", "7 3 2 3", "12 4"), strict=True))


@dataclass(frozen=True)
class _Line:
    """A line of a plot."""

    mark: Mark
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Plot:
    """A rectangle with logarithmic axes."""

    left: float
    top: float
    height: float
    x_values: Sequence[float]
    x_ticks: Sequence[float]
    lines: Sequence[_Line]
    x_label: str = ""
    at_least: float = 1.0  # the vertical axis spans this factor or more
    marked: float | None = None  # the height of a dotted line


def svg(document: Mapping[str, Any]) -> str:
    """Draw step times against width, depth and batch size, and conversion and inspection against parameters.

    Args:
        document: from :func:`normprop.experiments.growth.grow`.

    Returns:
        An SVG document in the colours of the reports' light theme; a column for each axis, times above, ratios to the
        network without normalisation below.
    """
    colors = _colors()
    styles = dict(zip(document["methods"], marks(document["methods"]), strict=True))
    machine, versions = document["machine"], document["versions"]
    where = f"{machine['processor']}, threads: {machine['threads']}, {machine['device']}"
    body = [
        _text(_LEFT, 44, document["title"], "title"),
        _text(_LEFT, 70, "Forward, backward and SGD step, all methods in turns; all axes are logarithmic.", "intro"),
        _text(_LEFT, 90, f"{where}; torch {versions['torch']}; {document['created'][:10]}"),
        _legend(styles),
    ]
    for column, axis in enumerate(document["axes"]):
        body += _axis(_LEFT + column * (_PLOT + _GAP), axis, styles)
    if document["tools"]:
        body += _tools(_LEFT + len(document["axes"]) * (_PLOT + _GAP), document["tools"])
    sheet, lines = _sheet(colors), "\n".join(body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{html.escape(document["title"])}">\n<style>{sheet}</style>\n'
        f'<rect width="100%" height="100%" fill="{colors["page"]}"/>\n{lines}\n</svg>\n'
    )


def _axis(left: float, axis: Mapping[str, Any], styles: Mapping[str, Mark]) -> list[str]:
    """The two plots of one axis."""
    values = [point["value"] for point in axis["points"]]

    def lines(key: str) -> list[_Line]:
        rows = [(point["value"], time) for point in axis["points"] for time in point["times"]]
        return [
            _Line(mark, [(value, time[key]) for value, time in rows if time["method"] == method])
            for method, mark in styles.items()
        ]

    top = _TOP + _TIME + 52
    return [
        _text(left, _TOP - 28, axis["name"].capitalize(), "head"),
        _text(left, _TOP - 10, f"{axis['of']}: milliseconds"),
        *_plot(_Plot(left, _TOP, _TIME, values, values, lines("milliseconds"))),
        _text(left, top - 10, "ratio to none"),
        *_plot(_Plot(left, top, _RATIO, values, values, lines("ratio"), axis["label"], 1.5, 1.0)),
    ]


def _tools(left: float, points: Sequence[Mapping[str, float]]) -> list[str]:
    """Conversion and inspection."""
    sizes = [point["parameters"] for point in points]
    lines = [_Line(mark, [(p["parameters"], p[name]) for p in points]) for name, mark in _TOOL_MARKS.items()]
    plot = _Plot(left, _TOP, _TIME, sizes, _decades(sizes), lines, "parameters")
    keys = [
        _key(left + 110 * place, _TOP + _TIME + 66, name, mark)
        for place, (name, mark) in enumerate(_TOOL_MARKS.items())
    ]
    heads = [
        _text(left, _TOP - 28, "Conversion and inspection", "head"),
        _text(left, _TOP - 10, "ResNet-14 with batch norm: seconds"),
    ]
    return [*heads, *_plot(plot), *keys]


def _plot(plot: _Plot) -> list[str]:
    """Grid, ticks, lines and markers."""
    heights = [y for line in plot.lines for _, y in line.points]
    low, high = _span(heights, plot.at_least)
    first, last = _span(plot.x_values, 1.0)

    def x(value: float) -> float:
        return plot.left + _PLOT * (math.log(value) - first) / (last - first)

    def y(value: float) -> float:
        return plot.top + plot.height * (high - math.log(value)) / (high - low)

    bottom, right = plot.top + plot.height, plot.left + _PLOT
    parts = []
    for tick in ticks(math.exp(low), math.exp(high), most=plot.height // 22):
        parts.append(_stroke(plot.left, y(tick), right, y(tick), "one" if tick == plot.marked else "grid"))
        parts.append(_text(plot.left - 7, y(tick) + 4, f"{tick:g}", anchor="end"))
    for tick in plot.x_ticks:
        parts.append(_stroke(x(tick), bottom, x(tick), bottom + 4, "axis"))
        parts.append(_text(x(tick), bottom + 18, _short(tick), anchor="middle"))
    parts.append(_stroke(plot.left, bottom, right, bottom, "axis"))
    if plot.x_label:
        parts.append(_text((plot.left + right) / 2, bottom + 38, plot.x_label, anchor="middle"))
    for line in plot.lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        dash = _DASH[line.mark.dash]
        parts.append(
            f'<polyline class="m{line.mark.color}" points="{path}" style="fill:none" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
        parts += [_marker(x(a), y(b), line.mark) for a, b in line.points]
    return parts


def ticks(low: float, high: float, most: float) -> list[float]:
    """Choose round numbers for a logarithmic axis.

    Args:
        low: lower end.
        high: upper end.
        most: how many have room.

    Returns:
        Numbers between the ends, rising: 1, 2 and 5 in every decade, decades alone where those are too many, or steps
        of equal size where they are too few.

    Example:
        >>> ticks(0.8, 30.0, 8), ticks(0.8, 30000.0, 5), ticks(0.9, 1.45, 5)
        ([1.0, 2.0, 5.0, 10.0, 20.0], [1.0, 10.0, 100.0, 1000.0, 10000.0], [1.0, 1.2, 1.4])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0, 2.0, 5.0), (1.0,)):
        found = [float(f"{step}e{decade}") for decade in decades for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if 3 <= len(found) <= most:
            return found
    if len(found) > most:
        return found[:: math.ceil(len(found) / most)]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1.0, 2.0, 5.0, 10.0) if unit * factor >= rough)
    return [float(f"{n * step:.6g}") for n in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _decades(values: Sequence[float]) -> list[float]:
    return [tick for tick in (10.0**n for n in range(13)) if min(values) <= tick <= max(values)] or list(values)


def _span(values: Sequence[float], at_least: float) -> tuple[float, float]:
    """The logarithms of the ends of an axis, with room around the values."""
    low, high = math.log(min(values)), math.log(max(values))
    missing = max(0.0, math.log(at_least) - (high - low)) / 2
    pad = 0.08 * (high - low + 2 * missing) or 0.1
    return low - missing - pad, high + missing + pad


def _legend(styles: Mapping[str, Mark]) -> str:
    parts, at = [], float(_WIDTH - 40)
    for name, mark in reversed([*styles.items()]):
        at -= 58 + 8.2 * len(name)
        parts.append(_key(at, 44, name, mark))
    return "\n".join(parts)


def _key(left: float, top: float, name: str, mark: Mark) -> str:
    dash = _DASH[mark.dash]
    line = f'<path class="m{mark.color}" d="M{left:.0f} {top - 5:.0f}h28" stroke-width="2" stroke-dasharray="{dash}"/>'
    return line + _marker(left + 14, top - 5, mark) + _text(left + 36, top, name, "key")


def _marker(x: float, y: float, mark: Mark) -> str:
    """A shape of 20 x 20 at half its size."""
    place = f"translate({x - 5:.1f} {y - 5:.1f}) scale(.5)"
    return f'<path class="m{mark.color}" d="{SHAPES[mark.shape]}" transform="{place}"/>'


def _stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _short(value: float) -> str:
    """A number with k or M for thousands and millions."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _sheet(colors: Mapping[str, str]) -> str:
    """The styles of the page."""
    muted, text = colors["muted"], colors["text"]
    rules = {
        "text": f"font:12.5px system-ui,'Segoe UI',Roboto,'Noto Sans',sans-serif;fill:{muted}",
        ".title": f"font-size:26px;font-weight:680;fill:{text}",
        ".intro": f"font-size:15px;fill:{text}",
        ".head": f"font-size:15px;font-weight:640;fill:{text}",
        ".key": f"font-size:14px;fill:{text}",
        ".grid": f"stroke:{colors['grid']}",
        ".axis": f"stroke:{colors['line']}",
        ".one": f"stroke:{muted};stroke-dasharray:2 3",
    }
    rules |= {f".{name}": f"stroke:{color};fill:{color}" for name, color in colors.items() if name[1:].isdigit()}
    return "".join(f"{name}{{{style}}}" for name, style in rules.items())


def _colors() -> dict[str, str]:
    """The light theme of the reports' style sheet."""
    sheet = (files("normprop.report") / "assets" / "page.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([\w-]+): light-dark\((#\w+)", sheet))
