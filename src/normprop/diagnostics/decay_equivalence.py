r"""Is weight decay before a normaliser anything but a learning rate? Two runs whose filters point the same way.

What follows a normaliser depends on the direction of a filter alone. A run without decay, with filters w', has the
directions of the run with decay, with filters w, when each filter's rate is

.. math:: \eta' = \eta \frac{c^2}{1 - \eta \lambda}, \qquad c = \|w'\| / \|w\|.

The poster's rule is :math:`\eta' = \eta c^2`. Four runs go side by side on the same batches: with decay, without it,
and without it by either rule.

Source:
    Hoffer, Banner, Golan & Soudry 2018, Norm Matters; the denominator is ours
    (:func:`normprop.training.effective_rate.mimic_decay`).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.loss import batches_of
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.quiet import quietly
from normprop.errors import ConfigError
from normprop.training import random_state
from normprop.training.effective_rate import mimic_decay
from normprop.training.filter_norms import filter_norms

Loss = Callable[[Tensor, Tensor], Tensor]

_ORTHOGONAL = 1e-3  # |cos(w, gradient)|: an eps of 1e-5 stays below, filters that are not scale-invariant do not


@dataclass(frozen=True)
class Equivalence:
    """How far the directions of runs without decay are from those of the run with decay.

    Args:
        rate: learning rate.
        decay: of the run with decay.
        weights: names of the weights compared.
        exact: largest angle between a filter and that of the run with decay, radians, after each step, with the exact
            rule.
        poster: the same with the poster's rule.
        none: the same without a correction.
        growth: geometric mean over filters of c after the last step, with the exact rule.
    """

    rate: float
    decay: float
    weights: tuple[str, ...]
    exact: tuple[float, ...]
    poster: tuple[float, ...]
    none: tuple[float, ...]
    growth: float


def scale_invariant(model: nn.Module, inputs: Tensor, labels: Tensor, loss: Loss = F.cross_entropy) -> tuple[str, ...]:
    """Find the weights whose filters may each have any length, in training mode.

    By Euler's theorem these are the weights of which every filter is orthogonal to its gradient.

    Args:
        model: the network; left as it is.
        inputs: a batch.
        labels: what the loss compares the outputs with.
        loss: mean over the batch.

    Returns:
        Names of parameters of two or more dimensions, in the network's order; filters lie along the first.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> scale_invariant(model, torch.randn(16, 4), torch.arange(16) % 2)
        ('0.weight',)
    """
    with quietly(model, inputs, grad=True) as twin:
        weights = {name: weight for name, weight in twin.named_parameters() if weight.ndim > 1 and weight.requires_grad}
        value = loss(twin.train()(inputs), labels)
        gradients = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return tuple(
        name
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        if gradient is not None and _orthogonal(weight.detach().flatten(1), gradient.flatten(1))
    )


def _orthogonal(weight: Tensor, gradient: Tensor) -> bool:
    """Whether each filter is orthogonal to its gradient; without a length or a gradient nothing tells."""
    lengths = weight.norm(dim=1) * gradient.norm(dim=1)
    product = (weight * gradient).sum(1).abs()
    return bool((weight.norm(dim=1) > 0).all() and lengths.max() > 0 and (product <= _ORTHOGONAL * lengths).all())


def decay_equivalence(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    rate: float = 0.1,
    decay: float = 0.05,
    steps: int = 200,
    momentum: float = 0.0,
    weights: Sequence[str] | None = None,
    loss: Loss = F.cross_entropy,
) -> Equivalence:
    """Train with decay and, in three ways, without it, and compare the directions of the filters.

    Only the weights compared decay; everything else trains alike. No layer is kept at unit length.

    Args:
        model: where all runs start; trained are copies, in training mode.
        batches: pairs of inputs and labels, taken in turn and again from the start.
        rate: learning rate of SGD.
        decay: of the run with decay, as torch's SGD takes it.
        steps: updates of each run.
        momentum: of SGD; the exact rule then has a form of its own.
        weights: names of the weights that decay, filters along the first axis; ``None`` for :func:`scale_invariant`.
        loss: mean over a batch.

    Returns:
        Angles after each step. In exact arithmetic those of the exact rule are 0 where a layer is exactly
        scale-invariant; training amplifies rounding and the eps of a normaliser, the more the larger the step.

    Raises:
        ConfigError: if there is nothing to train on or no such weight, or rate times decay is too large.

    Source:
        Hoffer et al. 2018.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, eps=1e-12), nn.ReLU(), nn.Linear(8, 2)).double()
        >>> batch = torch.randn(16, 4).double(), torch.arange(16) % 2
        >>> found = decay_equivalence(model, [batch], steps=5)
        >>> found.exact[-1] < 1e-9 < 1e-6 < found.poster[-1] < found.none[-1]
        True
    """
    if not batches or steps < 1:
        raise ConfigError(f"decay_equivalence: {len(batches)} batches and {steps} steps; expected at least one of each")
    names = scale_invariant(model, *batches[0], loss) if weights is None else tuple(weights)
    parameters = dict(model.named_parameters())
    if not names:
        raise ConfigError(
            "decay_equivalence: no weight has filters of any length; expected a norm per channel after a linear map "
            "(batch, weight, normprop) in training mode; or name the weights"
        )
    if unknown := [name for name in names if name not in parameters or parameters[name].ndim < 2]:
        raise ConfigError(f"decay_equivalence: {unknown[0]!r} is no weight of this network with filters; see weights=")
    # Read by the two corrections at the step that is being taken, and filled in just before it.
    record = {name: torch.ones(steps, len(parameters[name]), dtype=torch.float64) for name in names}
    decayed = _Run(model, names, rate, momentum, decay)
    plain = {name: _Run(model, names, rate, momentum, 0.0) for name in ("exact", "poster", "none")}
    mimic_decay(plain["exact"].optimizer, plain["exact"].weights, record, decay)
    mimic_decay(plain["poster"].optimizer, plain["poster"].weights, record, 0.0)
    angles: dict[str, list[float]] = {name: [] for name in plain}
    with random_state.preserved():
        for step in range(steps):
            for name in names:
                record[name][step] = filter_norms(decayed.weights[name])
            for run in (decayed, *plain.values()):
                random_state.seed(step)  # the same dropout masks in all runs
                run.step(*batches[step % len(batches)], loss)
            for name, run in plain.items():
                angles[name].append(max(_angle(run.weights[w], decayed.weights[w]) for w in names))
    ratios = [filter_norms(plain["exact"].weights[name]) / filter_norms(decayed.weights[name]) for name in names]
    growth = torch.cat(ratios).log().mean().exp().item()
    return Equivalence(rate, decay, names, **{name: tuple(values) for name, values in angles.items()}, growth=growth)


class _Run:
    """A copy of a network and its optimiser."""

    def __init__(self, model: nn.Module, names: Sequence[str], rate: float, momentum: float, decay: float) -> None:
        self.model = copy.deepcopy(model).train()
        parameters = dict(self.model.named_parameters())
        self.weights = {name: parameters[name] for name in names}
        rest = [parameter for name, parameter in parameters.items() if name not in self.weights]
        groups: list[dict[str, Any]] = [
            {"params": list(self.weights.values()), "weight_decay": decay},
            {"params": rest},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum)

    def step(self, inputs: Tensor, labels: Tensor, loss: Loss) -> None:
        with torch.enable_grad():
            self.optimizer.zero_grad()
            loss(self.model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()


def _angle(weight: Tensor, other: Tensor) -> float:
    """Largest angle between filters; from the chord, because 1 - cos of an angle below 1e-8 is rounding."""
    a, b = (F.normalize(w.detach().double().flatten(1), dim=1, eps=0.0) for w in (weight, other))
    chord = (a - b).norm(dim=1).max()
    return 2 * math.asin(min(chord.item() / 2, 1.0)) if chord.isfinite() else math.nan


def measure(
    subject: Subject, rate: float = 0.02, decay: float = 0.1, steps: int = 40, batch_size: int = 16
) -> Equivalence:
    """Ask a network, in double precision, so that what is left of the angles is not rounding of the inputs' type.

    Args:
        subject: the network, a batch and its labels.
        rate: learning rate of SGD.
        decay: of the run with decay.
        steps: updates of each run.
        batch_size: samples per update, out of the subject's inputs.

    Returns:
        What :func:`decay_equivalence` found.

    Raises:
        ConfigError: without labels, or as :func:`decay_equivalence`.

    Example:
        >>> from normprop import models
        >>> _ = torch.manual_seed(0)
        >>> model = models.create("mlp", (6,), 2, norm="batch", width=0.05)
        >>> subject = Subject("batch", model, torch.randn(64, 6), torch.arange(64) % 2)
        >>> found = measure(subject, steps=3)
        >>> len(found.weights), len(found.none)
        (4, 3)
    """
    inputs = subject.inputs.double() if subject.inputs.is_floating_point() else subject.inputs
    batches = batches_of(replace(subject, inputs=inputs), batch_size)
    return decay_equivalence(copy.deepcopy(subject.model).double(), batches, rate, decay, steps)


def describe(results: Mapping[str, Equivalence]) -> Diagnosis:
    """Say how far from the run with decay each correction stays.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers and a plot of the angles for each correction.

    Example:
        >>> found = Equivalence(0.1, 0.05, ("0.weight",), (1e-15,), (1e-5,), (1e-2,), 1.5)
        >>> describe({"batch": found}).found
        "batch: with learning rates corrected by the exact rule, filters trained without decay are at most 1e-15 rad
        from those trained with it (poster's rule 1e-05, no correction 0.01), in 1 step at rate 0.1 and decay 0.05."
    """
    return Diagnosis(
        name="decay-equivalence",
        title="Is weight decay before a normaliser only a learning rate?",
        look_for="With the exact rule the filters should stay with those of the run with decay, but for rounding and "
        "the normaliser's eps, which training amplifies; without a correction they should leave them.",
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=[
            _plot("No correction", {name: found.none for name, found in results.items()}),
            _plot("Poster's rule", {name: found.poster for name, found in results.items()}),
            _plot("Exact rule", {name: found.exact for name, found in results.items()}),
        ],
        source="Hoffer, Banner, Golan & Soudry 2018, Norm Matters; the exact rule is ours",
    )


def _words(found: Equivalence) -> str:
    """What was found of one network."""
    return (
        f"with learning rates corrected by the exact rule, filters trained without decay are at most "
        f"{_peak(found.exact):.2g} rad from those trained with it (poster's rule {_peak(found.poster):.2g}, no "
        f"correction {_peak(found.none):.2g}), in {len(found.exact)} step{'s' if len(found.exact) > 1 else ''} at rate "
        f"{found.rate:g} and decay {found.decay:g}."
    )


def _peak(values: Sequence[float]) -> float:
    """Largest angle of the run; the last one may be small because all runs have reached the same minimum."""
    return max(values) if all(map(math.isfinite, values)) else math.nan


def _plot(title: str, angles: Mapping[str, Sequence[float]]) -> Plot:
    """Angles against steps; a log axis has no place for 0."""
    lines = [
        Line(name, range(1, len(values) + 1), [value or math.nan for value in values], style="line")
        for name, values in angles.items()
    ]
    return Plot(title, "step", "largest angle to the run with decay, rad", lines, y_scale="log")


def _numbers(found: Equivalence) -> dict[str, float | int | list[float | None] | None]:
    return {
        "rate": found.rate,
        "decay": found.decay,
        "weights": len(found.weights),
        "growth of the filters": finite(found.growth),
        "largest angle, exact rule": finite(_peak(found.exact)),
        "largest angle, poster's rule": finite(_peak(found.poster)),
        "largest angle, no correction": finite(_peak(found.none)),
        "exact rule": [finite(value) for value in found.exact],
        "poster's rule": [finite(value) for value in found.poster],
        "no correction": [finite(value) for value in found.none],
    }
