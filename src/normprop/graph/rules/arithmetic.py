"""Sums, products and quotients of signals and constants, and what is written with them."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normprop.graph.rules import elementwise
from normprop.graph.rules.powers import inverse
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal, add


def aligned(value: Any, call: Call) -> Any:
    """A signal or constant with the axes of the output."""
    missing = len(call.shape) - (len(value.shape) if isinstance(value, (Signal, Tensor)) else 0)
    if isinstance(value, Signal) and missing:
        mean, var = (part.reshape([1] * missing + [*part.shape]) for part in (value.mean, value.var))
        return Signal(mean, var, call.shape, repeat=value.repeat)
    if isinstance(value, Tensor):
        return value.reshape([1] * missing + [*value.shape])
    return value


def moments_of(value: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a signal or constant."""
    if isinstance(value, Signal):
        return value.mean, value.var
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value, torch.zeros_like(value)


def _known(call: Call, result: Signal) -> Signal:
    """The result, with what it is as a function of the Gaussian behind it where that is known."""
    origin = elementwise.composed(call) if elementwise.one_source(call) else None
    return replace(result, origin=origin)


def plus(one: Any, other: Any, weight: Any, call: Call) -> Signal:
    """``one + weight * other`` for signals, of which there is one at least, and constants."""
    one, other = aligned(one, call), aligned(other, call)
    if isinstance(one, Signal) and isinstance(other, Signal):
        return add(one, other, weight, call.shape)
    signal, constant = (one, weight * other) if isinstance(one, Signal) else (other.scaled(weight), one)
    return replace(signal.shifted(constant), shape=call.shape)


def times(one: Any, other: Any, call: Call) -> Signal:
    """``one * other`` for signals, of which there is one at least, and constants; signals are independent (gates)."""
    one, other = aligned(one, call), aligned(other, call)
    if isinstance(one, Signal) and isinstance(other, Signal):
        mean = one.mean * other.mean
        var = one.var * other.var + one.var * other.mean.square() + other.var * one.mean.square()
        return Signal(mean, var, call.shape, repeat=min(one.repeat, other.repeat))
    signal, factor = (one, other) if isinstance(one, Signal) else (other, one)
    return replace(signal.scaled(factor), shape=call.shape)


@rule("add", "sub", "rsub")
def total(call: Call) -> Signal:
    """Sums: exact for constants; independent parts for signals, shared ones with their covariance."""
    one, other = [*call.arguments.values()][:2]
    weight = call.get("alpha", 1) * (1.0 if call.node.op == "add" else -1.0)
    if call.node.op == "rsub":
        one, other = other, one
    both = isinstance(one, Signal) and isinstance(other, Signal)
    if both and elementwise.one_source(call) and (one.origin or other.origin):
        return elementwise.unary(call)
    result = plus(one, other, weight, call)
    return result if both else _known(call, result)


@rule("mul", "div", "true_divide", "multiply", "divide")
def product(call: Call) -> Signal:
    """Products: of a signal and a constant; of functions of one Gaussian; else of independent signals (gates)."""
    one, other = [*call.arguments.values()][:2]
    divided = "div" in call.node.op
    both = isinstance(one, Signal) and isinstance(other, Signal)
    if call.get("rounding_mode") is not None or (both and elementwise.one_source(call)):
        return elementwise.unary(call)
    if divided and isinstance(other, Signal):
        return times(one, inverse(other), call)
    result = times(one, 1.0 / other if divided else other, call)
    return result if both else _known(call, result)


def _together(function: Callable[[Call], Signal]) -> Callable[[Call], Signal]:
    """Several functions of one Gaussian are taken as one, not as independent."""

    @functools.wraps(function)
    def rule_of(call: Call) -> Signal:
        if elementwise.one_source(call) and len(call.inputs) > 1:
            return elementwise.unary(call)
        return _known(call, function(call))

    return rule_of


def _combined(call: Call, base: Any, one: Any, other: Any, weight: Any) -> Signal:
    """``base + weight * (one * other)``, any of which may be constant."""
    if not isinstance(one, Signal) and not isinstance(other, Signal):
        return plus(base, one * other, weight, call)
    return plus(base, times(one, other, call), weight, call)


@rule("addcmul")
@_together
def addcmul(call: Call) -> Signal:
    """self + value * tensor1 * tensor2: a product, then a sum."""
    return _combined(call, call["self"], call["tensor1"], call["tensor2"], call.get("value", 1))


@rule("addcdiv")
@_together
def addcdiv(call: Call) -> Signal:
    """self + value * tensor1 / tensor2: a quotient, then a sum."""
    below = call["tensor2"]
    below = inverse(below) if isinstance(below, Signal) else 1.0 / below
    return _combined(call, call["self"], call["tensor1"], below, call.get("value", 1))


@rule("lerp")
@_together
def lerp(call: Call) -> Signal:
    """self + weight * (end - self) = (1 - weight) * self + weight * end, both independent."""
    start, end, weight = [*call.arguments.values()][:3]
    if isinstance(weight, Signal):
        away = plus(end, start, -1.0, call) if isinstance(end, Signal) or isinstance(start, Signal) else end - start
        return _combined(call, start, away, weight, 1.0)
    weight = aligned(weight, call)
    kept = aligned(start, call)
    return plus(kept.scaled(1 - weight) if isinstance(kept, Signal) else kept * (1 - weight), end, weight, call)


@rule("mean", "sum")
def reduction(call: Call) -> Signal:
    """Means and sums over axes of independent values: var / n and n var."""
    x = next(iter(call.arguments.values()))
    axes = reduced_axes(call, x)
    count = size_of(x, axes)
    mean, var = (part.mean(axes, keepdim=True) if axes else part for part in torch.broadcast_tensors(x.mean, x.var))
    var = var / distinct(count, x.repeat)
    if call.node.op == "sum":
        mean, var = mean * count, var * count**2
    return Signal(*squeezed(mean, var, axes, call), call.shape)


def reduced_axes(call: Call, x: Signal) -> list[int]:
    """The axes that a reduction takes, all if it names none."""
    dims = call.get("dim")
    dims = range(len(x.shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return sorted({axis % len(x.shape) for axis in dims}) if x.shape else []


def reduced_shape(call: Call, x: Signal, axes: list[int]) -> tuple[int, ...]:
    """Shape of a reduction, also where the call returns several tensors."""
    kept = bool(call.get("keepdim", False))
    return tuple(1 if i in axes else size for i, size in enumerate(x.shape) if kept or i not in axes)


def size_of(x: Signal, axes: list[int]) -> int:
    """How many elements a reduction takes together."""
    return math.prod(x.shape[axis] for axis in axes)


def squeezed(mean: Tensor, var: Tensor, axes: list[int], call: Call) -> tuple[Tensor, Tensor]:
    """Moments without the reduced axes, unless the call keeps them."""
    if not call.get("keepdim", False):
        for axis in reversed(axes):
            mean, var = mean.squeeze(axis), var.squeeze(axis)
    return mean, var


def distinct(count: float, repeat: float) -> float:
    """How many independent values stand in a window of ``count`` neighbours.

    Example:
        >>> distinct(9, 1.0), distinct(9, 4.0)
        (9.0, 3.0)
    """
    return 1.0 + (count - 1) / repeat
