"""What a layer's weight, gain and bias say, worked out before the layer is applied: see :mod:`normprop.fused_layer`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normprop.decoupled import InputMoments
from normprop.fused import LiveReLU, filter_statistics, rounding


class Convolution(NamedTuple):
    """The numbers of a convolution, one per axis of space."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Filters(NamedTuple):
    """What is known of a weight: length, (out, 1), infinite for zero filters, and the mean to subtract, if any."""

    norm: Tensor
    mean: Tensor | None


class Constants(NamedTuple):
    """What surrounds the linear map of a layer: ``max(scale * w x / ||w|| + shift, -mean)``.

    ``scale`` and ``shift`` are (out,). ``mean`` is (out,), a number, or ``None`` where there is no threshold.
    ``slopes`` are the derivatives by the bias of scale, of shift with the mean still to be taken off, and of the mean,
    and what turns their sum into the derivative by the gain, each (out,); or one number, that of scale by the gain and
    of shift by the bias.
    """

    scale: Tensor
    shift: Tensor
    mean: Tensor | float | None
    slopes: tuple[Tensor, ...] | float


class Prepared(NamedTuple):
    """What :func:`layer` needs beside the tensors that it is differentiated by; factor is scale / norm, (out, 1).

    With moments of the input they are measured in the forward pass, and the weight's gradient is decoupled.
    """

    filters: Filters
    constants: Constants
    factor: Tensor
    center: bool
    convolution: Convolution | None
    inputs: InputMoments | None = None


@torch.no_grad()
def live_constants(gain: Tensor, bias: Tensor | None) -> Constants:
    """Work out the constants of a ReLU layer with live moments.

    Args:
        gain: gamma, (out,); those of many layers may come in one tensor.
        bias: beta, (out,), or ``None``.

    Returns:
        Constants whose mean is a tensor.

    Example:
        >>> constants = live_constants(torch.ones(1), None)
        >>> round(float(constants.scale), 4), round(float(constants.shift), 4)
        (1.7129, -0.6833)
    """
    scale, shift, mean, *terms = LiveReLU.forward(gain, torch.zeros_like(gain) if bias is None else bias)
    return Constants(scale, shift - mean, mean, LiveReLU.slopes(gain, terms))


@torch.no_grad()
def fixed_constants(gain: Tensor, bias: Tensor | None, mean: float, std: float) -> Constants:
    """Work out the constants of a ReLU layer with fixed moments.

    Args:
        gain: gamma, (out,).
        bias: beta, (out,), or ``None``.
        mean: mean of the activation.
        std: its standard deviation.

    Returns:
        Constants whose mean is a number.

    Example:
        >>> fixed_constants(torch.ones(1), None, mean=0.5, std=0.5)[:3]
        (tensor([2.]), tensor([-1.]), 1.0)
    """
    scale = gain / std
    shift = torch.full_like(gain, -mean / std) if bias is None else (bias - mean) / std
    return Constants(scale, shift, mean / std, 1 / std)


def filters_of(weight: Tensor, center: bool) -> Filters:
    """Measure the filters of a weight.

    Args:
        weight: (out, in / groups, *kernel).
        center: whether their means are to be subtracted.

    Returns:
        Length and mean.

    Example:
        >>> filters_of(torch.tensor([[3.0, 4.0]]), center=False)
        Filters(norm=tensor([[5.]]), mean=None)
    """
    mean, inverse = filter_statistics(as_rows(weight)[:, :, None, None], center)
    return Filters(inverse.view(-1, 1).reciprocal(), mean.view(-1, 1) if center else None)


def prepare(filters: Filters, constants: Constants, center: bool, convolution: Convolution | None) -> Prepared:
    """Put together what a layer needs.

    Args:
        filters: what is known of the weight.
        constants: what surrounds the linear map.
        center: whether the filters are centred.
        convolution: its numbers, or ``None`` for a matrix.

    Returns:
        Argument of :func:`layer`.

    Example:
        >>> filters = Filters(torch.full((1, 1), 2.0), None)
        >>> prepare(filters, fixed_constants(torch.ones(1), None, 0.5, 0.5), False, None).factor
        tensor([[1.]])
    """
    return Prepared(filters, constants, constants.scale.detach().view(-1, 1) / filters.norm, center, convolution)


def normalize_rows_(weights: Sequence[Tensor], centers: Sequence[bool]) -> list[Filters]:
    """Give every row of every tensor length 1 in place, after subtracting its mean where asked; zero rows stay zero.

    Args:
        weights: tensors (out, fan-in) on one device and of one type.
        centers: for each whether to subtract the mean of each row.

    Returns:
        The rows as they are now, length 1 or infinity for zero rows.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> normalize_rows_([rows], [False])[0].norm.flatten()
        tensor([1., inf])
        >>> rows
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    bounds = []
    for rows, center in zip(weights, centers, strict=True):
        if center:
            mean = rows.mean(1, keepdim=True)
            rows.sub_(mean)
            bounds.append(mean.abs_().mul_(rounding(rows)))
        else:
            bounds.append(rows.new_zeros(len(rows), 1))
    norm = torch.cat([torch.linalg.vector_norm(rows, dim=1, keepdim=True) for rows in weights])
    # What rounding leaves of a constant filter is zero, not a direction.
    inverse = norm.masked_fill_(norm <= torch.cat(bounds), math.inf).reciprocal_()
    sizes = [len(rows) for rows in weights]
    for rows, factor in zip(weights, inverse.split(sizes), strict=True):
        rows.mul_(factor)
    return [Filters(norm, None) for norm in inverse.sign().reciprocal_().split(sizes)]


def unit_filters(rows: Tensor) -> Filters:
    """Describe rows of length 1 or 0.

    Args:
        rows: (out, fan-in).

    Returns:
        What :func:`normalize_rows_` said of them.

    Example:
        >>> unit_filters(torch.tensor([[0.6, 0.8], [0.0, 0.0]])).norm.flatten()
        tensor([1., inf])
    """
    alive = rows.any(1, keepdim=True).to(rows.dtype)
    return Filters(alive.reciprocal_(), None)


def as_rows(weight: Tensor) -> Tensor:
    """View filters as rows, in the order of memory.

    Args:
        weight: (out, in / groups, *kernel), contiguous or channels last.

    Returns:
        (out, fan-in).

    Example:
        >>> as_rows(torch.zeros(4, 3, 2, 2)).shape
        torch.Size([4, 12])
    """
    if weight.ndim == 2:
        return weight
    if not weight.is_contiguous():
        weight = weight.movedim(1, -1)  # channels last
    return weight.reshape(weight.shape[0], -1)
