"""The tables of docs/results/learning.md that were measured with Muon, and its picture, from the runs of learning.csv.

The larger budget's has the few cells that were trained with SGD as well.

    python -m benchmarks.learning

The tables are printed, the picture is written to docs/results/learning.svg. A cell's rate is chosen as
:func:`normprop.experiments.results.table` does it.
"""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normprop.diagnostics.plot import Line, Plot
from normprop.experiments.results import table
from normprop.files import write_content
from normprop.report.plots import svg
from normprop.report.summary import number, percent

RESULTS = Path(__file__).parents[1] / "docs" / "results"
NETWORKS = {
    "nin": "NIN, quarter width",
    "resnet14": "ResNet-14",
    "resnet20": "ResNet-20",
    "mlp40": "40-layer perceptron",
    "unet": "U-Net",
    "vit": "vision transformer",
}
METHODS = {
    "normprop": "normprop",
    "normprop --decouple": "normprop, decoupled",
    "batch": "batch norm",
    "layer": "layer norm",
    "normprop, SGD": "normprop, SGD",
    "batch, SGD": "batch norm, SGD",
}
Cells = Mapping[str, Mapping[tuple[str, int], Mapping[str, Any]]]
"""Rows of :func:`normprop.experiments.results.table`, by network, method and batch size."""


def trials(images: str, sgd: bool) -> dict[str, list[dict[str, Any]]]:
    """Runs on a budget, by the number of its training images: of each network as a study holds them.

    Those with SGD, if asked for, say so in their method.
    """
    runs: dict[str, list[dict[str, Any]]] = {network: [] for network in NETWORKS}
    with (RESULTS / "learning.csv").open(newline="") as file:
        for run in csv.DictReader(file):
            if run["images"] == images and (sgd or run["optimizer"] == "muon"):
                method = run["method"] + (", SGD" if run["optimizer"] == "sgd" else "")
                errors = {key: float(run[key] or "nan") for key in ("validation_error", "test_error")}
                numbers = {**errors, "batch_size": int(run["batch_size"]), "lr": float(run["lr"])}
                runs[run["network"]].append({**run, **numbers, "method": method})
    return runs


def cells(images: str, sgd: bool = False) -> Cells:
    """Cells of a budget, by the number of its training images; those with Muon, or with SGD as well."""
    return {
        network: {(row["method"], row["batch_size"]): row for row in table(runs)}
        for network, runs in trials(images, sgd).items()
    }


def markdown(networks: Cells) -> str:
    """Test errors in %."""
    sizes = sorted({size for rows in networks.values() for _, size in rows})
    columns = ["network", "method", *(f"batch {size}" for size in sizes)]
    lines = [columns, ["---"] * len(columns)]
    for network, title in NETWORKS.items():
        for method, name in METHODS.items():
            held = [networks[network].get((method, size)) for size in sizes]
            if any(held):
                lines.append([title, name, *(_cell(row, digits=2 if network == "unet" else 1) for row in held)])
                title = ""
    return "\n".join("".join(f"| {word} " if word else "| " for word in line) + "|" for line in lines)


def plots(networks: Cells) -> list[Plot]:
    """Test error over batch size, with bars of one standard deviation over seeds where there are several."""
    drawn = []
    for network, title in NETWORKS.items():
        lines = []
        for method, name in METHODS.items():
            rows = [row for (of, _), row in networks[network].items() if of == method]
            if len(rows) > 1 and method != "normprop --decouple":  # decoupled: two sizes, one seed each
                means = [100 * row["error_mean"] for row in rows]
                half = [math.nan if row["error_std"] is None else 100 * row["error_std"] for row in rows]
                low = [mean - width for mean, width in zip(means, half, strict=True)]
                high = [mean + width for mean, width in zip(means, half, strict=True)]
                sizes = [row["batch_size"] for row in rows]
                lines += [
                    Line(name, sizes, means, style="line"),
                    Line(name, sizes, means, low, high, style="points"),
                ]
        if lines:
            ticks = [(size, str(size)) for size in (1, 2, 8, 32, 128)]
            drawn.append(Plot(title, "batch size", "test error in %", lines, x_scale="log", x_ticks=ticks))
    return drawn


def _cell(row: Mapping[str, Any] | None, digits: int) -> str:
    if row is None:
        return ""
    deviation = f" ± {percent(row['error_std'], digits)}" if row["error_std"] is not None else ""
    few = {1: ", one seed", 2: ", two seeds"}.get(row["seeds"], "")
    edge = "*" if row["edge"] else ""
    return f"{percent(row['error_mean'], digits)}{deviation} ({number(row['best_lr'])}{edge}{few})"


if __name__ == "__main__":
    small, large = cells("4000"), cells("10000", sgd=True)
    print(f"4000 images\n\n{markdown(small)}\n\n10000 images\n\n{markdown(large)}")
    write_content(RESULTS / "learning.svg", svg(plots(large)))
