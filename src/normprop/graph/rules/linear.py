"""Linear maps: convolutions of every kind, fully connected layers, products of matrices."""

import math
from typing import Any

import torch
from torch import Tensor

from normprop.errors import UnknownOperatorError
from normprop.fused import at_least_float32
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal
from normprop.moments import Moments
from normprop.moments.linear import as_rows, coverage, filtered, transposed_coverage


def as_list(value: Any, dims: int) -> list[int]:
    """A number, or one per axis, as one per axis."""
    value = [value] if isinstance(value, int) else [*value]
    result: list[int] = value * dims if len(value) == 1 else value
    return result


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(call: Call) -> Signal:
    """Convolution with constant weights."""
    x, weight = call["input"], call["weight"]
    if call.get("transposed", False):
        return transposed(call)
    dims = weight.ndim - 2
    stride, dilation = (as_list(call[name], dims) for name in ("stride", "dilation"))
    padding = call["padding"]
    if isinstance(padding, str):
        padding = [
            0 if padding == "valid" else gap * (k - 1) // 2 for gap, k in zip(dilation, weight.shape[2:], strict=True)
        ]
    padding = as_list(padding, dims)
    if "seen" not in call.memory:
        call.memory["seen"] = coverage(x.shape[-dims:], weight.shape[2:], stride, padding, dilation)
    channel = len(x.shape) - dims - 1
    mean, var = x.channels(channel)
    result = filtered(at_least_float32(weight), mean, var, call["groups"], call.memory["seen"])
    return _with_bias(result, call, channel, max(1.0, x.repeat / math.prod(stride)))


def _with_bias(moments: tuple[Tensor, Tensor], call: Call, channel: int, repeat: float) -> Signal:
    mean = moments[0] if call.get("bias") is None else moments[0] + call["bias"]
    signal = Signal.of(mean, moments[1], call.shape, channel)
    return Signal(signal.mean, signal.var, call.shape, repeat=repeat)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(call: Call) -> Signal:
    """Transposed convolution with constant weights."""
    x, weight = call["input"], call["weight"]
    dims = weight.ndim - 2
    channel = len(x.shape) - dims - 1
    if "seen" not in call.memory:
        settings = (as_list(call[name], dims) for name in ("stride", "padding", "dilation"))
        sizes = x.shape[-dims:], call.shape[-dims:], weight.shape[2:]
        call.memory["seen"] = transposed_coverage(*sizes, *settings)
    rows = as_rows(at_least_float32(weight), call["groups"])
    mean, var = x.channels(channel)
    result = filtered(rows, mean, var, call["groups"], call.memory["seen"])
    return _with_bias(result, call, channel, max(1.0, x.repeat))


@rule("linear", "addmm", "mm", "mv", "dot", "matmul", "bmm", "baddbmm")
def product(call: Call) -> Signal:
    """Matrix products: of a signal and a constant, on either side, or of two independent signals."""
    if call.node.op == "linear":
        left, right, bias, scale = call["input"], call["weight"].mT, call.get("bias"), (1.0, 1.0)
    else:
        names = (
            ("mat1", "mat2") if call.node.op == "addmm" else ("batch1", "batch2") if call.node.op == "baddbmm" else None
        )
        left, right = [call[name] for name in names] if names else [*call.arguments.values()][:2]
        bias = call.get("self") if names else None
        scale = (float(call.get("alpha", 1)), float(call.get("beta", 1)))
    moments = _product(left, right, call)
    mean, var = torch.as_tensor(moments.mean) * scale[0], torch.as_tensor(moments.var) * scale[0] ** 2
    if isinstance(bias, Signal):
        mean, var = mean + bias.mean * scale[1], var + bias.var * scale[1] ** 2
    elif bias is not None:
        mean = mean + bias.reshape([1] * (len(call.shape) - bias.ndim) + [*bias.shape]) * scale[1]
    repeat = max((part.repeat for part in (left, right) if isinstance(part, Signal)), default=1.0)
    return Signal(mean, var, call.shape, repeat=repeat)


def _product(left: Any, right: Any, call: Call) -> Moments:
    """Mean and variance of ``left @ right``; of sums of products of independent values where both are signals."""
    inner = left.shape[-1]
    vectors = [axis for value, axis in ((left, -2), (right, -1)) if len(value.shape) == 1]
    (a, va), (b, vb) = _matrix(left, -1, inner), _matrix(right, -2, inner)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(wide), b.to(wide)
    va, vb = (part if part is None else part.to(wide) for part in (va, vb))
    mean = a @ b
    var = torch.zeros_like(mean)
    if va is not None and isinstance(left, Signal) and left.simplex:
        # Shares add up to one: what all values have in common passes unchanged.
        around = va @ b.square() - 2.0 * (va @ b) * mean + va.sum(-1, keepdim=True) * mean.square()
        var = var + around.clamp_min(0.0)
    elif va is not None:
        var = var + va @ b.square()
    if vb is not None:
        var = var + (a.square() if va is None else a.square() + va) @ vb
    for axis in vectors:
        mean, var = mean.squeeze(axis), var.squeeze(axis)
    fill = [1] * (len(call.shape) - mean.ndim)
    return Moments(mean.reshape([*fill, *mean.shape]), var.reshape([*fill, *var.shape]))


def _matrix(value: Any, axis: int, inner: int) -> tuple[Tensor, Tensor | None]:
    """Moments of a factor as matrices, in full along the axis that is summed over; constants have no variance."""

    def full(part: Tensor) -> Tensor:
        part = part.unsqueeze(-2 if axis == -1 else -1) if part.ndim == 1 else part
        return part.expand([inner if j == part.ndim + axis else size for j, size in enumerate(part.shape)])

    return (full(value.mean), full(value.var)) if isinstance(value, Signal) else (full(value), None)


@rule("einsum")
def einsum(call: Call) -> Signal:
    """Sums of products of one or two independent tensors: m1 m2, and v1 v2 + v1 m2^2 + m1^2 v2."""
    equation, operands = call["equation"].replace(" ", ""), call["tensors"]
    if len(operands) > 2:
        raise UnknownOperatorError(
            f"{call.node}: there is a rule for einsum of one or two tensors, not {len(operands)}"
        )
    inputs, _, output = equation.partition("->")
    parts = []
    for labels, value in zip(inputs.split(","), operands, strict=True):
        size = [1 if label in output else length for label, length in _labelled(labels, value.shape)]
        mean, var = (value.mean, value.var) if isinstance(value, Signal) else (value, torch.zeros_like(value))
        parts.append([part.expand(torch.broadcast_shapes(part.shape, size)) for part in (mean, var)])
    if len(parts) == 1:
        mean, var = (torch.einsum(equation, part) for part in parts[0])
    else:
        wide = torch.promote_types(parts[0][0].dtype, parts[1][0].dtype)
        (a, va), (b, vb) = ([part.to(wide) for part in pair] for pair in parts)
        mean = torch.einsum(equation, a, b)
        var = torch.einsum(equation, va, b.square() + vb) + torch.einsum(equation, a.square(), vb)
    return Signal(mean, var, call.shape, repeat=max(part.repeat for part in call.inputs))


def _labelled(labels: str, shape: Any) -> list[tuple[str, int]]:
    """The letter of every axis of an operand; "." for those of an ellipsis."""
    before, dots, after = labels.partition("...")
    middle = "." * (len(shape) - len(before) - len(after)) if dots else ""
    return list(zip(before + middle + after, shape, strict=True))
