"""Moments of a linear map's output, from those of its input's channels.

Inputs are taken as uncorrelated across channels and taps: mean W m, variance W^2 v. Under zero padding some taps of a
filter fall outside; moments are averaged over the output's positions, exactly as batch statistics are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Coverage(NamedTuple):
    """How often the taps of a filter see the input: the share of output positions.

    Attributes:
        single: share at which each tap lies inside, (taps,).
        pairs: what the share of each pair of taps has over the product of both, (taps, taps); ``None`` if no tap ever
            lies outside.
    """

    single: Tensor
    pairs: Tensor | None


def coverage(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Coverage:
    """Coverage of a convolution with zero padding.

    Args:
        size: spatial size of the input, per axis.
        kernel, stride, padding, dilation: of the convolution, per axis.

    Returns:
        The shares; taps in the order of the flattened kernel.

    Example:
        >>> coverage([4], [3], [1], [1], [1]).single
        tensor([0.7500, 1.0000, 0.7500])
    """
    axes = []
    for length, taps, step, pad, gap in zip(size, kernel, stride, padding, dilation, strict=True):
        first = torch.arange((length + 2 * pad - gap * (taps - 1) - 1) // step + 1) * step - pad
        at = first[:, None] + torch.arange(taps) * gap
        axes.append((at >= 0) & (at < length))
    return _combined(axes)


def transposed_coverage(
    size: Sequence[int],
    output: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Coverage:
    """Coverage of a transposed convolution: with stride s an output position sees one tap in s.

    Args:
        size: spatial size of the input, per axis.
        output: spatial size of the output.
        kernel, stride, padding, dilation: of the convolution, per axis.

    Returns:
        The shares.

    Example:
        >>> transposed_coverage([4], [8], [2], [2], [0], [1]).single
        tensor([0.5000, 0.5000])
    """
    axes = []
    for length, out, taps, step, pad, gap in zip(size, output, kernel, stride, padding, dilation, strict=True):
        at = torch.arange(out)[:, None] + pad - torch.arange(taps) * gap  # input position times the stride
        axes.append((at >= 0) & (at % step == 0) & (at // step < length))
    return _combined(axes)


def _combined(axes: Sequence[Tensor]) -> Coverage:
    """Shares of a kernel of several axes from whether each tap of each axis lies inside, (positions, taps)."""
    single, pairs = torch.ones(1), torch.ones(1, 1)
    for inside in axes:
        share = inside.float()
        single = torch.outer(single, share.mean(0)).flatten()
        pairs = torch.kron(pairs, share.T @ share / len(share))
    excess = pairs - torch.outer(single, single)
    return Coverage(single, excess if bool((excess.abs() > 1e-7).any()) else None)


def filtered(
    weight: Tensor, mean: Tensor, var: Tensor, groups: int = 1, seen: Coverage | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of a linear map's output per channel, averaged over positions.

    Args:
        weight: (out, in / groups, *kernel).
        mean: mean of the input's channels, (in,).
        var: their variance, (in,).
        groups: number of groups.
        seen: how often the taps see the input; always by default.

    Returns:
        Mean and variance, (out,) each.

    Source:
        Arpit et al. 2016, section 3.1, for inputs of any mean and variance; the border terms are ours.

    Example:
        >>> filtered(torch.tensor([[[3.0], [4.0]]]), torch.zeros(2), torch.ones(2))
        (tensor([0.]), tensor([25.]))
    """
    out, fan = weight.shape[0], weight.shape[1]
    rows = weight.reshape(groups, out // groups, fan, -1)
    means, variances = mean.to(rows.dtype).reshape(groups, 1, fan), var.to(rows.dtype).reshape(groups, 1, fan)
    if seen is None:
        output = (rows.sum(-1) * means).sum(-1)
        return output.flatten(), (rows.square().sum(-1) * variances).sum(-1).flatten()
    single = seen.single.to(rows)
    shares = (rows * means.unsqueeze(-1)).sum(2)
    spread = ((rows.square() @ single) * variances).sum(-1)
    if seen.pairs is not None:  # the mean differs from position to position
        spread = spread + ((shares @ seen.pairs.to(rows)) * shares).sum(-1)
    return (shares @ single).flatten(), spread.flatten()


def as_rows(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution, (in, out / groups, *kernel), in the layout of a convolution.

    Example:
        >>> as_rows(torch.zeros(4, 5, 3), groups=2).shape
        torch.Size([10, 2, 3])
    """
    fan, out = weight.shape[0] // groups, weight.shape[1]
    return weight.reshape(groups, fan, out, *weight.shape[2:]).transpose(1, 2).flatten(0, 1)


def as_matrices(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A weight as the matrices of its groups, (groups, filters, fan-in).

    Example:
        >>> as_matrices(torch.zeros(4, 5, 3), groups=2, transposed=True).shape
        torch.Size([2, 5, 6])
    """
    rows = as_rows(weight, groups) if transposed else weight
    return rows.reshape(groups, len(rows) // groups, -1)


def from_matrices(matrices: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """The weight of a shape whose matrices these are: the inverse of :func:`as_matrices`.

    Example:
        >>> weight = torch.rand(4, 5, 3)
        >>> torch.equal(from_matrices(as_matrices(weight, 2, True), weight.shape, True), weight)
        True
    """
    if not transposed:
        return matrices.reshape(shape)
    groups, filters = matrices.shape[:2]
    return matrices.reshape(groups, filters, shape[0] // groups, -1).transpose(1, 2).reshape(shape)
