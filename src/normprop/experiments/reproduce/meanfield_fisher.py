"""Mean-field analysis of batch norm: it flattens the landscape, the more the smaller its gamma."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from normprop import data
from normprop.data import Dataset
from normprop.diagnostics.fisher import fisher, gains
from normprop.diagnostics.fisher_mean_field import random_network
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.stable_rate import stable_rate
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import by_method
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread
from normprop.nn import DataNorm

GAMMAS = (0.1, 0.25, 0.5, 1.0, 2.0)
RATE, BATCH_SIZE = 0.1, 128
_WIDTH, _DEPTH, _FEATURES, _SAMPLES = 128, 3, 64, 256
_STEPS = {"small": 800, "paper": 8000}
_PLAIN = "none"

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


def run(context: Context) -> Reproduction:
    """Measure the Fisher matrix's largest eigenvalue, the largest stable rate, and training, against gamma.

    Args:
        context: scale, data and storage.

    Returns:
        Against gamma, with the network without batch norm beside it.

    Source:
        Wei, Stokes & Schwab 2019.
    """
    seeds = context.seed_list(3)
    dataset = data.load("mnist", context.data_dir)
    steps = _STEPS[context.scale]

    def measure(combination: Combination) -> dict[str, Any]:
        gamma = None if combination.method == _PLAIN else float(combination.method.removeprefix("gamma "))
        return sharpness(gamma, combination.seed) | {"loss": trained(dataset, gamma, combination.seed, steps)}

    methods = [_PLAIN, *(f"gamma {gamma:g}" for gamma in GAMMAS)]
    wanted = [Combination(method, BATCH_SIZE, RATE, seed) for seed in seeds for method in methods]
    settings = {"data": dataset.name, "width": _WIDTH, "depth": _DEPTH, "steps": steps}
    found = context.measure(f"meanfield-fisher-{context.scale}", settings, wanted, measure)
    runs = by_method(found, methods)
    agrees, contradicts = judged(_claims(runs))
    return Reproduction(
        name="meanfield-fisher",
        title="Batch norm flattens the landscape, and a smaller gamma makes it flatter and learns better",
        paper="Wei, Stokes & Schwab 2019",
        scale=context.scale,
        protocol=f"Eigenvalues: random tanh networks of {_DEPTH} hidden layers of {_WIDTH} and one linear output, "
        f"{_SAMPLES} Gaussian inputs of {_FEATURES} features, batch norm after every hidden linear map, derivatives "
        f"through its statistics; the stable rate by gradient descent and bisection. Training: the same networks with "
        f"ten outputs on MNIST, {steps} steps of SGD without momentum at rate {RATE:g}, batch size {BATCH_SIZE}, gamma "
        f"at its start value and learnt from there; mean loss of the last tenth. {len(seeds)} seeds.",
        differs_from_paper="The paper's own protocol was not at hand; ten times fewer steps than at paper scale."
        if context.scale == "small"
        else "The paper's own protocol was not at hand.",
        table=Table(
            ("network", "largest eigenvalue", "2 / eigenvalue", "largest stable rate", "training loss"),
            [
                (
                    "no batch norm" if method == _PLAIN else method,
                    spread([run["largest"] for run in runs[method]], 3),
                    spread([2 / run["largest"] for run in runs[method]], 3),
                    spread([run["stable"] for run in runs[method]], 3),
                    spread([run["loss"] for run in runs[method]], 4),
                )
                for method in methods
            ],
        ),
        figures=[
            _plot("Largest eigenvalue of the Fisher matrix", "largest", "lambda", runs, "log"),
            _plot("Training loss after equal steps", "loss", "cross entropy", runs, "log"),
        ],
        agrees=agrees,
        contradicts=contradicts,
        numbers={method: list(of) for method, of in runs.items()},
    )


def sharpness(gamma: float | None, seed: int) -> dict[str, float]:
    """Largest eigenvalue and largest stable rate of a random network, without batch norm if gamma is ``None``.

    Args:
        gamma: gain of every batch norm.
        seed: of the network and the inputs.

    Returns:
        "largest" and "stable".
    """
    inputs = torch.randn(_SAMPLES, _FEATURES, generator=torch.Generator().manual_seed(seed))
    network = _network(_FEATURES, 1, gamma, seed)
    found = fisher(network, inputs, seed=seed)
    return {"largest": found.largest, "stable": stable_rate(network, inputs, found.rate, seed=seed)}


def trained(dataset: Dataset, gamma: float | None, seed: int, steps: int) -> float:
    """Train a classifier for some steps; return its mean loss over the last tenth of them.

    Args:
        dataset: images and labels.
        gamma: gain of every batch norm at the start, ``None`` without batch norm.
        seed: of the network and the batches.
        steps: updates.

    Returns:
        Cross entropy.
    """
    generator = torch.Generator().manual_seed(seed)
    images = dataset.train.images.flatten(1).float() / 255
    images = DataNorm((images.shape[1],)).fit(images)(images)
    network = _network(images.shape[1], dataset.num_classes, gamma, seed).requires_grad_()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, fused=True)
    losses = []
    for _ in range(steps):
        index = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        loss = F.cross_entropy(network(images[index]), dataset.train.labels[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(1, steps // 10) :])


def _network(features: int, outputs: int, gamma: float | None, seed: int) -> nn.Module:
    where = range(0) if gamma is None else range(_DEPTH)
    network = random_network(features, _WIDTH, _DEPTH, "tanh", where, outputs=outputs, seed=seed)
    if gamma is not None:
        for name in gains(network):
            nn.init.constant_(network.get_submodule(name).weight, gamma)  # type: ignore[arg-type]
    return network


def _mean(runs: Runs, method: str, field: str) -> float:
    return statistics.fmean(run[field] for run in runs[method])


def _plot(title: str, field: str, label: str, runs: Runs, scale: Any) -> Plot:
    names = [f"gamma {gamma:g}" for gamma in GAMMAS]
    values = [[run[field] for run in runs[name]] for name in names]
    means = [statistics.fmean(seeds) for seeds in values]
    with_norm = Line("batch norm", GAMMAS, means, [min(v) for v in values], [max(v) for v in values])
    plain = Line("no batch norm", [GAMMAS[0], GAMMAS[-1]], [_mean(runs, _PLAIN, field)] * 2, style="theory")
    return Plot(title, "gamma of batch norm", label, [with_norm, plain], x_scale="log", y_scale=scale)


def _claims(runs: Runs) -> list[tuple[bool, str]]:
    names = [f"gamma {gamma:g}" for gamma in GAMMAS]
    largest = [_mean(runs, name, "largest") for name in names]
    plain = _mean(runs, _PLAIN, "largest")
    losses = [_mean(runs, name, "loss") for name in names]
    rises = all(low < high for low, high in itertools.pairwise(largest))
    flatter = [f"{gamma:g}" for gamma, value in zip(GAMMAS, largest, strict=True) if value < plain]
    ratios = [run["stable"] * run["largest"] / 2 for of in runs.values() for run in of if math.isfinite(run["stable"])]
    best = GAMMAS[losses.index(min(losses))]
    return [
        (
            rises,
            f"The largest eigenvalue goes from {largest[0]:.3g} at gamma {GAMMAS[0]:g} to {largest[-1]:.3g} at "
            f"{GAMMAS[-1]:g}{', rising all the way' if rises else ', not monotonically'} (the paper: smaller gamma is "
            "flatter).",
        ),
        (
            len(flatter) == len(GAMMAS),
            f"Without batch norm it is {plain:.3g}; batch norm is flatter at gamma {', '.join(flatter) or 'none'} of "
            f"{', '.join(f'{gamma:g}' for gamma in GAMMAS)} (the paper: batch norm flattens).",
        ),
        (
            min(ratios) > 0.8 and max(ratios) < 1.25,
            f"The largest stable rate is {min(ratios):.2f} to {max(ratios):.2f} times 2 / eigenvalue (the theory: 1).",
        ),
        (
            best == GAMMAS[0],
            f"After equal steps the loss is least at gamma {best:g}: "
            + ", ".join(f"{loss:.3g} at {gamma:g}" for gamma, loss in zip(GAMMAS, losses, strict=True))
            + " (the paper: smaller gamma gives a lower loss).",
        ),
    ]
