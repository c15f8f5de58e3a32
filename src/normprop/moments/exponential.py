"""Closed forms of the exponential linear units: ELU, CELU and SELU."""

import torch
from torch import Tensor

from normprop.moments.gaussian import standardize, truncated
from normprop.moments.value import Moments


def exponential(mean: Tensor, std: Tensor, height: float = 1.0, scale: float = 1.0, slope: float = 1.0) -> Moments:
    """Moments of slope * z for z > 0 and height * (exp(z / scale) - 1) otherwise.

    On the negative side f(Z) - f(mean) = A (exp(y) - 1) - B with y = (Z - min(mean, 0)) / scale, whose first two
    moments are differences of E[exp(k y); Z < 0] = exp(k s max(t, 0) + k^2 s^2 / 2) cdf(-t - k s), s = std / scale,
    t = mean / std, taken through the logarithm so that nothing overflows. For tiny s these differences cancel and the
    Taylor series in y, integrated against the truncated Gaussian, takes their place.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.
        height: minus the limit at minus infinity.
        scale: length over which the exponential decays, positive.
        slope: slope on the positive side.

    Returns:
        The moments, elementwise.

    Example:
        >>> round(exponential(torch.zeros(()), torch.ones(())).mean.item(), 6)
        0.160521
    """
    mean, std = torch.broadcast_tensors(mean, std)
    t, s = standardize(0.0, -mean, std), std / scale
    above = mean.clamp_min(0.0)
    below = mean - above
    shift = s * t.clamp_min(0.0)  # above / scale, bounded where the negative side has no mass
    centre = (slope * above + height * torch.expm1(below / scale)).detach()

    # Positive side: slope * z - centre = (slope * mean - centre) + slope * std * x.
    p, px, pxx = truncated(-t, None, 2)
    constant, linear = slope * mean - centre, slope * std
    first = constant * p + linear * px
    second = constant * constant * p + 2.0 * constant * linear * px + linear * linear * pxx

    # Negative side: A = height * rise.
    origin = below / scale
    rise, offset = torch.exp(origin), centre - height * torch.expm1(origin)
    below_zero = truncated(None, -t, 4)
    j0 = below_zero[0]
    j1, j2, square = _expm1_moments(t, s, origin, shift, rise, below_zero)
    first = first + height * j1 - offset * j0
    second = second + height * height * j2 - 2.0 * height * offset * j1 + offset * offset * j0

    squared_derivative = slope * slope * p + (height / scale) ** 2 * square
    return Moments(centre + first, (second - first * first).clamp_min(0.0), squared_derivative)


def _expm1_moments(
    t: Tensor, s: Tensor, origin: Tensor, shift: Tensor, rise: Tensor, m: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """E[r (e^y - 1)], E[r^2 (e^y - 1)^2], E[r^2 e^2y] over x < -t, for y = shift + s x, r = rise = e^origin.

    The last argument holds the moments of x there.
    """
    single = torch.exp(origin + shift + 0.5 * s * s + torch.special.log_ndtr(-t - s))
    double = torch.exp(2.0 * (origin + shift + s * s) + torch.special.log_ndtr(-t - 2.0 * s))
    # Taylor series in s x, whose error of order s^3 meets the rounding of the differences, 1 / s^2, at eps^(1/5).
    less, e = torch.expm1(shift), torch.exp(shift)
    x1, x2, x3, x4 = s * m[1], s * s * m[2] / 2.0, s**3 * m[3] / 6.0, s**4 * m[4] / 24.0
    mixed = less * x1 + (2.0 * e - 1.0) * x2 + (4.0 * e - 1.0) * x3 + (8.0 * e - 1.0) * x4
    series1 = less * m[0] + e * (x1 + x2 + x3 + x4)
    series2 = less * less * m[0] + 2.0 * e * mixed
    tiny = s < torch.finfo(s.dtype).eps ** 0.2
    j1 = torch.where(tiny, rise * series1, single - rise * m[0])
    j2 = torch.where(tiny, rise * rise * series2, double - 2.0 * rise * single + rise * rise * m[0])
    return j1, j2, double
