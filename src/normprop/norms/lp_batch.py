r"""``batch-l1``, ``batch-linf`` and ``batch-topk``: batch norms whose measure of spread needs no squares.

.. math::

    y = \gamma \frac{x - \mu}{s + \epsilon} + \beta, \qquad \mu = \text{mean}(x)

with mean and spread s over batch and space, per channel, of n values (:math:`d = |x - \mu|`):

- ``batch-l1``: :math:`s = \sqrt{\pi / 2} \cdot \text{mean}(d)`, the standard deviation of Gaussian data;
- ``batch-linf``: :math:`s = C(n) \max(d)`, :math:`C(n) = (1 + \sqrt{\pi \ln 4}) / (2 \sqrt{2 \ln n})`;
- ``batch-topk``: :math:`s = C(n)` times the mean of the k = 10 largest d (of all of them where there are fewer).

C(n) is halfway between the reciprocals of a lower and an upper bound of E max |z|, so s of Gaussian data is not their
standard deviation but 1.4 times it with ``batch-linf`` (1.39 at n = 64, 1.45 at 10,000) and 1 to 1.3 times it with
``batch-topk``; the gain takes that up.

In training the batch's own statistics are used and running averages are kept; in evaluation the running averages stand
in. (N, C, *space) to the same shape. Statistics are taken in float32 or better. They do not need it: nothing is squared
and sums are scaled down before they are added, so half-precision arithmetic does not overflow where the sum of squares
does.

Use it when arithmetic is narrow (fp16, integer hardware) and batches are as large as batch norm needs them. Do not use
it for accuracy alone: it is batch norm with another yardstick and fails where batch norm fails. ``batch-linf`` follows
a single outlier; ``batch-topk`` is the steadier of the two.

The public code differs in three things: it keeps running averages of 1 / s, it weighs the *old* value by its momentum
of 0.1, and it starts that average at 0, so that an untrained layer returns beta. Here the average is of s, momentum is
torch's (weight of the new value, 0.1), and mean 0, spread 1 are the start, so that an untrained layer in evaluation
passes its input through.

Source:
    Hoffer, Banner, Golan & Soudry 2018.
"""

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.norms.plain import of_layers
from normprop.norms.running import require_values

Kind = Literal["l1", "linf", "topk"]


def deviation(centred: Tensor, kind: Kind, k: int = 10) -> Tensor:
    r"""Measure the spread of every channel without squares, in the units of a standard deviation.

    Where values tie for the largest, ``"linf"`` shares the gradient among them and ``"topk"`` gives it to k of them;
    both are subgradients.

    Args:
        centred: values less their channel's mean, (N, C, *space), any floating type; computed in that type.
        kind: ``"l1"``, ``"linf"`` or ``"topk"``.
        k: number of values that ``"topk"`` averages, all of them where there are fewer.

    Returns:
        Spread of each channel, (C,).

    Source:
        Hoffer et al. 2018.

    Example:
        >>> values = torch.tensor([[-1.0], [1.0]])
        >>> deviation(values, "l1")  # sqrt(pi / 2)
        tensor([1.2533])
    """
    axes = (0, *range(2, centred.ndim))
    n = centred.numel() // max(centred.shape[1], 1)
    size = centred.abs()
    if kind == "l1":
        # 1 / n before the sum: a sum of n numbers can leave fp16's range where their mean does not.
        return (size / n).sum(axes) * math.sqrt(math.pi / 2)
    constant = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n)))
    if kind == "linf":
        return size.amax(axes) * constant
    largest = size.transpose(0, 1).flatten(1).topk(min(k, n), sorted=False).values
    return largest.mean(1) * constant


def lp_batch_norm(
    input: Tensor,
    kind: Kind,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_deviation: Tensor,
    training: bool,
    *,
    k: int = 10,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise every channel by its mean and a spread without squares.

    .. math:: y = \gamma (x - \mu) / (s + \epsilon) + \beta

    Args:
        input: (N, C, *space).
        kind: measure of spread, see :func:`deviation`.
        weight: gain, (C,).
        bias: shift, (C,).
        running_mean: average of the means, (C,); updated in place when training, used otherwise.
        running_deviation: average of the spreads, (C,); likewise.
        training: whether to use the statistics of this batch; an empty one has none and gives an empty output.
        k: number of values that ``"topk"`` averages.
        momentum: weight of the new value in the running averages.
        eps: added to the spread itself.

    Returns:
        Normalised input, same shape and dtype.

    Raises:
        ValueError: when training on one value per channel.

    Source:
        Hoffer et al. 2018.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> lp_batch_norm(torch.tensor([[1.0], [3.0]]), "l1", one, zero, zero.clone(), one.clone(), training=True)
        tensor([[-0.7979],
                [ 0.7979]])
    """
    values = at_least_float32(input)
    shape = (1, -1, *[1] * (input.ndim - 2))
    if training and input.numel() > 0:
        require_values(f"batch-{kind}", input, input[:, 0].numel())
        mean = values.mean((0, *range(2, input.ndim)))
        centred = values - mean.reshape(shape)
        spread = deviation(centred, kind, k)
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_deviation.lerp_(spread.to(running_deviation.dtype), momentum)
    else:
        centred = values - running_mean.to(values.dtype).reshape(shape)
        spread = running_deviation.to(values.dtype)
    scale = weight.to(values.dtype) / (spread + eps)
    return torch.addcmul(bias.to(values.dtype).reshape(shape), centred, scale.reshape(shape)).to(input.dtype)


class LpBatchNorm(nn.Module):
    """Batch norm by the mean, the maximum or the k largest of the absolute deviations; see :func:`lp_batch_norm`.

    Args:
        num_features: channels C.
        kind: ``"l1"``, ``"linf"`` or ``"topk"``.
        k: number of values that ``"topk"`` averages.
        momentum: weight of the new value in the running averages.
        eps: added to the spread; of fp16 parameters and inputs choose at least 1e-4, or the gradients of a channel
            that is constant over the batch overflow.

    Raises:
        ConfigError: for an unknown kind or numbers out of range.

    Shape:
        (N, C, *space) to the same; a ValueError for another C, or for one value per channel in training.

    Source:
        Hoffer et al. 2018.

    Example:
        >>> layer = LpBatchNorm(8, "topk")
        >>> layer(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    running_mean: Tensor
    running_deviation: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, kind: Kind, k: int = 10, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ConfigError(f"norms.LpBatchNorm: kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if k < 1 or not 0 <= momentum <= 1 or not eps >= 0:
            raise ConfigError(
                f"norms.batch-{kind}: expected k of at least 1, momentum from 0 to 1 and eps of at least 0, got "
                f"k={k!r}, momentum={momentum!r}, eps={eps!r}"
            )
        self.num_features, self.kind, self.k, self.momentum, self.eps = num_features, kind, k, momentum, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_deviation", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch, and in training move the running averages towards its statistics."""
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"norms.batch-{self.kind}: expected (N, {self.num_features}, *space), got {tuple(input.shape)}"
            )
        output = lp_batch_norm(
            input,
            self.kind,  # type: ignore[arg-type]
            self.weight,
            self.bias,
            self.running_mean,
            self.running_deviation,
            self.training,
            k=self.k,
            momentum=self.momentum,
            eps=self.eps,
        )
        if self.training and input.numel() > 0:
            self.num_batches_tracked.add_(1)
        return output

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.num_features}, kind={self.kind!r}, k={self.k}, momentum={self.momentum}, eps={self.eps}"


def _layer(kind: Kind, dims: int, channels: int) -> nn.Module:
    """The drop-in layer of one kind with the paper's settings."""
    return LpBatchNorm(channels, kind)


_PAPER = "Hoffer, Banner, Golan & Soudry 2018, Norm Matters"

METHODS = {
    "batch-l1": of_layers(_PAPER, partial(_layer, "l1")),
    "batch-linf": of_layers(_PAPER, partial(_layer, "linf")),
    "batch-topk": of_layers(_PAPER, partial(_layer, "topk")),
}
