"""Closed forms of the activations made of the error function: erf and GELU."""

import math

import torch
from torch import Tensor

from normprop.moments.gaussian import cdf, pdf, threshold_variance
from normprop.moments.value import Moments


def erf(mean: Tensor, std: Tensor) -> Moments:
    """Moments of erf(z), elementwise.

    E[erf(Z)] = erf(mean / sqrt(1 + 2 std^2)); the variance is four times that of a Gaussian threshold.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.

    Returns:
        The moments.

    Example:
        >>> round(erf(torch.zeros(()), torch.ones(())).var.item(), 6)  # 2 / pi * asin(2 / 3)
        0.464559
    """
    double = 2.0 * std * std
    h = mean * torch.rsqrt(0.5 + 0.5 * double)
    wide = 1.0 + 2.0 * double
    var = 4.0 * threshold_variance(h, torch.atan2(double, torch.sqrt(wide)))
    squared_derivative = (4.0 / math.pi) * torch.exp(-2.0 * mean * mean / wide) * torch.rsqrt(wide)
    return Moments(torch.erf(h * math.sqrt(0.5)), var, squared_derivative)


def gelu(mean: Tensor, std: Tensor) -> Moments:
    """Moments of z cdf(z), the exact (erf) form of GELU, elementwise.

    Write m, s for mean and std, d = 1 + s^2, e = 1 + 2 s^2, h = m / sqrt(d), k = h / sqrt(e), P = cdf(Z).
    Integration by parts gives E[Z P] = m cdf(h) + s^2 a with a = pdf(h) / sqrt(d), and

        Var = s^2 cdf(h)^2 + (m^2 + s^2) Var P + 2 m s^2 a (2 cdf(k) - cdf(h))
            + s^4 (2 E[pdf(Z)^2] - 2 E[Z P pdf(Z)] - a^2)

    in which the large terms m^2 cdf(h)^2 have already gone: every term left is of order s^2.

    Args:
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.

    Returns:
        The moments.

    Example:
        >>> round(gelu(torch.zeros(()), torch.ones(())).mean.item(), 6)  # 1 / (2 sqrt(pi))
        0.282095
    """
    s2 = std * std
    d, e = 1.0 + s2, 1.0 + 2.0 * s2
    root_d, root_e = torch.sqrt(d), torch.sqrt(e)
    h = mean / root_d
    k = h / root_e
    below, below_k = cdf(h), cdf(k)
    a = pdf(h) / root_d
    threshold = threshold_variance(h, torch.atan2(s2, root_e))
    product = a * (mean * below_k / d + s2 * pdf(k) / (root_d * root_e))  # E[Z P pdf(Z)]
    density = torch.exp(-mean * mean / e) / (2.0 * math.pi * root_e)  # E[pdf(Z)^2]
    var = (
        s2 * below * below
        + (mean * mean + s2) * threshold
        + 2.0 * mean * s2 * a * (2.0 * below_k - below)
        + s2 * s2 * (2.0 * (density - product) - a * a)
    )
    squared_derivative = (
        below * below + threshold + 2.0 * product + density * (mean * mean / (e * e) + s2 / e)  # E[(P + Z pdf(Z))^2]
    )
    return Moments(mean * below + s2 * a, var.clamp_min(0.0), squared_derivative)
