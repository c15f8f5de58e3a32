"""Modules of normprop.nn, whose effective weights say exactly what they do to the moments that arrive."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments as M
from normprop.graph.rules import linear
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal
from normprop.nn.data_norm import DataNorm
from normprop.nn.layer import NormPropLayer
from normprop.nn.predicted import PredictedLayer, PredictedNorm


@rule(NormPropLayer)
def normprop_layer(call: Call) -> Signal:
    """(f(z) - c2) / c1 of the linear map's Gaussian output z, by the layer's present weight, gain and bias."""
    layer: Any = call.module
    activation = M.resolve(layer.activation)
    constants = layer._constants(activation)
    before = linear_map(call, *layer._effective(constants))
    if activation.name == "identity":
        return before
    channel = len(call.shape) - layer._spatial_dims - 1
    mean, reciprocal = (_row(value, call, channel) for value in (constants.mean, constants.reciprocal_std))
    # ReLU's constant shift is part of the bias already: max(z, -mean) = relu(z + mean) - mean.
    absorbed = activation.name == "relu" and isinstance(constants.mean, float)
    middle = before.mean + mean if absorbed else before.mean
    std = before.var.clamp_min(torch.finfo(before.var.dtype).tiny ** 0.5).sqrt()
    result = activation.moments(_last(middle, channel), _last(std, channel), derivative=False)
    value, var = (torch.as_tensor(part).transpose(channel, -1) for part in (result.mean, result.var))
    return Signal(value * reciprocal - mean, var * reciprocal**2, call.shape, repeat=before.repeat)


def _row(value: Any, call: Call, channel: int) -> Any:
    """A constant per channel with the axes of the output."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.reshape([-1 if axis == channel else 1 for axis in range(len(call.shape))])


def _last(value: Tensor, channel: int) -> Tensor:
    """Channels last, where learned slopes of an activation meet them."""
    return value.transpose(channel, -1)


@rule(PredictedLayer)
def predicted_layer(call: Call) -> Signal:
    """The plain layer of the same effective weight and bias; its variance as the rehearsal found it."""
    layer: Any = call.module
    result = linear_map(call, *layer.effective())
    return dataclasses.replace(result, var=result.var * layer.correction)


def linear_map(call: Call, weight: Tensor, bias: Tensor | None) -> Signal:
    """A module's linear map with another weight and bias, by the rule of its operator."""
    layer: Any = call.module
    arguments: dict[str, Any] = {"input": call.inputs[0], "weight": weight, "bias": bias}
    if isinstance(layer, nn.Linear):
        return linear.product(
            dataclasses.replace(call, node=dataclasses.replace(call.node, op="linear"), arguments=arguments)
        )
    # Padding by values of the input leaves no tap outside.
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    arguments |= {"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups}
    arguments["transposed"] = layer.transposed
    return linear.convolution(dataclasses.replace(call, arguments=arguments))


@rule(PredictedNorm)
def predicted_norm(call: Call) -> Signal:
    """x * scale + shift per channel."""
    layer: Any = call.module
    (x,) = call.inputs
    scale, shift = (
        part.reshape([-1 if axis == 1 else 1 for axis in range(len(x.shape))]) for part in layer.scale_and_shift()
    )
    result = x.scaled(scale).shifted(shift)
    return Signal(result.mean, result.var * layer.correction, x.shape, repeat=x.repeat)


@rule(DataNorm)
def data_norm(call: Call) -> Signal:
    """(x - mean) / std by the statistics of the training set; mean 0 and variance 1 by those of a batch."""
    layer: Any = call.module
    (x,) = call.inputs
    if layer.mode == "batch" and layer.training:
        return Signal.of(0.0, 1.0, x.shape)
    scale = torch.where(layer.var > 0, layer.var, 1).rsqrt().unsqueeze(0)
    return x.shifted(-layer.mean.unsqueeze(0)).scaled(scale)
