"""Normalisers of torch, as operators: batch, instance, group, layer and RMS normalisation.

Statistics of many values are taken as their expectation. Of few values they are not, but second moments are right on
average all the same: the values of a group of n have the mean square 1 by construction.
"""

from typing import Any

import torch
from torch import Tensor

from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal


def affine(weight: Any, bias: Any, x: Signal, axis: int | None) -> Signal:
    """Gain and bias, which stand along one axis or fill the trailing ones."""

    def shaped(value: Any) -> Tensor:
        value = expected(value)
        size = [1] * len(x.shape)
        if axis is None:
            size[len(size) - value.ndim :] = value.shape
        else:
            size[axis] = -1
        reshaped: Tensor = value.reshape(size)
        return reshaped

    mean, var = x.mean, x.var
    if weight is not None:
        mean, var = mean * shaped(weight), var * shaped(weight).square()
    if bias is not None:
        mean = mean + shaped(bias)
    return Signal(mean, var, x.shape, repeat=x.repeat)


def expected(value: Any) -> Any:
    """A parameter; of a statistic of the data its expectation."""
    return value.mean.expand(value.shape) if isinstance(value, Signal) else value


def row(value: Tensor, x: Signal) -> Tensor:
    """A value per channel with the axes of a signal."""
    return value.reshape([-1 if axis == 1 else 1 for axis in range(len(x.shape))])


def standardised(mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Moments of the values of a group, along the last axis, less their mean and over their deviation."""
    middle = mean.mean(-1, keepdim=True)
    spread = var.mean(-1, keepdim=True) + (mean - middle).square().mean(-1, keepdim=True)
    scale = (spread + eps).rsqrt()
    return (mean - middle) * scale, var * scale.square()


def _finished(call: Call, mean: Tensor, var: Tensor, x: Signal, axis: int | None, statistics: int) -> Any:
    """Gain and bias, and places for the statistics that decomposed forms return."""
    signal = affine(call.get("weight"), call.get("bias"), Signal(mean, var, x.shape, repeat=x.repeat), axis)
    return signal if call.node.shape is not None or call.module is not None else (signal, *[None] * statistics)


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_impl_index",
    "batch_norm_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "miopen_batch_norm",
)
def batch(call: Call) -> Any:
    """Batch norm: N(bias, gain^2) from batch statistics, an affine map of the input's moments from running ones."""
    x = call.inputs[0]
    training = call.get("training", call.get("train", False)) or call.get("running_mean") is None
    average, var = x.channels(1)
    if not training:
        average, var = (expected(call[name]).to(var) for name in ("running_mean", "running_var"))
    scale = row((var + call["eps"]).rsqrt(), x)
    return _finished(call, (x.mean - row(average, x)) * scale, x.var * scale.square(), x, 1, 4)


@rule("instance_norm")
def instance(call: Call) -> Any:
    """Instance norm: each channel by the statistics of its own positions, or by running ones like batch norm."""
    if not call.get("use_input_stats", True):
        return batch(Call(call.node, {**call.arguments, "training": False}, memory=call.memory))
    return grouped(call)


@rule("group_norm", "native_group_norm")
def grouped(call: Call) -> Any:
    """Group norm: each group's own mean and variance, over positions and the group's channels."""
    x = call.inputs[0]
    groups = x.shape[1] if call.node.op == "instance_norm" else call.get("num_groups", call.get("group"))
    mean, var = x.channels(1)
    mean, var = standardised(mean.reshape(groups, -1), var.reshape(groups, -1), call["eps"])
    return _finished(call, row(mean.flatten(), x), row(var.flatten(), x), x, 1, 2)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer(call: Call) -> Any:
    """Layer norm, (x - mean) / std, and RMS norm, x / root mean square, over the trailing axes."""
    x = call.inputs[0]
    axes = list(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    full = [x.shape[axis] if axis in axes else 1 for axis in range(len(x.shape))]
    mean, var = (part.expand(torch.broadcast_shapes(part.shape, full)) for part in (x.mean, x.var))
    eps = call.get("eps", torch.finfo(torch.float32).eps)
    middle = torch.zeros_like(mean) if "rms" in call.node.op else mean.mean(axes, keepdim=True)
    scale = ((var + (mean - middle).square()).mean(axes, keepdim=True) + eps).rsqrt()
    return _finished(call, (mean - middle) * scale, var * scale.square(), x, None, 2)
