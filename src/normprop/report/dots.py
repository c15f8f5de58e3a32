"""Dot plots with a row for each method: all of them in order of error, and the time of a step."""

from collections.abc import Sequence
from dataclasses import dataclass

from normprop.report.figures import plus
from normprop.report.marks import Mark
from normprop.report.results import Results, Row
from normprop.report.summary import number, percent
from normprop.report.traces import Figure, line, safe, short, styled

MANY = 12  # methods from which lines in one plot can no longer be told apart at a glance


@dataclass(frozen=True)
class _Dot:
    """One method's value with the ends of its bar."""

    method: tuple[int, str, Mark]
    value: float
    low: float
    high: float
    text: str
    hover: str


def ranking(results: Results) -> list[Figure]:
    """Test error at the best rate, the methods in order, a plot for each batch size; only for many methods."""
    if len(results.methods) <= MANY:
        return []
    figures = []
    for batch in results.batch_sizes:
        dots = []
        for method in styled(results):
            cell = results.cell(method[1], batch)
            if cell.get("error_mean") is None:
                continue
            error, spread = 100 * cell["error_mean"], 100 * (cell.get("error_std") or 0.0)
            hover = (
                f"<b>{safe(method[1])}</b><br>batch size {batch}"
                f"<br>test error {plus(cell['error_mean'], cell.get('error_std'), results.digits)}"
                f"<br>learning rate {number(cell.get('best_lr'))}"
            )
            text = percent(cell["error_mean"], results.digits)
            dots.append(_Dot(method, error, error - spread, error + spread, text, hover))
        dots.sort(key=lambda dot: dot.value)
        words = ", ".join(f"{short(dot.method[1])} {dot.text}" for dot in dots[:5])
        label = f"Dot plot of test error at batch size {batch}, methods in order. The lowest: {words}."
        figures.append(_figure(batch, dots, "test error, %", label, "ranking", None))
    return figures


def step_time(results: Results) -> list[Figure]:
    """Time of a training step as a ratio to the plain network's, a plot for each batch size."""
    rows = [row for row in results.step_time if row["method"] in results.methods]
    figures = []
    for batch in sorted({row["batch_size"] for row in rows}):
        found = {row["method"]: row for row in rows if row["batch_size"] == batch}
        dots = []
        for method in styled(results):
            if method[1] not in found:
                continue
            row = found[method[1]]
            ratio = row["ratio"]
            low, high = (ratio if row.get(key) is None else row[key] for key in ("low", "high"))
            milliseconds = row.get("milliseconds")
            hover = (
                f"<b>{safe(method[1])}</b><br>{ratio:.3f} × the plain network<br>quartiles {low:.3f} to {high:.3f}"
                + (f"<br>{milliseconds:.2f} ms a step" if milliseconds is not None else "")
            )
            dots.append(_Dot(method, ratio, low, high, f"{ratio:.2f}", hover))
        label = f"Dot plot of step time at batch size {batch} as a ratio to the plain network: " + ", ".join(
            f"{short(name)} {row['ratio']:.2f}" for name, row in found.items()
        )
        ends = [end for row in rows for key in ("ratio", "low", "high") if (end := row.get(key)) is not None]
        figures.append(_figure(batch, dots, "ratio to none", label, "time", [*ends, 1.0]))
    return figures


def _figure(
    batch: int, dots: Sequence[_Dot], title: str, label: str, group: str, shared: Sequence[float] | None
) -> Figure:
    """One plot; ``shared`` are values that its horizontal axis must reach, and asks for a line at 1."""
    traces, keys, texts = [], [], []
    for dot in dots:
        index, name, mark = dot.method
        keys.append(f"m{index}")
        texts.append(f"{safe(short(name, 26))}  <b>{dot.text}</b>")
        bars: Row = {
            "array": [dot.high - dot.value],
            "arrayminus": [dot.value - dot.low],
            "thickness": 2,
            "width": 0,
        }
        trace = line(
            index, name, mark, [dot.value], [keys[-1]], [dot.hover], mode="markers", marker_size=10, error_x=bars
        )
        trace["meta"]["group"] = group
        traces.append(trace)
    axis: Row = {"title": {"text": title}, "nticks": 6}
    ends = shared or [end for dot in dots for end in (dot.low, dot.high)]
    if ends:
        pad = max(0.06 * (max(ends) - min(ends)), 0.02)
        axis["range"] = [min(ends) - pad, max(ends) + pad]
    rows: Row = {
        "type": "category",
        "tickvals": keys,
        "ticktext": texts,
        "fixedrange": True,
        "showgrid": False,
        "categoryorder": "array",
        "categoryarray": keys,
    }
    layout: Row = {"xaxis": axis, "yaxis": rows}
    if shared:
        layout["shapes"] = [{"name": "one", "yref": "paper", "x0": 1, "x1": 1, "y0": 0, "y1": 1}]
    height = 84 + (22 if len(dots) > MANY else 26) * len(dots)
    return Figure(f"Batch size {batch}", "", label, traces, layout, height, group=group)
