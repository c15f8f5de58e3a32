"""The tables of docs/results/learning.md that were measured with Muon, from the runs in its learning.csv.

    python -m benchmarks.learning

A cell's rate is chosen as :func:`normprop.experiments.results.table` does it.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normprop.experiments.results import table
from normprop.report.summary import number, percent

RUNS = Path(__file__).parents[1] / "docs" / "results" / "learning.csv"
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
}


def trials(images: str) -> dict[str, list[dict[str, Any]]]:
    """Runs with Muon on a budget, by the number of its training images: of each network as a study holds them."""
    runs: dict[str, list[dict[str, Any]]] = {network: [] for network in NETWORKS}
    with RUNS.open(newline="") as file:
        for run in csv.DictReader(file):
            if (run["images"], run["optimizer"]) == (images, "muon"):
                errors = {key: float(run[key] or "nan") for key in ("validation_error", "test_error")}
                typed = {**run, **errors, "batch_size": int(run["batch_size"]), "lr": float(run["lr"])}
                runs[run["network"]].append(typed)
    return runs


def markdown(images: str) -> str:
    """Test errors of a budget in %."""
    cells = {
        network: {(row["method"], row["batch_size"]): row for row in table(runs)}
        for network, runs in trials(images).items()
    }
    sizes = sorted({size for rows in cells.values() for _, size in rows})
    columns = ["network", "method", *(f"batch {size}" for size in sizes)]
    lines = [columns, ["---"] * len(columns)]
    for network, title in NETWORKS.items():
        for method, name in METHODS.items():
            held = [cells[network].get((method, size)) for size in sizes]
            if any(held):
                lines.append([title, name, *(_cell(row, digits=2 if network == "unet" else 1) for row in held)])
                title = ""
    return "\n".join("".join(f"| {word} " if word else "| " for word in line) + "|" for line in lines)


def _cell(row: Mapping[str, Any] | None, digits: int) -> str:
    if row is None:
        return ""
    deviation = f" ± {percent(row['error_std'], digits)}" if row["error_std"] is not None else ""
    few = {1: ", one seed", 2: ", two seeds"}.get(row["seeds"], "")
    edge = "*" if row["edge"] else ""
    return f"{percent(row['error_mean'], digits)}{deviation} ({number(row['best_lr'])}{edge}{few})"


if __name__ == "__main__":
    for images in ("4000", "10000"):
        print(f"{images} images\n\n{markdown(images)}\n")
