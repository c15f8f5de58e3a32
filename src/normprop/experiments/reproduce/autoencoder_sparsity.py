"""Why regularised auto-encoders learn sparse codes: activation fraction against the coefficient."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop import data
from normprop.diagnostics.plot import Line, Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged
from normprop.experiments.sparse_autoencoders import COEFFICIENTS, patches, standardised, train

BATCH_SIZE, RATE = 50, 0.001


@dataclass(frozen=True)
class Case:
    """A curve of the paper's figures.

    Args:
        figure: its number.
        objective: name of the objective.
        activation: of the encoder.
        unit_norm: whether filters are kept at length 1.
        shape: how activation goes with the coefficient: "flat", "falls", "irregular", or "above": never below 0.1.
        printed: what the figure shows.
    """

    figure: int
    objective: str
    activation: str
    unit_norm: bool
    shape: str
    printed: str

    @property
    def name(self) -> str:
        """Objective, activation and constraint."""
        return f"{self.objective.upper()}, {self.activation}, {'unit' if self.unit_norm else 'free'} norm"


CASES = (
    Case(1, "mdae", "relu", True, "flat", "flat, .98 on MNIST, .28 on CIFAR-10"),
    Case(1, "dae", "relu", True, "falls", "falls below .05, then units die"),
    Case(2, "cae", "relu", False, "irregular", "unpredictable"),
    Case(2, "mdae", "relu", False, "irregular", "unpredictable"),
    Case(2, "dae", "relu", False, "above", "stays above .1"),
    Case(3, "edae", "relu", True, "falls", "falls"),
    Case(4, "mdae", "sigmoid", True, "falls", "falls steadily"),
    Case(4, "dae", "sigmoid", True, "falls", "falls steadily"),
    Case(4, "sae", "sigmoid", True, "falls", "falls steadily"),
    Case(5, "cae", "sigmoid", False, "irregular", "irregular"),
    Case(5, "mdae", "sigmoid", False, "irregular", "irregular"),
)


@dataclass(frozen=True)
class Scale:
    """How much is trained: samples (``None`` for the paper's), hidden units, epochs and coefficients."""

    samples: int | None
    hidden: int
    epochs: int
    coefficients: tuple[float, ...]


SCALES = {
    "small": Scale(5000, 200, 10, (0.0, 0.01, 0.09, 0.25, 0.49, 1.0)),
    "paper": Scale(None, 1000, 50, COEFFICIENTS),
}

Curves = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # by data and case: for each coefficient


def run(context: Context) -> Reproduction:
    """Train auto-encoders by every objective at every coefficient and count how often units are active.

    Args:
        context: scale, data and storage.

    Returns:
        Activation fraction against the coefficient.

    Source:
        Arpit, Zhou, Ngo & Govindaraju 2016, section 5, figures 1 to 5.
    """
    scale = SCALES[context.scale]
    seeds = context.seed_list(2 if context.scale == "small" else 3)
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, samples in (("MNIST", _mnist(context, scale)), ("CIFAR-10 patches", _patches(context, scale))):

        def measure(combination: Combination, samples: Tensor = samples) -> dict[str, Any] | None:
            number, coefficient = combination.method.split(" ")
            case = CASES[int(number)]
            record = train(
                case.objective,
                case.activation,
                float(coefficient),
                case.unit_norm,
                samples,
                scale.epochs,
                scale.hidden,
                combination.lr,
                combination.seed,
            )
            if record.diverged:
                return None
            last = record.epochs[-1]
            return {"active": last.activation_fraction, "dead": last.dead_share, "error": last.reconstruction}

        wanted = {
            (number, coefficient): [Combination(f"{number} {coefficient:g}", BATCH_SIZE, RATE, s) for s in seeds]
            for number in range(len(CASES))
            for coefficient in scale.coefficients
        }
        study = f"autoencoder-sparsity-{context.scale}-{name.split('-')[0].lower()}"
        settings = {"data": name, "samples": len(samples), "hidden": scale.hidden, "epochs": scale.epochs}
        found = context.measure(study, settings, [c for of in wanted.values() for c in of], measure)
        curves[name] = {
            case.name: [_point([found[c] for c in wanted[number, value]], value) for value in scale.coefficients]
            for number, case in enumerate(CASES)
        }
    agrees, contradicts = judged([_claim(case, name, of[case.name]) for case in CASES for name, of in curves.items()])
    return Reproduction(
        name="autoencoder-sparsity",
        title="The gradient of the encoder's bias decides how sparse a regularised auto-encoder becomes",
        paper="Arpit, Zhou, Ngo & Govindaraju 2016, section 5, figures 1 to 5",
        scale=context.scale,
        protocol=f"Tied auto-encoders of {scale.hidden} units, {scale.epochs} epochs of SGD with momentum 0.9, batch "
        f"size {BATCH_SIZE}, rate {RATE:g}, Glorot weights, biases 0, on {_count(scale)} standardised MNIST images and "
        "as many patches of 8x8 pixels of CIFAR-10. Activation fraction: share of the samples that activate a unit "
        "(above 0 for ReLU, 0.1 for sigmoid), mean over units. Coefficient: factor of the regulariser or variance of "
        f"the noise. {len(seeds)} seeds.",
        differs_from_paper="The paper has 1,000 units, 50 epochs, 50,000 samples and twelve coefficients."
        if context.scale == "small"
        else "Of the paper's rates, 0.001 and 0.005, only the first.",
        table=Table(
            (
                "figure",
                "objective",
                "data",
                f"at {scale.coefficients[0]:g}",
                f"at {scale.coefficients[-1]:g}",
                "printed",
            ),
            [
                (str(case.figure), case.name, name, _text(of[case.name][0]), _text(of[case.name][-1]), case.printed)
                for case in CASES
                for name, of in curves.items()
            ],
        ),
        figures=[_plot(name, activation, of) for name, of in curves.items() for activation in ("relu", "sigmoid")],
        agrees=agrees,
        contradicts=contradicts,
        numbers=dict(curves),
    )


def _count(scale: Scale) -> str:
    return "50,000" if scale.samples is None else f"{scale.samples:,}"


def _mnist(context: Context, scale: Scale) -> Tensor:
    images = data.load("mnist", context.data_dir).train.images[: scale.samples or 50_000]
    return standardised(images.float(), offset=0.1 * 255)


def _patches(context: Context, scale: Scale) -> Tensor:
    images = data.load("cifar10", context.data_dir).train.images
    cut = patches(images, scale.samples or 50_000, generator=torch.Generator().manual_seed(0))
    return standardised(cut.float())


def _point(measured: Sequence[Mapping[str, Any] | None], coefficient: float) -> dict[str, Any]:
    """Means over the seeds that stayed finite."""
    kept = [values for values in measured if values is not None]
    active = [values["active"] for values in kept]
    return {
        "coefficient": coefficient,
        "active": statistics.fmean(active) if active else None,
        "low": min(active, default=None),
        "high": max(active, default=None),
        "dead": statistics.fmean(values["dead"] for values in kept) if kept else None,
    }


def _text(point: Mapping[str, Any]) -> str:
    if point["active"] is None:
        return "diverged"
    return f"{point['active']:.3f}" + (f" ({100 * point['dead']:.0f} % dead)" if point["dead"] > 0.005 else "")


def _plot(name: str, activation: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Plot:
    lines = []
    for case in CASES:
        points = [point for point in curves[case.name] if point["active"] is not None]
        if case.activation == activation and points:
            x, y, low, high = ([point[key] for point in points] for key in ("coefficient", "active", "low", "high"))
            lines.append(Line(case.name, x, y, low, high))
    return Plot(f"{name}, {activation}", "coefficient", "activation fraction", lines)


def _claim(case: Case, name: str, points: Sequence[Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether a curve has the shape of the paper's figure."""
    active = [point["active"] for point in points if point["active"] is not None]
    if len(active) < len(points):
        return False, f"Figure {case.figure}, {case.name}, {name}: {len(points) - len(active)} coefficients diverged."
    noise = max(point["high"] - point["low"] for point in points)
    rises = [later - earlier for earlier, later in itertools.pairwise(active)]
    change = active[-1] - active[0]
    if change < -max(0.01, noise) and max(rises) <= max(noise, 0.005):
        seen = "falls"
    elif max(active) - min(active) <= max(0.02, noise):
        seen = "flat"
    else:
        seen = "irregular"
    return (
        seen == case.shape or (case.shape == "above" and min(active) >= 0.1),
        f"Figure {case.figure}, {case.name}, {name}: {active[0]:.3f} to {active[-1]:.3f}, {_SEEN[seen]} (the paper: "
        f"{case.printed}).",
    )


_SEEN = {"falls": "falling steadily", "flat": "flat", "irregular": "neither flat nor falling steadily"}
