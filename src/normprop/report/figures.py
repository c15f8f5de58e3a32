"""The figures that compare methods over batch sizes and learning rates."""

from statistics import stdev
from typing import Any

from normprop.report.marks import Mark
from normprop.report.results import Results, Row
from normprop.report.summary import number, percent
from normprop.report.traces import Figure, dodge, line, log_axis, mean, safe, short, styled

_BAND = 0.87  # share of a plot's height below the band of diverged runs


def by_batch(results: Results) -> list[Figure]:
    """Test error at the best learning rate against batch size, a line for each method."""
    batches = sorted(results.batch_sizes)
    if len(batches) * len(results.methods) < 2:
        return []
    traces = []
    for index, name, mark in styled(results):
        known = [b for b in batches if results.error(name, b) is not None]
        cells = [results.cell(name, b) for b in known]
        moved = [dodge(batch, batches, index, len(results.methods), 0.008) for batch in known]
        hover = [
            f"<b>{safe(name)}</b><br>batch size {cell['batch_size']}<br>test error {_score(results, cell)}"
            f"<br>learning rate {number(cell.get('best_lr'))}, {_seeds(cell)}"
            for cell in cells
        ]
        spread = [100 * (cell.get("error_std") or 0.0) for cell in cells]
        traces.append(
            line(
                index,
                name,
                mark,
                moved,
                [100 * cell["error_mean"] for cell in cells],
                hover,
                marker_size=11,
                error_y={"array": spread, "thickness": 1.5, "width": 4},
            )
        )
    layout = {"xaxis": log_axis(batches, "batch size"), "yaxis": {}}
    label = "Line chart of test error against batch size, a line for each method. The table above has the numbers."
    return [Figure("", "test error, %", label, traces if any(t["x"] for t in traces) else [], layout, 420)]


def by_rate(results: Results) -> list[Figure]:
    """Validation error against learning rate, a plot for each batch size; diverged runs in a band on top."""
    has_band = any(trial["status"] == "diverged" for trial in results.trials)
    figures = []
    for batch in sorted(results.batch_sizes) if results.lrs else []:
        points = [
            [point for lr in sorted(results.lrs) if (point := _point(results, name, batch, lr))]
            for name in results.methods
        ]
        traces = [trace for method in styled(results) for trace in _rate_traces(results, method, points)]
        layout: Row = {"xaxis": log_axis(results.lrs, "learning rate"), "yaxis": _range(results)}
        if has_band:
            layout["yaxis"]["domain"] = [0, _BAND - 0.02]
            layout["yaxis2"] = {"domain": [_BAND, 1], "range": [0, 1], "fixedrange": True, "visible": False}
            layout["xaxis"]["anchor"] = "y"
            layout["shapes"] = [
                {"name": "band", "xref": "paper", "yref": "paper", "x0": 0, "x1": 1, "y0": _BAND, "y1": 1}
            ]
            layout["annotations"] = [
                {
                    "text": "diverged",
                    "xref": "paper",
                    "yref": "paper",
                    "x": 0,
                    "y": 1,
                    "yanchor": "bottom",
                    "showarrow": False,
                }
            ]
        label = (
            f"Line chart of validation error against learning rate at batch size {batch}; crosses mark diverged runs."
        )
        figures.append(Figure(f"Batch size {batch}", "validation error, %", label, traces, layout, 320))
    return figures


def _rate_traces(results: Results, method: tuple[int, str, Mark], points: list[list[Row]]) -> list[Row]:
    """A method's line over the rates it trained at, and its crosses at the rates where it diverged."""
    index, name, mark = method
    traces = []
    alive = [point for point in points[index] if point["error"] is not None]
    if alive:
        # Hollow where only some seeds lived: their mean flatters the rate.
        shapes = [mark.shape + ("-open" if point["diverged"] else "") for point in alive]
        style: Row = {
            "marker": {"size": [14 if point["best"] else 8 for point in alive], "symbol": shapes},
            "error_y": {"array": [point["spread"] for point in alive], "thickness": 1.2, "width": 3},
        }
        x, y = [point["lr"] for point in alive], [point["error"] for point in alive]
        traces.append(line(index, name, mark, x, y, [point["hover"] for point in alive], **style))
    dead = [point for point in points[index] if point["diverged"]]
    if dead:
        x = []
        for point in dead:
            beside = [i for i, row in enumerate(points) if any(p["diverged"] and p["lr"] == point["lr"] for p in row)]
            x.append(dodge(point["lr"], results.lrs, beside.index(index), len(beside), 0.035))
        trace = line(
            index, name, mark, x, [0.5] * len(dead), [point["hover"] for point in dead], mode="markers", yaxis="y2"
        )
        trace["marker"] = {"symbol": "x-thin", "size": 8, "line": {"width": 2.5}}
        trace["meta"]["part"] = "diverged"
        traces.append(trace)
    return traces


def _point(results: Results, name: str, batch: Any, lr: float) -> Row | None:
    """Validation error over the seeds of one method, batch size and learning rate; None where nothing has run."""
    runs = results.runs_at(name, batch, lr)
    diverged = [run for run in runs if run["status"] == "diverged"]
    errors = [
        run["validation_error"]
        for run in runs
        if run["status"] == "complete" and run.get("validation_error") is not None
    ]
    if not errors and not diverged:
        return None
    hover = f"<b>{safe(name)}</b><br>batch size {batch}, learning rate {number(lr)}"
    spread = stdev(errors) if len(errors) > 1 else None
    if errors:
        hover += f"<br>validation error {plus(mean(errors), spread, results.digits)}"
        tests = [run["test_error"] for run in runs if run["status"] == "complete" and run.get("test_error") is not None]
        hover += f"<br>test error {plus(mean(tests), stdev(tests) if len(tests) > 1 else None, results.digits)}"
    if diverged:
        hover += f"<br><b>{len(diverged)} of {len(runs)} seeds diverged</b>"
        reasons = dict.fromkeys(run["reason"] for run in diverged if run.get("reason"))
        hover += "".join(f"<br>{safe(short(reason, 60))}" for reason in list(reasons)[:3])
    best = results.cell(name, batch).get("best_lr") == lr
    if best:
        hover += "<br><b>chosen rate</b>"
    value = mean(errors)
    return {
        "lr": lr,
        "error": None if value is None else 100 * value,
        "spread": 100 * (spread or 0.0),
        "diverged": bool(diverged),
        "best": best,
        "hover": hover,
    }


def _range(results: Results) -> Row:
    """One vertical axis for all batch sizes, so that the plots can be compared."""
    errors = [
        100 * t["validation_error"]
        for t in results.trials
        if t["status"] == "complete" and t.get("validation_error") is not None
    ]
    if not errors:
        return {}
    pad = max(0.08 * (max(errors) - min(errors)), 0.5)
    return {"range": [max(min(errors) - pad, -1.0), max(errors) + pad]}


def plus(value: float | None, spread: float | None, digits: int) -> str:
    """An error in percent with its spread over seeds."""
    return percent(value, digits) + (f" ± {percent(spread, digits)}" if spread is not None else "") + " %"


def _score(results: Results, cell: Row) -> str:
    return plus(cell["error_mean"], cell.get("error_std"), results.digits)


def _seeds(cell: Row) -> str:
    count = cell.get("seeds")
    return f"{count} seed{'s' if count != 1 else ''}" if isinstance(count, int) else "seeds unknown"
