r"""``evonorm-s0``: normaliser and activation in one, found by search.

.. math:: y = \gamma \frac{x \, \sigma(v x)}{\sqrt{s^2 + \epsilon}} + \beta

:math:`s^2` is the variance of x per sample, over a group of channels and space; x itself is not centred. v is per
channel and learnable. :math:`v, \gamma, \beta` start at 1, 1 and 0. No running statistics: train and eval are the same
function, a sample's output depends on that sample alone. There are 32 groups, or as many of them as divide the channels
into groups of two or more, as in ``group``; in linear layers, whose groups would hold few values, there is one.

The nonlinearity is the method's own: in a block it takes the place of any activation. Without activation, as in front
of a residual sum, the block has the norm without :math:`\sigma`, :math:`y = \gamma x / \sqrt{s^2 + \epsilon} + \beta`
(ours). The activation after a residual sum is the plain one.

Shape: (N, C, \*space) to the same.

Use it in the place of batch norm and ReLU in convolutional networks, at any batch size. Do not use it where a certain
activation is wanted, or where a group holds few values, as on 1x1 maps: x is not centred, so dividing by a deviation of
a few values gives outliers.

Source:
    Liu, Brock, Simonyan & Le 2020.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.classic import default_groups
from normprop.norms.plain import linear_map, of_blocks


class EvoNormS0(nn.Module):
    r"""EvoNorm-S0, or its norm without the nonlinearity.

    Args:
        num_groups: groups of channels.
        num_channels: channels.
        nonlinear: with :math:`\sigma(v x)`.
        eps: epsilon of the variance.

    Raises:
        ValueError: from forward, for input with one value per sample and group.

    Shape:
        (N, num_channels, \*space) to the same.

    Source:
        Liu et al. 2020.

    Example:
        >>> EvoNormS0(4, 8)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, num_groups: int, num_channels: int, *, nonlinear: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.v = nn.Parameter(torch.ones(num_channels)) if nonlinear else None

    def forward(self, input: Tensor) -> Tensor:
        """Divide by the deviation of the group, gate by the sigmoid, then apply gain and bias."""
        if input.shape[1:].numel() == self.num_groups:
            raise ValueError(
                f"norms.evonorm-s0: expected more than 1 value per sample and group, got input size "
                f"{tuple(input.shape)} and {self.num_groups} groups"
            )
        wide = at_least_float32(input)
        per_channel = (-1,) + (1,) * (input.ndim - 2)
        values = wide.unflatten(1, (self.num_groups, -1)).flatten(2)
        # Not var(), which warns about a batch of no samples.
        var = (values - values.mean(2, keepdim=True)).square().mean(2)
        scale = (var + self.eps).rsqrt().repeat_interleave(self.num_channels // self.num_groups, 1)
        factor = scale.reshape(input.shape[:2] + per_channel[1:]) * self.weight.reshape(per_channel)
        gated = wide if self.v is None else wide * torch.sigmoid(self.v.reshape(per_channel) * wide)
        return torch.addcmul(self.bias.reshape(per_channel), gated, factor).to(input.dtype)

    def extra_repr(self) -> str:
        """Groups, channels and epsilon."""
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, nonlinear={self.v is not None}"


def evonorm_s0(dims: int, num_features: int, nonlinear: bool = True) -> nn.Module:
    """EvoNorm-S0 with as many groups as group norm has here, or with one for features."""
    return EvoNormS0(default_groups(dims, num_features) if dims else 1, num_features, nonlinear=nonlinear)


def block(
    dims: int, in_channels: int, out_channels: int, *args: Any, activation: Activation = "relu", **kwargs: Any
) -> nn.Module:
    """Linear map without bias and EvoNorm-S0 in the place of norm and activation."""
    parts = nn.Sequential()
    parts.add_module("linear", linear_map(dims, in_channels, out_channels, *args, bias=False, **kwargs))
    parts.add_module("norm", evonorm_s0(dims, out_channels, nonlinear=activation is not None))
    return parts


METHODS = {
    "evonorm-s0": of_blocks("Liu et al. 2020, Evolving Normalization-Activation Layers", block, layer=evonorm_s0)
}
