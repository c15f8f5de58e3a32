"""What one wide random layer does to size, likeness and gradients, in theory.

A layer is o = (f(gain w.h) - shift) / scale with random rows w of unit length and no bias. Normalization Propagation
has the activation's mean and deviation for shift and scale; a plain layer has 0 and 1, and its gain^2 is fan-in times
the variance of a weight. Filters centred to mean 0 do not see the mean of h over its features: then sizes and
likenesses are taken about that mean, else about 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop import moments as M
from normprop.errors import ConfigError
from normprop.functional import MomentKind
from normprop.moments import Activation, Moments, Value, maps
from normprop.moments.adaptive import adaptive
from normprop.moments.quadrature import Shape
from normprop.moments.rule import widened


@dataclass(frozen=True)
class Layer:
    """A layer o = (f(gain w.h) - shift) / scale.

    Args:
        activation: f, see :func:`normprop.moments.resolve`.
        gain: length of the rows of the weight.
        shift: c2, subtracted from the activation.
        scale: c1, which divides it, above 0.
        center: whether rows have mean 0.

    Raises:
        ConfigError: if gain or scale are not above 0 and finite.

    Example:
        >>> Layer("relu", gain=2**0.5)
        Layer(activation='relu', gain=1.4142135623730951, shift=0.0, scale=1.0, center=False)
    """

    activation: Activation = "relu"
    gain: float = 1.0
    shift: float = 0.0
    scale: float = 1.0
    center: bool = False

    def __post_init__(self) -> None:
        for label, value in (("gain", self.gain), ("scale", self.scale)):
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"mean field: {label} of a layer with {M.resolve(self.activation).name} must be above 0 and "
                    f"finite, got {value}"
                )


def normprop(
    activation: Activation = "relu", gain: float = 1.0, moments: MomentKind = "fixed", center: bool = False
) -> Layer:
    """A layer of Normalization Propagation; the defaults are the printed one at gain 1.

    Args:
        activation: f.
        gain: gamma, above 0.
        moments: "fixed" for mean and deviation of f(N(0, 1)), as printed; "live" for those of f(N(0, gain^2)).
        center: whether filters are centred.

    Returns:
        The layer.

    Source:
        Arpit et al. 2016, equation 12.

    Example:
        >>> layer = normprop("relu", gain=0.5)
        >>> round(layer.shift, 6), round(layer.scale, 6)
        (0.398942, 0.583819)
    """
    unit = _of(activation, 1.0 if moments == "fixed" else abs(gain))
    return Layer(activation, gain, float(unit.mean), float(unit.std), center)


def plain(activation: Activation = "relu", weight_variance: float = 1.0) -> Layer:
    """A layer without normalisation.

    Args:
        activation: f.
        weight_variance: fan-in times the variance of a weight: 1 for LeCun's initialisation, and for Glorot's where
            there are as many outputs as inputs.

    Returns:
        The layer.

    Example:
        >>> plain("tanh").gain
        1.0
    """
    return Layer(activation, math.sqrt(weight_variance))


def he(activation: Activation = "relu") -> Layer:
    """A layer without normalisation in He's initialisation, weight variance 1 / (fan-in E[f(z)^2]).

    Args:
        activation: f.

    Returns:
        The layer.

    Source:
        He et al. 2015, for any activation by its second moment.

    Example:
        >>> round(he("relu").gain ** 2, 12)
        2.0
    """
    return plain(activation, 1.0 / float(_of(activation, 1.0).second))


def second_moment(layer: Layer, q: Value) -> Value:
    """Second moment of a layer's output: q' = E[(f(gain sqrt(q) X) - shift)^2] / scale^2.

    With centred filters it is the variance, Var[f(gain sqrt(q) X)] / scale^2.

    Args:
        layer: the layer.
        q: second moment of its input, a number or a tensor, not negative.

    Returns:
        q', differentiable for a tensor.

    Example:
        >>> round(second_moment(normprop("relu", 1 / 1.21), 1.0), 5), round(second_moment(he("relu"), 3.0), 12)
        (0.69708, 3.0)
    """
    found = _at(layer, q)
    offset = 0.0 if layer.center else (found.mean - layer.shift) ** 2
    return (found.var + offset) / layer.scale**2


def output_mean(layer: Layer, q: Value) -> Value:
    """Mean of a layer's output over its features: (E[f(gain sqrt(q) X)] - shift) / scale.

    Args:
        layer: the layer.
        q: second moment of its input.

    Returns:
        The mean.

    Example:
        >>> round(output_mean(normprop("relu", 1 / 1.21), 1.0), 7)
        -0.1185948
    """
    return (_at(layer, q).mean - layer.shift) / layer.scale


def second_moment_slope(layer: Layer, q: float) -> float:
    """Slope of :func:`second_moment`, by which a small deviation of the size is multiplied in a layer.

    Args:
        layer: the layer.
        q: second moment of its input, above 0.

    Returns:
        dq' / dq.

    Example:
        >>> round(second_moment_slope(normprop("relu"), 1.0), 12)
        1.0
    """
    with torch.enable_grad():
        at = torch.tensor(q, dtype=torch.float64, requires_grad=True)
        size = torch.as_tensor(second_moment(layer, at))
        (slope,) = torch.autograd.grad(size, at)
    return float(slope)


def correlation(layer: Layer, c: float, q: float = 1.0) -> float:
    """Correlation of a layer's outputs for two inputs of equal size, given that of the inputs.

    E[(f(U) - shift)(f(V) - shift)] / (scale^2 q') with U, V ~ N(0, gain^2 q) of correlation c; Cov[f(U), f(V)] with
    centred filters. One integral, over U, is done numerically; the one over V given U by the activation's own rule.

    Args:
        layer: the layer.
        c: correlation of the inputs, from -1 to 1.
        q: second moment of both inputs, above 0.

    Returns:
        The correlation.

    Raises:
        ConfigError: if c is out of range.

    Source:
        Cho & Saul 2009 for ReLU.

    Example:
        >>> round(correlation(normprop("relu"), 0.5), 5), round(correlation(he("relu"), 0.0), 5)
        (0.42642, 0.31831)
    """
    if not -1.0 <= c <= 1.0:
        raise ConfigError(f"a correlation is between -1 and 1, got {c}")
    found = _at(layer, q)
    mean = float(found.mean)
    covariance = _product(layer, c, q) - mean**2
    offset = 0.0 if layer.center else (mean - layer.shift) ** 2
    return (covariance + offset) / (float(found.var) + offset)


def correlation_slope(layer: Layer, c: float, q: float = 1.0) -> float:
    """Slope of :func:`correlation`: gain^2 q E[f'(U) f'(V)] / (scale^2 q').

    Above 1 at c = 1 two nearby inputs part with depth (chaos), below 1 they meet (order).

    Args:
        layer: the layer.
        c: correlation of the inputs, from -1 to 1.
        q: second moment of both inputs, above 0.

    Returns:
        The slope.

    Raises:
        ConfigError: if c is out of range.

    Example:
        >>> round(correlation_slope(normprop("relu"), 1.0), 5), round(correlation_slope(he("relu"), 1.0), 12)
        (1.46694, 1.0)
    """
    size = float(second_moment(layer, q)) * layer.scale**2
    return maps.correlation_slope(c, layer.activation, layer.gain, q) * _paper_size(layer, q) / size


def backward_growth(layer: Layer, q: float = 1.0) -> float:
    """Factor by which E||dL/dh||^2 grows through a layer on its way back: gain^2 E[f'(gain sqrt(q) X)^2] / scale^2.

    It does not depend on the layer's width, as rows have equal length.

    Args:
        layer: the layer.
        q: second moment of its input.

    Returns:
        The factor.

    Source:
        Arpit et al. 2016, section 3.4.

    Example:
        >>> [round(backward_growth(normprop("relu", gain)), 5) for gain in (1.0, 1 / 1.21)]
        [1.46694, 1.00194]
    """
    return layer.gain**2 * float(_at(layer, q).squared_derivative) / layer.scale**2


def batch_norm_growth(batch_size: int) -> float:
    """Growth of squared gradients per layer in a deep linear network with batch norm: (B - 2) / (B - 3).

    With an activation and a large batch it is that of :func:`normprop` at gain 1.

    Args:
        batch_size: B, above 3.

    Returns:
        The factor.

    Raises:
        ConfigError: if B is not above 3.

    Source:
        Yang et al. 2019, A Mean Field Theory of Batch Normalization.

    Example:
        >>> round(batch_norm_growth(6), 5)
        1.33333
    """
    if batch_size <= 3:
        raise ConfigError(f"mean field of batch norm: gradients have no finite size below 4 samples, got {batch_size}")
    return (batch_size - 2) / (batch_size - 3)


@dataclass(frozen=True)
class Signal:
    """Numbers of a layer's input that its output's follow from.

    Args:
        second_moment: mean square over samples and features.
        mean: mean over features, to its size (root mean square over samples).
        correlation: of two samples, about 0.

    Example:
        >>> Signal(1.0).correlation
        0.0
    """

    second_moment: float
    mean: float = 0.0
    correlation: float = 0.0


def propagate(layer: Layer, signal: Signal) -> Signal:
    """Send a signal through a layer.

    Args:
        layer: the layer.
        signal: of its input; numbers that are not known are nan.

    Returns:
        That of its output, about 0 whether or not filters are centred.

    Example:
        >>> round(propagate(normprop("relu", 1 / 1.21), Signal(1.0)).second_moment, 5)
        0.69708
    """
    q, c = signal.second_moment, signal.correlation
    if layer.center:
        square = signal.mean**2
        c, q = c * q - square, q - square
        c = c / q if q > 0 else math.nan
    if not 0 < q < math.inf:
        return Signal(math.nan, math.nan, math.nan)
    mean = float(output_mean(layer, q))
    size = float(_at(layer, q).var) / layer.scale**2 + mean**2
    if not math.isfinite(c):
        return Signal(size, mean, math.nan)
    seen = correlation(layer, min(1.0, max(-1.0, c)), q)
    if layer.center:
        seen = (seen * (size - mean**2) + mean**2) / size
    return Signal(size, mean, seen)


def _of(activation: Activation, std: float) -> Moments:
    """Moments at N(0, std^2) as numbers, also of an activation whose parameters are tensors."""
    with torch.no_grad():
        found = M.of(activation, 0.0, std)
        return Moments(*(float(part) for part in (found.mean, found.var, found.squared_derivative)))


def _at(layer: Layer, q: Value) -> Moments:
    """Moments of the activation for an input of second moment q."""
    if isinstance(q, Tensor):
        return M.of(layer.activation, 0.0, layer.gain * q.sqrt())
    return _of(layer.activation, layer.gain * math.sqrt(q))


def _product(layer: Layer, c: float, q: float) -> float:
    """E[f(U) f(V)], by E[f(V) | U = u], the mean of f at N(c u, (1 - c^2) std^2)."""
    rule, std = M.resolve(layer.activation), layer.gain * math.sqrt(q)
    function, left = widened(rule.function), std * math.sqrt((1.0 - c) * (1.0 + c))

    @torch.no_grad()  # its slope is not needed
    def integrand(u: Tensor) -> Tensor:
        given = rule.moments(c * u, left, derivative=False).mean if left else function(c * u)
        return function(u.clone()) * given

    middle = torch.zeros((), dtype=torch.float64)
    shape = rule.law if isinstance(rule.law, Shape) else Shape()
    return float(adaptive(integrand, middle, middle + std, shape, rule.name).mean)


def _paper_size(layer: Layer, q: float) -> float:
    """E[(f(gain sqrt(q) X) - c2)^2] with c2 at N(0, 1), which the maps of the printed layer divide by."""
    unit, found = _of(layer.activation, 1.0), _at(layer, q)
    return float((found.mean - unit.mean) ** 2 + found.var)
