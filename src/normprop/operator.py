"""Operators of torch for what a compiler does badly by itself on a CPU.

Left to itself it computes the norms of the filters in loops several times slower than torch's own kernels, and the
constants of a channel again for every element that they meet, nine times over where a pool follows; and it stores a
mask beside the output. A compiled NIN then takes up to twice the time of the plain one. Behind an operator it sees
tensors; linear map, threshold and whatever comes after them stay its own to fuse. On a GPU and in exported programs
there are ordinary operators alone.
"""

import math
from typing import Any

import torch
from torch import Tensor

from normprop.fused import rounding
from normprop.fused_layer import filters_backward, full_precision, like
from normprop.prepared import Filters, as_rows


def available(*tensors: Tensor | None) -> bool:
    """Whether a layer with these parameters may use the operator: it is compiled, for a CPU, and not exported.

    Args:
        tensors: parameters; ``None`` counts as nothing.

    Returns:
        False outside of torch.compile, and under functorch's transforms inside.

    Example:
        >>> available(torch.ones(2))
        False
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    return all(tensor is None or (tensor.device.type == "cpu" and full_precision(tensor)) for tensor in tensors)


def normalize_filters(weight: Tensor, scale: Tensor, center: bool) -> Tensor:
    """Give every filter the length of its scale, after centring: :func:`normprop.functional.normalize_weight`.

    Args:
        weight: (out, in / groups, *kernel).
        scale: length of each filter, (out,).
        center: whether the filters' means are subtracted.

    Returns:
        Weight of the plain linear map; of two-dimensional convolutions in the memory format that they are compiled for.

    Example:
        >>> normalize_filters(torch.tensor([[3.0, 4.0]]), torch.ones(1), center=False)
        tensor([[0.6000, 0.8000]])
    """
    effective: Tensor = torch.ops.normprop.normalize_filters(weight, scale, center)[0]
    return effective


def computed(value: Tensor) -> Tensor:
    """Return a copy that is computed once, not again wherever it is used.

    Args:
        value: a small tensor.

    Returns:
        The same numbers.

    Example:
        >>> computed(torch.ones(2))
        tensor([1., 1.])
    """
    copy: Tensor = torch.ops.normprop.computed(value)
    return copy


class Threshold(torch.autograd.Function):
    """``max(x, -m)``, whose backward needs the output alone: left to itself the compiler would store a mask as well."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mean: Tensor | float) -> Tensor:
        """Cut off below ``-mean``, a number or a tensor that broadcasts against the input."""
        if isinstance(mean, Tensor):
            output = torch.maximum(input, -mean)
            ctx.save_for_backward(output, mean)
        else:
            output = input.clamp(min=-mean)
            ctx.save_for_backward(output)
            ctx.mean = mean
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of input and mean, as those of an eager layer."""
        output, *mean = ctx.saved_tensors
        if not mean:
            return torch.ops.aten.threshold_backward(grad, output, -ctx.mean), None
        # Sums that were cut off are exactly -m.
        by_input = torch.ops.aten.threshold_backward(grad, output + mean[0], 0.0)
        return by_input, -grad.sum_to_size(mean[0].shape)


def _layout(weight: Tensor) -> torch.memory_format:
    """What the compiler lays two-dimensional convolutions out in."""
    return torch.channels_last if weight.ndim == 4 else torch.contiguous_format


def _normalize(weight: Tensor, scale: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous(memory_format=_layout(weight))
    rows = as_rows(weight)
    mean = rows.mean(1, keepdim=True) if center else rows.new_zeros(len(rows), 1)
    centered = rows - mean if center else rows
    norm = torch.linalg.vector_norm(centered, dim=1, keepdim=True)
    norm = norm.masked_fill_(norm <= mean.abs() * rounding(rows), math.inf)
    factor = scale.view(-1, 1) / norm
    effective = centered.mul_(factor) if center else centered * factor
    return like(effective, weight), norm, mean


def _fake_normalize(weight: Tensor, scale: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    vector = weight.new_empty(len(weight), 1)
    return torch.empty_like(weight, memory_format=_layout(weight)), vector, torch.empty_like(vector)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, scale, ctx.center = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight, scale, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.normprop.normalize_filters_backward(grad, *ctx.saved_tensors, ctx.center), None


def _normalize_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, norm: Tensor, mean: Tensor, center: bool
) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous(memory_format=_layout(weight))
    return filters_backward(grad, weight, scale, Filters(norm, mean if center else None), center)


def _fake_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, norm: Tensor, mean: Tensor, center: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=_layout(weight)), torch.empty_like(scale)


# torch.library.custom_op is shorter to write, and its checks at every call cost more than a small layer's work.
for _name, _schema, _kernel, _fake in (
    (
        "normalize_filters",
        "(Tensor weight, Tensor scale, bool center) -> (Tensor, Tensor, Tensor)",
        _normalize,
        _fake_normalize,
    ),
    (
        "normalize_filters_backward",
        "(Tensor grad, Tensor weight, Tensor scale, Tensor norm, Tensor mean, bool center) -> (Tensor, Tensor)",
        _normalize_backward,
        _fake_backward,
    ),
    ("computed", "(Tensor value) -> Tensor", Tensor.clone, torch.empty_like),
):
    torch.library.define(f"normprop::{_name}", _schema, tags=(torch.Tag.flexible_layout,))
    torch.library.impl(f"normprop::{_name}", "cpu", _kernel)
    torch.library.register_fake(f"normprop::{_name}", _fake)
torch.library.register_autograd("normprop::normalize_filters", _backward, setup_context=_setup)
torch.library.register_autograd("normprop::computed", lambda _, grad: grad)
