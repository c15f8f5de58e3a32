"""Pools of every kind, and interpolation."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from normprop.graph.expression import Expression, increasing
from normprop.graph.node import execute
from normprop.graph.rules.arithmetic import independent
from normprop.graph.rules.linear import as_list
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Origin, Signal
from normprop.moments import Moments
from normprop.moments import pool as pools


def _window(call: Call, x: Signal) -> tuple[float, float]:
    """Values per window and stride, over all pooled axes."""
    kernel = call.get("kernel_size")
    if kernel is None:  # adaptive
        sizes = call["output_size"]
        sizes = [sizes] if isinstance(sizes, int) else [*sizes]
        inner = x.shape[-len(sizes) :]
        pairs = [(size, size if target is None else target) for size, target in zip(inner, sizes, strict=True)]
        window = math.prod(max(1.0, size / target) for size, target in pairs)
        return window, math.prod(size / target for size, target in pairs)
    dims = {"1": 1, "2": 2, "3": 3}[next(c for c in call.node.op if c.isdigit())]
    stride = call.get("stride") or kernel
    return _inside(call, x, as_list(kernel, dims), as_list(stride, dims)), math.prod(as_list(stride, dims))


def _inside(call: Call, x: Signal, kernel: list[int], stride: list[int]) -> float:
    """Mean number of values in a window; padding and ceil mode leave some windows with fewer."""
    padding, dilation = as_list(call.get("padding", 0), len(kernel)), as_list(call.get("dilation", 1), len(kernel))
    if "inside" not in call.memory:
        shape = call.shape if call.node.shape is not None else _pooled(call, x)
        count = 1.0
        for axis, (taps, step, pad, gap) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
            at = torch.arange(shape[axis - len(kernel)])[:, None] * step - pad + torch.arange(taps) * gap
            count *= float(((at >= 0) & (at < x.shape[axis - len(kernel)])).sum(1).float().mean())
        call.memory["inside"] = count
    result: float = call.memory["inside"]
    return result


@rule(
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def average(call: Call) -> Signal:
    """Average pools; counted zeros of the padding lower the mean by their share."""
    x = next(iter(call.arguments.values()))
    window, stride = _window(call, x)
    inside, squares = _counted(call, x)
    count = independent(window, x.repeat)
    mean, var = _positions(x, call)
    spread = mean.square() * (squares - inside**2)
    repeat = max(1.0, x.repeat / stride * count)
    return Signal(mean * inside, var / count * squares + spread, call.shape, repeat=repeat)


def _positions(x: Signal, call: Call) -> tuple[Tensor, Tensor]:
    """Moments averaged over the pooled axes, where they depend on the position."""
    axes = [axis for axis in range(len(x.shape)) if x.shape[axis] != call.shape[axis] and axis > 0]
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    if not axes or all(mean.shape[axis] == 1 for axis in axes):
        return mean, var
    average = mean.mean(axes, keepdim=True)
    return average, var.mean(axes, keepdim=True) + (mean - average).square().mean(axes, keepdim=True)


def _counted(call: Call, x: Signal) -> tuple[float, float]:
    """Mean and mean square, over positions, of the sum of a window's weights on a constant input of ones."""
    if "counted" not in call.memory:
        value = (1.0, 1.0)
        if call.get("padding") and any(call["padding"] if not isinstance(call["padding"], int) else [call["padding"]]):
            dims = int(next(c for c in call.node.op if c.isdigit()))
            name = next(iter(call.arguments))
            ones = torch.ones(1, 1, *x.shape[-dims:])
            output = execute(call.node, {**call.arguments, name: ones})
            value = (float(output.mean()), float(output.square().mean()))
        call.memory["counted"] = value
    result: tuple[float, float] = call.memory["counted"]
    return result


@rule(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d_with_indices",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
)
def maximum(call: Call) -> Any:
    """Max pools: an increasing function of the largest Gaussian, itself taken as Gaussian."""
    x = next(iter(call.arguments.values()))
    window, stride = _window(call, x)
    result = largest(x, window, call.shape if call.node.shape is not None else _pooled(call, x))
    repeat = max(1.0, x.repeat * independent(window, x.repeat) / stride)
    result = dataclasses.replace(result, repeat=repeat)
    return (result, None) if call.node.shape is None else result


def _pooled(call: Call, x: Signal) -> tuple[int, ...]:
    name = next(iter(call.arguments))
    with torch.no_grad():
        output = execute(call.node, {**call.arguments, name: torch.empty(x.shape, device="meta")})
    return tuple(output[0].shape)


def largest(x: Signal, count: float, shape: tuple[int, ...]) -> Signal:
    """The signal of the largest of ``count`` neighbours."""
    number = max(1, round(independent(count, x.repeat)))
    base = x.base()
    if not increasing(base.function):
        base = Origin(None, x.mean, x.var, Expression())
    unit = pools.max_pool(number, Moments(0.0, 1.0))
    std = base.var.clamp_min(1e-30).sqrt()
    mean, var = torch.broadcast_tensors(base.mean + std * unit.mean, base.var * unit.var)
    axes = [axis for axis in range(len(shape)) if x.shape[axis] != shape[axis] and axis > 0 and mean.shape[axis] > 1]
    if axes:
        mean, var = mean.mean(axes, keepdim=True), var.mean(axes, keepdim=True)
    origin = Origin(None, mean, var, base.function)
    return Signal(mean, var, shape).through(base.function, origin)


@rule(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def interpolate(call: Call) -> Signal:
    """Interpolation: what the weights of an output position, squared, add up to, measured on random signs."""
    name = next(iter(call.arguments))
    x = call[name]
    dims = len(x.shape) - 2
    if "factor" not in call.memory:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (1, 64, *x.shape[2:]), generator=generator).float() * 2 - 1
        call.memory["factor"] = float(execute(call.node, {**call.arguments, name: signs}).square().mean())
    axes = [axis for axis in range(2, len(x.shape)) if x.mean.shape[axis] > 1 or x.var.shape[axis] > 1]
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    if axes:
        var = var.mean(axes, keepdim=True) + mean.var(axes, correction=0, keepdim=True)
        mean = mean.mean(axes, keepdim=True)
    ratio = math.prod(call.shape[-dims:]) / math.prod(x.shape[-dims:])
    factor = 1.0 - (1.0 - call.memory["factor"]) / x.repeat  # neighbours that are equal lose nothing
    return Signal(mean, var * factor, call.shape, repeat=max(1.0, x.repeat * ratio))
