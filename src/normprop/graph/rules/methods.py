"""Normalisers of normprop.norms whose operators say less than what is known of them; the others need no rule."""

from typing import Any

import torch

from normprop.graph.rules.normalisers import affine, batch, row, standardised
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal
from normprop.norms.cross_iteration import CrossIterationNorm
from normprop.norms.regbn import ChannelRegression


@rule(CrossIterationNorm)
def cross_iteration(call: Call) -> Any:
    """Statistics of several batches of one law are those of one: batch norm, of the first signal in evaluation."""
    layer: Any = call.module
    x = call.inputs[0]
    if layer.training:
        return affine(layer.weight, layer.bias, Signal.of(x.mean.new_zeros(()), x.mean.new_ones(()), call.shape), 1)
    arguments = {name: getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")}
    return batch(Call(call.node, {"input": x, **arguments, "training": False}))


@rule(ChannelRegression)
def channel_regression(call: Call) -> Signal:
    """f - g W and g, each layer-normed; in training W explains means alone, by s = sum m_g^2 / v_g: m_f s / (1 + s)."""
    layer: Any = call.module
    (x,) = call.inputs
    halves = [[*part.split(layer.sizes)] for part in x.channels(1)]
    means, variances = halves
    if layer.training:
        explained = (means[1].square() / variances[1].clamp_min(1e-12)).sum()
        variances[0] = variances[0] + means[0].square() * explained / (1.0 + explained).square()
        means[0] = means[0] / (1.0 + explained)
    else:
        weight = layer.regression.running_weight.to(means[0].dtype)
        means[0] = means[0] - means[1] @ weight
        variances[0] = variances[0] + variances[1] @ weight.square()
    parts = [standardised(m, v, 1e-5) for m, v in zip(means, variances, strict=True)]
    mean, var = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return affine(layer.weight, layer.bias, Signal(row(mean, x), row(var, x), x.shape, repeat=x.repeat), 1)
