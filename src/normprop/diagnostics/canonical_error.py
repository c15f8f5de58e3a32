"""How far is the covariance of a layer's pre-activations from the diagonal one that normalising each unit assumes?

Proposition 1: for u = W x with E x = 0 and E xx^T = sigma^2 I, the closest diagonal matrix to Cov(u) is that of
sigma^2 ||W_i||^2, which dividing by ||W_i|| turns into sigma^2 I, and what is left is bounded by the coherence of the
rows. Filters of different groups of a convolution see different inputs, which the assumption makes uncorrelated: only
pairs within a group count, in the error as in its bounds.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.linear_calls import LinearCall, Watching
from normprop.diagnostics.plot import Line, Plot
from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError
from normprop.functional import normalize_weight
from normprop.fused import at_least_float32
from normprop.nn import NormPropLayer

_ROWS = 1024  # of the Gram matrix at a time


@dataclass(frozen=True)
class CanonicalError:
    """Both sides of Proposition 1 for one weight.

    Args:
        filters: number of rows m, over all groups.
        fan_in: their length n.
        error: left side, min over alpha of ||Cov(u) - diag(alpha)||_F = sigma^2 sqrt(sum_{i != j} (W_i.W_j)^2).
        tight: right side of the paper, sigma^2 mu sqrt(sum_{i != j} ||W_i||^2 ||W_j||^2).
        loose: right side of its supplement, with the number of pairs, m (m - 1), under the root.
        diagonal: ||diag(alpha)||_F at the minimum, alpha_i = sigma^2 ||W_i||^2.
        coherence: mu, the largest |cosine| between two rows of a group; 0 if there are no two.
        welch: smallest coherence that so many rows can have in so many dimensions.
    """

    filters: int
    fan_in: int
    error: float
    tight: float
    loose: float
    diagonal: float
    coherence: float
    welch: float


@dataclass(frozen=True)
class LayerError:
    """Proposition 1 in one layer of a network.

    Args:
        layer: dotted path of the module that applies the weight.
        assumed: both sides for inputs as the proposition assumes them, sigma^2 being the mean variance of the real
            (1 where these do not vary, as a single sample).
        measured: left side with the covariance of the pre-activations on the layer's real inputs, over all pairs of
            rows; nan with fewer than 4 samples.
    """

    layer: str
    assumed: CanonicalError
    measured: float


def canonical_error(
    weight: Tensor, variance: float = 1.0, groups: int = 1, dimensions: int | None = None
) -> CanonicalError:
    """Work out both sides of Proposition 1, min ||Sigma - diag(alpha)||_F <= sigma^2 mu sqrt(sum ||W_i||^2 ||W_j||^2).

    Args:
        weight: (out, in / groups, *kernel).
        variance: sigma^2 of the input's elements.
        groups: number of groups of the convolution.
        dimensions: of the space that the rows lie in; by default their length, one less for centred rows.

    Returns:
        Both sides, with the supplement's looser one, coherence and its Welch bound.

    Raises:
        ConfigError: for a weight without rows, groups that do not divide them or a negative variance.

    Source:
        Arpit et al. 2016, Proposition 1: equation 3, and equation 15 of the supplement.

    Example:
        >>> found = canonical_error(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
        >>> round(found.error, 6), round(found.tight, 6), round(found.coherence, 6)
        (0.848528, 0.848528, 0.6)
    """
    if weight.ndim < 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ConfigError(
            f"canonical_error: expected a real weight (out, in / groups, *kernel), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if groups < 1 or len(weight) % groups:
        raise ConfigError(f"canonical_error: {groups} groups do not divide {len(weight)} filters")
    if variance < 0:
        raise ConfigError(f"canonical_error: the variance of the input must not be negative, got {variance}")
    rows = weight.detach().cpu().double().reshape(groups, len(weight) // groups, -1)
    count, fan_in = rows.shape[1:]
    squares = rows.square().sum(-1)
    unit = F.normalize(rows, dim=-1, eps=1e-300)
    products = lengths = 0.0
    coherences = [0.0]
    for start in range(0, count, _ROWS):
        block = slice(start, start + _ROWS)
        products += _off_diagonal(rows[:, block] @ rows.mT, start).square().sum().item()
        lengths += _off_diagonal(squares[:, block, None] * squares[:, None], start).sum().item()
        coherences.append(_off_diagonal(unit[:, block] @ unit.mT, start).abs().max().item())
    coherence = math.nan if any(math.isnan(value) for value in coherences) else min(1.0, max(coherences))
    tight = variance * coherence * math.sqrt(lengths)
    return CanonicalError(
        filters=len(weight),
        fan_in=fan_in,
        error=variance * math.sqrt(products),
        tight=tight,
        loose=tight * math.sqrt(groups * count * (count - 1)),
        diagonal=variance * squares.square().sum().sqrt().item(),
        coherence=coherence,
        welch=welch_bound(count, fan_in if dimensions is None else dimensions),
    )


def welch_bound(rows: int, dimensions: int) -> float:
    """Smallest coherence of m vectors in n dimensions, sqrt((m - n) / (n (m - 1))), 0 unless m > n.

    Args:
        rows: number of vectors m.
        dimensions: n, at least 1.

    Returns:
        The bound, attained by equiangular tight frames.

    Source:
        Welch 1974.

    Example:
        >>> round(welch_bound(192, 75), 4), welch_bound(10, 75)
        (0.0904, 0.0)
    """
    return math.sqrt((rows - dimensions) / (dimensions * (rows - 1))) if rows > dimensions else 0.0


@torch.no_grad()
def measured_error(outputs: Tensor) -> float:
    """Left side of Proposition 1 from samples of the pre-activations: ||Cov(u) - diag Cov(u)||_F.

    The covariances of the first half of the samples and of the second are estimated apart and multiplied, so that the
    noise of few samples does not add up: the square is unbiased.

    Args:
        outputs: u, (N, m, ...); further axes are positions.

    Returns:
        The norm, 0 where noise makes its square negative; nan with fewer than 4 samples.

    Example:
        >>> u = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
        >>> round(measured_error(u) ** 2, 6)  # two entries of 2^2
        8.0
    """
    if len(outputs) < 4:
        return math.nan
    halves = [at_least_float32(half).movedim(1, -1).flatten(0, -2) for half in outputs.tensor_split(2)]
    halves = [half - half.mean(0) for half in halves]
    total = 0.0
    for start in range(0, outputs.shape[1], _ROWS):
        covariances = [half[:, start : start + _ROWS].mT @ half / (len(half) - 1) for half in halves]
        total += _off_diagonal(covariances[0] * covariances[1], start).sum().item()
    return math.sqrt(max(0.0, total)) if math.isfinite(total) else math.nan


def measure(subject: Subject) -> tuple[LayerError, ...]:
    """Apply Proposition 1 to the linear maps that a network calls, with the weights that it applies.

    For NormProp layers these are the filters of unit length, centred where the layer centres them. Transposed
    convolutions are left out, as their outputs see different taps from place to place.

    Args:
        subject: the network and its inputs.

    Returns:
        One entry for each module with a linear map, in the order of the calls, at its first call.

    Raises:
        ConfigError: if the network cannot be called with the inputs, or it has no linear map.

    Source:
        Arpit et al. 2016, Proposition 1.

    Example:
        >>> [found.layer for found in measure(Subject("small", torch.nn.Linear(4, 3), torch.randn(8, 4)))]
        ['Linear']
    """
    found: dict[str, LayerError] = {}

    def look(linear: LinearCall) -> None:
        if linear.name not in found:
            found[linear.name] = _layer_error(linear)

    with quietly(subject.model, subject.inputs) as network, Watching(network, look):
        call(network, subject.inputs.detach().clone(), subject.name)
    if not found:
        raise ConfigError(
            f"{subject.name}: the network calls no linear map or convolution; there is nothing to look at"
        )
    return tuple(found.values())


def _layer_error(linear: LinearCall) -> LayerError:
    """Proposition 1 of one call."""
    input, weight, output = linear.arguments["input"], linear.arguments["weight"], linear.output
    module, groups = linear.module, linear.groups
    centered = isinstance(module, NormPropLayer) and module.center
    if isinstance(module, NormPropLayer):  # which applies gain and deviation too
        weight = normalize_weight(module.weight, torch.ones_like(module.gain), center=centered, groups=groups)
        output = linear.again(weight=weight.to(input.dtype), bias=None)
    if output.ndim < weight.ndim:
        input, output = input.unsqueeze(0), output.unsqueeze(0)
    if linear.function is F.linear:  # features are last
        input, output = input.movedim(-1, 1), output.movedim(-1, 1)
    variance = at_least_float32(input).movedim(1, 0).flatten(1).var(1, correction=0).mean().item()
    assumed = canonical_error(weight, variance or 1.0, groups, max(1, weight[0].numel() - centered))
    return LayerError(linear.name, assumed, measured_error(output))


def describe(results: Mapping[str, Sequence[LayerError]]) -> Diagnosis:
    """Say how good the assumption behind dividing by the filters' lengths is.

    Args:
        results: from :func:`measure`, by the networks' names.

    Returns:
        The diagnosis.

    Example:
        >>> found = measure(Subject("small", torch.nn.Linear(4, 3), torch.randn(8, 4)))
        >>> describe({"small": found}).name
        'canonical-error'
    """
    return Diagnosis(
        name="canonical-error",
        title="How far is each layer from the uncorrelated units that normalising by weights assumes?",
        look_for=(
            "The lower the better: the error is what normalising by weights ignores, the covariances between units, "
            "relative to the variances, which it keeps; dashed lines are its two bounds in the first plot and the "
            "error for uncorrelated inputs in the second, so that the distance above it is what real inputs cost."
        ),
        found=by_network(results, _words),
        numbers={name: [_numbers(found) for found in layers] for name, layers in results.items()},
        figures=[
            Plot(
                "Uncorrelated inputs: error and bounds",
                "layer",
                "‖Σ − diag α‖ over ‖diag α‖",
                [
                    line
                    for name, layers in results.items()
                    for line in (
                        _line(name, layers, lambda found: found.assumed.error),
                        _line(name, layers, lambda found: found.assumed.tight, theory=True),
                        _line(name, layers, lambda found: found.assumed.loose, theory=True),
                    )
                ],
                y_scale="log",
            ),
            Plot(
                "Real inputs: error",
                "layer",
                "‖Σ − diag Σ‖ over ‖diag α‖",
                [
                    line
                    for name, layers in results.items()
                    for line in (
                        _line(name, layers, lambda found: found.measured),
                        _line(name, layers, lambda found: found.assumed.error, theory=True),
                    )
                ],
                y_scale="log",
            ),
            Plot(
                "Coherence and its Welch bound",
                "layer",
                "largest |cosine| of two filters",
                [
                    line
                    for name, layers in results.items()
                    for line in (
                        Line(name, range(len(layers)), [found.assumed.coherence for found in layers]),
                        Line(name, range(len(layers)), [found.assumed.welch for found in layers], style="theory"),
                    )
                ],
            ),
        ],
        source="Arpit et al. 2016, Proposition 1",
    )


def _off_diagonal(block: Tensor, start: int) -> Tensor:
    """Rows of a matrix, from one row on, with its diagonal set to 0 in place."""
    block.diagonal(start, -2, -1).zero_()
    return block


def _relative(value: float, found: LayerError) -> float:
    """A norm over that of the diagonal."""
    return value / found.assumed.diagonal if found.assumed.diagonal else math.nan


def _line(name: str, layers: Sequence[LayerError], value: Callable[[LayerError], float], theory: bool = False) -> Line:
    """A norm by layer, relative to the diagonal's; a logarithmic axis shows no 0."""
    shown = [_relative(value(found), found) for found in layers]
    y = [value if value > 0 else math.nan for value in shown]
    return Line(name, range(len(layers)), y, style="theory" if theory else "both")


def _words(layers: Sequence[LayerError]) -> str:
    """What was found in one network."""
    assumed = _median([_relative(found.assumed.error, found) for found in layers])
    tight = _median([_relative(found.assumed.tight, found) for found in layers])
    measured = _median([_relative(found.measured, found) for found in layers])
    if not math.isfinite(assumed):
        return f"weights or inputs are not finite in any of {len(layers)} layers."
    text = f"relative to the variances, the covariances of units are {assumed:.2g} in the median layer for "
    text += f"uncorrelated inputs (at most {tight:.2g} by theory)"
    if math.isfinite(measured):
        text += f" and {measured:.2g} for the real ones"
    worst = max(layers, key=lambda found: -math.inf if math.isnan(found.assumed.coherence) else found.assumed.coherence)
    return f"{text}. Two filters are most alike in layer {worst.layer} (cosine {worst.assumed.coherence:.2f})."


def _median(values: Sequence[float]) -> float:
    """Median of what is finite; nan of nothing."""
    kept = [value for value in values if math.isfinite(value)]
    return statistics.median(kept) if kept else math.nan


def _numbers(found: LayerError) -> dict[str, Any]:
    """The numbers of one layer for JSON."""
    numbers = {key: finite(value) for key, value in vars(found.assumed).items()}
    return {"layer": found.layer, **numbers, "measured": finite(found.measured)}
