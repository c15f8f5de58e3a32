"""Sums, products and quotients of signals and constants."""

from typing import Any

import torch
from torch import Tensor

from normprop.graph.rules import elementwise
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal, add


def _pair(call: Call) -> tuple[Any, Any]:
    one, other = [*call.arguments.values()][:2]
    return one, other


def _aligned(value: Any, call: Call) -> Any:
    """A signal or constant with the axes of the output."""
    missing = len(call.shape) - (len(value.shape) if isinstance(value, (Signal, Tensor)) else 0)
    if isinstance(value, Signal) and missing:
        mean, var = (part.reshape([1] * missing + [*part.shape]) for part in (value.mean, value.var))
        return Signal(mean, var, call.shape, repeat=value.repeat)
    if isinstance(value, Tensor):
        return value.reshape([1] * missing + [*value.shape])
    return value


@rule("add", "sub", "rsub")
def total(call: Call) -> Signal:
    """Sums: exact for constants; independent parts for signals, shared ones with their covariance."""
    one, other = _pair(call)
    weight = float(call.get("alpha", 1)) * (1.0 if call.node.op == "add" else -1.0)
    if call.node.op == "rsub":
        one, other = other, one
    if isinstance(one, Signal) and isinstance(other, Signal):
        if elementwise.one_source(call) and (one.origin or other.origin):
            return elementwise.unary(call)
        return add(_aligned(one, call), _aligned(other, call), weight, call.shape)
    numbers = not isinstance(one, Tensor | None) and not isinstance(other, Tensor)
    if numbers and elementwise.one_source(call):
        composed = elementwise.unary(call)
        signal, constant = (one, weight * other) if isinstance(one, Signal) else (other.scaled(weight), one)
        moved = signal.shifted(constant)
        return Signal(moved.mean, moved.var, call.shape, None, signal.repeat, moved.parts, composed.origin)
    one, other = _aligned(one, call), _aligned(other, call)
    signal, constant = (one, weight * other) if isinstance(one, Signal) else (other.scaled(weight), one)
    moved = signal.shifted(constant)
    return Signal(moved.mean, moved.var.expand_as(moved.var), call.shape, None, signal.repeat, moved.parts)


@rule("mul", "div")
def product(call: Call) -> Signal:
    """Products: of a signal and a constant; of functions of one Gaussian; else of independent signals (gates)."""
    one, other = _pair(call)
    if call.node.op == "div" and call.get("rounding_mode") is not None and elementwise.one_source(call):
        return elementwise.unary(call)
    if elementwise.one_source(call):
        composed = elementwise.unary(call)
        if isinstance(one, Signal) and isinstance(other, Signal):
            return composed
        if not isinstance(one, Signal) and call.node.op == "div":
            return composed
        signal, number = (one, float(other)) if isinstance(one, Signal) else (other, float(one))
        scaled = signal.scaled(1.0 / number if call.node.op == "div" else number)
        return Signal(scaled.mean, scaled.var, call.shape, None, signal.repeat, scaled.parts, composed.origin)
    one, other = _aligned(one, call), _aligned(other, call)
    if call.node.op == "div":
        if isinstance(other, Signal):
            other = reciprocal(other)
        else:
            other = 1.0 / other
    if isinstance(one, Signal) and isinstance(other, Signal):
        mean = one.mean * other.mean
        var = one.var * other.var + one.var * other.mean.square() + other.var * one.mean.square()
        return Signal(mean, var, call.shape, repeat=min(one.repeat, other.repeat))
    signal, factor = (one, other) if isinstance(one, Signal) else (other, one)
    return Signal(signal.mean * factor, signal.var * factor**2, call.shape, repeat=signal.repeat)


def reciprocal(signal: Signal) -> Signal:
    """1 / x to second order around the mean, for denominators that stay away from zero (norms, sums of gates)."""
    mean = signal.mean
    relative = signal.var / mean.square()
    return Signal((1.0 + relative) / mean, relative / mean.square(), signal.shape, repeat=signal.repeat)


@rule("mean", "sum")
def reduction(call: Call) -> Signal:
    """Means and sums over axes of independent values."""
    x = call["self"]
    dims = call.get("dim")
    if dims is None or dims == []:
        dims = range(len(x.shape))
    axes = sorted({axis % len(x.shape) for axis in ([dims] if isinstance(dims, int) else dims)})
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    mean, var = (part.mean(axes, keepdim=True) if axes else part for part in torch.broadcast_tensors(x.mean, x.var))
    effective = independent(count, x.repeat)
    var = var / effective
    if call.node.op == "sum":
        mean, var = mean * count, var * count**2
    if not call.get("keepdim", False):
        for axis in reversed(axes):
            mean, var = mean.squeeze(axis), var.squeeze(axis)
    return Signal(mean, var, call.shape)


def independent(count: float, repeat: float) -> float:
    """How many independent values stand in a window of ``count`` neighbours.

    Example:
        >>> independent(9, 1.0), independent(9, 4.0)
        (9.0, 3.0)
    """
    return 1.0 + (count - 1) / repeat
