r"""``dynamic-tanh``: an elementwise squashing in the place of a norm, :math:`y = \gamma \tanh(\alpha x) + \beta`.

No statistics at all: train and eval are the same function, every element's output depends on that element alone.
:math:`\alpha` is one learnable number per layer and starts at 0.5; :math:`\gamma` and :math:`\beta` are per feature or
channel and start at 1 and 0.

Shape: (\*, C, \*space) to the same.

Use it in transformers, in the place of each layer norm. Do not use it where the scale of the input is not known: where
:math:`\alpha x` is large the gradient is gone, where it is small the layer is linear and normalises nothing. In a block
it stands between a linear map and the activation, where the paper makes no claim; the linear map then starts with He's
variance for both together, which is larger, or else every layer would halve its input.

Source:
    Zhu, Chen, He, LeCun & Liu 2025.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.plain import activation_module, linear_map, of_blocks

ALPHA = 0.5


class DynamicTanh(nn.Module):
    r"""A tanh with a learnable scale inside and an affine map outside.

    Args:
        num_features: features, or channels of a map.
        dims: spatial dimensions, 0 for features.
        alpha: start of the scale inside.

    Shape:
        (\*, num_features, \*space) to the same, with ``dims`` axes of space.

    Source:
        Zhu et al. 2025.

    Example:
        >>> DynamicTanh(2)(torch.tensor([[0.0, 2.0]]))
        tensor([[0.0000, 0.7616]], grad_fn=...)
    """

    def __init__(self, num_features: int, dims: int = 0, *, alpha: float = ALPHA) -> None:
        super().__init__()
        self.num_features = num_features
        self.dims = dims
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Squash every element."""
        per_channel = (-1,) + (1,) * self.dims
        squashed = torch.tanh(self.alpha * at_least_float32(input))
        output = torch.addcmul(self.bias.reshape(per_channel), squashed, self.weight.reshape(per_channel))
        return output.to(input.dtype)

    def extra_repr(self) -> str:
        """Number of features and spatial dimensions."""
        return f"{self.num_features}, dims={self.dims}"


def dynamic_tanh(dims: int, num_features: int) -> nn.Module:
    """Dynamic tanh with the paper's start, 0.5."""
    return DynamicTanh(num_features, dims)


def block(
    dims: int, in_channels: int, out_channels: int, *args: Any, activation: Activation = "relu", **kwargs: Any
) -> nn.Module:
    """Linear map without bias, dynamic tanh and activation."""
    function = moments.resolve(activation).function

    def squashed(z: Tensor) -> Tensor:
        return function(torch.tanh(ALPHA * z))

    parts = nn.Sequential()
    parts.add_module(
        "linear", linear_map(dims, in_channels, out_channels, *args, activation=squashed, bias=False, **kwargs)
    )
    parts.add_module("norm", DynamicTanh(out_channels, dims))
    if activation is not None:
        parts.add_module("activation", activation_module(activation))
    return parts


METHODS = {"dynamic-tanh": of_blocks("Zhu et al. 2025, Transformers without Normalization", block, layer=dynamic_tanh)}
