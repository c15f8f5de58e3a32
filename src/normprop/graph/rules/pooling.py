"""Pools of every kind, and interpolation."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from normprop.graph.expression import increasing
from normprop.graph.operators import execute
from normprop.graph.rules.arithmetic import distinct
from normprop.graph.rules.extremes import greatest
from normprop.graph.rules.linear import as_list
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Origin, Signal, averaged


def _counts(call: Call, x: Signal, shape: tuple[int, ...]) -> Tensor:
    """How many values stand in the window of every output position; padding and ceil mode leave some with fewer."""
    kernel = call.get("kernel_size")
    if kernel is None:
        sizes = as_list(call["output_size"], _dims(call))
        axes = []
        for size, target in zip(x.shape[-len(sizes) :], sizes, strict=True):
            bins = size if target is None else target
            index = torch.arange(bins)
            axes.append(((index + 1) * size + bins - 1) // bins - index * size // bins)
    else:
        dims = _dims(call)
        settings = [as_list(call.get(name, default), dims) for name, default in (("padding", 0), ("dilation", 1))]
        steps = as_list(call.get("stride") or kernel, dims)
        axes = []
        for axis, (taps, step, pad, gap) in enumerate(zip(as_list(kernel, dims), steps, *settings, strict=True)):
            at = torch.arange(shape[axis - dims])[:, None] * step - pad + torch.arange(taps) * gap
            axes.append(((at >= 0) & (at < x.shape[axis - dims])).sum(1))
    count = torch.ones(())
    for inside in axes:
        count = count.unsqueeze(-1) * inside
    return count


def _dims(call: Call) -> int:
    """Number of pooled axes, from the operator's name."""
    return int(next(character for character in call.node.op if character.isdigit()))


def _stride(call: Call, x: Signal, shape: tuple[int, ...]) -> float:
    """Positions of the input per position of the output."""
    dims = _dims(call)
    return math.prod(x.shape[-dims:]) / max(math.prod(shape[-dims:]), 1)


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
    """Average pools: var / n, averaged over positions; counted zeros of the padding lower mean and variance there."""
    x = next(iter(call.arguments.values()))
    if "weights" not in call.memory:
        counts = _counts(call, x, call.shape)
        name = next(iter(call.arguments))
        ones = torch.ones(1, 1, *x.shape[-_dims(call) :])
        sums = execute(call.node, {**call.arguments, name: ones})[0, 0]
        free = 1.0 + (counts - 1) / x.repeat
        call.memory["weights"] = [float(part.mean()) for part in (sums, sums.square() / free, sums.square(), free)]
    inside, lowered, squares, free = call.memory["weights"]
    mean, var = _positions(x, call)
    spread = mean.square() * (squares - inside**2)
    repeat = max(1.0, x.repeat / _stride(call, x, call.shape) * free)
    return Signal(mean * inside, var * lowered + spread, call.shape, repeat=repeat)


def _positions(x: Signal, call: Call) -> tuple[Tensor, Tensor]:
    """Moments averaged over the pooled axes, where they depend on the position."""
    axes = [axis for axis in range(len(x.shape)) if x.shape[axis] != call.shape[axis] and axis > 0]
    mean, var = torch.broadcast_tensors(x.mean, x.var)
    if not axes or all(mean.shape[axis] == 1 for axis in axes):
        return mean, var
    return averaged(mean, var, axes)


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
    """Max pools: the largest of n independent values; for what follows, an increasing function of a Gaussian."""
    x = next(iter(call.arguments.values()))
    shape = call.shape if call.node.shape is not None else _pooled(call, x)
    if "count" not in call.memory:
        call.memory["count"] = float(_counts(call, x, shape).float().mean())
    count = distinct(call.memory["count"], x.repeat)
    repeat = max(1.0, x.repeat * count / _stride(call, x, shape))
    result = dataclasses.replace(largest(x, count, shape, call.memory), repeat=repeat)
    return result if call.node.shape is not None else (result, torch.zeros(shape, dtype=torch.long))


def _pooled(call: Call, x: Signal) -> tuple[int, ...]:
    name = next(iter(call.arguments))
    with torch.no_grad():
        output = execute(call.node, {**call.arguments, name: torch.empty(x.shape, device="meta")})
    return tuple(output[0].shape)


def largest(x: Signal, count: float, shape: tuple[int, ...], memory: dict[str, Any]) -> Signal:
    """The signal of the largest of ``count`` independent neighbours."""
    axes = [axis for axis in range(len(shape)) if x.shape[axis] != shape[axis] and axis > 0]
    mean, var = greatest(x, count, axes)
    result = Signal(mean, var, shape)
    base = x.base().plain()
    if base is None or base.function.args is None:
        return result
    if "increasing" not in memory:
        memory["increasing"] = increasing(base.function)
    if not memory["increasing"]:
        return result
    middle, spread = greatest(dataclasses.replace(x, mean=base.mean, var=base.var, origin=None), count, axes)
    return dataclasses.replace(result, origin=Origin(None, middle, spread, base.function))


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
        mean, var = averaged(mean, var, axes)
    ratio = math.prod(call.shape[-dims:]) / math.prod(x.shape[-dims:])
    factor = 1.0 - (1.0 - call.memory["factor"]) / x.repeat  # neighbours that are equal lose nothing
    return Signal(mean, var * factor, call.shape, repeat=max(1.0, x.repeat * ratio))
