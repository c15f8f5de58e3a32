r"""Objectives of regularised auto-encoders, and what noise on the input adds to the loss.

All start from :math:`J_{AE} = E \|x - W^\top s(W x + b) - b_d\|^2`: squares are summed over features and averaged over
samples. ``coefficient`` is the factor of the regulariser, of the denoising ones the variance of the noise.

Source:
    Arpit, Zhou, Ngo & Govindaraju 2016 (Why regularized auto-encoders learn sparse representation?).
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normprop.errors import ConfigError
from normprop.models.autoencoder import AutoEncoder

Objective = Callable[[AutoEncoder, Tensor, float, torch.Generator | None], Tensor]


def reconstruction(
    autoencoder: AutoEncoder, batch: Tensor, coefficient: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    r"""Squared error without regulariser: :math:`J_{AE} = E \|x - y\|^2`.

    Args:
        autoencoder: the network.
        batch: (N, n).
        coefficient, generator: not used; all objectives take them.

    Returns:
        A scalar.

    Source:
        Arpit et al. 2016, section 2.

    Example:
        >>> autoencoder = AutoEncoder(4, 3).requires_grad_(False)
        >>> _ = autoencoder.weight.zero_()
        >>> reconstruction(autoencoder, torch.ones(2, 4))
        tensor(4.)
    """
    return _distance(autoencoder(batch), batch)


def denoising(
    autoencoder: AutoEncoder, batch: Tensor, coefficient: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""DAE: reconstruct samples from corrupted ones, :math:`E \|x - y(x + \epsilon)\|^2`.

    Args:
        autoencoder: the network.
        batch: (N, n).
        coefficient: variance of the Gaussian noise on each feature.
        generator: where the noise is drawn from; ``None`` for torch's own.

    Returns:
        A scalar.

    Source:
        Vincent et al. 2008; Arpit et al. 2016, section 4.

    Example:
        >>> autoencoder, batch = AutoEncoder(4, 3), torch.randn(5, 4)
        >>> bool(denoising(autoencoder, batch, 0.0) == reconstruction(autoencoder, batch))
        True
    """
    return _distance(autoencoder(batch + _noise(batch, coefficient, generator)), batch)


def first_order_denoising(
    autoencoder: AutoEncoder, batch: Tensor, coefficient: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""EDAE: the loss of corrupted samples to first order in the noise.

    .. math:: E[\ell(x) + \epsilon^\top \nabla_{\tilde x} \ell(x)], \qquad
        \epsilon^\top \nabla_{\tilde x} \ell = 2 (y - x)^\top W^\top (s' \odot W \epsilon)

    Its mean over the noise is J_AE: what it adds to training is in the fluctuations alone.

    Args:
        autoencoder: the network.
        batch: (N, n).
        coefficient: variance of the Gaussian noise on each feature.
        generator: where the noise is drawn from; ``None`` for torch's own.

    Returns:
        A scalar.

    Source:
        Arpit et al. 2016, section 4.

    Example:
        >>> autoencoder, batch = AutoEncoder(4, 3), torch.randn(5, 4)
        >>> bool(first_order_denoising(autoencoder, batch, 0.0) == reconstruction(autoencoder, batch))
        True
    """
    a = autoencoder.preactivation(batch)
    activation, slope, _ = autoencoder.nonlinearity
    error = autoencoder.decode(activation(a)) - batch
    moved = (slope(a) * (_noise(batch, coefficient, generator) @ autoencoder.weight.T)) @ autoencoder.weight
    return (error * (error + 2 * moved)).sum(1).mean()


def contractive(
    autoencoder: AutoEncoder, batch: Tensor, coefficient: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""CAE: :math:`J_{AE} + \lambda E \sum_j h_j'^2 \|W_j\|^2`, the squared Frobenius norm of the encoder's Jacobian.

    Args:
        autoencoder: the network.
        batch: (N, n).
        coefficient: lambda.
        generator: not used.

    Returns:
        A scalar.

    Source:
        Rifai et al. 2011; Arpit et al. 2016, section 3.2.

    Example:
        >>> autoencoder, batch = AutoEncoder(4, 3), torch.randn(5, 4)
        >>> bool(contractive(autoencoder, batch, 0.0) == reconstruction(autoencoder, batch))
        True
    """
    return _with_slopes(autoencoder, batch, coefficient, power=2)


def marginalized_denoising(
    autoencoder: AutoEncoder, batch: Tensor, coefficient: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""The mDAE: :math:`J_{AE} + \lambda E \sum_j h_j'^2 \|W_j\|^4`, the CAE's where weights have length 1.

    Args:
        autoencoder: the network.
        batch: (N, n).
        coefficient: lambda, the variance of the noise that it stands for.
        generator: not used.

    Returns:
        A scalar.

    Source:
        Chen et al. 2014; Arpit et al. 2016, section 3.2.

    Example:
        >>> autoencoder, batch = AutoEncoder(4, 3), torch.randn(5, 4)
        >>> autoencoder.normalize_weight_()
        >>> bool(torch.isclose(*(f(autoencoder, batch, 0.3) for f in (contractive, marginalized_denoising))))
        True
    """
    return _with_slopes(autoencoder, batch, coefficient, power=4)


def sparse(
    autoencoder: AutoEncoder, batch: Tensor, coefficient: float, generator: torch.Generator | None = None
) -> Tensor:
    r"""SAE with target 0: :math:`J_{AE} - \lambda \sum_j \log(1 - E h_j)`, the mean over the batch.

    Args:
        autoencoder: the network; its activation has to be the sigmoid, whose codes lie in (0, 1).
        batch: (N, n).
        coefficient: lambda.
        generator: not used.

    Returns:
        A scalar.

    Raises:
        ConfigError: for another activation.

    Source:
        Arpit et al. 2016, section 3.2, with rho = 0.

    Example:
        >>> sparse(AutoEncoder(4, 3), torch.randn(5, 4), 0.1)
        Traceback (most recent call last):
        normprop.errors.ConfigError: sparse auto-encoder: activation is 'relu', whose codes may pass 1; use 'sigmoid'
    """
    if autoencoder.activation != "sigmoid":
        raise ConfigError(
            f"sparse auto-encoder: activation is {autoencoder.activation!r}, whose codes may pass 1; use 'sigmoid'"
        )
    a = autoencoder.preactivation(batch)
    # 1 - sigmoid(a) = sigmoid(-a) does not round to 0.
    penalty = -torch.sigmoid(-a).mean(0).log().sum()
    return _squared_error(autoencoder, batch, a) + _checked(coefficient) * penalty


OBJECTIVES: dict[str, Objective] = {
    "ae": reconstruction,
    "dae": denoising,
    "edae": first_order_denoising,
    "mdae": marginalized_denoising,
    "cae": contractive,
    "sae": sparse,
}
"""Objectives by name: (autoencoder, batch, coefficient, generator) to a scalar."""

NOISY = frozenset({"dae", "edae"})
"""Names of the objectives that draw noise."""


def bias_gradient(
    autoencoder: AutoEncoder,
    batch: Tensor,
    objective: str,
    coefficient: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gradient of an objective in the encoder's bias, by autograd; the auto-encoder is left alone.

    Args:
        autoencoder: the network.
        batch: (N, n).
        objective: name, a key of :data:`OBJECTIVES`.
        coefficient: of the regulariser, or variance of the noise.
        generator: where noise is drawn from; ``None`` for torch's own.

    Returns:
        (m,).

    Raises:
        ConfigError: for an unknown objective, or one that cannot take this auto-encoder.

    Example:
        >>> bias_gradient(AutoEncoder(4, 3), torch.randn(5, 4), "ae").shape
        torch.Size([3])
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"auto-encoder: no objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    twin = copy.deepcopy(autoencoder).requires_grad_(False)
    twin.bias.requires_grad_()
    with torch.enable_grad():
        loss = OBJECTIVES[objective](twin, batch, coefficient, generator)
        (gradient,) = torch.autograd.grad(loss, twin.bias)
    return gradient


class Expansion(NamedTuple):
    """What noise of variance 1 adds to J_AE, to second order; all scalars, means over the batch.

    ``own`` is what mDAE keeps, ``cross`` couples pairs of units, ``residual`` goes with the error of reconstruction.
    """

    own: Tensor
    cross: Tensor
    residual: Tensor


def denoising_expansion(autoencoder: AutoEncoder, batch: Tensor) -> Expansion:
    r"""Second-order terms of the denoising loss: :math:`J_{DAE} = J_{AE} + \sigma^2 (own + cross + residual) + o`.

    .. math:: E \sum_j h_j'^2 \|W_j\|^4, \quad E \sum_{j \ne k} h_j' h_k' (W_j \cdot W_k)^2, \quad
        E (y - x)^\top W^\top (h'' \odot \|W\|^2)

    Their sum is half the trace of the loss's Hessian in the corrupted input. Differentiable; not that of the ReLU,
    whose kinks h'' leaves out.

    Args:
        autoencoder: the network.
        batch: (N, n).

    Returns:
        The three terms.

    Source:
        Arpit et al. 2016, theorem 3.

    Example:
        >>> autoencoder = AutoEncoder(4, 3, "identity")
        >>> terms = denoising_expansion(autoencoder, torch.randn(5, 4))
        >>> bool(torch.isclose(sum(terms), (autoencoder.weight.T @ autoencoder.weight).square().sum()))
        True
    """
    a = autoencoder.preactivation(batch)
    activation, slope, curvature = autoencoder.nonlinearity
    slopes, weight = slope(a), autoencoder.weight
    error = autoencoder.decode(activation(a)) - batch
    gram = (weight @ weight.T).square()
    own = (slopes.square() @ gram.diagonal()).mean()
    pairs = ((slopes @ gram) * slopes).sum(1).mean()
    residual = ((error @ weight.T) * curvature(a)) @ weight.square().sum(1)
    return Expansion(own, pairs - own, residual.mean())


def _with_slopes(autoencoder: AutoEncoder, batch: Tensor, coefficient: float, power: int) -> Tensor:
    """J_AE + coefficient E sum_j h'_j^2 ||W_j||^power, from one pass through the encoder."""
    a = autoencoder.preactivation(batch)
    lengths = autoencoder.weight.square().sum(1) ** (power // 2)
    penalty = autoencoder.nonlinearity.slope(a).square().mean(0) @ lengths
    return _squared_error(autoencoder, batch, a) + _checked(coefficient) * penalty


def _squared_error(autoencoder: AutoEncoder, batch: Tensor, preactivation: Tensor) -> Tensor:
    """J_AE where the pre-activation is known."""
    return _distance(autoencoder.decode(autoencoder.nonlinearity.function(preactivation)), batch)


def _distance(output: Tensor, batch: Tensor) -> Tensor:
    """Squared, summed over features, mean over samples."""
    return (output - batch).square().sum(1).mean()


def _noise(batch: Tensor, variance: float, generator: torch.Generator | None) -> Tensor:
    """Gaussian noise of a batch's shape, type and device."""
    drawn_on = generator.device if generator is not None else batch.device
    noise = torch.randn(batch.shape, generator=generator, device=drawn_on, dtype=batch.dtype).to(batch.device)
    return noise.mul_(math.sqrt(_checked(variance)))


def _checked(coefficient: float) -> float:
    """A coefficient that can work."""
    if not 0 <= coefficient < math.inf:
        raise ConfigError(f"auto-encoder objective: coefficient is {coefficient}; expected a finite number, 0 or more")
    return coefficient
