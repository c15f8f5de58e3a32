"""The work on a layer's parameters as one operator of torch, for compiled networks on a CPU.

Left to itself the compiler computes the constants of a channel again for every element that they meet, nine times over
where a pool follows, and the norms of the filters in loops several times slower than torch's own kernels: a compiled NIN
then takes twice the time of the plain one. Behind an operator it sees tensors; linear map, threshold and whatever comes
after them stay its own to fuse. On a GPU and in exported programs there are ordinary operators alone.
"""

from typing import Any

import torch
from torch import Tensor

from normprop.fused_layer import constants_backward, filters_backward, full_precision, scaled
from normprop.prepared import Constants, Filters, filters_of, fixed_constants, live_constants, prepare

_SLOPES = 4


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


def effective(
    weight: Tensor, gain: Tensor, bias: Tensor | None, center: bool, fixed: tuple[float, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the plain linear map, and the mean below which :class:`Threshold` cuts its output off.

    Args:
        weight: (out, in / groups, *kernel).
        gain: gamma, (out,).
        bias: beta, (out,), or ``None``.
        center: whether the filters' means are subtracted.
        fixed: mean and standard deviation of the activation, or ``None`` for live moments of a ReLU.

    Returns:
        Weight, bias and, of live moments, mean, (out,).

    Example:
        >>> weight, shift, _ = effective(torch.tensor([[3.0, 4.0]]), torch.ones(1), None, False, (0.0, 1.0))
        >>> weight, shift
        (tensor([[0.6000, 0.8000]]), tensor([0.]))
    """
    mean, std = fixed or (0.0, 0.0)  # a standard deviation of 0 stands for live moments
    found: tuple[Tensor, ...] = torch.ops.normprop.effective(weight, gain, bias, center, mean, std)
    return found[0], found[1], found[2]


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


def _forward(
    weight: Tensor, gain: Tensor, bias: Tensor | None, center: bool, mean: float, std: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    constants = fixed_constants(gain, bias, mean, std) if std else live_constants(gain, bias)
    filters = filters_of(weight, center)
    prepared = prepare(filters, constants, center, None)
    effective = scaled(weight, prepared.factor, filters.mean)
    rows = [filters.norm.view(-1), constants.scale]
    if filters.mean is not None:
        rows.append(filters.mean.view(-1))
    if not isinstance(constants.slopes, tuple):
        return effective, constants.shift, gain.new_empty(0), torch.stack(rows)
    assert isinstance(constants.mean, Tensor)
    return effective, constants.shift, constants.mean, torch.stack([*constants.slopes, *rows])


def _fake(
    weight: Tensor, gain: Tensor, bias: Tensor | None, center: bool, mean: float, std: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = 2 + center + (0 if std else _SLOPES)
    means = gain.new_empty(0) if std else torch.empty_like(gain)
    return torch.empty_like(weight), torch.empty_like(gain), means, gain.new_empty(rows, len(gain))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, _, bias, ctx.center, _, ctx.std = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(weight, output[3])


def _backward(ctx: Any, by_weight: Tensor, by_shift: Tensor, by_mean: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    weight, noted = ctx.saved_tensors
    found = torch.ops.normprop.effective_backward(by_weight, by_shift, by_mean, weight, noted, ctx.center, ctx.std)
    return found[0], found[1], found[2] if ctx.has_bias else None, None, None, None


def _backward_of_parameters(
    by_weight: Tensor, by_shift: Tensor, by_mean: Tensor, weight: Tensor, noted: Tensor, center: bool, std: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = noted.unbind()
    slopes: tuple[Tensor, ...] | float = 1 / std if std else rows[:_SLOPES]
    norm, scale, *mean = rows if std else rows[_SLOPES:]
    constants = Constants(scale, by_shift, by_mean, slopes)
    filters = Filters(norm.view(-1, 1), mean[0].view(-1, 1) if center else None)
    by_rows, by_scale = filters_backward(by_weight, weight, scale, filters, center)
    by_gain, by_bias = constants_backward(constants, by_scale, by_shift, by_mean)
    assert by_gain is not None and by_bias is not None
    return by_rows, by_gain, by_bias.clone() if by_bias is by_shift else by_bias


def _fake_backward(
    by_weight: Tensor, by_shift: Tensor, by_mean: Tensor, weight: Tensor, noted: Tensor, center: bool, std: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(by_shift), torch.empty_like(by_shift)


# torch.library.custom_op is shorter to write, and its checks at every call cost more than a small layer's work.
torch.library.define(
    "normprop::effective",
    "(Tensor weight, Tensor gain, Tensor? bias, bool center, float mean, float std) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "normprop::effective_backward",
    "(Tensor by_weight, Tensor by_shift, Tensor by_mean, Tensor weight, Tensor noted, bool center, float std)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("normprop::effective", "cpu", _forward)
torch.library.impl("normprop::effective_backward", "cpu", _backward_of_parameters)
torch.library.register_fake("normprop::effective", _fake)
torch.library.register_fake("normprop::effective_backward", _fake_backward)
torch.library.register_autograd("normprop::effective", _backward, setup_context=_setup)
