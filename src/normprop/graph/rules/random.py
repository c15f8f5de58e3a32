"""Random operators: dropout of every kind and what stochastic depth is written with."""

from typing import Any

from normprop.graph.expression import Expression
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal
from normprop.moments import Moments
from normprop.moments import pool as pools


@rule("dropout", "feature_dropout", "native_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(call: Call) -> Any:
    """Dropout; in evaluation nothing happens. Alpha dropout keeps mean 0 and variance 1 by construction."""
    x = call.inputs[0]
    train = call.get("train", True)
    if not train or call["p"] == 0.0:
        result = x
    elif call.node.op.endswith("alpha_dropout"):
        result = Signal(x.mean, x.var, x.shape, repeat=x.repeat)
    else:
        after = pools.dropout(Moments(x.mean, x.var), call["p"])
        result = Signal(after.mean, after.var, x.shape, repeat=x.repeat)  # type: ignore[arg-type]
    return (result, None) if call.node.op == "native_dropout" else result


@rule("bernoulli")
def bernoulli(call: Call) -> Signal:
    """Zeros and ones of probability p."""
    p = call.get("p", 0.5)
    return Signal.of(float(p), float(p) * (1.0 - float(p)), call.shape)


@rule("empty_like", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_ones", "full_like", "new_full")
def filled(call: Call) -> Signal:
    """Tensors of one value that only take their shape from a signal."""
    value = {"ones_like": 1.0, "new_ones": 1.0}.get(call.node.op, call.get("fill_value", 0.0))
    return Signal.of(float(value), 0.0, call.shape)


@rule("rand_like", "randn_like", "rand", "randn")
def noise(call: Call) -> Signal:
    """Gaussian noise, or uniform noise as the distribution function of Gaussian noise."""
    normal = Signal.of(0.0, 1.0, call.shape).made_by(call.node.index)
    if "randn" in call.node.op:
        return normal
    return normal.through(Expression("aten.special_ndtr.default", {"self": Expression()}))
