"""Activations and all else that acts on every element alone, of one Gaussian or of two independent ones."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from normprop.errors import UnknownOperatorError
from normprop.graph import expression
from normprop.graph.expression import Expression
from normprop.graph.node import replace
from normprop.graph.operators import functional
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Origin, Signal
from normprop.moments.piecewise import rectifier

_LARGEST = 64  # operators in one expression

# Elementwise, but not marked so by torch.
_UNMARKED = {"hardswish", "log_sigmoid", "special_expit", "special_ndtr"}


def applies(call: Call) -> bool:
    """Whether a call is an elementwise function of signals and constants."""
    if not call.node.overload or not call.inputs:
        return False
    name = call.node.overload.split(".")[1].removesuffix("_")
    tags = getattr(functional(call.node.overload), "tags", ())
    return name in _UNMARKED or torch.Tag.pointwise in tags


def one_source(call: Call) -> bool:
    """Whether all signals of a call are functions of one Gaussian, of the shape of the output."""
    shapes = {signal.shape for signal in call.inputs}
    return len({signal.base().source for signal in call.inputs}) == 1 and shapes == {call.node.shape}


def composed(call: Call) -> Origin:
    """What a call of one source is, as a function of the Gaussian behind its inputs."""

    def part(leaf: Any) -> Any:
        if isinstance(leaf, Signal):
            return leaf.base().function
        if isinstance(leaf, Tensor):
            return leaf.reshape([1] * (len(call.shape) - leaf.ndim) + [*leaf.shape] if leaf.numel() > 1 else [])
        return leaf

    base = call.inputs[0].base()
    return Origin(base.source, base.mean, base.var, Expression(call.node.overload, replace(call.arguments, part)))


def unary(call: Call) -> Signal:
    """Any elementwise operator: exact for functions of one Gaussian, written in one call or in several.

    Of two independent signals by quadrature over both.
    """
    if not one_source(call):
        return independent(call)
    first, origin = call.inputs[0], composed(call)
    if origin.function.size > _LARGEST:
        alone = replace(call.arguments, lambda leaf: Expression() if isinstance(leaf, Signal) else leaf)
        fresh = Signal(first.mean, first.var, first.shape, repeat=first.repeat).made_by(call.node.index)
        return fresh.through(Expression(call.node.overload, alone))
    return first.through(origin.function, origin)


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(48)


def independent(call: Call) -> Signal:
    """Gauss-Hermite quadrature over one or two independent Gaussians, for shapes that differ as well."""
    signals = list({id(signal): signal for signal in call.inputs}.values())
    if len(signals) > 2:
        raise UnknownOperatorError(f"{call.node}: its rule takes two signals at most, got {len(signals)}; write one")
    axes = len(call.shape)
    weight: Any = 1.0
    values = {}
    for position, signal in enumerate(signals):
        base = signal.base()
        mean, std = (
            part.reshape([1] * (axes - part.ndim) + [*part.shape]).unsqueeze(-1).double()
            for part in (base.mean, base.var.clamp_min(torch.finfo(base.var.dtype).tiny).sqrt())
        )
        size = [1] * (axes + position) + [-1] + [1] * (len(signals) - 1 - position)
        z, share = (torch.as_tensor(part, device=mean.device).reshape(size) for part in (_NODES, _WEIGHTS))
        spread = mean.unsqueeze(-1) if len(signals) > 1 else mean
        scale = std.unsqueeze(-1) if len(signals) > 1 else std
        values[id(signal)] = base.function(spread + scale * z)
        weight = weight * share / share.sum()

    def on_nodes(leaf: Any) -> Any:
        if isinstance(leaf, Signal):
            return values[id(leaf)]
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.reshape([1] * (axes - leaf.ndim) + [*leaf.shape] + [1] * len(signals))
        return leaf

    first, *rest = call.arguments.items()
    output = functional(call.node.overload)(on_nodes(first[1]), **{k: replace(v, on_nodes) for k, v in rest})
    output = output.double()
    over = [*range(axes, axes + len(signals))]
    mean = (output * weight).sum(over, keepdim=True)
    var = ((output - mean).square() * weight).sum(over)
    dtype = signals[0].mean.dtype
    repeat = min(signal.repeat for signal in signals)
    return Signal(mean.flatten(axes).squeeze(-1).to(dtype), var.to(dtype), call.shape, repeat=repeat)


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Signal:
    """PReLU: a rectifier whose slopes are learned, one for all channels or one each."""
    x, weight = [*call.arguments.values()][:2]
    size = [1] * len(x.shape)
    if weight.numel() > 1:
        size[1] = -1
    moments = rectifier(x.mean.double(), x.var.double().clamp_min(1e-30).sqrt(), weight.double().reshape(size))
    mean, var = (torch.as_tensor(part).to(x.mean.dtype) for part in (moments.mean, moments.var))
    return Signal(mean, var, x.shape, repeat=x.repeat)


@rule("rrelu", "rrelu_with_noise")
def rrelu(call: Call) -> Signal:
    """Randomised leaky ReLU: slope uniform in [lower, upper] on the negative side in training, else their mean."""
    x = call.inputs[0]
    low, high = float(call.get("lower", 1 / 8)), float(call.get("upper", 1 / 3))
    middle = (low + high) / 2
    mean, std = x.mean.double(), x.var.double().clamp_min(1e-30).sqrt()
    moments, below = rectifier(mean, std, middle), rectifier(-mean, std)
    var = torch.as_tensor(moments.var)
    if call.get("training", False):
        var = var + (high - low) ** 2 / 12 * (torch.as_tensor(below.var) + torch.as_tensor(below.mean).square())
    return Signal(torch.as_tensor(moments.mean).to(x.mean), var.to(x.mean), x.shape, repeat=x.repeat)


@rule("log_sigmoid_forward")
def log_sigmoid(call: Call) -> Any:
    """Log-sigmoid in the form that also returns a buffer: an activation by quadrature."""
    (x,) = call.inputs
    return x.through(Expression("aten.log_sigmoid.default", {"self": x.base().function}), x.base()), None


@rule("glu")
def glu(call: Call) -> Signal:
    """Gated linear unit, a * sigmoid(b) of the halves of an axis: independent, so means and second moments multiply."""
    x, axis = call["self"], call.get("dim", -1) % len(call.shape)
    width = call.shape[axis]
    (a, va), (b, vb) = (
        [part if part.shape[axis] == 1 else part.narrow(axis, start, width) for part in (x.mean, x.var)]
        for start in (0, width)
    )
    gate = expression.moments(Expression("aten.sigmoid.default", {"self": Expression()}), b, vb)
    mean, var = torch.as_tensor(gate.mean), torch.as_tensor(gate.var)
    return Signal(a * mean, va * var + va * mean.square() + a.square() * var, call.shape, repeat=x.repeat)
