"""The statistics of a network's calls as text, 120 columns wide."""

import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_WIDTH = 120
_NAME, _SHAPE = 28, 14
_HEADS = (
    ("", "mean", "", "std", "", "over", "over", "pred.", "grad.", "zero", "dead", "", "exc."),
    ("shape", "pred.", "meas.", "pred.", "meas.", "data", "chan.", "/meas", "rms", "%", "%", "skew", "kurt."),
)
_WIDTHS = (_SHAPE, 7, 7, 7, 7, 7, 7, 6, 7, 5, 5, 6, 6)


def table(document: Row) -> str:
    """Lay an inspection out, a line for each call, grouped by the modules that the calls stand in.

    Args:
        document: from :meth:`~normprop.graph.inspect.Inspection.to_dict`.

    Returns:
        Lines of at most 120 characters.
    """
    lines = textwrap.wrap(headline(document), _WIDTH)
    lines += [line for note in remarks(document) for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")]
    lines += [
        "",
        *(_line(" ", title, cells) for title, cells in zip(("", "  call"), _HEADS, strict=True)),
        "─" * _WIDTH,
    ]
    for group, sites in groupby(document["sites"], key=lambda site: site["group"]):
        lines.append(_fit(group or document["model"], _WIDTH))
        lines += [_line("!" if site["flagged"] else " ", f"  {name(site)}", cells(site)) for site in sites]
    flagged = [site for site in document["sites"] if site["flagged"]]
    if flagged:
        lines += ["─" * _WIDTH, "! flagged"]
    for site in flagged:
        line = f"  {place(site, document)}: {site['op']}  {source(site)}"
        lines.append(_fit(line.rstrip(), _WIDTH, keep_end=False))
    return "\n".join(lines)


def headline(document: Row) -> str:
    """What was inspected and how well it was predicted, in one or two sentences."""
    shapes = ", ".join(shape(sizes) for sizes in document["inputs"])
    sites, flagged, factor = document["sites"], document["flagged"], f"{document['threshold']:g}"
    text = f"{document['model']} in {document['mode']} mode on {shapes}: {count(len(sites), 'call')}"
    judged = sum(site["ratio"] is not None for site in sites)
    if not judged:
        return f"{text}, none of which can be judged."
    if not flagged:
        text += f", every standard deviation within a factor {factor} of its prediction"
    else:
        text += f", {flagged} of them flagged (standard deviation beyond a factor {factor} of its prediction)"
    worst = next(site for site in sites if site["index"] == document["worst"])
    return f"{text}. Worst is {place(worst, document)} ({worst['op']}): predicted / measured {ratio(worst)}."


def remarks(document: Row) -> list[str]:
    """What to know beside the numbers."""
    lines = ["The prediction knows of the input only mean and variance of each channel."]
    missing = sum(site["predicted"] is None for site in document["sites"])
    if missing:
        lines.append(f"{count(missing, 'call')} without a prediction.")
    return lines + list(document["notes"])


def place(site: Row, document: Row) -> str:
    """Path of a call's module, numbered if it is called again."""
    return str(site["path"] or document["model"]) + (f" #{site['call'] + 1}" if site["call"] else "")


def name(site: Row) -> str:
    """Where a call stands within its group, and what it calls."""
    inner = site["path"].removeprefix(site["group"]).removeprefix(".")
    again = f" #{site['call'] + 1}" if site["call"] else ""
    return f"{inner}{again}: {site['op']}" if inner else f"{site['op']}{again}"


def source(site: Row) -> str:
    """The line of code, with the name of its file alone."""
    file, _, rest = site["source"].partition(".py:")
    return f"{Path(file).name}.py:{rest}" if rest else str(site["source"])


def cells(site: Row) -> tuple[str, ...]:
    """The numbers of one call as text."""
    measured = site["measured"]
    sides = (site["predicted"] or {}, measured)
    means = [number(_rounded(side.get("mean"), side.get("std"))) for side in sides]
    spreads = [number(side.get("std")) for side in sides]
    spreads += [number(_rounded(measured[key], measured["std"])) for key in ("within", "between")]
    shares = [percent(site[key]) for key in ("zeros", "dead")]
    moments = [moment(site[key]) for key in ("skew", "kurtosis")]
    return shape(site["shape"]), *means, *spreads, ratio(site), number(site["gradient"]), *shares, *moments


def _rounded(value: Any, std: Any) -> Any:
    """Zero for what is nothing beside the standard deviation, which is mostly rounding."""
    finite = isinstance(value, float) and isinstance(std, float)
    return 0.0 if finite and abs(value) < 1e-4 * std else value


def shape(sizes: list[int]) -> str:
    """Sizes as people write them.

    Example:
        >>> shape([2, 3, 8])
        '2×3×8'
    """
    return "×".join(map(str, sizes)) or "number"


def count(many: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> count(1, "call"), count(2, "call")
        ('1 call', '2 calls')
    """
    return f"{many} {noun}{'s' if many != 1 else ''}"


def number(value: float | str | None) -> str:
    """A number in at most six characters.

    Example:
        >>> [number(value) for value in (0.5, -0.01234, 12345.0, -2.5e-07, 0.0, None, "nan")]
        ['0.500', '-0.012', '1.2e4', '-2e-7', '0', '', 'nan']
    """
    if value is None or isinstance(value, str):
        return value or ""
    size = abs(value)
    if 0.001 <= size < 9999.5:
        digits = 4 if size < 0.01 else 3 if size < 1 else 2 if size < 100 else 1 if size < 1000 else 0
        return f"{value:.{min(digits, 3) if value < 0 else digits}f}"
    mantissa, _, exponent = f"{value:.{1 if value > 0 and 1e-9 < size < 1e10 else 0}e}".partition("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}"


def ratio(site: Row) -> str:
    """Predicted over measured standard deviation.

    Example:
        >>> [ratio({"ratio": value}) for value in (None, 1.234, 250.0, "inf")]
        ['', '1.23', '> 99', '> 99']
    """
    value = site["ratio"]
    return "" if value is None else "> 99" if float(value) > 99 else f"{float(value):.2f}"


def percent(share: float | None) -> str:
    """A share in percent, without the sign; what is not nothing never reads as 0.

    Example:
        >>> [percent(value) for value in (None, 0.0, 0.0001, 0.5012)]
        ['', '0', '< 1', '50']
    """
    return "" if share is None else "< 1" if 0 < share < 0.01 else f"{100 * share:.0f}"


def moment(value: float | str | None) -> str:
    """Skewness or kurtosis.

    Example:
        >>> [moment(value) for value in (None, -0.001, 1.234, 1234.5)]
        ['', '0.00', '1.23', '1234']
    """
    if value is None or isinstance(value, str):
        return value or ""
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 99.5 else f"{value:.0f}" if abs(value) < 9999 else "> 9999"


def _line(mark: str, title: str, cells: tuple[str, ...]) -> str:
    texts = [cell.rjust(width) for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True)]
    return (
        f"{mark}{_fit(title, _NAME - 1).ljust(_NAME)}{_fit(cells[0], _SHAPE - 1).ljust(_SHAPE)}" + "".join(texts)
    ).rstrip()


def _fit(text: str, width: int, *, keep_end: bool = True) -> str:
    """Text cut where it is too long; of names the end says more than the beginning."""
    if len(text) <= width:
        return text
    if not keep_end:
        return text[: width - 1] + "…"
    indent = len(text) - len(text.lstrip())
    return text[:indent] + "…" + text[len(text) - width + indent + 1 :]
