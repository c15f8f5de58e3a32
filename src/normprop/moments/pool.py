"""Moments after pooling and dropout."""

import functools
import math

import numpy as np
import torch

from normprop.errors import ConfigError
from normprop.moments.gaussian import cdf, legendre, pdf
from normprop.moments.rule import Activation, of, resolve, widened
from normprop.moments.value import Moments


def mean_pool(k: int, moments: Moments, rho: float = 0.0) -> Moments:
    """Moments of the mean of k variables with equal moments and pairwise correlation rho.

    The mean stays; the variance becomes var * (rho + (1 - rho) / k).

    Args:
        k: number of variables, at least 1.
        moments: moments of each.
        rho: correlation of every pair, between -1 / (k - 1) and 1.

    Returns:
        Mean and variance of the average.

    Raises:
        ConfigError: if no k variables can be correlated like that.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, section 3.3 (pooling follows the normalisation).

    Example:
        >>> mean_pool(4, Moments(mean=1.0, var=2.0)).var
        0.5
    """
    _check(k, rho, -1.0 / (k - 1) if k > 1 else -1.0)
    return Moments(moments.mean, moments.var * (rho + (1.0 - rho) / k))


def max_pool(k: int, moments: Moments, rho: float = 0.0) -> Moments:
    """Moments of the largest of k *Gaussian* variables with equal moments and pairwise correlation rho.

    mean + std * sqrt(1 - rho) * m_k and var * (rho + (1 - rho) * v_k), where m_k and v_k belong to k independent
    standard Gaussians. For pooling that follows an activation see :func:`max_pool_of`.

    Args:
        k: number of variables, at least 1.
        moments: moments of each.
        rho: correlation of every pair, from 0 to 1.

    Returns:
        Mean and variance of the maximum.

    Raises:
        ConfigError: if k or rho is out of range.

    Example:
        >>> largest = max_pool(4, Moments(mean=0.0, var=1.0))
        >>> round(largest.mean, 6), round(largest.std, 6)
        (1.029375, 0.701224)
    """
    _check(k, rho, 0.0)
    mean, var = _largest(k)
    return Moments(moments.mean + moments.std * (math.sqrt(1.0 - rho) * mean), moments.var * (rho + (1.0 - rho) * var))


def max_pool_of(k: int, activation: Activation, mean: float = 0.0, std: float = 1.0, rho: float = 0.0) -> Moments:
    """Moments of the largest of k outputs f(Z_i), Z_i ~ N(mean, std^2) with pairwise correlation rho.

    The law of f(Z) is computed numerically, so that f need not be monotone and may map many inputs to one value.
    For normalised outputs (f(Z) - c2) / c1 subtract and divide afterwards.

    Args:
        k: number of variables, at least 1.
        activation: see :func:`normprop.moments.resolve`.
        mean: mean of every Gaussian.
        std: standard deviation of every Gaussian, not negative.
        rho: correlation of every pair of Gaussians, from 0 to 1.

    Returns:
        Mean and variance of the maximum, as floats; relative error about 1e-6.

    Raises:
        ConfigError: if k or rho is out of range.
        MomentError: if the activation is not elementwise or its moments are not reliable.

    Example:
        >>> relu, largest = of("relu"), max_pool_of(4, "relu")
        >>> round((largest.mean - relu.mean) / relu.std, 5), round(largest.std / relu.std, 5)
        (1.1079, 1.14925)
    """
    _check(k, rho, 0.0)
    of(activation, mean, std)  # checks it
    function = widened(resolve(activation).function)
    if rho == 0.0:
        shared, share = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    else:  # Z_i = mean + std * (sqrt(rho) * shared + sqrt(1 - rho) * own_i): average over what they share
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        shared, share = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    cells = 200_001 if rho == 0.0 else 20_001
    own = torch.linspace(-10.0, 10.0, cells, dtype=torch.float64)
    mass = pdf(own) / pdf(own).sum()
    first = second = 0.0
    with torch.no_grad():
        for position, weight in zip(shared.tolist(), share.tolist(), strict=True):
            z = mean + std * (math.sqrt(rho) * position + math.sqrt(1.0 - rho) * own)
            value, order = function(z).double().sort()
            below = mass[order].cumsum(0).clamp_max(1.0)
            chance = torch.diff(below**k, prepend=below.new_zeros(1))
            first += weight * float(value @ chance)
            second += weight * float(value.square() @ chance)
    return Moments(first, max(second - first * first, 0.0))


def dropout(moments: Moments, p: float) -> Moments:
    """Moments after torch's dropout, which zeroes with probability p and scales the rest by 1 / (1 - p).

    The mean stays and second moments are divided by 1 - p, so the variance becomes (var + p * mean^2) / (1 - p).

    Args:
        moments: moments before.
        p: probability of zero, from 0 to less than 1.

    Returns:
        Moments after.

    Raises:
        ConfigError: if p is out of range.

    Source:
        Srivastava et al., Dropout, JMLR 2014.

    Example:
        >>> dropout(Moments(mean=0.0, var=1.0), p=0.5).var
        2.0
    """
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"dropout probability must be at least 0 and less than 1, got {p}")
    keep = 1.0 - p
    var = (moments.var + p * moments.mean * moments.mean) / keep
    return Moments(moments.mean, var, moments.squared_derivative / keep, moments.error / keep)


def _check(k: int, rho: float, lowest: float) -> None:
    """Refuse an impossible number or correlation of variables."""
    if k < 1:
        raise ConfigError(f"a pool takes at least 1 variable, got k={k}")
    if not lowest <= rho <= 1.0:
        raise ConfigError(f"correlation of {k} pooled variables must be between {lowest:.4g} and 1, got rho={rho}")


@functools.cache
def _largest(k: int) -> tuple[float, float]:
    """Mean and variance of the largest of k independent standard Gaussians."""
    if k == 1:
        return 0.0, 1.0
    nodes, weights = (torch.tensor(part, dtype=torch.float64) for part in legendre(32))
    edges = torch.arange(-12.0, 12.0, dtype=torch.float64).unsqueeze(-1)
    x = (edges + nodes).flatten()
    chance = k * pdf(x) * cdf(x) ** (k - 1) * weights.repeat(len(edges))
    mean = float(x @ chance)
    return mean, float((x - mean).square() @ chance)
