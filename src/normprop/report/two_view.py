"""The two-view experiment as a table and as a figure."""

import itertools
from statistics import fmean, stdev
from typing import Any

from normprop.errors import requires
from normprop.report.marks import marks
from normprop.report.traces import safe

with requires("report"):
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

# The light theme's method colours of the reports, by number.
_COLORS = ("#3a5fd0", "#e2722f", "#43a380", "#b868c4", "#3b4200", "#1c6a63", "#74123f", "#737b88")

_COLUMNS = (
    ("accuracy, z as in training", "accuracy", "correlated", 100, 1),
    ("accuracy, z independent", "accuracy", "independent", 100, 1),
    ("R²: left, before", "readable", "left", 1, 2),
    ("R²: left, regressed", "readable", "residual", 1, 2),
    ("R²: left, joined", "readable", "left_joined", 1, 2),
    ("R²: right, joined", "readable", "right_joined", 1, 2),
    ("share: left, before", "share", "left", 100, 1),
    ("share: left, regressed", "share", "residual", 100, 1),
    ("share: left, joined", "share", "left_joined", 100, 1),
)


def table(document: dict[str, Any]) -> str:
    """Lay the results out in Markdown, mean ± standard deviation over the seeds.

    Args:
        document: from :func:`normprop.experiments.two_view.run`.

    Returns:
        A table with a row for each method: accuracies in %, R² of z by linear regression on held-out images, and the
        share of z in the variance of the features in %.

    Example:
        >>> trial = {"method": "reg", "seed": 0, "accuracy": {"correlated": 0.5, "independent": 0.25}}
        >>> trial |= {"readable": {"left": 0.5}, "share": {"left": 0.5}}
        >>> print(table({"methods": ["reg"], "trials": [trial]}).splitlines()[2])
        | reg | 50.0 | 25.0 | 0.50 |  |  |  | 50.0 |  |  |
    """
    lines = [["method", *(column[0] for column in _COLUMNS)], ["---"] * (len(_COLUMNS) + 1)]
    for method in document["methods"]:
        cells = [_cell(_values(document, method, *column[1:3]), *column[3:]) for column in _COLUMNS]
        lines.append([method, *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(document: dict[str, Any]) -> str:
    """Draw the results as one HTML page that opens from disk and loads nothing.

    Args:
        document: from :func:`normprop.experiments.two_view.run`.

    Returns:
        The page. Left: how well z can be read off the left features, hollow before and filled after the branches are
        joined. Right: accuracy, hollow with z as in training and filled with z independent. Small dots are seeds.
    """
    titles = (
        "R² of z from left features<br>hollow: before, filled: joined",
        "test accuracy, %<br>hollow: z as in training, filled: z independent",
    )
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=titles)
    pairs = (
        ("readable", "left", "left_joined", 1, "before", "joined"),
        ("accuracy", "correlated", "independent", 100, "z as in training", "z independent"),
    )
    styles = zip(document["methods"], marks(document["methods"]), strict=True)
    for (method, mark), panel in itertools.product(styles, range(2)):
        kind, first, last, factor, *words = pairs[panel]
        ends = [[factor * value for value in _values(document, method, kind, name)] for name in (first, last)]
        texts = [
            f"<b>{safe(method)}</b><br>{word} {_cell(values, 1, 3 - panel)}"
            for word, values in zip(words, ends, strict=True)
        ]
        color = _COLORS[mark.color]
        style: dict[str, Any] = {"color": color, "symbol": [f"{mark.shape}-open", mark.shape], "size": 12}
        line = {"x": [fmean(values) for values in ends], "y": [method] * 2, "marker": style, "hovertext": texts}
        every = [*ends[0], *ends[1]]
        seeds = {"x": every, "y": [method] * len(every), "marker": {"color": color, "size": 4}}
        common: dict[str, Any] = {"hoverinfo": "text", "showlegend": False}
        figure.add_trace(go.Scatter(**line, **common, mode="lines+markers", line={"color": color}), 1, panel + 1)
        figure.add_trace(go.Scatter(**seeds, showlegend=False, hoverinfo="x", mode="markers"), 1, panel + 1)
    figure.update_yaxes(autorange="reversed")
    height = 190 + 52 * len(document["methods"])
    figure.update_layout(title={"text": safe(document["title"])}, template="plotly_white", height=height, margin_t=120)
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _values(document: dict[str, Any], method: str, kind: str, name: str) -> list[float]:
    """One number of every seed; none where the method has no such place."""
    return [trial[kind][name] for trial in document["trials"] if trial["method"] == method and name in trial[kind]]


def _cell(values: list[float], factor: float, digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {factor * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{factor * fmean(values):.{digits}f}{spread}"
