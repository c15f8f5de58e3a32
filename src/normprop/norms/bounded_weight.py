r"""``bounded-weight`` and ``bounded-weight-mean``: weight normalisation whose filters have one fixed length.

.. math:: y = f(W x + b), \qquad W_i = \rho \, v_i / \|v_i\|

rho is one number per layer, the mean length of its filters at the start, and is not learned: where weight normalisation
has a gain for every filter, this has none. ``bounded-weight`` takes no statistics at all: train and eval are the same
function and a sample's output depends on that sample alone. ``bounded-weight-mean`` subtracts from every channel of
W x its mean over batch and space before the bias is added (mean-only batch norm; running average in evaluation), which
is what the paper trains. Both are registered because they differ in kind: one can run at batch 1, the other not.
(N, C_in, *space) to (N, C_out, *space').

The start is He's, which makes rho E[f(z)^2]^(-1/2) up to sampling error: the second moment of the pre-activations is
kept. v does not decay (the output does not depend on its length; decay would only raise the effective step
:math:`\eta / \|v\|^2`, and bounding the weights is meant to make decay needless); the last, plain linear map does.

Use ``bounded-weight-mean`` when batches are large enough for a mean and variances cannot be afforded;
``bounded-weight`` when nothing may depend on the batch. Do not use ``bounded-weight`` in deep networks: unlike NormProp
it lets the mean of the activations drift. Without a gain a layer cannot make one channel count more than another.

The paper's repository has two versions: this one, and one with a gain for every filter whose vector is rescaled to a
fixed length.

Source:
    Hoffer, Banner, Golan & Soudry 2018; mean-only batch norm: Salimans & Kingma 2016.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normprop.functional import normalize_weight
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.plain import activation_module, apply_linear, linear_map, of_blocks
from normprop.norms.running import require_values


class MeanOnlyBatchNorm(nn.Module):
    r"""Subtract every channel's mean over batch and space and add a bias: :math:`x - \text{mean}(x) + \beta`.

    Args:
        num_features: channels C.
        momentum: weight of the new value in the running mean, which evaluation uses.

    Shape:
        (N, C, *space) to the same; a ValueError for one value per channel in training.

    Source:
        Salimans & Kingma 2016.

    Example:
        >>> MeanOnlyBatchNorm(1)(torch.tensor([[1.0], [5.0]]))
        tensor([[-2.],
                [ 2.]], grad_fn=...)
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        """Centre a batch, and in training move the running mean towards its mean."""
        mean = self.running_mean
        if self.training and input.numel() > 0:
            require_values("bounded-weight-mean", input, input[:, 0].numel())
            mean = at_least_float32(input).mean((0, *range(2, input.ndim)))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.num_batches_tracked.add_(1)
        shift = at_least_float32(self.bias) - mean
        return (input + shift.reshape(-1, *[1] * (input.ndim - 2))).to(input.dtype)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_features}, momentum={self.momentum}"


class BoundedWeight(nn.Module):
    r"""A linear map whose filters all keep one length: :math:`W_i = \rho v_i / \|v_i\|`.

    Args:
        linear: torch's linear map; rho is the mean length of its filters now.

    Shape:
        That of ``linear``.

    Source:
        Hoffer et al. 2018.

    Example:
        >>> layer = BoundedWeight(nn.Linear(4, 3))
        >>> layer.rho.shape, layer(torch.randn(5, 4)).shape
        (torch.Size([]), torch.Size([5, 3]))
    """

    rho: Tensor

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear
        # Read by normprop.training.parameter_groups.
        linear.parameter_decay = {"weight": False}
        self.register_buffer("rho", linear.weight.detach().flatten(1).norm(dim=1).mean())

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map with filters of length rho."""
        length = self.rho.expand(len(self.linear.weight))
        return apply_linear(self.linear, input, normalize_weight(self.linear.weight, length))


def block(
    dims: int,
    in_channels: int,
    out_channels: int,
    *args: Any,
    activation: Activation = "relu",
    mean_only: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Linear map with filters of fixed length and a bias, mean-only batch norm if asked for, then the activation."""
    linear = linear_map(dims, in_channels, out_channels, *args, activation=activation, bias=not mean_only, **kwargs)
    parts = nn.Sequential()
    parts.add_module("linear", BoundedWeight(linear))
    if mean_only:
        parts.add_module("norm", MeanOnlyBatchNorm(out_channels))
    if activation is not None:
        parts.add_module("activation", activation_module(activation))
    return parts


_PAPER = "Hoffer, Banner, Golan & Soudry 2018, Norm Matters"

METHODS = {
    "bounded-weight": of_blocks(_PAPER, block),
    "bounded-weight-mean": of_blocks(_PAPER, partial(block, mean_only=True)),
}
