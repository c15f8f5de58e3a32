r"""``filter-response``: division by the root mean square over space, then a learned threshold.

.. math:: y = \gamma \frac{x}{\sqrt{\nu^2 + \epsilon}} + \beta, \qquad z = \max(y, \tau)

:math:`\nu^2` is the mean of :math:`x^2` per sample and channel, over space; nothing is centred. No running statistics:
train and eval are the same function, a sample's output depends on that sample alone. :math:`\gamma, \beta, \tau` are
per channel and start at 1, 0 and 0.

A linear layer has no space: then :math:`\nu^2 = x^2`, and epsilon decides how much of y is more than the sign of x. As
the paper recommends it is learnable there, 1e-6 plus the size of a parameter per feature. That parameter starts at 1
here, where y is smooth; the smaller it starts the slower a multilayer perceptron learns. Maps of 1x1 need the same
(``learnable_eps=True``); with a fixed epsilon, 1e-6, they are refused, because hardly any gradient passes.

In a block the threshold takes the place of ReLU. Another activation stays as it is, and without activation there is no
threshold. The drop-in layer is the norm alone, :class:`ThresholdedLinearUnit` is its activation.

Shape: (\*, C, \*space) to the same.

Use it in convolutional networks at any batch size. Do not use it for linear layers if there is a choice, nor after
activations with a large common mean, which is not removed.

Source:
    Singh & Krishnan 2020.
"""

from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.plain import of_blocks, with_norm

SMALLEST_EPS = 1e-6
LEARNABLE_START = 1.0


class FilterResponseNorm(nn.Module):
    r"""Filter response normalisation.

    Args:
        num_features: features, or channels of a map.
        dims: spatial dimensions, 0 for features.
        eps: epsilon, 1e-6 if not given; of a learnable one the start of its parameter, 1 if not given.
        learnable_eps: learn an epsilon per channel; by default for features alone.

    Raises:
        ValueError: from forward, for maps of one position with a fixed epsilon.

    Shape:
        (\*, num_features, \*space) to the same, with ``dims`` axes of space.

    Source:
        Singh & Krishnan 2020.

    Example:
        >>> FilterResponseNorm(1, dims=1)(torch.tensor([[[1.0, 7.0]]]))
        tensor([[[0.2000, 1.4000]]], grad_fn=...)
    """

    def __init__(
        self, num_features: int, dims: int = 2, *, eps: float | None = None, learnable_eps: bool | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.dims = dims
        learnable = dims == 0 if learnable_eps is None else learnable_eps
        start = (LEARNABLE_START if learnable else SMALLEST_EPS) if eps is None else eps
        self.eps: Tensor | float = nn.Parameter(torch.full((num_features,), start)) if learnable else start
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Divide by the root mean square over space, then apply gain and bias."""
        wide = at_least_float32(input)
        per_channel = (-1,) + (1,) * self.dims
        square = wide.square()
        if self.dims:
            square = square.mean(tuple(range(-self.dims, 0)), keepdim=True)
        if isinstance(self.eps, Tensor):
            eps: Tensor | float = SMALLEST_EPS + at_least_float32(self.eps).abs().reshape(per_channel)
        elif input.shape[input.ndim - self.dims :].numel() > 1:
            eps = self.eps
        else:
            raise ValueError(
                "norms.filter-response: expected more than 1 spatial element, or learnable_eps=True, "
                f"got input size {tuple(input.shape)}"
            )
        factor = (square + eps).rsqrt() * self.weight.reshape(per_channel)
        return torch.addcmul(self.bias.reshape(per_channel), wide, factor).to(input.dtype)

    def extra_repr(self) -> str:
        """Number of channels, spatial dimensions and epsilon."""
        eps = "learnable" if isinstance(self.eps, Tensor) else self.eps
        return f"{self.num_features}, dims={self.dims}, eps={eps}"


class ThresholdedLinearUnit(nn.Module):
    r"""The activation :math:`\max(y, \tau)` with a learnable threshold per channel: ReLU at the start.

    Args:
        num_features: features, or channels of a map.
        dims: spatial dimensions, 0 for features.

    Shape:
        (\*, num_features, \*space) to the same, with ``dims`` axes of space.

    Source:
        Singh & Krishnan 2020.

    Example:
        >>> ThresholdedLinearUnit(2)(torch.tensor([[-1.0, 2.0]]))
        tensor([[0., 2.]], grad_fn=...)
    """

    def __init__(self, num_features: int, dims: int = 0) -> None:
        super().__init__()
        self.dims = dims
        self.tau = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        """Replace what is below the threshold by it."""
        return torch.maximum(input, self.tau.reshape((-1,) + (1,) * self.dims).to(input.dtype))


def filter_response_norm(dims: int, num_features: int) -> nn.Module:
    """Filter response norm, with a learnable epsilon where there is no space."""
    return FilterResponseNorm(num_features, dims)


_plain_block = with_norm(filter_response_norm)


def block(
    dims: int, in_channels: int, out_channels: int, *args: Any, activation: Activation = "relu", **kwargs: Any
) -> nn.Module:
    """Linear map without bias, the norm, and the threshold in the place of ReLU."""
    parts = _plain_block(dims, in_channels, out_channels, *args, activation=activation, **kwargs)
    if activation is not None and moments.resolve(activation).name == "relu":
        parts.register_module("activation", ThresholdedLinearUnit(out_channels, dims))
    return parts


METHODS = {
    "filter-response": of_blocks(
        "Singh & Krishnan 2020, Filter Response Normalization Layer", block, layer=filter_response_norm
    )
}
