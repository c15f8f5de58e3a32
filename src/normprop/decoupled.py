"""Filters' gradients without what a filter does to mean and scale of its pre-activations."""

import math
from typing import Any

import torch
from torch import Tensor

STEEPEST = 30.0
"""Longest direction, in lengths of its filter: along one at right angles to its filter the scale cannot be held."""

ENOUGH = 2
"""Images of a batch that are measured, at least, in spans."""


class InputMoments:
    r"""What a layer's filters see in training: mean patch m and, for each filter, the direction that scales its output.

    .. math:: d_i = C w_i / (w_i' C w_i), \quad C = E[(x - m) (x - m)']

    Averages over about the last ``span`` samples, the batch at hand included. Of a batch of many images every so many
    are measured.

    Args:
        span: samples that the averages reach back.

    Example:
        >>> moments = InputMoments(span=16)
        >>> moments.measure(torch.eye(2), torch.eye(2), torch.eye(2), None)
        >>> moments.mean, moments.covariance
        (tensor([[0.5000, 0.5000]]), tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]]))
    """

    def __init__(self, span: float) -> None:
        self.span = span
        self.mean: Tensor | None = None  # of patches, one for each group, shaped as its filters
        self.covariance: Tensor | None = None  # of pre-activations with patches, shaped as the weight
        self.known = 0.0  # of an average over ever so many samples, the share that is measured by now

    @torch.no_grad()
    def measure(self, input: Tensor, output: Tensor, weight: Tensor, convolution: Any) -> None:
        """Take in a batch.

        Args:
            input: (N, in), or (N, in, *space) for a convolution.
            output: pre-activations, (N, out) or (N, out, *space), with any scale and shift per channel.
            weight: (out, in / groups, *kernel).
            convolution: its numbers (:class:`normprop.prepared.Convolution`), or ``None`` for a matrix.
        """
        if convolution is not None:  # an image has many positions: a few of many images will do
            every = max(1, int(len(input) / (ENOUGH * self.span)))
            input, output = input[::every], output[::every]
        about = output - output.mean([0, *range(2, output.ndim)], keepdim=True)
        average = input.mean(0, keepdim=True)
        small = (output.shape[1] / output.numel()) ** 0.5  # before a sum and after it: half precision ends early
        about = about * small
        if convolution is None:
            covariance, mean = about.mT @ input, average
        else:
            even = math.prod(output.shape[2:]) ** -0.5
            ones = output.new_full((1, convolution.groups, *output.shape[2:]), even)
            covariance = _by_weight(about, input, weight, convolution)
            mean = _by_weight(ones, average, weight[: convolution.groups], convolution).to(weight.dtype) * even
        share = 1 - math.exp(-len(input) / self.span)
        self.known += share * (1 - self.known)
        share /= self.known  # of what is known by now, so that the first batch counts in full
        self.mean = _average(self.mean, mean.to(weight.dtype), share)
        self.covariance = _average(self.covariance, covariance.to(weight.dtype) * small, share)


def _by_weight(grad: Tensor, input: Tensor, weight: Tensor, convolution: Any) -> Tensor:
    stride, padding, dilation, groups = convolution
    zero = [0] * len(stride)
    outcome: tuple[Any, Tensor, Any] = torch.ops.aten.convolution_backward(
        grad, input, weight.to(grad.dtype), None, stride, padding, dilation, False, zero, groups, (False, True, False)
    )
    return outcome[1]


def _average(before: Tensor | None, value: Tensor, share: float) -> Tensor:
    # Anew: backward passes to come hold the one before.
    return value if before is None else before.to(value).lerp(value, share)


def decoupled(
    grad: Tensor, by_scale: Tensor, by_shift: Tensor, rows: Tensor, factor: Tensor, mean: Tensor, covariance: Tensor
) -> Tensor:
    r"""Gradient of filters w of length 1 without their gradients through mean and scale of the pre-activations.

    .. math:: G_i - s_i m - (G_i \cdot w_i - s_i\, m \cdot w_i)\, d_i

    s is the gradient of the shift after the linear map; m and d are those of :class:`InputMoments`.

    Args:
        grad: G less its part along w, (out, fan-in).
        by_scale: G . w, (out,), both by the unit of ``factor``.
        by_shift: s, (out,).
        rows: w, (out, fan-in).
        factor: what the filters are multiplied by, (out, 1).
        mean: m, (out or 1, fan-in); with centred filters, centred.
        covariance: C w up to a factor for each filter, (out, fan-in); likewise.

    Returns:
        The gradient, (out, fan-in).

    Source:
        Ours: the gradient of batch norm's weights (Ioffe & Szegedy 2015) with moments of the input in place of the
        batch.

    Example:
        >>> one = torch.ones(1)
        >>> rows, covariance = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.5]])
        >>> decoupled(torch.zeros(1, 2), one, 0 * one, rows, torch.ones(1, 1), torch.zeros(1, 2), covariance)
        tensor([[ 0.0000, -0.5000]])
    """
    along = (rows * covariance).sum(1, keepdim=True)
    length = torch.linalg.vector_norm(covariance, dim=1, keepdim=True)
    steepness = along / torch.maximum(along.square(), (length / STEEPEST).square()).clamp_min(1e-30)
    by_shift = by_shift.unsqueeze(1)
    spread = by_scale.unsqueeze(1) - by_shift * (mean * rows).sum(1, keepdim=True)
    removed = torch.addcmul(by_shift * mean, spread * steepness, covariance)
    removed.addcmul_((removed * rows).sum(1, keepdim=True), rows, value=-1.0)  # G has no part along w to take it from
    return torch.addcmul(grad, factor, removed, value=-1.0)
