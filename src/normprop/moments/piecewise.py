"""Closed forms of the piecewise polynomial activations."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normprop.moments.gaussian import cdf, pdf, positive, standardize, truncated
from normprop.moments.value import Moments


def rectifier(mean: Tensor, std: Tensor, slope: float | Tensor = 0.0) -> Moments:
    """Moments of z for z > 0 and slope * z otherwise: ReLU, leaky ReLU, PReLU, abs (-1) and identity (1).

    With t = mean / std, p = cdf(t), A = E[relu(X + t)] = t p + pdf(t) and B = A - t = E[relu(-X - t)],
    relu has mean std A and variance std^2 (p - A B), which does not cancel for t > 0; the other members add a
    multiple of z, whose covariance with relu(z) is std^2 p.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.
        slope: slope on the negative side, a number or a tensor that broadcasts against `mean`.

    Returns:
        The moments, elementwise.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, remarks 1 and 2 (mean 0 and deviation 1).

    Example:
        >>> rectifier(torch.zeros(()), torch.ones(())).squared_derivative
        tensor(0.5000)
    """
    scale = positive(std)
    t = mean / scale
    p, density = cdf(t), pdf(t)
    above = torch.addcmul(density, t, p)
    scaled_var = torch.addcmul(p, above, above - t, value=-1.0)
    relu_mean = scale * above
    if isinstance(slope, float) and slope == 0.0:
        return Moments(relu_mean, (std * std * scaled_var).clamp_min(0.0), p)
    step = 1.0 - slope
    scaled_var = step * step * scaled_var + 2.0 * slope * step * p + slope * slope
    return Moments(
        slope * mean + step * relu_mean, (std * std * scaled_var).clamp_min(0.0), p + slope * slope * (1.0 - p)
    )


def polynomials(
    mean: Tensor, std: Tensor, breaks: Sequence[float], pieces: Sequence[Sequence[float]], centre: Tensor
) -> Moments:
    """Moments of a continuous function that is a polynomial between its breaks.

    Every piece is expanded about the mean, so that a small deviation does not cancel, and integrated against the
    moments of the truncated Gaussian.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.
        breaks: increasing break points, at least one.
        pieces: coefficients of the len(breaks) + 1 polynomials in z, constant first.
        centre: the function at `mean`; it is subtracted before squares are taken.

    Returns:
        The moments, elementwise.

    Example:
        >>> zero, one = torch.zeros(()), torch.ones(())
        >>> polynomials(zero, one, [0.0], [[0.0], [0.0, 1.0]], centre=zero).squared_derivative
        tensor(0.5000)
    """
    mean, std = torch.broadcast_tensors(mean, std)
    centre = centre.detach()
    bounds = [None, *(standardize(bound, mean, std) for bound in breaks), None]
    first = second = squared_derivative = torch.zeros_like(mean)
    for lower, upper, piece in zip(bounds[:-1], bounds[1:], pieces, strict=True):
        moments = truncated(lower, upper, 2 * len(piece) - 2)
        taylor = [_taylor(piece, k, mean) for k in range(len(piece))]
        value = [taylor[0] - centre, *(taylor[k] * std**k for k in range(1, len(piece)))]
        slope = [k * taylor[k] * (std ** (k - 1) if k > 1 else 1.0) for k in range(1, len(piece))]
        first = first + sum(c * m for c, m in zip(value, moments, strict=False))
        second = second + _square(value, moments)
        squared_derivative = squared_derivative + _square(slope, moments)
    return Moments(centre + first, (second - first * first).clamp_min(0.0), squared_derivative)


def _taylor(piece: Sequence[float], k: int, mean: Tensor) -> float | Tensor:
    """Coefficient of (z - mean)^k of a polynomial in z."""
    return sum(
        c * math.comb(i, k) * (mean ** (i - k) if i > k else 1.0) for i, c in enumerate(piece) if i >= k and c != 0.0
    )


def _square(coefficients: Sequence[float | Tensor], moments: Sequence[Tensor]) -> float | Tensor:
    """Expectation of a squared polynomial, given the moments of its argument."""
    return sum(
        (1.0 if i == j else 2.0) * a * coefficients[j] * moments[i + j]
        for i, a in enumerate(coefficients)
        for j in range(i, len(coefficients))
    )


def hardtanh(mean: Tensor, std: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Moments:
    """Moments of clamp(z, min_val, max_val), elementwise.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.
        min_val: lower bound.
        max_val: upper bound, greater than `min_val`.

    Returns:
        The moments.

    Example:
        >>> round(hardtanh(torch.zeros(()), torch.ones(())).squared_derivative.item(), 6)
        0.682689
    """
    pieces = [[min_val], [0.0, 1.0], [max_val]]
    return polynomials(mean, std, [min_val, max_val], pieces, mean.clamp(min_val, max_val))


def hardsigmoid(mean: Tensor, std: Tensor) -> Moments:
    """Moments of clamp(z / 6 + 1 / 2, 0, 1), elementwise.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.

    Returns:
        The moments.

    Example:
        >>> hardsigmoid(torch.zeros(()), torch.ones(())).mean
        tensor(0.5000)
    """
    centre = torch.nn.functional.hardsigmoid(mean)
    return polynomials(mean, std, [-3.0, 3.0], [[0.0], [0.5, 1 / 6], [1.0]], centre)


def hardswish(mean: Tensor, std: Tensor) -> Moments:
    """Moments of z * clamp(z / 6 + 1 / 2, 0, 1), elementwise.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.

    Returns:
        The moments.

    Example:
        >>> round(hardswish(torch.zeros(()), torch.ones(())).mean.item(), 6)
        0.166217
    """
    centre = torch.nn.functional.hardswish(mean)
    return polynomials(mean, std, [-3.0, 3.0], [[0.0], [0.0, 0.5, 1 / 6], [0.0, 1.0]], centre)
