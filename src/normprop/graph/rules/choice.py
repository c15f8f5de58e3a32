"""Choosing elements by a condition that may itself depend on the input."""

from typing import Any

from normprop.graph.rules import elementwise
from normprop.graph.rules.arithmetic import aligned, moments_of
from normprop.graph.rules.movement import moved
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal


@rule("where", "masked_fill")
def where(call: Call) -> Any:
    """A constant condition moves elements; a random one of chance p mixes: p a + (1 - p) b, second moments likewise."""
    if call.node.op == "where":
        condition, one, other = call["condition"], call["self"], call["other"]
    else:
        condition, one, other = call["mask"], call["value"], call["self"]
    if not isinstance(condition, Signal):
        return moved(call)
    if elementwise.one_source(call):
        return elementwise.unary(call)
    chance = aligned(condition, call).mean
    (a, first), (b, second) = (moments_of(aligned(part, call), chance) for part in (one, other))
    mean = chance * a + (1.0 - chance) * b
    var = chance * (first + (a - mean).square()) + (1.0 - chance) * (second + (b - mean).square())
    return Signal(mean, var, call.shape, repeat=min(signal.repeat for signal in call.inputs))
