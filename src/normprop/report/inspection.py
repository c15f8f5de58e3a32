"""The page of an inspection: how the signal travels through a network, as plots against depth and as a table."""

import math
from itertools import groupby
from typing import Any

from normprop.errors import requires
from normprop.graph import site_table as text
from normprop.report.template import asset, template
from normprop.report.traces import safe, short

with requires("report"):
    import plotly.graph_objects as go
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

Row = dict[str, Any]
_MOST_STAGES = 14  # names that fit side by side above the plots


def page(document: Row) -> str:
    """Draw an inspection as one HTML page that opens from disk, loads nothing and needs no network.

    Args:
        document: from :meth:`~normprop.graph.inspect.Inspection.to_dict`.

    Returns:
        The page.

    Example:
        >>> document = {"model": "Net", "mode": "training", "how": "export", "inputs": [[1, 2]], "threshold": 1.5}
        >>> document |= {"sites": [], "notes": [], "flagged": 0, "worst": None}
        >>> page(document)[:15]
        '<!doctype html>'
    """
    return template("inspection.html.j2").render(
        document=document,
        headline=text.headline(document),
        remarks=text.remarks(document),
        facts=_facts(document),
        groups=_groups(document),
        payload={"traces": traces(document), "stages": stages(document)},
        style=asset("page.css") + asset("inspection.css"),
        script=asset("inspection.js"),
        plotly=Markup(get_plotlyjs()),
    )


def traces(document: Row) -> list[Row]:
    """Plotly traces without colours: predicted and measured standard deviation and mean, and gradients, by depth."""
    sites = document["sites"]
    drawn = [
        ("std", "y", "predicted", [_positive((site["predicted"] or {}).get("std")) for site in sites]),
        ("std", "y", "measured", [_positive(site["measured"]["std"]) for site in sites]),
        ("mean", "y2", "predicted", [_finite((site["predicted"] or {}).get("mean")) for site in sites]),
        ("mean", "y2", "measured", [_finite(site["measured"]["mean"]) for site in sites]),
        ("gradient", "y3", "gradient", [_positive(site["gradient"]) for site in sites]),
    ]
    hover = [_hover(site, document) for site in sites]
    made = []
    for quantity, axis, part, values in drawn:
        trace = go.Scatter(
            x=list(range(1, len(sites) + 1)),
            y=values,
            yaxis=axis,
            mode="lines" if part == "predicted" else "markers",
            hovertext=hover,
            hoverinfo="text",
            meta={"part": part, "quantity": quantity, "flagged": [site["flagged"] for site in sites]},
        )
        made.append(dict(trace.to_plotly_json()))
    return made


def stages(document: Row) -> list[Row]:
    """The parts of the network along the depth: name, and number of the first and the last call.

    Named by as many levels of the modules' paths as there is room for.

    Example:
        >>> paths = ["stem", "body.0.conv", "body.0.act", "body.1.conv", ""]
        >>> document = {"model": "Net", "sites": [{"path": path} for path in paths]}
        >>> [(stage["name"], stage["first"], stage["last"]) for stage in stages(document)]
        [('stem', 1, 1), ('body.0.conv', 2, 2), ('body.0.act', 3, 3), ('body.1.conv', 4, 4), ('Net', 5, 5)]
    """
    found: list[Row] = []
    for level in (1, 2, 3):
        runs = groupby(enumerate(document["sites"], 1), key=lambda entry: ".".join(entry[1]["path"].split(".")[:level]))
        listed = [(name, [number for number, _ in run]) for name, run in runs]
        if found and len(listed) > _MOST_STAGES:
            break
        found = [
            {"name": safe(short(name or document["model"], 18)), "first": numbers[0], "last": numbers[-1]}
            for name, numbers in listed
        ]
    return found


def _groups(document: Row) -> list[Row]:
    """The table's rows, by the modules that the calls stand in."""
    numbered = enumerate(document["sites"], 1)
    return [
        {
            "name": group or document["model"],
            "rows": [
                {
                    "number": number,
                    "name": text.name(site),
                    "cells": text.cells(site),
                    "flagged": site["flagged"],
                    "source": text.source(site),
                    "bar": _bar(site["ratio"]),
                    "words": f"{site['path']} {site['op']} {site['module']}".lower(),
                }
                for number, site in entries
            ],
        }
        for group, entries in groupby(numbered, key=lambda entry: entry[1]["group"])
    ]


def _bar(ratio: float | str | None) -> float:
    """Where a ratio stands between half (-1) and twice (1)."""
    if ratio is None:
        return 0.0
    value = float(ratio)
    return max(-1.0, min(1.0, math.log2(value))) if value > 0 else -1.0


def _facts(document: Row) -> list[tuple[str, str]]:
    worst = next((site for site in document["sites"] if site["index"] == document["worst"]), None)
    facts = [
        ("Input", ", ".join(text.shape(sizes) for sizes in document["inputs"])),
        ("Mode", document["mode"]),
        ("Calls", str(len(document["sites"]))),
        (f"Flagged, beyond × {document['threshold']:g}", str(document["flagged"])),
        ("Captured by", {"export": "torch.export", "recorded": "recording a run"}[document["how"]]),
    ]
    if worst is not None:
        facts.insert(4, ("Worst prediction", f"{text.place(worst, document)}, × {text.ratio(worst)}"))
    return facts


def _hover(site: Row, document: Row) -> str:
    """The label of a call in the plots."""
    shape, *numbers = text.cells(site)
    predicted_mean, mean, predicted_std, std, _, _, ratio, gradient, *_ = numbers
    lines = [
        f"<b>{safe(text.place(site, document))}</b>",
        f"{safe(site['op'])} → {shape}",
        f"std {std}, predicted {predicted_std or '–'}" + (f" (× {safe(ratio)})" if ratio else ""),
        f"mean {mean}, predicted {predicted_mean or '–'}",
        f"gradient rms {gradient or '–'}",
    ]
    if site["source"]:
        lines.append(f"<i>{safe(short(text.source(site), 64))}</i>")
    return "<br>".join(lines)


def _finite(value: float | str | None) -> float | None:
    """A number to draw, with five significant digits; nothing for what is not finite."""
    return float(f"{value:.5g}") if isinstance(value, float) else None


def _positive(value: float | str | None) -> float | None:
    """A number to draw on a logarithmic axis."""
    return _finite(value) if isinstance(value, float) and value > 0 else None
