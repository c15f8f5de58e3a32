"""Batch norm as regularisation whose rate the data set: the ridge that noisy inputs amount to, on MNIST."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normprop import data
from normprop.diagnostics.equivalent_ridge import equivalent_ridge
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread

NOISES = (0.1, 0.3, 1.0, 3.0)
_RIDGES = tuple(10 ** (quarter / 4) for quarter in range(-18, 3, 2))
_SIZES = {"small": (2000, 600), "paper": (20_000, 6000)}  # training images, steps
_HIDDEN, _BATCH_SIZE, _RATE = 64, 128, 0.1
_PIXEL = 0.1  # added to the pixels' deviations: many never change


def run(context: Context) -> Reproduction:
    """Find the L2 penalty whose weights point like those of a batch-norm network on noisy inputs.

    Args:
        context: scale, data and storage.

    Returns:
        The equivalent ridge and the multiplier of linear units against the noise.

    Source:
        Annamalai & Thakur 2022.
    """
    seeds = context.seed_list(3)
    images, steps = _SIZES[context.scale]
    dataset = data.load("mnist", context.data_dir).split(train=images)
    pixels = dataset.train.images.flatten(1).float() / 255
    pixels = (pixels - pixels.mean(0)) / (pixels.std(0, correction=0) + _PIXEL)

    def measure(combination: Combination) -> dict[str, Any]:
        torch.manual_seed(combination.seed)
        normalized = nn.Sequential(
            nn.Linear(pixels.shape[1], _HIDDEN), nn.BatchNorm1d(_HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10)
        )
        plain = nn.Sequential(nn.Linear(pixels.shape[1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 10))
        found = equivalent_ridge(
            normalized,
            plain,
            pixels,
            dataset.train.labels,
            NOISES,
            _RIDGES,
            steps=steps,
            batch_size=_BATCH_SIZE,
            lr=_RATE,
            seed=combination.seed,
        )
        return {"ridge": list(found.ridge), "distance": list(found.distance), "rate": list(found.rates)}

    wanted = [Combination("batch", _BATCH_SIZE, _RATE, seed) for seed in seeds]
    settings = {"data": dataset.name, "train": images, "steps": steps, "hidden": _HIDDEN}
    found = context.measure(f"auto-lambda-{context.scale}", settings, wanted, measure)
    runs = [measured for measured in found.values() if measured is not None]
    agrees, contradicts = judged(_claims(runs))
    return Reproduction(
        name="auto-lambda",
        title="Batch norm regularises by as much as the noise in the data asks for",
        paper="Annamalai & Thakur 2022",
        scale=context.scale,
        protocol=f"A perceptron of {_HIDDEN} ReLU units with batch norm, trained on {images:,} MNIST images with "
        "Gaussian noise of some variance on every normalised pixel, and the same without batch norm on clean images "
        f"with an L2 penalty on its first weights out of {len(_RIDGES)} from {_RIDGES[0]:.2g} to {_RIDGES[-1]:.2g}; "
        f"the equivalent ridge is the one whose filters point most alike. {steps} steps of SGD, momentum 0.9, rate "
        f"{_RATE:g} falling to 0, batch size {_BATCH_SIZE}, {len(seeds)} seeds.",
        differs_from_paper="The paper's formula and protocol were not at hand; the probe is ours.",
        table=Table(
            ("variance of the noise", "equivalent ridge", "1 - cos that is left", "multiplier of a linear unit"),
            [
                (
                    f"{noise:g}",
                    _significant([run["ridge"][index] for run in runs]),
                    spread([run["distance"][index] for run in runs], 3),
                    spread([run["rate"][index] for run in runs], 3),
                )
                for index, noise in enumerate(NOISES)
            ],
        ),
        figures=[
            _plot("Equivalent ridge", "ridge coefficient", "ridge", runs, "log"),
            _plot("Multiplier of a linear unit on the same data", "lambda", "rate", runs, "linear"),
        ],
        agrees=agrees,
        contradicts=contradicts,
        numbers={"runs": runs, "noises": list(NOISES), "ridges": list(_RIDGES)},
    )


def _significant(values: Sequence[float]) -> str:
    """Geometric mean and range, as the grid is logarithmic."""
    mean = math.exp(statistics.fmean(map(math.log, values)))
    return f"{mean:.2g} ({min(values):.2g} to {max(values):.2g})"


def _plot(title: str, label: str, field: str, runs: Sequence[Mapping[str, Any]], scale: Any) -> Plot:
    columns = [[run[field][index] for run in runs] for index in range(len(NOISES))]
    means = [statistics.fmean(column) for column in columns]
    line = Line("batch norm", NOISES, means, [min(c) for c in columns], [max(c) for c in columns])
    references = () if scale == "log" else (Reference(0.0),)
    return Plot(title, "variance of the noise on each pixel", label, [line], "log", scale, references)


def _claims(runs: Sequence[Mapping[str, Any]]) -> list[tuple[bool, str]]:
    def means(field: str) -> list[float]:
        return [statistics.fmean(run[field][index] for run in runs) for index in range(len(NOISES))]

    ridges, rates, left = means("ridge"), means("rate"), means("distance")
    grows = all(low < high for low, high in itertools.pairwise(ridges))
    falls = all(low > high for low, high in itertools.pairwise(rates))
    return [
        (
            grows,
            f"The equivalent ridge goes from {ridges[0]:.2g} at a noise variance of {NOISES[0]:g} to {ridges[-1]:.2g} "
            f"at {NOISES[-1]:g}{', rising all the way' if grows else ', not rising all the way'} (the claim: batch "
            "norm regularises more on noisier data, by itself).",
        ),
        (
            falls,
            f"The multiplier of a linear unit, in closed form, goes from {rates[0]:.2g} to {rates[-1]:.2g} (theory: it "
            "falls with the noise).",
        ),
        (
            max(left) < 0.2,
            f"The best penalty leaves 1 - cos of {min(left):.2f} to {max(left):.2f} between the filters (0 if a ridge "
            "were all that noise does; 1 for unrelated filters).",
        ),
    ]
