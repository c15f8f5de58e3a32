r"""What weight decay does a norm amount to on noisy inputs? Two networks whose first layers point the same way.

For a linear unit behind a batch norm the answer is known, see :mod:`.auto_rate`: noise of variance s^2 on the inputs
turns its weight as a ridge coefficient of s^2 does without the norm. Other networks are trained and compared.

Source:
    Annamalai & Thakur 2022 for the claim; the probe is ours.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.diagnostics.auto_rate import auto_rate
from normprop.diagnostics.diagnosis import Diagnosis, by_network, finite
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.errors import ConfigError
from normprop.training import random_state
from normprop.training.statistics import watched

Loss = Callable[[Tensor, Tensor], Tensor]


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error, the loss that makes decay and ridge coefficient one number.

    Args:
        output: (samples, 1) or (samples,).
        target: (samples,).

    Example:
        >>> squared_error(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
        tensor(1.)
    """
    return 0.5 * (output.reshape(-1) - target).square().mean()


@dataclass(frozen=True)
class EquivalentRidge:
    """Which ridge makes the weights of a plain network point like those of a normalised one on noisy inputs.

    Args:
        noises: variances of the noise.
        ridges: coefficients tried, in ascending order.
        distances: mean over units of 1 - cos between the first layers' filters, (noises, ridges).
        ridge: for each noise the coefficient of least distance, between those tried by a parabola.
        rates: for each noise the multiplier of a linear unit on the same data with targets of variance 1, its mean over
            the classes if the targets are classes; nan without any.
    """

    noises: tuple[float, ...]
    ridges: tuple[float, ...]
    distances: tuple[tuple[float, ...], ...]
    ridge: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def distance(self) -> tuple[float, ...]:
        """Least distance for each noise."""
        return tuple(min(row) for row in self.distances)


def equivalent_ridge(
    normalized: nn.Module,
    plain: nn.Module,
    X: Tensor,
    y: Tensor,
    noises: Sequence[float],
    ridges: Sequence[float],
    loss: Loss = F.cross_entropy,
    steps: int = 500,
    batch_size: int = 128,
    lr: float = 0.1,
    seed: int = 0,
) -> EquivalentRidge:
    r"""Train a normalised network on noisy inputs and a plain one with L2, and match their first layers.

    The plain network starts from the normalised one's weights and sees clean inputs; its first weight alone has the
    penalty :math:`\tfrac12 \rho \|W\|^2`. Both are trained by SGD with momentum 0.9, a linear schedule and the same
    batches. For a linear unit (``nn.Linear(d, 1)`` with and without a batch norm without affine parameters, loss
    :func:`squared_error`) the answer is :math:`\rho = s^2`, whatever the data, once both have converged: a direction
    in which inputs, noise and ridge come to little needs many steps.

    Args:
        normalized: with a norm after its first linear map; left as it is.
        plain: the same without it; left as it is.
        X: inputs, (samples, ...).
        y: targets, (samples,): classes, or numbers with a loss for them.
        noises: variances of Gaussian noise added to every input, anew at each step.
        ridges: coefficients to try, above 0.
        loss: mean over a batch.
        steps: updates of each run.
        batch_size: samples per update; all of them if there are no more.
        lr: learning rate at the start.
        seed: of batches and noise.

    Returns:
        Distances for all pairs, and the best coefficient for each noise.

    Raises:
        ConfigError: if there is nothing to compare, or the networks do not fit.

    Source:
        Ours, for Annamalai & Thakur 2022.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> X = torch.randn(256, 3) * torch.tensor([0.3, 1.0, 3.0])
        >>> normalized = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1, affine=False))
        >>> ridges = [0.1, 0.3, 1.0]
        >>> found = equivalent_ridge(normalized, nn.Linear(3, 1), X, X.sum(1), [0.3], ridges, squared_error, steps=200)
        >>> 0.25 < found.ridge[0] < 0.35
        True
    """
    _require(X, y, noises, ridges, steps)
    start, plain = _weights(normalized), copy.deepcopy(plain)
    shapes = [tuple(weight.shape) for weight in start]
    if shapes != [tuple(weight.shape) for weight in _weights(plain)] or not shapes:
        raise ConfigError(
            f"equivalent_ridge: {type(normalized).__name__} has weights of shapes {shapes}, the plain network "
            f"{[tuple(weight.shape) for weight in _weights(plain)]}; expected networks that differ in their norm alone"
        )
    with torch.no_grad():
        for weight, value in zip(_weights(plain), start, strict=True):
            weight.copy_(value)
    rungs = tuple(sorted(ridges))

    def train(model: nn.Module, noise: float, ridge: float) -> Tensor:
        return _train(model, X, y, noise, ridge, loss, steps, min(batch_size, len(X)), lr, seed)

    with random_state.preserved():
        ridged = [train(plain, 0.0, ridge) for ridge in rungs]
        noisy = [train(normalized, noise, 0.0) for noise in noises]
    rows = tuple(tuple(_distance(a, b) for b in ridged) for a in noisy)
    return EquivalentRidge(
        tuple(noises), rungs, rows, tuple(_least(rungs, row) for row in rows), tuple(_rate(X, y, s) for s in noises)
    )


def _require(X: Tensor, y: Tensor, noises: Sequence[float], ridges: Sequence[float], steps: int) -> None:
    if len(X) < 2 or y.shape != X.shape[:1]:
        raise ConfigError(
            f"equivalent_ridge: X has shape {tuple(X.shape)} and y {tuple(y.shape)}; expected (samples, ...) and "
            "(samples,), at least 2"
        )
    if not noises or min(noises) < 0 or not ridges or min(ridges) <= 0 or steps < 1:
        raise ConfigError(
            f"equivalent_ridge: noises {list(noises)}, ridges {list(ridges)}, {steps} steps; expected variances of at "
            "least 0, coefficients above 0 and steps, at least one of each"
        )


def _weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear maps, from the input on."""
    return [parameter for _, layer in watched(model) for parameter in layer.parameters() if parameter.ndim > 1]


def _train(
    model: nn.Module,
    X: Tensor,
    y: Tensor,
    noise: float,
    ridge: float,
    loss: Loss,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Tensor:
    """Train a copy; return its first weight, a row for each unit."""
    random_state.seed(seed)
    model = copy.deepcopy(model).train()
    weight = _weights(model)[0]
    rest = [parameter for parameter in model.parameters() if parameter is not weight]
    groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": ridge}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for step in range(steps):
            if len(waiting) < batch_size:
                waiting = torch.randperm(len(X), generator=order)
            batch, waiting = waiting[:batch_size].to(X.device), waiting[batch_size:]
            inputs = X[batch]
            if noise:
                inputs = inputs + math.sqrt(noise) * torch.randn_like(inputs)
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            loss(model(inputs), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return weight.detach().double().flatten(1)


def _distance(a: Tensor, b: Tensor) -> float:
    """Mean over units of 1 - cos."""
    return float((1 - F.cosine_similarity(a, b, dim=1)).mean())


def _least(ridges: Sequence[float], distances: Sequence[float]) -> float:
    """Ridge of least distance: the vertex of the parabola in log ridge through the least one and its neighbours."""
    if not all(map(math.isfinite, distances)):
        return math.nan
    at = min(range(len(ridges)), key=distances.__getitem__)
    if not 0 < at < len(ridges) - 1:
        return ridges[at]
    x = [math.log(ridge) for ridge in ridges[at - 1 : at + 2]]
    d = distances[at - 1 : at + 2]
    left, right = (d[1] - d[0]) / (x[1] - x[0]), (d[2] - d[1]) / (x[2] - x[1])
    if right <= left:
        return ridges[at]
    return math.exp((x[0] + x[1]) / 2 - left * (x[2] - x[0]) / 2 / (right - left))


def _rate(X: Tensor, y: Tensor, noise: float) -> float:
    """Mean multiplier of linear units for targets of variance 1: y itself, or an indicator of each class."""
    targets = [y.double()] if y.is_floating_point() else [(y == label).double() for label in y.unique()]
    scaled = [target / target.std(correction=0) for target in targets if target.std(correction=0) > 0]
    rates = [auto_rate(X.flatten(1), target, noise).rate for target in scaled]
    return sum(rates) / len(rates) if rates else math.nan


def describe(results: Mapping[str, EquivalentRidge]) -> Diagnosis:
    """Say which ridge noisy inputs amount to behind a norm.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of the equivalent ridge, of the least distance and of the multiplier.

    Example:
        >>> found = EquivalentRidge((0.1, 0.4), (0.1, 0.3), ((0.0, 0.2), (0.3, 0.1)), (0.1, 0.3), (-0.2, -0.3))
        >>> describe({"linear": found}).found
        'linear: noise of variance 0.1 to 0.4 on the inputs turns the first weights as a weight decay of 0.1 to 0.3 (at
        an end of the grid) does without the norm; what is left of the angle has 1 - cos of at most 0.1. For a linear
        unit on the same data the multiplier is -0.2 to -0.3.'
    """
    noises = sorted({noise for found in results.values() for noise in found.noises if noise > 0})
    ridge = [Line(name, found.noises, found.ridge) for name, found in results.items()]
    theory = [Line("linear unit, theory", noises, noises, style="theory")] if noises else []
    least = [Line(name, found.noises, found.distance) for name, found in results.items()]
    rates = [Line(name, found.noises, found.rates) for name, found in results.items()]
    variance = "variance of the noise on each input"
    return Diagnosis(
        name="equivalent-ridge",
        title="What weight decay does a norm amount to on noisy inputs?",
        look_for="The more noise, the larger the weight decay (ridge coefficient) that does the same without the norm; "
        "for a linear unit the two are equal, and its multiplier, the rate of regularisation, falls with the noise.",
        found=by_network(results, _words),
        numbers={name: _numbers(found) for name, found in results.items()},
        figures=[
            Plot("Equivalent ridge", variance, "ridge coefficient", [*ridge, *theory], "log", "log"),
            Plot("Distance that is left", variance, "1 - cos, mean over units", least, "log"),
            Plot("Multiplier of a linear unit", variance, "multiplier", rates, "log", references=[Reference(0.0)]),
        ],
        source="Annamalai & Thakur 2022, arXiv 2209.07587, for the claim; formulas and probe are ours",
    )


def _words(found: EquivalentRidge) -> str:
    """What was found of one network."""
    order = sorted(range(len(found.noises)), key=found.noises.__getitem__)
    noises, ridges, rates = ([values[at] for at in order] for values in (found.noises, found.ridge, found.rates))
    ends = " (at an end of the grid)" if {*found.ridge} & {found.ridges[0], found.ridges[-1]} else ""
    return (
        f"noise of variance {_span(noises)} on the inputs turns the first weights as a weight decay of {_span(ridges)}"
        f"{ends} does without the norm; what is left of the angle has 1 - cos of at most {max(found.distance):.2g}. "
        f"For a linear unit on the same data the multiplier is {_span(rates)}."
    )


def _span(values: Sequence[float]) -> str:
    """First and last of some numbers."""
    return f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"


def _numbers(found: EquivalentRidge) -> dict[str, Any]:
    def row(values: Sequence[float]) -> list[float | None]:
        return [finite(value) for value in values]

    return {
        "noise variance": row(found.noises),
        "equivalent ridge": row(found.ridge),
        "least distance": row(found.distance),
        "multiplier of a linear unit": row(found.rates),
        "ridges": row(found.ridges),
        "distances": [row(values) for values in found.distances],
    }
