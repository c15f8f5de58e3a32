"""Linear maps: convolutions of every kind, fully connected layers, products of matrices."""

import math
from typing import Any

import torch
from torch import Tensor

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


@rule("linear", "addmm", "mm", "matmul", "bmm", "baddbmm")
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
    inner = (left.shape[-1],)
    parts = []
    for value, axis in ((left, -1), (right, -2)):
        mean, var = (value.mean, value.var) if isinstance(value, Signal) else (at_least_float32(value), None)
        if mean.ndim == 1:
            mean, var = mean.unsqueeze(axis + 1 if axis == -1 else 1), var
            mean = mean.reshape(1, -1) if axis == -1 else mean.reshape(-1, 1)
            var = None if var is None else var.reshape(mean.shape)
        size = [*mean.shape]
        size[axis] = inner[0]
        mean = mean.expand(size)
        parts.append((mean, None if var is None else var.expand(torch.broadcast_shapes(var.shape, size))))
    (a, va), (b, vb) = parts
    mean = a @ b
    var = torch.zeros_like(mean)
    if va is not None:
        var = var + va @ b.square()
    if vb is not None:
        var = var + a.square() @ vb
    if va is not None and vb is not None:
        var = var + va @ vb
    lengths = len(call.shape)
    if mean.ndim > lengths:
        mean, var = mean.reshape(call.shape), var.reshape(call.shape)
    fill = [1] * (lengths - mean.ndim)
    return Moments(mean.reshape([*fill, *mean.shape]), var.reshape([*fill, *var.shape]))
