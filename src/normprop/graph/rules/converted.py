"""The output of a converted normaliser, where a live propagation begins."""

from torch import Tensor

from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal


@rule("normalised")
def normalised(call: Call) -> Signal:
    """A normalised value is N(bias, gain^2), whatever went in."""
    gain, bias = call.get("weight"), call.get("bias")
    reference: Tensor = gain if gain is not None else bias
    var = reference.new_ones(reference.shape) if gain is None else gain.square()
    mean = reference.new_zeros(reference.shape) if bias is None else bias
    return Signal.of(mean, var, call.shape, axis=1)
