"""A whole layer as one autograd function: what eager training costs beyond the plain network's own work.

Beside the linear map and the threshold, which a plain ReLU layer has as well, there is one pass over the smaller of
weight and output forward, to scale it; backward one pass over the weight for the projection and the gain's gradient,
two to centre it, and with live moments one to sum the incoming gradient. Of the size of an activation nothing is kept
but input and output.

Under a compiler, an export, functorch's transforms or for tensor subclasses the same function is composed of ordinary
operators, which these can fuse and differentiate (:func:`normprop.functional.normalize_weight`,
:func:`normprop.functional.activate`); so are derivatives of the backward.
"""

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.decoupled import decoupled
from normprop.errors import ConfigError
from normprop.fused import LiveReLU, NormalizeFilters
from normprop.prepared import Constants, Convolution, Filters, Prepared, as_rows


def available(*tensors: Tensor | None) -> bool:
    """Whether a layer on these tensors may run as one function: plain tensors, in full precision, no transform around.

    Args:
        tensors: input, which may be of any type under autocast, and parameters; ``None`` counts as nothing.

    Returns:
        False under compilation, export and functorch's transforms.

    Example:
        >>> available(torch.ones(2)), available(torch.ones(2, dtype=torch.bfloat16))
        (True, False)
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if not full_precision(tensor) and not under_autocast(tensor):
            return False
    return True


def under_autocast(tensor: Tensor) -> bool:
    """Whether operators on a tensor's device choose their own types now."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def full_precision(tensor: Tensor) -> bool:
    """Whether a tensor is of a type that norms and moments may be computed in."""
    return tensor.dtype in (torch.float32, torch.float64)


def like(rows: Tensor, weight: Tensor) -> Tensor:
    """View rows as the weight that they are of."""
    if weight.ndim == 2:
        return rows
    if not weight.is_contiguous():
        return rows.view(weight.movedim(1, -1).shape).movedim(-1, 1)
    return rows.view(weight.shape)


def layer(input: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, prepared: Prepared) -> Tensor:
    """``relu(s (w x) / ||w|| + b) - m`` for (centred) filters w, computed as ``max(s (w x) / ||w|| + b - m, -m)``.

    Args:
        input: (N, in), or (N, in, *space) for a convolution.
        weight: (out, in / groups, *kernel).
        gain: what the constants are functions of, (out,).
        bias: as the gain, or ``None``.
        prepared: the constants and all the rest.

    Returns:
        (N, out, *space); without a threshold where the constants have no mean.

    Example:
        >>> from normprop.prepared import filters_of, fixed_constants, prepare
        >>> weight, gain = torch.eye(2), torch.ones(2)
        >>> prepared = prepare(filters_of(weight, False), fixed_constants(gain, None, 0.5, 0.5), False, None)
        >>> layer(torch.tensor([[-3.0, 3.0]]), weight, gain, None, prepared)
        tensor([[-1.,  5.]])
    """
    output: Tensor
    output, mean = _Normalized.apply(input, weight, gain, bias, prepared)
    return output if mean is None else _Threshold.apply(output, mean)  # type: ignore[no-any-return]


class _Normalized(torch.autograd.Function):
    """The linear map with its scale and shift; the mean passes through, for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, prepared: Prepared
    ) -> tuple[Tensor, Tensor | float | None]:
        """Return the output; keep the input, the parameters and what was prepared."""
        filters, constants, factor, _, convolution, inputs = prepared
        shift, mean = constants.shift, constants.mean
        dtype = weight.dtype
        ctx.input_dtype = input.dtype
        if under_autocast(input) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(input.device.type)
            input = input.to(dtype)
        # At small batches and wide layers it is the output that is scaled, forward and backward, not the weight.
        ctx.after = dtype == weight.dtype and filters.mean is None and 4 * input.numel() < weight.numel()
        if ctx.after:
            output = _linear(input, weight, None, convolution)
            output.mul_(_per_channel(factor, output)).add_(_per_channel(shift, output))
        elif dtype == weight.dtype:
            output = _linear(input, scaled(weight, factor, filters.mean), shift, convolution)
        else:
            effective = scaled(weight, factor, filters.mean).to(dtype)
            output = _linear(input, effective, shift.to(dtype), convolution)
        ctx.prepared = prepared
        if inputs is not None and len(input):
            inputs.measure(input, output, weight, convolution)
            ctx.moments = inputs.mean, inputs.covariance
        ctx.save_for_backward(input, weight, gain, bias)
        ctx.set_materialize_grads(False)
        return output, mean.detach() if isinstance(mean, Tensor) else mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, by_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight, gain and bias."""
        if grad is None:
            return None, None, None, None, None
        input, weight, gain, bias = ctx.saved_tensors
        prepared: Prepared = ctx.prepared
        filters, constants, factor, center, convolution, inputs = prepared
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            if inputs is not None:
                raise ConfigError("decoupled gradients have no derivatives: remove them before asking for some")
            return _differentiable((input, weight, gain, bias), prepared, grad, by_mean, needs)
        shift = needs[2] or needs[3] or inputs is not None
        own = needs[1] or needs[2] or (shift and isinstance(constants.slopes, tuple))  # live: the bias moves the scale
        if ctx.after:
            _, by_weight, by_shift = _linear_backward(grad, input, weight, convolution, (False, own, shift))
            outer = grad * _per_channel(factor, grad) if needs[0] else grad
            by_input = _linear_backward(outer, input, weight, convolution, (needs[0], False, False))[0]
        else:
            effective = scaled(weight, factor, filters.mean).to(grad.dtype) if needs[0] else weight
            outcome = _linear_backward(grad, input, effective, convolution, (needs[0], own, shift))
            by_input, by_weight, by_shift = outcome
        by_scale = None
        if by_weight is not None:
            by_weight, by_scale = filters_backward(by_weight, weight, constants.scale, filters, center)
            if inputs is not None and by_shift is not None and len(input):
                by_weight = _decoupled(by_weight, by_scale, by_shift, weight, prepared, ctx.moments)
        by_gain, by_bias = _constants_backward(constants, by_scale, by_shift, by_mean)
        if by_input is not None and by_input.dtype != ctx.input_dtype:
            by_input = by_input.to(ctx.input_dtype)
        return by_input, by_weight, by_gain, by_bias if needs[3] else None, None


class _Threshold(torch.autograd.Function):
    """``max(x, -m)`` in place, where x has taken in ``-m``: the ReLU of x + m, less m, for a mean per channel.

    The gradient by x is that of the ReLU; that by m is the gradient where the sum was cut off, and where it was not
    that of x is taken off again by whoever took m in, so here it is given for both: minus the sum.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, mean: Tensor | float) -> Tensor:
        """Overwrite the input and keep it."""
        ctx.mark_dirty(input)
        ctx.number = None
        if isinstance(mean, Tensor):
            input.clamp_(min=-_per_channel(mean, input))
            ctx.save_for_backward(input, mean)
        else:
            ctx.number = -mean
            torch.threshold_(input, -mean, -mean)
            ctx.save_for_backward(input)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of input and mean."""
        if ctx.number is not None:
            return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0].detach(), ctx.number), None
        output, mean = (saved.detach() for saved in ctx.saved_tensors)
        by_mean = -_channel_sums(grad, mean.dtype)
        # Sums that were cut off are exactly -m. A selection by a mask would take ten times as long as this.
        above = output + _per_channel(mean, output)
        if torch.is_grad_enabled():
            return torch.ops.aten.threshold_backward(grad, above, 0.0), by_mean
        return torch.ops.aten.threshold_backward.grad_input(grad, above, 0.0, grad_input=above), by_mean


class ScaledReLU(torch.autograd.Function):
    """``relu(x) a - m`` in place, per channel, for a > 0: the activation after a sum. Only the output is kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
        """Overwrite the input, (N, out, *space) or (..., out), by scale and mean that broadcast against it."""
        ctx.mark_dirty(input)
        input.clamp_(min=0.0).mul_(scale.to(input.dtype)).sub_(mean.to(input.dtype))
        ctx.save_for_backward(input, scale, mean)
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, scale and mean."""
        output, scale, mean = ctx.saved_tensors
        active = output + mean.to(output.dtype)  # relu(x) a; output stands in the graph, so this is differentiable
        by_scale = by_mean = None
        if ctx.needs_input_grad[1]:
            by_scale = (grad * active).sum_to_size(scale.shape).to(scale.dtype) / scale
        if ctx.needs_input_grad[2]:
            by_mean = -grad.sum_to_size(mean.shape).to(mean.dtype)
        by_input = torch.ops.aten.threshold_backward(grad, active, 0.0)
        return by_input * scale.to(grad.dtype), by_scale, by_mean


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, convolution: Convolution | None) -> Tensor:
    if convolution is None:
        return F.linear(input, weight, bias)
    stride, padding, dilation, groups = convolution
    output: Tensor = torch.convolution(input, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)
    return output


def _linear_backward(
    grad: Tensor, input: Tensor, weight: Tensor, convolution: Convolution | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the linear map's input, weight and bias, those that are needed."""
    if not any(needs):
        return None, None, None
    if convolution is None:
        return (
            grad @ weight if needs[0] else None,
            grad.mT @ input if needs[1] else None,
            grad.sum(0) if needs[2] else None,
        )
    stride, padding, dilation, groups = convolution
    zero = [0] * len(stride)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad, input, weight, [len(weight)], stride, padding, dilation, False, zero, groups, needs
    )


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    """View a value per channel so that it broadcasts against an output."""
    value = value if value.dtype == like.dtype else value.to(like.dtype)
    return value.view(-1, *[1] * (like.ndim - 2))


def _channel_sums(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over samples and positions."""
    if grad.dtype != dtype and grad.device.type == "cpu" and math.prod(grad.shape[2:]) >= _MANY:
        # In half precision a product with ones takes a tenth of the time of torch's sum, at the same precision as
        # that of the bias.
        space = grad.flatten(2)
        return torch.matmul(space, space.new_ones(space.shape[2])).sum(0, dtype=dtype)
    return grad.sum([0, *range(2, grad.ndim)], dtype=dtype)


_MANY = 256


def scaled(weight: Tensor, factor: Tensor, mean: Tensor | None) -> Tensor:
    """Filters about zero, times a factor, (out, 1)."""
    if mean is None:
        return weight * factor if weight.ndim == 2 else weight * factor.view(-1, *[1] * (weight.ndim - 1))
    return like(torch.addcmul(-mean * factor, as_rows(weight), factor), weight)


def filters_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, filters: Filters, center: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and scale from that of the effective weight."""
    rows = as_rows(weight) if filters.mean is None else as_rows(weight) - filters.mean
    outer = as_rows(grad.to(weight.dtype).contiguous(memory_format=_layout(weight)))
    by_rows, by_scale = torch.ops.aten._weight_norm_interface_backward(outer, rows, scale.view(-1, 1), filters.norm, 0)
    if center:
        by_rows.sub_(by_rows.mean(1, keepdim=True))
    return like(by_rows, weight), by_scale.view(-1)


def _decoupled(
    grad: Tensor, by_scale: Tensor, by_shift: Tensor, weight: Tensor, prepared: Prepared, moments: tuple[Tensor, Tensor]
) -> Tensor:
    filters, _, factor, center, _, _ = prepared
    layout = _layout(weight)
    mean, covariance = (as_rows(moment.contiguous(memory_format=layout)) for moment in moments)
    if center:
        mean, covariance = (rows - rows.mean(1, keepdim=True) for rows in (mean, covariance))
    mean = mean.repeat_interleave(len(weight) // len(mean), 0)
    rows = as_rows(weight) if filters.mean is None else as_rows(weight) - filters.mean
    rows = rows / filters.norm
    return like(decoupled(as_rows(grad), by_scale, by_shift.to(rows.dtype), rows, factor, mean, covariance), weight)


def _layout(weight: Tensor) -> torch.memory_format:
    """Memory format of a weight."""
    if weight.is_contiguous() or weight.ndim < 4:
        return torch.contiguous_format
    return torch.channels_last if weight.ndim == 4 else torch.channels_last_3d


def _constants_backward(
    constants: Constants, by_scale: Tensor | None, by_shift: Tensor | None, by_mean: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gain and bias."""
    slopes = constants.slopes
    if by_shift is not None:
        by_shift = by_shift.to(constants.shift.dtype)
    if not isinstance(slopes, tuple):
        return tuple(None if by is None else by if slopes == 1.0 else by * slopes for by in (by_scale, by_shift))  # type: ignore[return-value]
    if by_scale is None or by_shift is None or by_mean is None:
        return None, None
    by_bias = torch.addcmul(by_scale * slopes[0], by_shift, slopes[1]).addcmul_(by_mean, slopes[2])
    return by_bias * slopes[3], by_bias


def _differentiable(
    inputs: tuple[Any, ...], prepared: Prepared, grad: Tensor, by_mean: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, from the layer composed of ordinary operators."""
    input, weight, gain, bias = inputs
    _, constants, _, center, convolution, _ = prepared
    groups = 1 if convolution is None else convolution.groups
    bias = torch.zeros_like(gain) if bias is None else bias
    outputs, grads = [], [grad]
    if isinstance(constants.mean, Tensor):
        scale, shift, mean = LiveReLU.apply(gain, bias)[:3]
        if by_mean is not None and mean.requires_grad:
            outputs, grads = [mean], [by_mean, grad]
    else:
        scale = gain * constants.slopes
        shift = bias * constants.slopes
    effective: Tensor = NormalizeFilters.apply(weight, scale, center, groups, False)[0].to(input.dtype)
    outputs.append(_linear(input, effective, shift.to(input.dtype), convolution))
    asked = [i for i in range(4) if needs[i]]
    found = torch.autograd.grad(outputs, [inputs[i] for i in asked], grads, create_graph=True, allow_unused=True)
    result: list[Tensor | None] = [None] * 5
    for i, value in zip(asked, found, strict=True):
        result[i] = value
    return tuple(result)


for _function in (_Normalized, _Threshold, ScaledReLU):
    # torch inspects the signature of forward at every call unless it finds one ready: 20 us.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined, union-attr]
