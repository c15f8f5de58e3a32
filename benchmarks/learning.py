"""The tables of docs/results/learning.md that were measured with Muon, from the runs in its learning.csv.

    python -m benchmarks.learning

A cell's rate is the one with the most seeds and, among those, the lowest mean validation error; rates at which a seed
diverged are left out.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

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
}

Cell = tuple[str, str, int]  # network, method, batch size


class Result:
    """A cell: its rate, its test errors over seeds in %, and whether the rate is at the edge of those tried."""

    def __init__(self, rates: dict[float, list[dict[str, str]]]) -> None:
        whole = {rate: runs for rate, runs in rates.items() if all(run["status"] == "complete" for run in runs)}
        seeds = max(map(len, whole.values()))
        validation = {
            rate: statistics.mean(float(run["validation_error"]) for run in runs)
            for rate, runs in whole.items()
            if len(runs) == seeds
        }
        self.rate = min(validation, key=validation.__getitem__)
        self.edge = self.rate in (min(rates), max(rates))
        self.errors = [100 * float(run["test_error"]) for run in whole[self.rate]]


def results(images: str) -> dict[Cell, Result]:
    """Every cell of a budget, by the number of its training images."""
    runs: dict[Cell, dict[float, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    with (RESULTS / "learning.csv").open(newline="") as file:
        for run in csv.DictReader(file):
            if (run["images"], run["optimizer"]) == (images, "muon"):
                runs[run["network"], run["method"], int(run["batch_size"])][float(run["lr"])].append(run)
    return {cell: Result(rates) for cell, rates in runs.items() if cell[0] in NETWORKS and cell[1] in METHODS}


def table(cells: dict[Cell, Result]) -> str:
    """Test errors in % as Markdown."""
    sizes = sorted({size for _, _, size in cells})
    columns = ["network", "method", *(f"batch {size}" for size in sizes)]
    rows = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for network, title in NETWORKS.items():
        for method in METHODS:
            words = [word(cells.get((network, method, size)), network) for size in sizes]
            if any(words):
                rows.append(" | ".join([f"| {title}", METHODS[method], *words]) + " |")
                title = ""
    return "\n".join(rows).replace("|  |", "| |").replace("|  |", "| |")


def word(result: Result | None, network: str) -> str:
    """A cell's mean, deviation or number of seeds, and rate."""
    if result is None:
        return ""
    digits = 2 if network == "unet" else 1
    few = {1: ", one seed", 2: ", two seeds"}.get(len(result.errors), "")
    mean = f"{statistics.mean(result.errors):.{digits}f}"
    deviation = f" ± {statistics.stdev(result.errors):.{digits}f}" if len(result.errors) > 1 else ""
    return f"{mean}{deviation} ({result.rate:g}{'*' if result.edge else ''}{few})"


if __name__ == "__main__":
    for images in ("4000", "10000"):
        print(f"{images} images\n\n{table(results(images))}\n")
