"""The page of a diagnosis: a question, what to look for, what was found and plots, for each question asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from normprop.diagnostics.diagnosis import Diagnosis
from normprop.errors import requires
from normprop.report.marks import SHAPES, marks
from normprop.report.plots import line_names, svg, themed
from normprop.report.template import asset, template

with requires("report"):
    from markupsafe import Markup


def page(
    title: str, diagnoses: Sequence[Diagnosis], names: Sequence[str], facts: Mapping[str, str], remarks: Sequence[str]
) -> str:
    """Draw diagnoses as one HTML page that opens from disk, loads nothing and needs no script to be read.

    Args:
        title: heading.
        diagnoses: what was found, in the order of the page.
        names: the networks, in the order that gives them their colours.
        facts: what was looked at: model, data, batch, machine.
        remarks: what was left out, and why.

    Returns:
        The page.

    Example:
        >>> page("Nothing", [], [], {}, [])[:15]
        '<!doctype html>'
    """
    sections = [
        {
            "id": diagnosis.name,
            "diagnosis": diagnosis,
            "plots": Markup(themed(svg(diagnosis.figures, names=_order(diagnosis, names)))),
            "rows": _rows(diagnosis.numbers),
        }
        for diagnosis in diagnoses
    ]
    styles = list(zip(names, marks(list(names)), strict=True))
    return template("diagnosis.html.j2").render(
        title=title,
        sections=sections,
        facts=facts,
        remarks=remarks,
        styles=styles,
        shapes=SHAPES,
        style=asset("page.css") + asset("diagnosis.css"),
        script=asset("diagnosis.js"),
    )


def _order(diagnosis: Diagnosis, names: Sequence[str]) -> list[str]:
    """The page's networks first, so that they keep their colours, then lines of the diagnosis's own."""
    return list(dict.fromkeys([*names, *line_names(diagnosis.figures)]))


def _rows(numbers: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The single numbers of a diagnosis, by their path; lists are left to the JSON file."""
    rows: list[tuple[str, str]] = []
    for key, value in numbers.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += _rows(value, f"{name} · ")
        elif isinstance(value, float):
            rows.append((name, f"{value:.4g}"))
        elif isinstance(value, int | str):
            rows.append((name, str(value)))
    return rows
