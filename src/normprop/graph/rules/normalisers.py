"""Normalisers of torch, as operators: batch, instance, group, layer and RMS normalisation."""

from typing import Any

import torch
from torch import Tensor

from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal


def _affine(call: Call, mean: Tensor, var: Tensor, x: Signal, axis: int | None) -> Signal:
    """Gain and bias on a signal of the given moments; without axis they fill the trailing axes."""
    weight, bias = call.get("weight"), call.get("bias")

    def shaped(value: Tensor) -> Tensor:
        size = [1] * len(x.shape)
        if axis is None:
            size[len(size) - value.ndim :] = value.shape
        else:
            size[axis] = -1
        return value.reshape(size)

    if weight is not None:
        mean, var = mean * shaped(weight), var * shaped(weight).square()
    if bias is not None:
        mean = mean + shaped(bias)
    return Signal(mean, var, x.shape, repeat=x.repeat)


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
    if training:
        signal = _affine(call, _row(torch.zeros_like(var), x), _row(var / (var + call["eps"]), x), x, 1)
    else:
        scale = (call["running_var"].to(var) + call["eps"]).rsqrt()
        mean = (average - call["running_mean"]) * scale
        signal = _affine(call, _row(mean, x), _row(var * scale.square(), x), x, 1)
    return signal if call.node.shape is not None else (signal, None, None, None, None)


def _row(value: Tensor, x: Signal) -> Tensor:
    return value.reshape([-1 if axis == 1 else 1 for axis in range(len(x.shape))])


@rule("instance_norm", "group_norm", "native_group_norm")
def grouped(call: Call) -> Any:
    """Instance and group norm: each group's own mean and variance, over positions and the group's channels."""
    x = call.inputs[0]
    channels = x.shape[1]
    groups = channels if call.node.op == "instance_norm" else call.get("num_groups", call.get("group"))
    mean, var = (part.reshape(groups, -1) for part in x.channels(1))
    middle = mean.mean(1, keepdim=True)
    spread = var.mean(1, keepdim=True) + (mean - middle).square().mean(1, keepdim=True)
    scale = (spread + call["eps"]).rsqrt()
    mean, var = ((mean - middle) * scale).flatten(), (var * scale.square()).flatten()
    signal = _affine(call, _row(mean, x), _row(var, x), x, 1)
    return signal if call.node.shape is not None else (signal, None, None)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer(call: Call) -> Any:
    """Layer and RMS norm over the trailing axes, whose statistics of many values are taken as their expectation."""
    x = call.inputs[0]
    axes = list(range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    full = [x.shape[axis] if axis in axes else 1 for axis in range(len(x.shape))]
    mean, var = (part.expand(torch.broadcast_shapes(part.shape, full)) for part in (x.mean, x.var))
    eps = call.get("eps", torch.finfo(torch.float32).eps)
    if "rms" in call.node.op:
        middle = torch.zeros_like(mean)
        spread = (var + mean.square()).mean(axes, keepdim=True)
    else:
        middle = mean.mean(axes, keepdim=True)
        spread = (var + (mean - middle).square()).mean(axes, keepdim=True)
    scale = (spread + eps).rsqrt()
    signal = _affine(call, (mean - middle) * scale, var * scale.square(), x, None)
    return signal if call.node.shape is not None else (signal, None, None)
