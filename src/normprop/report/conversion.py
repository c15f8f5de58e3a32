"""The page of a conversion: what became of every normaliser, what was left and why."""

import math
from collections.abc import Sequence
from typing import Any

from normprop.graph.report import ConversionReport, SiteReport
from normprop.report.template import asset, template

Row = dict[str, Any]
_WORDS = {
    "absorbed": "absorbed into the weights of the layer in front",
    "predicted": "given predicted moments in place of measured ones",
    "replaced": "replaced by {to}",
    "kept": "kept",
    "cannot": "not convertible",
}
_WEIGHTS = {
    "fresh": "fresh: to be trained from scratch",
    "exact": "exact: the function in evaluation is kept",
    "rescale": "rescale: filters kept, statistics predicted",
}
_WIDTH, _LEFT, _HEIGHT = 1080, 52, 150  # of the plot, in units of its own


def page(report: ConversionReport) -> str:
    """Write a conversion as one HTML page that opens from disk, loads nothing and needs no network.

    Args:
        report: what was done, or would be.

    Returns:
        The page: counts, every normaliser in the order of the forward pass, and what there is to note.

    Example:
        >>> page(ConversionReport("Net", "normprop", "fresh", "export", []))[:15]
        '<!doctype html>'
    """
    return template("conversion.html.j2").render(
        report=report,
        headline=headline(report),
        facts=_facts(report),
        actions=[(action, count, _WORDS[action].format(to=report.to)) for action, count in report.counts.items()],
        rows=[_row(number, site) for number, site in enumerate(report.sites, 1)],
        plots=[
            plot
            for plot in (
                _plot("Predicted standard deviation", report.sites, [site.std for site in report.sites], None),
                _plot("Correction of the variance", report.sites, [site.correction for site in report.sites], 1.0),
            )
            if plot
        ],
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        has={
            name: any(getattr(site, name) not in (None, "") for site in report.sites) for name in ("std", "correction")
        }
        | {"calls": any(site.calls != 1 for site in report.sites)},
        style=asset("page.css") + asset("conversion.css"),
        script=asset("conversion.js"),
    )


def headline(report: ConversionReport) -> str:
    """The conversion in a sentence.

    Example:
        >>> sites = [SiteReport(name, "BatchNorm2d", "batch norm", 8, 1, "absorbed", "conv") for name in ("a", "b")]
        >>> headline(ConversionReport("Net", "normprop", "fresh", "export", sites))
        'Both normalisers are converted.'
    """
    counts, number = report.counts, len(report.sites)
    kept, stuck = counts.get("kept", 0), counts.get("cannot", 0)
    done = number - kept - stuck
    if number < 2:
        words = "is converted" if done else "is kept" if kept else "cannot be converted"
        return f"The one normaliser {words}." if number else "There is no normaliser to convert."
    start = f"{done or 'None'} of {number}" if done < number else "Both" if number == 2 else f"All {number}"
    rest = f"; {kept} {'are' if kept > 1 else 'is'} kept" * bool(kept)
    rest += f"; {stuck} cannot be converted" * bool(stuck)
    return f"{start} normalisers {'is' if done == 1 or not done else 'are'} converted{rest}."


def _facts(report: ConversionReport) -> list[tuple[str, str]]:
    facts = [("Converted to", report.to), ("Weights", _WEIGHTS.get(report.weights, report.weights))]
    if report.difference is not None:
        facts.append(("Largest difference in evaluation", f"{report.difference:.1e} of the output"))
    corrections = [site.correction for site in report.sites if site.correction is not None]
    if corrections:
        facts.append(("Corrections of the variance", f"{_number(min(corrections))} to {_number(max(corrections))}"))
    facts.append(("Channels", f"{sum(site.channels for site in report.sites):,}"))
    facts.append(("Captured by", report.captured.replace("export", "torch.export", 1)))
    return facts


def _row(number: int, site: SiteReport) -> Row:
    folder, dot, name = site.path.rpartition(".")
    into, _, last = site.into.rpartition(".")
    return {
        "number": number,
        "folder": folder + dot,
        "name": name or "(the model itself)",
        "site": site,
        "into": ("" if into in ("", folder) else f"{into}.", last),
        "predicted": None if site.mean is None or site.std is None else (_number(site.mean), _number(site.std)),
        "correction": "" if site.correction is None else f"{site.correction:.3f}",
        "bar": _bar(site.correction),
        "source": _source(site.source),
        "words": f"{site.path} {site.module} {site.kind} {site.into} {site.reason}".lower(),
    }


def _bar(correction: float | None) -> float:
    """Where a correction stands between half (-1) and twice (1)."""
    return 0.0 if correction is None else max(-1.0, min(1.0, math.log2(max(correction, 1e-30))))


def _plot(title: str, sites: Sequence[SiteReport], values: Sequence[float | None], line: float | None) -> Row | None:
    """Numbers against the order of the sites, on a logarithmic axis."""
    known = [value for value in values if value is not None and 0.0 < value < math.inf]
    if len(known) < 2:
        return None
    low, high = math.log10(min(*known, line or known[0])), math.log10(max(*known, line or known[0]))
    low, high = min(low, (low + high) / 2 - 0.06), max(high, (low + high) / 2 + 0.06)
    pad = 0.08 * (high - low)

    def y(value: float) -> float:
        return round(_HEIGHT - 8 - (math.log10(value) - low + pad) / (high - low + 2 * pad) * (_HEIGHT - 16), 1)

    step = (_WIDTH - _LEFT - 20) / max(len(values) - 1, 1)
    dots = [
        {
            "x": round(_LEFT + 10 + step * place, 1),
            "y": y(value),
            "number": place + 1,
            "action": site.action,
            "text": f"{site.path}: {_number(value)}",
        }
        for place, (site, value) in enumerate(zip(sites, values, strict=True))
        if value is not None and 0.0 < value < math.inf
    ]
    return {
        "title": title,
        "dots": dots,
        "ticks": [{"y": y(tick), "text": f"{tick:g}"} for tick in _ticks(10 ** (low - pad), 10 ** (high + pad))],
        "line": None if line is None else y(line),
        "radius": 4 if len(values) < 80 else 3,
    }


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, three to eight of them.

    Example:
        >>> _ticks(0.2, 30.0), _ticks(0.95, 1.4)
        ([0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0], [1.0, 1.1, 1.2, 1.3, 1.4])
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0,), (1.0, 2.0, 5.0)):
        ticks = [tick for decade in decades for step in steps if low <= (tick := step * 10.0**decade) <= high]
        if len(ticks) >= 3:
            return [float(f"{tick:.6g}") for tick in ticks[:: math.ceil(len(ticks) / 8)]]
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1.0, 2.0, 5.0, 10.0) if unit * factor >= rough)
    return [float(f"{place * step:.6g}") for place in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Three decimals, or three digits of what is small or large.

    Example:
        >>> _number(0.5), _number(-0.0001), _number(12345.6)
        ('0.500', '-1.0e-04', '1.2e+04')
    """
    return f"{value:.3f}" if value == 0.0 or 5e-4 <= abs(value) < 1e4 else f"{value:.1e}"


def _source(source: str) -> str:
    """File name, line number and code; without the folders of one machine."""
    place, colon, code = source.partition(": ")
    return place.replace("\\", "/").rpartition("/")[2] + colon + code
