"""What depth does to a wide random NormProp network: maps of second moment and correlation, growth of gradients.

A layer is o = (f(gain * w.h) - c2) / c1 with random unit-norm rows w, no bias and the moments c2, c1^2 of f(N(0, 1)).
"""

import math

import torch
from torch import Tensor

from normprop.errors import ConfigError, MomentError
from normprop.moments.adaptive import adaptive
from normprop.moments.quadrature import Function, Shape, slope
from normprop.moments.rule import Activation, Rule, of, resolve, widened
from normprop.moments.value import Value


def second_moment(q: Value, activation: Activation = "relu", gain: float = 1.0) -> Value:
    """Second moment of a layer's output, given that of its input.

    q' = E[(f(gain sqrt(q) X) - c2)^2] / c1^2, for ReLU gain^2 q / (2 c1^2) - 2 c2^2 gain sqrt(q) / c1^2 + c2^2 / c1^2.

    Args:
        q: mean square of the input, a number or a tensor.
        activation: see :func:`normprop.moments.resolve`.
        gain: gamma of the layer.

    Returns:
        Mean square of the output; differentiable for a tensor.

    Raises:
        MomentError: if the activation's moments are not reliable.

    Example:
        >>> round(second_moment(1.0), 12), round(second_moment(1.0, gain=1 / 1.21), 5)
        (1.0, 0.69708)
    """
    unit = of(activation)
    std = abs(gain) * (q.sqrt() if isinstance(q, Tensor) else math.sqrt(q))
    moments = of(activation, 0.0, std)
    return ((moments.mean - unit.mean) ** 2 + moments.var) / unit.var


@torch.no_grad()
def fixed_point(activation: Activation = "relu", gain: float = 1.0, start: float = 1.0) -> float:
    """Second moment that a deep network settles at.

    Iterates :func:`second_moment` from the input's value until it stays.

    Args:
        activation: see :func:`normprop.moments.resolve`.
        gain: gamma of every layer.
        start: mean square of the network's input.

    Returns:
        The fixed point, to about twelve digits.

    Raises:
        MomentError: if the second moment diverges or does not settle within 1000 layers.

    Example:
        >>> gain = math.sqrt(1 - 1 / math.pi)
        >>> round(fixed_point("relu", gain), 7) == round(math.pi / (4 * (math.pi - 1)), 7)
        True
    """
    q = start
    for _ in range(1000):
        previous, q = q, float(second_moment(q, activation, gain))
        if abs(q - previous) <= 1e-13 * (1.0 + q):
            return q
        if q > 1e12:
            break
    raise MomentError(
        f"the second moment of {resolve(activation).name} at gain {gain:.6g} does not settle from {start:.4g}, it "
        f"reached {q:.4g}; use a smaller gain"
    )


@torch.no_grad()
def correlation(c: float, activation: Activation = "relu", gain: float = 1.0, q: float = 1.0) -> float:
    """Correlation of a layer's outputs for two inputs, given that of the inputs.

    c' = E[(f(U) - c2) (f(V) - c2)] / (c1^2 q'), with U, V ~ N(0, gain^2 q) of correlation c. Correlations are about 0,
    not about the mean: <h, h'> / (|h| |h'|).

    Args:
        c: correlation of the inputs, from -1 to 1.
        activation: see :func:`normprop.moments.resolve`.
        gain: gamma of the layer.
        q: mean square of both inputs.

    Returns:
        Correlation of the outputs.

    Raises:
        ConfigError: if c is out of range.
        MomentError: if the activation's moments are not reliable.

    Example:
        >>> [round(correlation(c), 5) + 0.0 for c in (0.0, 0.5, 0.9, 1.0)]
        [0.0, 0.42642, 0.8673, 1.0]
    """
    rule, std = resolve(activation), abs(gain) * math.sqrt(q)
    function, other, centre = widened(rule.function), _given(rule, c, std), of(rule).mean
    # E[f(V) | U = u] is the mean of f at N(c u, (1 - c^2) std^2), which leaves one integral.
    total = _expectation(lambda u: (function(u.clone()) - centre) * (other(c * u) - centre), std, rule)
    return total / (float(second_moment(q, rule, gain)) * float(of(rule).var))


@torch.no_grad()
def correlation_slope(c: float, activation: Activation = "relu", gain: float = 1.0, q: float = 1.0) -> float:
    """Slope of :func:`correlation`, by which two nearby inputs part (above 1 at c = 1) or meet.

    gain^2 q E[f'(U) f'(V)] / (c1^2 q').

    Args:
        c: correlation of the inputs, from -1 to 1.
        activation: see :func:`normprop.moments.resolve`.
        gain: gamma of the layer.
        q: mean square of both inputs.

    Returns:
        The slope.

    Raises:
        ConfigError: if c is out of range.
        MomentError: if the activation's moments are not reliable.

    Example:
        >>> round(correlation_slope(0.0), 7), round(correlation_slope(1.0), 5)
        (0.7334711, 1.46694)
    """
    rule, std = resolve(activation), abs(gain) * math.sqrt(q)
    function, other = widened(rule.function), _given(rule, c, std)
    total = _expectation(lambda u: slope(function, u) * slope(other, c * u), std, rule)
    return std * std * total / (float(second_moment(q, rule, gain)) * float(of(rule).var))


@torch.no_grad()
def backward_growth(activation: Activation = "relu", gain: float = 1.0, q: float = 1.0) -> float:
    """Factor by which a layer multiplies the mean squared gradient on its way back.

    It is gain^2 E[f'(gain sqrt(q) X)^2] / c1^2. Its root at q = gain = 1 is the Jacobian factor, whose reciprocal the
    paper uses as initial gain.

    Args:
        activation: see :func:`normprop.moments.resolve`.
        gain: gamma of the layer.
        q: mean square of the layer's input.

    Returns:
        The factor per layer.

    Raises:
        MomentError: if the activation's moments are not reliable.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.4.

    Example:
        >>> round(backward_growth("relu"), 5), round(backward_growth("relu", gain=1 / 1.21), 5)
        (1.46694, 1.00194)
    """
    moments = of(activation, 0.0, abs(gain) * math.sqrt(q))
    return float(gain * gain * moments.squared_derivative / of(activation).var)


def _given(rule: Rule, c: float, std: float) -> Function:
    """E[f(V)] as a function of the mean of V, when its deviation is what correlation c leaves of std."""
    if not -1.0 <= c <= 1.0:
        raise ConfigError(f"a correlation is between -1 and 1, got {c}")
    if abs(c) == 1.0:
        return widened(rule.function)
    left = std * math.sqrt((1.0 - c) * (1.0 + c))
    return lambda mean: torch.as_tensor(rule.moments(mean, left, derivative=False).mean)


def _expectation(function: Function, std: float, rule: Rule) -> float:
    """E[function(U)] for U ~ N(0, std^2)."""
    mean = torch.zeros((), dtype=torch.float64)
    shape = rule.law if isinstance(rule.law, Shape) else Shape()
    return float(adaptive(function, mean, mean + std, shape, rule.name).mean)
