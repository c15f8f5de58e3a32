r"""How strong a regulariser is batch norm? The multiplier that the data set, for a linear unit.

A linear unit behind a batch norm of fixed scale, :math:`\hat y = w \cdot x / \sqrt{w^T \Sigma w}`, is the constrained
problem of least :math:`\tfrac12 E (y - w \cdot x)^2` under :math:`w^T \Sigma w = 1`, with :math:`\Sigma = E x x^T` and
:math:`c = E x y` of centred data. Its multiplier, the rate of regularisation, is no setting but a statistic of the
data. With noise of variance :math:`s^2` on every input, :math:`\Sigma` becomes :math:`\Sigma + s^2 I`:

.. math:: \lambda^* = \sqrt{c^T (\Sigma + s^2 I)^{-1} c} - 1, \qquad w^* = (\Sigma + s^2 I)^{-1} c / (1 + \lambda^*)

Without noise :math:`1 + \lambda^*` is the multiple correlation times sd(y). Noise lowers it and adds the ridge term
:math:`\tfrac12 (1 + \lambda^*) s^2 \|w\|^2`, so the direction of w is that of ridge regression with coefficient
:math:`s^2`. With a learnable gain the constraint does not bind: :math:`\gamma^* = 1 + \lambda^*` and the prediction is
that ridge regression itself.

The claim that batch norm tunes its regularisation by the data is Annamalai & Thakur's. Their own formula, their theorem
on noisy inputs and their protocol were not at hand: all formulas here are ours. :mod:`.equivalent_ridge` asks the same
of networks.

Source:
    Annamalai & Thakur 2022 for the claim; derivation ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.errors import ConfigError


@dataclass(frozen=True)
class AutoRate:
    """What the data make of a linear unit behind a batch norm of fixed scale.

    Args:
        rate: the multiplier lambda*; 0 where the constraint does not bind, below 0 where it stretches the unit.
        weight: w*, (features,).
        gain: gamma*, the best scale of the batch norm, 1 + lambda*.
        ridge: coefficient of the term ||w||^2 / 2 that noise adds, (1 + lambda*) s^2.
    """

    rate: float
    weight: Tensor
    gain: float
    ridge: float


def from_moments(covariance: Tensor, cross: Tensor, noise: float = 0.0) -> AutoRate:
    """Compute the multiplier from second moments.

    Args:
        covariance: of the inputs, (features, features); where it is singular w* is the solution of least norm.
        cross: covariances of inputs and target, (features,).
        noise: variance of noise added to every input.

    Returns:
        Multiplier, weight, gain and ridge.

    Raises:
        ConfigError: if the noise is negative or the target does not depend linearly on the inputs.

    Source:
        Ours, for Annamalai & Thakur 2022.

    Example:
        >>> from_moments(torch.eye(2), torch.tensor([3.0, 4.0]))
        AutoRate(rate=4.0, weight=tensor([0.6000, 0.8000]), gain=5.0, ridge=0.0)
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise ConfigError(f"auto_rate: noise {noise}; expected a variance, finite and at least 0")
    if covariance.shape != (len(cross), len(cross)):
        raise ConfigError(
            f"auto_rate: covariance of shape {tuple(covariance.shape)}; expected {(len(cross), len(cross))}"
        )
    noisy = covariance + noise * torch.eye(len(cross), dtype=cross.dtype, device=cross.device)
    direction = torch.linalg.pinv(noisy, hermitian=True) @ cross
    squared = float(cross @ direction)
    if not squared > 0:
        raise ConfigError("auto_rate: the target is uncorrelated with the inputs; no weight is better than another")
    gain = math.sqrt(squared)
    return AutoRate(gain - 1, direction / gain, gain, gain * noise)


def auto_rate(X: Tensor, y: Tensor, noise: float = 0.0) -> AutoRate:
    """Compute the multiplier from data, in double precision.

    Args:
        X: inputs, (samples, features); centred here.
        y: target, (samples,); centred here, its scale matters.
        noise: variance of noise added to every input, in the units of the inputs.

    Returns:
        Multiplier, weight, gain and ridge.

    Raises:
        ConfigError: if the shapes do not fit, a value is not finite, or as :func:`from_moments`.

    Source:
        Ours, for Annamalai & Thakur 2022.

    Example:
        >>> X = torch.tensor([[1.0], [-1.0]])
        >>> auto_rate(X, 2 * X[:, 0]).rate, auto_rate(X, 2 * X[:, 0], noise=3.0).rate
        (1.0, 0.0)
    """
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise ConfigError(
            f"auto_rate: X has shape {tuple(X.shape)} and y {tuple(y.shape)}; expected (samples, features) and "
            "(samples,)"
        )
    if not (X.isfinite().all() and y.isfinite().all()):
        raise ConfigError("auto_rate: X or y has values that are not finite; leave these samples out")
    centred = X.double() - X.double().mean(0)
    target = y.double() - y.double().mean()
    return from_moments(centred.T @ centred / len(X), centred.T @ target / len(X), noise)
