"""Activations: every operator that torch marks as elementwise, alone or composed, of one Gaussian."""

from typing import Any

import torch
from torch import Tensor

from normprop.graph.expression import Expression
from normprop.graph.node import leaves, replace
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal
from normprop.moments.piecewise import rectifier

_LARGEST = 64  # operators in one expression


def applies(call: Call) -> bool:
    """Whether a call is an elementwise function of values that come from one Gaussian, with numbers for the rest."""
    if not call.node.overload or not call.inputs:
        return False
    namespace, name, overload = call.node.overload.split(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    elementwise = torch.Tag.pointwise in operator.tags or name.removesuffix("_") in _UNMARKED
    return elementwise and one_source(call)


# Elementwise, but not marked so by torch.
_UNMARKED = {"hardswish", "log_sigmoid", "special_expit", "tanhshrink"}


def one_source(call: Call) -> bool:
    """Whether all signals of a call are functions of one Gaussian, and all else is numbers."""
    origins = [signal.base() for signal in call.inputs]
    plain = all(not isinstance(leaf, Tensor) or leaf.numel() == 1 for leaf in leaves(call.arguments))
    shapes = {signal.shape for signal in call.inputs}
    return plain and len({origin.source for origin in origins}) == 1 and len(shapes) == 1


def unary(call: Call) -> Signal:
    """The composed expression of the Gaussian behind the call's inputs."""

    def expression(leaf: Any) -> Any:
        if isinstance(leaf, Signal):
            return leaf.base().function
        return leaf.item() if isinstance(leaf, Tensor) else leaf

    first = call.inputs[0]
    composed = Expression(call.node.overload, replace(call.arguments, expression))
    if composed.size > _LARGEST:
        alone = Expression(
            call.node.overload, replace(call.arguments, lambda leaf: Expression() if isinstance(leaf, Signal) else leaf)
        )
        return Signal(first.mean, first.var, first.shape, repeat=first.repeat).made_by(call.node.index).through(alone)
    return first.through(composed, first.base())


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Signal:
    """PReLU: its slopes are learned, one for all channels or one each."""
    x, weight = [*call.arguments.values()][:2]
    size = [1] * len(x.shape)
    if weight.numel() > 1:
        size[1] = -1
    moments = rectifier(x.mean.double(), x.var.double().clamp_min(1e-30).sqrt(), weight.double().reshape(size))
    mean, var = (torch.as_tensor(part).to(x.mean.dtype) for part in (moments.mean, moments.var))
    return Signal(mean, var, x.shape, repeat=x.repeat)
