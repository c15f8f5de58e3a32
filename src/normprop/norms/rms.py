r"""``rms`` and ``prms``: division by the root mean square, without centring.

.. math:: y = g \, \frac{a}{\mathrm{RMS}(a)} + b, \qquad \mathrm{RMS}(a) = \sqrt{\operatorname{mean}(a^2)}

The mean is taken per sample, over the features (``dims=0``, the last axis) or over channels and space (maps), as
``layer`` does here: RMS norm of a sample without its mean is layer norm. Two other choices for maps are not made here:
per sample and channel, over space (``filter-response``), and per position, over channels (move the channels last and
take ``dims=0``). ``prms`` takes the mean over the first features or channels alone, int(d p) of d.

No running statistics: train and eval are the same function, a sample's output depends on that sample alone. The paper
puts no bias in the layer but keeps that of the neuron, after the normalisation: the drop-in layer has none, the block
has one. The gain starts at 1, the bias at 0.

Shape: (\*, C, \*space) to the same.

Use it where layer norm works: transformers, recurrent networks, any batch size. It saves layer norm's pass for the
mean. Do not use it where the mean of the pre-activations carries no information and drifts: it stays. Do not use
``prms`` where few values are left to average: the ratio of a normal variable to one other has no variance.

Source:
    Zhang & Sennrich 2019. Their codes place epsilon differently: outside the root for PyTorch (1e-8), inside for the
    others (1e-8 and 1e-5).
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.norms.plain import of_blocks, with_norm

EpsPlacement = Literal["inside", "outside"]
DEFAULT_FRACTION = 1 / 16
FEWEST_FEATURES = 4


def inverse_rms(
    input: Tensor, axes: tuple[int, ...], eps: float = 1e-5, eps_placement: EpsPlacement = "inside"
) -> Tensor:
    r"""Reciprocal root mean square, :math:`1/\sqrt{m + \epsilon}` or :math:`1/(\sqrt m + \epsilon)`.

    Args:
        input: any tensor of float32 or better.
        axes: axes of the mean; they stay, with size 1.
        eps: keeps the result finite.
        eps_placement: ``"inside"`` or ``"outside"`` the root.

    Returns:
        A tensor that broadcasts against ``input``. Zeros have a finite value and gradient.

    Source:
        Zhang & Sennrich 2019.

    Example:
        >>> inverse_rms(torch.tensor([[3.0, 4.0]]), (-1,), eps=0.0)
        tensor([[0.2828]])
    """
    if eps_placement == "inside":
        return (input.square().mean(axes, keepdim=True) + eps).rsqrt()
    # The norm, unlike the square root, has a gradient at zero: zero.
    norm = torch.linalg.vector_norm(input, dim=axes, keepdim=True)
    count = math.prod(input.shape[axis] for axis in axes)
    inverse: Tensor = (norm * count**-0.5 + eps).reciprocal()
    return inverse


class RMSNorm(nn.Module):
    r"""Root mean square normalisation of features or of channels and space.

    Args:
        num_features: features, or channels of a map.
        dims: spatial dimensions, 0 for features.
        partial_size: how many of the first features make the statistic; all if ``None``.
        bias: add a learnable bias.
        eps: epsilon.
        eps_placement: ``"inside"`` the root, :math:`\sqrt{m + \epsilon}`, or ``"outside"``, :math:`\sqrt m + \epsilon`.

    Raises:
        ConfigError: for a partial size that is not between 1 and ``num_features``, or another placement.

    Shape:
        (\*, num_features, \*space) to the same, with ``dims`` axes of space.

    Source:
        Zhang & Sennrich 2019.

    Example:
        >>> RMSNorm(2)(torch.tensor([[1.0, 7.0]]))
        tensor([[0.2000, 1.4000]], grad_fn=...)
    """

    def __init__(
        self,
        num_features: int,
        dims: int = 0,
        *,
        partial_size: int | None = None,
        bias: bool = False,
        eps: float = 1e-5,
        eps_placement: EpsPlacement = "inside",
    ) -> None:
        super().__init__()
        if partial_size is not None and not 1 <= partial_size <= num_features:
            raise ConfigError(
                f"norms.prms: the partial size must be from 1 to the number of features, {num_features}, "
                f"got {partial_size}; choose another p"
            )
        if eps_placement not in ("inside", "outside"):
            raise ConfigError(f'norms.rms: eps_placement must be "inside" or "outside", got {eps_placement!r}')
        self.num_features = num_features
        self.dims = dims
        self.partial_size = partial_size
        self.eps = eps
        self.eps_placement: EpsPlacement = eps_placement
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """Divide by the root mean square, then apply gain and bias."""
        wide = at_least_float32(input)
        kept = wide if self.partial_size is None else wide.narrow(-self.dims - 1, 0, self.partial_size)
        axes = tuple(range(-self.dims - 1, 0))
        per_channel = (-1,) + (1,) * self.dims
        factor = inverse_rms(kept, axes, self.eps, self.eps_placement) * self.weight.reshape(per_channel)
        output = wide * factor if self.bias is None else torch.addcmul(self.bias.reshape(per_channel), wide, factor)
        return output.to(input.dtype)

    def extra_repr(self) -> str:
        """Sizes and epsilon."""
        part = "" if self.partial_size is None else f", partial_size={self.partial_size}"
        return f"{self.num_features}, dims={self.dims}{part}, eps={self.eps}, eps_placement={self.eps_placement}"


def partial_size(num_features: int, p: float | None = None) -> int:
    """Number of features in the statistic of partial RMS norm: int(num_features p).

    Args:
        num_features: features or channels.
        p: their share. Without it 1/16, but at least four features where there are that many: the second moment of
            normal variables over the root mean square of k others is k / (k - 2).

    Raises:
        ConfigError: for a p that leaves none, or more than all.

    Source:
        Zhang & Sennrich 2019.

    Example:
        >>> partial_size(256, 0.25), partial_size(256), partial_size(24), partial_size(3)
        (64, 16, 4, 3)
    """
    if p is None:
        return min(num_features, max(FEWEST_FEATURES, int(num_features * DEFAULT_FRACTION)))
    size = int(num_features * p)
    if not 1 <= size <= num_features:
        raise ConfigError(
            f"norms.prms: p={p} of {num_features} features leaves {size} for the statistic; "
            f"p must be from 1/{num_features} to 1"
        )
    return size


def rms_norm(dims: int, num_features: int, bias: bool = False) -> nn.Module:
    """RMS norm over all features."""
    return RMSNorm(num_features, dims, bias=bias)


def partial_rms_norm(dims: int, num_features: int, bias: bool = False) -> nn.Module:
    """RMS norm by the first features, as many as :func:`partial_size` says."""
    return RMSNorm(num_features, dims, partial_size=partial_size(num_features), bias=bias)


_SOURCE = "Zhang & Sennrich 2019, Root Mean Square Layer Normalization"
METHODS = {
    "rms": of_blocks(_SOURCE, with_norm(partial(rms_norm, bias=True)), layer=rms_norm),
    "prms": of_blocks(_SOURCE, with_norm(partial(partial_rms_norm, bias=True)), layer=partial_rms_norm),
}
