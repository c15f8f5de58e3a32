"""Building blocks of the closed forms: the normal law, its truncated moments and the covariance of two thresholds."""

import math

import numpy as np
import torch
from torch import Tensor

SQRT_2PI = math.sqrt(2.0 * math.pi)
FAR = 40.0  # exp(-FAR^2 / 2) is zero in float64: bounds further out than this many deviations are at infinity


def pdf(x: Tensor) -> Tensor:
    """Density of N(0, 1).

    Example:
        >>> round(pdf(torch.tensor(0.0)).item(), 6)
        0.398942
    """
    return torch.exp(x * x * -0.5) * (1.0 / SQRT_2PI)


def cdf(x: Tensor) -> Tensor:
    """Distribution function of N(0, 1), to full relative accuracy in the left tail.

    Example:
        >>> cdf(torch.tensor(0.0)).item()
        0.5
    """
    return torch.erfc(x * -math.sqrt(0.5)) * 0.5


def positive(std: Tensor) -> Tensor:
    """A deviation that can be divided by: zero becomes so small that nothing overflows, even in a gradient.

    Example:
        >>> bool(positive(torch.zeros(())) > 0)
        True
    """
    return std.clamp_min(torch.finfo(std.dtype).tiny ** (1 / 3))


def standardize(bound: float | Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Position of a bound in deviations, (bound - mean) / std, held within +-`FAR`.

    Example:
        >>> standardize(3.0, torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])).tolist()
        [1.0, 40.0]
    """
    return ((bound - mean) / positive(std)).clamp(-FAR, FAR)


def widen(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A deviation that quadrature can resolve about the mean, and which part of it the given one is.

    Below about 1e-8 of the mean, positions mean + std * x round to a few numbers; any function is linear on such a
    scale, so that its variance follows from that at the wider deviation.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.

    Returns:
        The larger deviation, and std divided by it.

    Example:
        >>> [part.item() for part in widen(torch.tensor(1.0), torch.tensor(0.5))]
        [0.5, 1.0]
    """
    wide = torch.maximum(std, torch.finfo(std.dtype).eps ** 0.5 * (1.0 + mean.detach().abs()))
    return wide, std / wide


def density(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Density of N(mean, std^2).

    Example:
        >>> round(density(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(2.0)).item(), 6)
        0.199471
    """
    return pdf((z - mean) / std) / std


def truncated(lower: Tensor | None, upper: Tensor | None, order: int) -> list[Tensor]:
    """Moments of a truncated standard Gaussian, M_k = E[X^k; lower < X < upper] for k = 0 ... order.

    M_0 is a difference of distribution functions taken in the tail where it does not cancel; then, by parts,
    M_k = lower^(k-1) pdf(lower) - upper^(k-1) pdf(upper) + (k - 1) M_(k-2).

    Args:
        lower: lower bound, None for minus infinity.
        upper: upper bound, None for infinity.
        order: highest power.

    Returns:
        The order + 1 moments.

    Raises:
        ValueError: if neither bound is given.

    Example:
        >>> [round(moment.item(), 6) for moment in truncated(torch.tensor(0.0), None, 2)]
        [0.5, 0.398942, 0.5]
    """
    if lower is not None and upper is not None:
        right = lower + upper > 0
        moments = [cdf(torch.where(right, -lower, upper)) - cdf(torch.where(right, -upper, lower))]
        if order > 0:
            from_lower, from_upper = pdf(lower), pdf(upper)
        for k in range(1, order + 1):
            boundary = from_lower - from_upper
            moments.append(boundary if k == 1 else torch.add(boundary, moments[k - 2], alpha=k - 1))
            from_lower, from_upper = from_lower * lower, from_upper * upper
        return moments
    if lower is None and upper is None:
        raise ValueError("truncated needs a bound")
    bound = lower if lower is not None else upper
    assert bound is not None
    boundary = pdf(bound) if upper is None else -pdf(bound)
    moments = [cdf(-bound if upper is None else bound)]
    for k in range(1, order + 1):
        moments.append(boundary if k == 1 else torch.add(boundary, moments[k - 2], alpha=k - 1))
        boundary = boundary * bound
    return moments


def legendre(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1].

    Example:
        >>> nodes, weights = legendre(2)
        >>> round(sum(node * weight for node, weight in zip(nodes, weights)), 6)
        0.5
    """
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return ((nodes + 1.0) / 2.0).tolist(), (weights / 2.0).tolist()


_NODES, _WEIGHTS = legendre(24)


def threshold_variance(h: Tensor, angle: Tensor) -> Tensor:
    """Variance of cdf(a + b X) for X ~ N(0, 1), without cancellation.

    With h = a / sqrt(1 + b^2) and rho = b^2 / (1 + b^2) = sin(angle) it is the probability that two Gaussians of
    correlation rho are both below h, less the product of their probabilities:
    (1 / 2 pi) int_0^angle exp(-h^2 / (1 + sin v)) dv. The integrand is smooth and positive.

    Args:
        h: common threshold.
        angle: arcsine of the correlation, in [0, pi / 2].

    Returns:
        The variance, elementwise.

    Source:
        R. L. Plackett, A reduction formula for normal multivariate integrals, Biometrika 1954.

    Example:
        >>> round(threshold_variance(torch.tensor(0.0), torch.tensor(math.asin(0.5))).item(), 6)  # angle / 2 pi
        0.083333
    """
    nodes, weights = h.new_tensor(_NODES), h.new_tensor(_WEIGHTS)
    h, angle = torch.broadcast_tensors(h, angle)
    values = torch.exp(-(h * h).unsqueeze(-1) / (1.0 + torch.sin(angle.unsqueeze(-1) * nodes)))
    return angle * (values @ weights) * (0.5 / math.pi)
