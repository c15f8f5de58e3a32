"""The figures of training at each method's best rate: curves against epoch, and every layer's output over time."""

from typing import Any

from normprop.report.marks import Mark
from normprop.report.results import Results, Row
from normprop.report.summary import state
from normprop.report.traces import Figure, band, line, mean, safe, short, styled

_QUANTITIES = (
    ("train_loss", "Training loss", "cross-entropy", 1.0),
    ("validation_error", "Validation error", "%", 100.0),
    ("test_error", "Test error", "%", 100.0),
)


def curves(results: Results) -> list[Figure]:
    """Training loss, validation error and test error against epoch: mean over seeds and range."""
    figures = []
    for key, title, unit, scale in _QUANTITIES:
        bands, lines = [], []
        for batch in results.batch_sizes:
            for index, name, mark in styled(results):
                runs = _best_runs(results, name, batch)
                values = _by_epoch([run.get("curve") or [] for run in runs], key, scale)
                if not values:
                    continue
                epochs = list(values)
                means = [mean(values[epoch]) for epoch in epochs]
                if any(len(values[epoch]) > 1 for epoch in epochs):
                    low, high = [min(values[e]) for e in epochs], [max(values[e]) for e in epochs]
                    bands.append(band(index, epochs, low, high, batch=batch))
                hover = [
                    f"<b>{safe(name)}</b><br>epoch {epoch}<br>{title.lower()} {value:.4g}{' %' if unit == '%' else ''}"
                    f"<br>{_seed_range(values[epoch])}"
                    for epoch, value in zip(epochs, means, strict=True)
                ]
                lines.append(line(index, name, mark, epochs, means, hover, batch=batch, marker_size=7))
        layout: Row = {"xaxis": {"title": {"text": "epoch"}, "nticks": 7}, "yaxis": {}}
        label = f"Line chart of {title.lower()} against epoch for each method at its best learning rate."
        figures.append(Figure(title, unit, label, bands + lines, layout, 320))
    return figures if any(figure.traces for figure in figures) else []


def layers(results: Results) -> list[Figure]:
    """Mean and standard deviation of each layer's output against epoch, a plot for each method."""
    figures = []
    for index, name, mark in styled(results):
        traces = []
        for batch in results.batch_sizes:
            traces += _layer_traces(
                index, mark, [run.get("layers") or [] for run in _best_runs(results, name, batch)], batch
            )
        if not traces:
            continue
        layout: Row = {
            "xaxis": {"title": {"text": "epoch"}, "anchor": "y2", "nticks": 7},
            "yaxis": {"domain": [0.56, 1], "title": {"text": "mean"}, "nticks": 5},
            "yaxis2": {"domain": [0, 0.48], "title": {"text": "std"}, "type": "log", "nticks": 5},
            "shapes": [
                {"name": "one", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "yref": "y"},
                {"name": "one", "xref": "paper", "x0": 0, "x1": 1, "y0": 1, "y1": 1, "yref": "y2"},
            ],
        }
        label = f"Mean and standard deviation of every layer's output against epoch with {short(name)}."
        empty = "No run without divergence at this batch size."
        figures.append(Figure(name, "", label, traces, layout, 320, index, empty, group="layers"))
    return figures


def absent(results: Results) -> list[str]:
    """Methods that have no curve, with the reason, by batch size."""
    words = {
        "impossible": "cannot run",
        "diverged": "diverged at every rate",
        "waiting": "not finished",
        "missing": "no result",
    }
    lines = []
    for batch in results.batch_sizes:
        names = [(name, words.get(state(results, name, batch))) for name in results.methods]
        missing = [f"{name} ({word})" for name, word in names if word]
        if missing:
            lines.append(f"Batch size {batch}: " + ", ".join(missing))
    return lines


def _best_runs(results: Results, name: str, batch: Any) -> list[Row]:
    """The complete runs of a method at its best learning rate."""
    lr = results.cell(name, batch).get("best_lr")
    return [run for run in results.runs_at(name, batch, lr) if run["status"] == "complete"]


def _by_epoch(records: list[list[Row]], key: str, scale: float = 1.0) -> dict[int, list[float]]:
    """The values of one quantity over the runs, by epoch."""
    values: dict[int, list[float]] = {}
    for record in sorted((r for run in records for r in run), key=lambda r: r["epoch"]):
        if record.get(key) is not None:
            values.setdefault(record["epoch"], []).append(scale * record[key])
    return values


def _seed_range(values: list[float]) -> str:
    if len(values) == 1:
        return "one seed"
    return f"{len(values)} seeds, {min(values):.4g} to {max(values):.4g}"


def _layer_traces(index: int, mark: Mark, runs: list[list[Row]], batch: Any) -> list[Row]:
    """A line for each layer and statistic, means over the runs; `depth` runs from 0 (first layer) to 1 (last)."""
    names = list(dict.fromkeys(record["layer"] for run in runs for record in run))
    traces = []
    for place, layer in enumerate(names):
        records = [[record for record in run if record["layer"] == layer] for run in runs]
        depth = place / max(len(names) - 1, 1)
        place_of = f"<b>{safe(layer)}</b> (layer {place + 1} of {len(names)})<br>epoch %{{x}}<br>"
        for key, axis in (("mean", "y"), ("std", "y2")):
            values = _by_epoch(records, key)
            y = [mean(items) for items in values.values()]
            trace = line(index, layer, mark, list(values), y, [], batch=batch, mode="lines", yaxis=axis)
            # A template, not a text for each point: layers are most of the page's points.
            trace |= {
                "hovertext": None,
                "hoverinfo": None,
                "hovertemplate": place_of + f"{key} %{{y:.3g}}<extra></extra>",
            }
            trace["line"] = {"width": 1.2 + depth}
            trace["meta"] |= {"part": "layer", "depth": depth}
            traces.append(trace)
    return traces
