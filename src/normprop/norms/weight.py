r"""``weight``: weight normalisation, :math:`f(g_i W_i x / \|W_i\| + b_i)`.

Weight-side only: train and eval are the same function, a sample's output depends on that sample alone. g starts where
the second moment of the pre-activations is kept, the counterpart without data of the paper's initialisation on a batch.

Use it when batches are small and the network is shallow. Do not use it in deep networks: unlike NormProp it lets the
mean of the activations drift.

Source:
    Salimans & Kingma 2016.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.functional import normalize_weight
from normprop.moments import Activation
from normprop.norms.plain import activation_module, apply_linear, linear_map, of_blocks


class WeightNorm(nn.Module):
    """A linear map whose filters have the length of a learnable gain.

    Args:
        linear: torch's linear map.
        gain: initial length of every filter.

    Example:
        >>> layer = WeightNorm(nn.Linear(4, 3), gain=2.0)
        >>> layer(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, linear: Any, gain: float) -> None:
        super().__init__()
        self.linear = linear
        self.gain = nn.Parameter(torch.full_like(linear.weight.flatten(1)[:, 0], gain))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map with normalised weights."""
        return apply_linear(self.linear, input, normalize_weight(self.linear.weight, self.gain))


def block(dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Linear map with normalised weights, gain and bias, then the activation."""
    gain = float(moments.of(activation).second) ** -0.5
    parts = nn.Sequential()
    parts.add_module("linear", WeightNorm(linear_map(dims, *args, **kwargs), gain))
    if activation is not None:
        parts.add_module("activation", activation_module(activation))
    return parts


METHODS = {
    "weight": of_blocks("Salimans & Kingma 2016, Weight Normalization", block, head=partial(block, activation=None))
}
