r"""``weight-standardized``: weight standardisation and group norm.

.. math:: \hat W_i = (W_i - m_i) / (s_i + \varepsilon), \qquad o = f(\mathrm{GN}(\hat W * x))

m and s are mean and biased standard deviation of one filter, over its input channels and its kernel; the group norm
then takes mean and variance over a group of channels and space, per sample, as in ``group``. Train and eval are the
same function, and a sample's output depends on that sample alone. Maps (N, C_in, \*space) to (N, C_out, \*space').

A standardised filter of N weights has length :math:`\sqrt N`, not 1, so a normaliser must follow. The authors' code
divides by the unbiased deviation, which is :math:`\sqrt{N / (N - 1)}` times ours, a factor that the group norm takes
out again.

Use it when batches are too small for batch norm, where it closes most of the gap that ``group`` leaves. Do not use it
on layers whose filters have a single weight (a depthwise 1x1 convolution): they would be zero.

Source:
    Qiao et al. 2019, Weight Standardization.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.classic import group_norm
from normprop.norms.plain import apply_linear, of_blocks, with_norm


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Give every filter mean 0 and deviation 1: :math:`(W_i - m_i) / (s_i + \varepsilon)`.

    Args:
        weight: (out, in / groups, \*kernel).
        eps: added to the biased standard deviation.

    Returns:
        Standardised weight, same shape; float32 for half-precision weights. A constant filter gives zeros.

    Source:
        Qiao et al. 2019.

    Example:
        >>> standardize_weight(torch.tensor([[1.0, 3.0]]), eps=0.0)
        tensor([[-1.,  1.]])
    """
    rows = at_least_float32(weight).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    # A norm, whose gradient at zero is defined, unlike that of the root of a variance.
    std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(rows.shape[1])
    standardized: Tensor = centred / (std + eps)
    return standardized.reshape(weight.shape)


def require_fan_in(linear: Any, name: str) -> None:
    """Refuse filters of a single weight, of which centring leaves nothing."""
    if linear.weight[0].numel() == 1:
        raise ConfigError(
            f"norms.{name}: subtracting a filter's mean leaves nothing of a filter with a single weight (fan-in 1); "
            f"use another method for this layer"
        )


class WeightStandardized(nn.Module):
    r"""A linear map with standardised filters.

    Args:
        linear: torch's linear map.
        eps: added to the standard deviation.

    Raises:
        ConfigError: if a filter has a single weight.

    Shape:
        That of ``linear``.

    Source:
        Qiao et al. 2019.

    Example:
        >>> WeightStandardized(nn.Conv2d(3, 8, 3))(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, linear: Any, eps: float = 1e-5) -> None:
        super().__init__()
        require_fan_in(linear, "weight-standardized")
        self.linear = linear
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map with standardised weights."""
        return apply_linear(self.linear, input, standardize_weight(self.linear.weight, self.eps))


def block(dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Linear map with standardised weights, group norm, activation."""
    parts: Any = with_norm(group_norm)(dims, *args, activation=activation, **kwargs)
    parts.linear = WeightStandardized(parts.linear)
    return parts  # type: ignore[no-any-return]


METHODS = {"weight-standardized": of_blocks("Qiao et al. 2019, Weight Standardization", block)}
