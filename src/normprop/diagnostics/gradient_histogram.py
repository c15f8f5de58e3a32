"""Gradient histogram: are a weight's gradients alike, or do a few dwarf the rest?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.loss import gradients, labels_of
from normprop.diagnostics.plot import Line, Plot
from normprop.errors import ConfigError
from normprop.training.statistics import watched


@dataclass(frozen=True)
class GradientHistogram:
    """How the values of a gradient are distributed; see :func:`histogram`.

    Args:
        weight: name of the parameter, or "all".
        count: number of values.
        not_finite: how many of them are infinite or not a number; the rest is about the others.
        std: standard deviation of the values.
        kurtosis: fourth moment about the mean over the squared variance, 3 for a Gaussian; nan for equal values.
        peak: largest absolute value over the median one; infinite where more than half are 0, nan where all are.
        centres: of the bins, in standard deviations from the mean.
        density: of the values there, per standard deviation.
    """

    weight: str
    count: int
    not_finite: int
    std: float
    kurtosis: float
    peak: float
    centres: tuple[float, ...]
    density: tuple[float, ...]


def middle_weight(model: nn.Module) -> str:
    """Name the weight of the middle linear map of a network.

    Args:
        model: the network.

    Returns:
        Dotted name of the parameter.

    Raises:
        ConfigError: if the network has no linear map.

    Example:
        >>> middle_weight(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2)))
        '1.0.weight'
    """
    # A block holds a single linear map; its weight is the largest of its parameters with rows.
    rows = [[p for p in layer.parameters() if p.ndim >= 2] for _, layer in watched(model)]
    weights = [max(own, key=Tensor.numel) for own in rows if own]
    if not weights:
        raise ConfigError(f"{type(model).__name__}: the network has no linear map, so no weight to look at")
    middle = weights[len(weights) // 2]
    return next(name for name, parameter in model.named_parameters() if parameter is middle)


def histogram(values: Tensor, weight: str = "", bins: int = 81) -> GradientHistogram:
    r"""Distribution of the values of a gradient: histogram, kurtosis and peak.

    .. math:: \mathrm{kurtosis} = E[(g - \bar g)^4] / E[(g - \bar g)^2]^2, \qquad
        \mathrm{peak} = \max |g| / \mathrm{median} |g|

    Args:
        values: the gradient, any shape.
        weight: what it is by.
        bins: number of bins, which reach as far as the values.

    Returns:
        The distribution of the finite values.

    Raises:
        ConfigError: if there are no values.

    Source:
        Bjorck et al. 2018, Understanding Batch Normalization (heavy tails without normalisation).

    Example:
        >>> found = histogram(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
        >>> found.kurtosis, found.peak
        (1.0, 1.0)
    """
    if not values.numel():
        raise ConfigError(f"the gradient of {weight or 'the weight'} has no values")
    flat = values.detach().flatten().cpu().double()
    kept = flat[flat.isfinite()]
    lost = len(flat) - len(kept)
    if not len(kept):
        nan = math.nan
        return GradientHistogram(weight, len(flat), lost, nan, nan, nan, (), ())
    size = kept.abs().sort().values
    median = (size[(len(size) - 1) // 2] + size[len(size) // 2]) / 2
    # In units of the largest value: the fourth power of a small gradient leaves the range of numbers.
    largest = size[-1].clamp_min(torch.finfo(torch.float64).tiny)
    scaled = kept / largest
    scaled = scaled - scaled.mean()
    deviation = scaled.square().mean().sqrt()
    standard = scaled / deviation
    peak = (size[-1] / median).item()
    # Equal values deviate from their mean by no more than rounding.
    if deviation < 1e-12:
        return GradientHistogram(weight, len(flat), lost, 0.0, math.nan, peak, (), ())
    reach = standard.abs().max().item() * (1 + 1e-9)
    counts = torch.histc(standard, bins, -reach, reach)
    width = 2 * reach / bins
    return GradientHistogram(
        weight=weight,
        count=len(flat),
        not_finite=lost,
        std=(deviation * largest).item(),
        kurtosis=standard.pow(4).mean().item(),
        peak=peak,
        centres=tuple(-reach + (k + 0.5) * width for k in range(bins)),
        density=tuple((counts / (len(kept) * width)).tolist()),
    )


def measure(subject: Subject, weight: str = "middle", bins: int = 81) -> GradientHistogram:
    """Measure the distribution of the gradients of one weight of a network, or of all its parameters.

    Args:
        subject: network, inputs and labels.
        weight: name of a parameter, "middle" for the weight of the middle linear map, "all" for all parameters.
        bins: number of bins of the histogram.

    Returns:
        The distribution.

    Raises:
        ConfigError: without labels, or if there is no such parameter with a gradient.

    Example:
        >>> from normprop.models import create
        >>> subject = Subject("none", create("mlp", (4,), 3, norm="none"), torch.randn(8, 4), torch.arange(8) % 3)
        >>> measure(subject).weight
        '3.linear.weight'
    """
    name = middle_weight(subject.model) if weight == "middle" else weight
    _, found = gradients(subject.model, subject.inputs, labels_of(subject))
    if name == "all":
        return histogram(torch.cat([value.flatten() for value in found.values()]), name, bins)
    if name not in found:
        raise ConfigError(
            f"{subject.name}: no parameter {name!r} with a gradient; there are {', '.join(found)}, 'middle' and 'all'"
        )
    return histogram(found[name], name, bins)


def describe(results: Mapping[str, GradientHistogram]) -> Diagnosis:
    """Put the distributions of some networks side by side.

    Args:
        results: by network.

    Returns:
        What was found.

    Example:
        >>> describe({"none": histogram(torch.randn(1000))}).name
        'gradient-histogram'
    """
    lines = [
        Line(name, found.centres, [d if d > 0 else math.nan for d in found.density], style="line")
        for name, found in results.items()
        if found.centres
    ]
    points = [k / 10 for k in range(-45, 46)]
    normal = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in points]
    figure = Plot(
        "Distribution of the gradient's values",
        "gradient, in standard deviations from its mean",
        "density",
        (*lines, Line("normal distribution", points, normal, style="theory")),
        y_scale="log",
    )
    return Diagnosis(
        name="gradient-histogram",
        title="Are the gradients of a weight alike, or do a few dwarf the rest?",
        look_for=(
            "Tails far above the dashed curve of a normal distribution are rare, very large gradients: they force a "
            "small learning rate on all others."
        ),
        found=by_network(results, _words),
        numbers={
            name: {
                "weight": found.weight,
                "count": found.count,
                "not_finite": found.not_finite,
                "std": finite(found.std),
                "kurtosis": finite(found.kurtosis),
                "peak": finite(found.peak),
            }
            for name, found in results.items()
        },
        figures=(figure,),
        source="Bjorck et al. 2018, Understanding Batch Normalization (histograms of gradients at initialisation)",
    )


def _words(found: GradientHistogram) -> str:
    """What was found of one network."""
    where = "all parameters" if found.weight == "all" else found.weight or "one weight"
    if found.not_finite == found.count:
        return f"{where} has no finite gradient."
    lost = f" ({found.not_finite} of {found.count} are not finite)" if found.not_finite else ""
    if math.isnan(found.peak):
        return f"the gradients of {where} are all 0{lost}."
    if math.isnan(found.kurtosis):
        return f"the gradients of {where} are all equal{lost}."
    peak = f"{found.peak:.3g} times" if math.isfinite(found.peak) else "infinitely many times"
    return (
        f"the largest gradient of {where} is {peak} the median one, and the kurtosis is {found.kurtosis:.3g}, where a "
        f"normal distribution has 3{lost}."
    )
