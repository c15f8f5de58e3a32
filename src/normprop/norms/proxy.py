r"""``proxy-layer``, ``proxy-group``, ``proxy-instance``: activations normalised by those of a Gaussian proxy.

.. math::
    z = \phi(\gamma y + \beta), \qquad o = \frac{z - \tilde\mu}{\sqrt{\tilde v + 0.03}}, \qquad
    \tilde\mu, \tilde v = \operatorname{mean, var} \phi(\gamma \tilde Y + \beta), \quad
    \tilde Y = (1 + \tilde\gamma) \xi + \tilde\beta, \quad \xi \sim N(0, 1)

y is layer, group or instance norm of the linear map, without affine: its statistics are per sample, over channels and
space, over a group of channels and space, or over space. The proxy's mean and variance are per channel, over 200
quantiles of the Gaussian, and functions of the four parameters alone: no data enter, the gradient flows through them.
They cost 200 numbers per channel, nothing of the size of the activations. No running statistics: train and eval are
the same function, a sample's output depends on that sample alone.

:math:`\gamma = 1`, :math:`\beta = \tilde\gamma = \tilde\beta = 0` at the start. :math:`\tilde\gamma` and
:math:`\tilde\beta` decay under weight decay, so that the proxy stays near N(0, 1); :math:`\gamma, \beta` do not. At the
start, with epsilon 0 and many quantiles, the activation is that of NormProp.

Rules for a network, of the authors' code: the norm has no affine where an activation follows. After the last linear map
of a residual branch, which has no activation, it has a gain, no bias and no proxy: blocks without activation are built
so. Inside squeeze-and-excitation the plain activation stays. Two of its rules are not followed: the scaling by the
proxy's deviation is not delayed past a pooling, nor left out in the last layer. After a residual sum, which nothing
normalises, the plain activation stays.

Shape: (N, C_in, \*space) to (N, C_out, \*space').

Use it in deep networks at any batch size, in the place of batch norm: layer and group norm let channels collapse to
constants with depth, the proxy prevents that. Do not use ``proxy-instance`` on maps of 1x1 or in linear layers, nor any
with activations that are not elementwise.

Source:
    Labatie, Masters, Eaton-Rosen & Luschi 2021, and their public code.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.moments.rule import widened
from normprop.norms.classic import default_groups
from normprop.norms.plain import activation_module, linear_map, of_blocks

NORM_EPS = 1e-3
PROXY_EPS = 0.03
QUANTILES = 200


def quantiles(count: int, reference: Tensor) -> Tensor:
    r"""Mid-point quantiles of N(0, 1), :math:`\Phi^{-1}((k + 1/2) / K)`, of the type of a tensor.

    Example:
        >>> quantiles(4, torch.zeros(()))
        tensor([-1.1503, -0.3186,  0.3186,  1.1503])
    """
    levels = torch.arange(count, dtype=reference.dtype, device=reference.device).add(0.5).div(count)
    normal: Tensor = torch.special.ndtri(levels)
    return normal


def proxy_moments(
    activation: Activation, weight: Tensor, bias: Tensor, proxy_weight: Tensor, proxy_bias: Tensor, count: int | None
) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of :math:`\phi(\gamma ((1 + \tilde\gamma) \xi + \tilde\beta) + \beta)` for normal ξ.

    Args:
        activation: φ.
        weight: γ, (C,).
        bias: β, (C,).
        proxy_weight: what the proxy's deviation has above 1, (C,).
        proxy_bias: the proxy's mean, (C,).
        count: number of quantiles, or ``None`` for the exact moments.

    Returns:
        Mean and variance, each (C,), in float32 or better, differentiable in the four parameters.

    Source:
        Labatie et al. 2021; by quantiles as their code.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> proxy_moments("relu", one, zero, zero, zero, 200)
        (tensor([0.3985]), tensor([0.3380]))
    """
    weight, bias, proxy_weight, proxy_bias = map(at_least_float32, (weight, bias, proxy_weight, proxy_bias))
    mean, std = torch.addcmul(bias, weight, proxy_bias), torch.addcmul(weight, weight, proxy_weight)
    rule = moments.resolve(activation)
    if count is None:
        exact = rule.moments(mean, std.abs(), derivative=False)
        return torch.as_tensor(exact.mean), torch.as_tensor(exact.var)
    proxy = widened(rule.function)(torch.addcmul(mean, quantiles(count, mean).unsqueeze(1), std))
    var, average = torch.var_mean(proxy, 0, correction=0)
    return average, var


class SampleNorm(nn.GroupNorm):
    r"""Group norm that refuses groups of one value, whose norm is zero.

    Raises:
        ValueError: from forward, for input with one value per sample and group.

    Example:
        >>> SampleNorm(4, 8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise every group of every sample."""
        if input.shape[1:].numel() == self.num_groups:
            raise ValueError(
                f"norms.proxy: expected more than 1 value per sample and group, got input size {tuple(input.shape)} "
                f"and {self.num_groups} groups"
            )
        return super().forward(input)


class ProxyNorm(nn.Module):
    r"""Group norm, activation, and normalisation by the activation's Gaussian proxy.

    Args:
        num_groups: groups of channels for the norm; 1 for layer norm, ``num_channels`` for instance norm.
        num_channels: channels.
        activation: φ, elementwise.
        eps: epsilon of the norm.
        proxy_eps: epsilon of the proxy's variance.
        quantiles: number of quantiles for the proxy's moments, or ``None`` for the exact ones.

    Attributes:
        norm: the norm, with γ and β as its ``weight`` and ``bias``, (num_channels,).
        proxy_weight: what the proxy's deviation has above 1, (num_channels,), starts at 0, decays.
        proxy_bias: the proxy's mean, (num_channels,), starts at 0, decays.

    Raises:
        ConfigError: for fewer than two quantiles.
        ValueError: from forward, for input with one value per sample and group.

    Shape:
        (N, num_channels, \*space) to the same.

    Source:
        Labatie et al. 2021.

    Example:
        >>> ProxyNorm(4, 8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    parameter_decay: ClassVar[dict[str, bool]] = {"proxy_weight": True, "proxy_bias": True}

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        activation: Activation = "relu",
        *,
        eps: float = NORM_EPS,
        proxy_eps: float = PROXY_EPS,
        quantiles: int | None = QUANTILES,
    ) -> None:
        super().__init__()
        if quantiles is not None and quantiles < 2:
            raise ConfigError(f"norms.proxy: quantiles must be 2 or more, or None for exact moments, got {quantiles}")
        self.proxy_eps = proxy_eps
        self.quantiles = quantiles
        self.norm = SampleNorm(num_groups, num_channels, eps=eps)
        self.activation = activation_module(activation)
        self.proxy_weight = nn.Parameter(torch.zeros(num_channels))
        self.proxy_bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, activate, and normalise by the proxy."""
        activated = self.activation(self.norm(input))
        parameters = (self.norm.weight, self.norm.bias, self.proxy_weight, self.proxy_bias)
        mean, var = proxy_moments(self.activation, *parameters, self.quantiles)
        scale = (var + self.proxy_eps).rsqrt()
        per_channel = (-1,) + (1,) * (input.ndim - 2)
        shift = (-mean * scale).reshape(per_channel)
        return torch.addcmul(shift, activated, scale.reshape(per_channel)).to(input.dtype)

    def extra_repr(self) -> str:
        """Epsilon and quantiles of the proxy."""
        return f"proxy_eps={self.proxy_eps}, quantiles={self.quantiles}"


def block(
    num_groups: Callable[[int, int], int],
    dims: int,
    in_channels: int,
    out_channels: int,
    *args: Any,
    activation: Activation = "relu",
    **kwargs: Any,
) -> nn.Module:
    """Linear map without bias, then norm, activation and proxy; without activation the norm with a gain alone."""
    groups = num_groups(dims, out_channels)
    linear = linear_map(dims, in_channels, out_channels, *args, activation=activation, bias=False, **kwargs)
    if activation is None:
        norm: nn.Module = SampleNorm(groups, out_channels, eps=NORM_EPS, bias=False)
    else:
        norm = ProxyNorm(groups, out_channels, activation)
    return nn.Sequential(OrderedDict(linear=linear, norm=norm))


def _one(dims: int, channels: int) -> int:
    """One group: layer norm."""
    return 1


def _each(dims: int, channels: int) -> int:
    """One group per channel: instance norm, which needs space."""
    if dims == 0:
        raise ConfigError(
            "norms.proxy-instance: instance norm takes its statistics over space; a linear layer has none; "
            "use proxy-layer or proxy-group"
        )
    return channels


_SOURCE = "Labatie et al. 2021, Proxy-Normalizing Activations to Match Batch Normalization"
METHODS = {
    f"proxy-{name}": of_blocks(_SOURCE, partial(block, num_groups))
    for name, num_groups in (("layer", _one), ("group", default_groups), ("instance", _each))
}
