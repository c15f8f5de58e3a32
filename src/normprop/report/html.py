"""The report of a comparison: one HTML file that opens from disk and loads nothing."""

from pathlib import Path
from typing import Any

from normprop.errors import requires
from normprop.files import write_content
from normprop.report import curves, dots, figures, summary
from normprop.report.marks import SHAPES, marks
from normprop.report.results import Results, read
from normprop.report.template import asset, template

with requires("report"):
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs


def write(document: dict[str, Any], path: Path) -> Path:
    """Write the report of a comparison as one self-contained HTML file.

    The file has its style, its script and plotly inside, opens without a network and forbids itself any request. It is
    written beside its place and moved there when whole.

    Args:
        document: the results, from ``normprop.experiments.results.document``; step times, layer statistics and
            unfinished trials may be missing.
        path: the file to write; its directory is made if need be, a file that is there is replaced.

    Returns:
        The path.

    Raises:
        ConfigError: if the document is not one that ``normprop compare`` makes.

    Example:
        >>> import tempfile
        >>> empty = {"title": "Nothing yet", "methods": ["none"], "batch_sizes": [32], "lrs": [0.1], "seeds": [0]}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write(empty | {"trials": [], "table": []}, Path(directory) / "report.html").name
        'report.html'
    """
    page = _render(read(document))
    return write_content(Path(path), page)


def _render(results: Results) -> str:
    """The page as text."""
    groups = {
        "ranking": dots.ranking(results),
        "batch": figures.by_batch(results),
        "rate": figures.by_rate(results),
        "curves": curves.curves(results),
        "time": dots.step_time(results),
        "layers": curves.layers(results),
    }
    styles = marks(results.methods)
    hidden = summary.hidden(results, dots.MANY)
    rows, footnotes = summary.table(results)
    drawings = [
        {"id": f"{group}-{index}", **vars(figure)}
        for group, plots in groups.items()
        for index, figure in enumerate(plots)
    ]
    return template("page.html.j2", number=summary.number, percent=summary.percent).render(
        results=results,
        groups=groups,
        marks=styles,
        hidden=hidden,
        shapes=SHAPES,
        sentence=summary.sentence(results),
        progress=summary.progress(results),
        remarks=summary.remarks(results),
        date=summary.date(results.created),
        facts=summary.facts(results),
        rows=rows,
        footnotes=footnotes,
        absent=curves.absent(results),
        payload={
            "figures": _rounded(drawings),
            "batches": results.batch_sizes,
            "colors": [mark.color for mark in styles],
            "hidden": hidden,
        },
        style=asset("page.css"),
        script=asset("page.js"),
        plotly=Markup(get_plotlyjs()),
    )


def _rounded(value: Any) -> Any:
    """A copy with five significant digits: more than a plot can show, at half the size."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
