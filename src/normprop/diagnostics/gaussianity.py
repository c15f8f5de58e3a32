"""Are pre-activations Gaussian? What goes into each activation of a network, unit by unit.

Everything that predicts moments by layers (Normalization Propagation, self-normalising and norm-free networks) takes
pre-activations as Gaussian. A weighted sum is nearly so if no weight dominates and its inputs are nearly independent:
the excess kurtosis of ``w . x`` for independent x of excess kurtosis k is ``k sum(w^4) / sum(w^2)^2``.

Source:
    Arpit et al. 2016, section 3 (the assumption); Jarque & Bera 1980 (standard errors); Lilliefors 1967 (the distance).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.preactivations import preactivations
from normprop.errors import ConfigError

LEVELS = tuple((step + 0.5) / 101 for step in range(101))
"""Probabilities of the quantiles."""
_POSITIONS = 64


@dataclass(frozen=True)
class Statistics:
    """How some samples are distributed; float64, of shape () or (units,).

    Args:
        mean: their mean.
        std: their standard deviation, dividing by the count.
        skew: mean of z^3 for standardised values z; 0 of a Gaussian, nan of constants.
        kurtosis: mean of z^4, less 3: the excess kurtosis; 0 of a Gaussian.
        distance: largest distance between the distribution of z and that of N(0, 1), of Kolmogorov and Smirnov; of n
            Gaussian values about 0.9 / sqrt(n) or less, 19 times out of 20.
    """

    mean: Tensor
    std: Tensor
    skew: Tensor
    kurtosis: Tensor
    distance: Tensor


def statistics(values: Tensor) -> Statistics:
    """Describe samples along the last axis.

    Args:
        values: (..., n).

    Returns:
        The statistics, each (...).

    Source:
        Lilliefors 1967, for the distance.

    Example:
        >>> found = statistics(torch.tensor([-1.0, 1.0, -1.0, 1.0]))  # two points are as light-tailed as can be
        >>> found.std.item(), found.skew.item(), found.kurtosis.item(), round(found.distance.item(), 3)
        (1.0, 0.0, -2.0, 0.341)
    """
    values = values.double()
    mean, std = values.mean(-1), values.std(-1, correction=0)
    z = _standardised(values)
    expected = torch.special.ndtr(z.sort(-1).values)
    count = values.shape[-1]
    steps = torch.arange(count + 1, dtype=torch.float64, device=values.device) / count
    distance = torch.maximum(steps[1:] - expected, expected - steps[:-1]).amax(-1)
    return Statistics(mean, std, z.pow(3).mean(-1), z.pow(4).mean(-1) - 3.0, distance)


def _standardised(values: Tensor) -> Tensor:
    """Values less their mean, in units of their standard deviation; nan where they are constant."""
    centred = values - values.mean(-1, keepdim=True)
    std = centred.square().mean(-1, keepdim=True).sqrt()
    return centred / torch.where(std > 1e-6 * values.abs().amax(-1, keepdim=True), std, math.nan)


def effective(values: Tensor, power: int) -> Tensor:
    r"""Count the independent values among those of units: :math:`n = N P^2 / \sum_{pq}\rho_{pq}^k`.

    Samples are independent, positions are not. Of a Gaussian signal with correlations rho between positions the mean of
    the Hermite polynomial of degree k has the variance that n independent values would give: k = 3 for the skew, k = 4
    for the excess kurtosis. Correlations are estimated, which makes n a little too small at few samples.

    Args:
        values: (N, units, P).
        power: k.

    Returns:
        Between about N and N P, (units,).

    Example:
        >>> same = torch.randn(100, 1, 1, dtype=torch.float64).expand(100, 1, 9)  # nine copies count once
        >>> round(effective(same, 3).item(), 6)
        100.0
    """
    samples, units, positions = values.shape
    z = _standardised(values.double().transpose(0, 1).flatten(1)).view(units, samples, positions)
    total = (z.mT @ z / samples).pow(power).sum((1, 2))
    return samples * positions**2 / total.clamp_min(positions)


@dataclass(frozen=True)
class Gaussianity:
    """Pre-activations of one layer against Gaussians.

    Args:
        layer: name from :func:`~normprop.diagnostics.preactivations.preactivations`.
        units: statistics of each unit over samples and positions, (units,).
        pooled: statistics of all values together, in which differences between units count, ().
        skew_error: standard error of a Gaussian's skew, sqrt(6 / n) at the :func:`effective` n, (units,).
        kurtosis_error: standard error of a Gaussian's excess kurtosis, sqrt(24 / n), (units,).
        quantiles: of the values at :data:`LEVELS`, each unit standardised on its own.
        count: values per unit.
    """

    layer: str
    units: Statistics
    pooled: Statistics
    skew_error: Tensor
    kurtosis_error: Tensor
    quantiles: Tensor
    count: int

    @property
    def within(self) -> float:
        """Share of units whose skew and kurtosis are both within 2 standard errors; of Gaussians about 0.91."""
        near = (self.units.skew.abs() <= 2 * self.skew_error) & (self.units.kurtosis.abs() <= 2 * self.kurtosis_error)
        return near.double().mean().item()


def gaussianity(values: Tensor, layer: str = "", limit: int = 4096) -> Gaussianity:
    """Compare the values of some units with Gaussians.

    Args:
        values: (N, units, P): samples, units and positions of a map, or (N, units).
        layer: name.
        limit: values per unit at most, from positions (64 at most) and samples at equal distances.

    Returns:
        The comparison, on the CPU in float64.

    Raises:
        ConfigError: for other shapes or fewer than two samples.

    Example:
        >>> found = gaussianity(torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)))
        >>> bool((found.units.skew.abs() < 3 * found.skew_error).all()), round(found.skew_error[0].item(), 4)
        (True, 0.0775)
    """
    if values.ndim not in (2, 3) or len(values) < 2 or not values.numel() or limit < 2:
        raise ConfigError(
            f"gaussianity: {layer or 'values'} of shape {tuple(values.shape)}, at most {limit} per unit; expected "
            f"(samples, units[, positions]) with at least 2 samples"
        )
    values = values.detach().unsqueeze(2) if values.ndim == 2 else values.detach()
    samples = _spread(len(values), limit)
    positions = _spread(values.shape[2], min(_POSITIONS, max(1, limit // len(samples))))
    values = values[samples.to(values.device)][..., positions.to(values.device)].cpu().double()
    units = values.transpose(0, 1).flatten(1)
    z = _standardised(units).flatten()
    z = z[z.isfinite()].sort().values
    level = torch.tensor(LEVELS, dtype=torch.float64)
    return Gaussianity(
        layer=layer,
        units=statistics(units),
        pooled=statistics(units.flatten()),
        skew_error=(6.0 / effective(values, 3)).sqrt(),
        kurtosis_error=(24.0 / effective(values, 4)).sqrt(),
        quantiles=z[(level * len(z)).long()] if len(z) else torch.full_like(level, math.nan),
        count=units.shape[1],
    )


def _spread(count: int, most: int) -> Tensor:
    """Indices at equal distances, all of them if that is not too many."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def measure(subject: Subject, limit: int = 4096) -> tuple[Gaussianity, ...]:
    """Compare what goes into each activation of a network with Gaussians.

    Args:
        subject: the network and a batch; a hundred samples or more tell apart skews of 0.5.
        limit: values per unit at most.

    Returns:
        One comparison for each call of an activation, from the input on.

    Raises:
        ConfigError: without activations, or for fewer than two samples.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> [found.layer for found in measure(Subject("net", model, torch.randn(16, 4)))]
        ['1']
    """
    found = preactivations(subject.model, subject.inputs, lambda values: gaussianity(values, subject.name, limit))
    return tuple(dataclasses.replace(value, layer=layer) for layer, value in found.items())


def describe(results: Mapping[str, Sequence[Gaussianity]]) -> Diagnosis:
    """Say how far from Gaussian the pre-activations of some networks are.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of skew, excess kurtosis and the quantiles of the least Gaussian layers.

    Example:
        >>> values = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> describe({"net": [gaussianity(values, "0")]}).found
        'net: 67% of the units are Gaussian as far as their skew and kurtosis tell (of exact Gaussians 91% would be);
        least Gaussian are those of layer 0 (median |skew| 0.16, excess kurtosis 0.48, distance 0.03).'
    """
    least = {name: max(layers, key=_distance) for name, layers in results.items() if layers}
    ideal = torch.special.ndtri(torch.tensor(LEVELS, dtype=torch.float64)).tolist()
    return Diagnosis(
        name="gaussianity",
        title="Are pre-activations Gaussian?",
        look_for="Skew and excess kurtosis inside the band of sampling errors around 0, and quantiles on the dashed "
        "diagonal: then the moments that are predicted for Gaussians hold.",
        found=by_network({name: results[name] for name in least}, _words) or "No pre-activations were looked at.",
        numbers={name: [_numbers(found) for found in layers] for name, layers in results.items()},
        figures=[
            _profile("Skew, band: 2 standard errors", "|skew|, median unit", results, "skew", torch.abs),
            _profile(
                "Tails, band: 2 standard errors", "excess kurtosis, median unit", results, "kurtosis", torch.clone
            ),
            Plot(
                "Quantiles in the least Gaussian layer",
                "Gaussian, standard deviations",
                "pre-activation, its unit's standard deviations",
                [Line(name, ideal, found.quantiles.tolist(), style="line") for name, found in least.items()]
                + [Line("", ideal, ideal, style="theory")],
            ),
        ],
        source="Arpit et al. 2016, Normalization Propagation, section 3",
    )


def _words(layers: Sequence[Gaussianity]) -> str:
    """What was found in one network."""
    least = max(layers, key=_distance)
    return (
        f"{100 * _within(layers):.0f}% of the units are Gaussian as far as their skew and kurtosis tell (of exact "
        f"Gaussians 91% would be); least Gaussian are those of layer {least.layer} (median |skew| "
        f"{_median(least.units.skew.abs()):.2g}, excess kurtosis {_median(least.units.kurtosis):.2g}, distance "
        f"{_distance(least):.2g})."
    )


def _profile(title: str, label: str, results: Mapping[str, Sequence[Gaussianity]], field: str, pick: Any) -> Plot:
    """Median over units by layer, and the band of sampling errors of a Gaussian, the widest of the networks."""
    lines = [
        Line(name, range(1, len(layers) + 1), [_median(pick(getattr(found.units, field))) for found in layers])
        for name, layers in results.items()
    ]
    depth = max((len(layers) for layers in results.values()), default=0)
    errors = [
        [2 * _median(getattr(layers[layer], f"{field}_error")) for layers in results.values() if layer < len(layers)]
        for layer in range(depth)
    ]
    width = [max((error for error in row if math.isfinite(error)), default=math.nan) for row in errors]
    low = [-error for error in width] if pick(torch.tensor(-1.0)) < 0 else [0.0] * depth
    band = Line("", range(1, depth + 1), [0.0] * depth, low, width, style="theory")
    return Plot(title, "activation, from the input", label, [*lines, band])


def _median(values: Tensor) -> float:
    """Median of what is finite."""
    return values[values.isfinite()].quantile(0.5).item() if values.isfinite().any() else math.nan


def _distance(found: Gaussianity) -> float:
    """Median distance over units; the largest there is where no unit has one."""
    distance = _median(found.units.distance)
    return distance if math.isfinite(distance) else 1.0


def _within(layers: Sequence[Gaussianity]) -> float:
    units = [len(found.units.mean) for found in layers]
    return sum(found.within * count for found, count in zip(layers, units, strict=True)) / sum(units)


def _numbers(found: Gaussianity) -> dict[str, Any]:
    fields = ("mean", "std", "skew", "kurtosis", "distance")
    return {
        "layer": found.layer,
        "values per unit": found.count,
        "units": len(found.units.mean),
        "units within 2 standard errors": found.within,
        "median over units": {field: finite(_median(getattr(found.units, field))) for field in fields}
        | {"|skew|": finite(_median(found.units.skew.abs()))},
        "pooled": {field: finite(getattr(found.pooled, field).item()) for field in fields},
        "standard error": {
            "skew": finite(_median(found.skew_error)),
            "kurtosis": finite(_median(found.kurtosis_error)),
        },
    }
