"""Understanding batch norm: a network without it diverges because moments grow with depth."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from normprop.data import batches
from normprop.diagnostics.divergence_movie import RATES, diverging_rate, movie
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import bjorck_lr
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import by_method
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread
from normprop.nn import DataNorm

METHODS = ("none", "batch", "normprop")
_STEPS, _BATCHES = 30, 8
_ANY_RATE = 1.0  # the rate is found, not given

Runs = Mapping[str, list[dict[str, Any]]]


def run(context: Context) -> Reproduction:
    """Train a residual network just above the rate that it bears, and record every layer's moments at every step.

    Args:
        context: scale, data and storage.

    Returns:
        Rates at which the methods diverge, and how variances grow with depth and step.

    Source:
        Bjorck, Gomes, Selman & Weinberger 2018, section 3.
    """
    shared = bjorck_lr.settings(context)
    seeds = context.seed_list(3)
    dataset = shared.load()
    norm = DataNorm(dataset.shape).fit(batches(dataset.train, 4096, shuffle=False))

    def measure(combination: Combination) -> dict[str, Any]:
        torch.manual_seed(combination.seed)
        network = shared.builder(dataset, combination.method)()
        order = torch.Generator().manual_seed(combination.seed)
        stream = batches(dataset.train, combination.batch_size, shuffle=True, generator=order)
        pairs = [(norm(images), labels) for images, labels in (next(stream) for _ in range(_BATCHES))]
        rate = diverging_rate(network, pairs, RATES, _STEPS, momentum=0.9)
        seen = movie(network, pairs, rate or RATES[-1], _STEPS, momentum=0.9)
        before = movie(network, pairs, RATES[0], 1)
        return {
            "rate": rate,
            "losses": list(seen.losses),
            "variance": seen.variance[: seen.last + 1].tolist(),
            "start": before.variance[0].tolist(),
            "growth": seen.growth.tolist(),
        }

    wanted = [Combination(method, bjorck_lr.BATCH_SIZE, _ANY_RATE, seed) for seed in seeds for method in METHODS]
    study = f"bjorck-divergence-{context.scale}"
    settings = shared.identity(dataset) | {"steps": _STEPS, "batches": _BATCHES}
    found = context.measure(study, settings, wanted, measure)
    runs = by_method(found, METHODS)
    agrees, contradicts = judged(_claims(runs))
    return Reproduction(
        name="bjorck-divergence",
        title="Without batch norm a network diverges because its moments grow with depth",
        paper="Bjorck, Gomes, Selman & Weinberger 2018",
        scale=context.scale,
        protocol=f"{shared.model} at width {shared.width:g} at its random start, {_BATCHES} batches of "
        f"{bjorck_lr.BATCH_SIZE} CIFAR-10 images in turn, SGD with momentum 0.9 for at most {_STEPS} steps, at the "
        f"smallest rate out of {RATES[0]:g}, ..., {RATES[-1]:g} (factors of the square root of ten) at which the loss "
        f"passes 1,000; {len(seeds)} seeds.",
        differs_from_paper="The paper watches 110 layers on the whole data set."
        if context.scale == "small"
        else "The paper does not stop at the same number of steps.",
        table=Table(
            (
                "method",
                "diverges at",
                "steps",
                "variance at the start, last to first",
                "growth, last hidden layer",
            ),
            [
                (
                    method,
                    ", ".join("never" if r["rate"] is None else f"{r['rate']:.3g}" for r in runs[method]),
                    ", ".join(str(len(r["losses"]) - 1) for r in runs[method]),
                    spread([_slope(r["start"]) for r in runs[method]]),
                    ", ".join(f"{r['growth'][-2]:.3g}" for r in runs[method]),
                )
                for method in METHODS
            ],
        ),
        figures=[
            _by_depth("Channel variance at the start", "start", "average channel variance", runs),
            _by_depth("Growth until the loss is lost", "growth", "channel variance, last frame to first", runs),
        ],
        agrees=agrees,
        contradicts=contradicts,
        notes=["The paper's own figures were not at hand; its claim is what is tested."],
        numbers=dict(runs),
    )


def _slope(variances: list[float]) -> float:
    """Ratio of the variance before the read-out to that of the first layer."""
    return variances[-2] / variances[0]


def _by_depth(title: str, field: str, label: str, runs: Runs) -> Plot:
    lines = []
    for method, found in runs.items():
        logs = [[math.log(v) if v > 0 and math.isfinite(v) else math.nan for v in run[field]] for run in found]
        means = [math.exp(statistics.fmean(layer)) for layer in zip(*logs, strict=True)]
        lines.append(Line(method, list(range(1, len(means) + 1)), means))
    return Plot(title, "layer, from the input", label, lines, y_scale="log", references=[Reference(1.0)])


def _claims(runs: Runs) -> list[tuple[bool, str]]:
    def median_rate(method: str) -> float:
        return statistics.median(math.inf if run["rate"] is None else run["rate"] for run in runs[method])

    def text(rate: float) -> str:
        return f"{rate:.3g}" if math.isfinite(rate) else f"no rate up to {RATES[-1]:g}"

    plain, batch = median_rate("none"), median_rate("batch")
    slopes = {method: statistics.fmean(_slope(run["start"]) for run in runs[method]) for method in METHODS}
    deep = statistics.median(run["growth"][-2] / run["growth"][0] for run in runs["none"])
    return [
        (
            plain < batch,
            f"Without normalisation the loss is lost at a rate of {text(plain)}, with batch norm at {text(batch)} (the "
            "paper: the plain network stands far smaller rates).",
        ),
        (
            slopes["none"] > 2 * slopes["batch"],
            f"At the start the variance of the last hidden layer is {slopes['none']:.3g} times that of the first "
            f"without normalisation and {slopes['batch']:.3g} times with batch norm (the paper: moments grow with "
            "depth without it).",
        ),
        (
            deep > 1,
            f"Until the loss is lost the variance of the last hidden layer grows {deep:.3g} times as much as that of "
            "the first (the paper: divergence begins in the deep layers).",
        ),
    ]
