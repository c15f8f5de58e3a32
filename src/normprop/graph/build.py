"""The modules that take a normaliser's place."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normprop import nn as layers
from normprop import norms
from normprop.errors import ConversionError
from normprop.fused import filters
from normprop.graph.absorb import linear_outputs
from normprop.graph.expression import Expression
from normprop.graph.node import Graph, Ref, leaves, replace
from normprop.graph.sites import EPS, Site
from normprop.moments.linear import Coverage
from normprop.norms.plain import ElementwiseActivation

_PREDICTED: dict[type[nn.Module], type[layers.PredictedLayer]] = {
    nn.Linear: layers.PredictedLinear,
    nn.Conv1d: layers.PredictedConv1d,
    nn.Conv2d: layers.PredictedConv2d,
    nn.Conv3d: layers.PredictedConv3d,
    nn.ConvTranspose1d: layers.PredictedConvTranspose1d,
    nn.ConvTranspose2d: layers.PredictedConvTranspose2d,
    nn.ConvTranspose3d: layers.PredictedConvTranspose3d,
}
_NORMPROP: dict[type[nn.Module], type[layers.NormPropLayer]] = {
    nn.Linear: layers.Linear,
    nn.Conv1d: layers.Conv1d,
    nn.Conv2d: layers.Conv2d,
    nn.Conv3d: layers.Conv3d,
    nn.ConvTranspose1d: layers.ConvTranspose1d,
    nn.ConvTranspose2d: layers.ConvTranspose2d,
    nn.ConvTranspose3d: layers.ConvTranspose3d,
}


def settings(module: Any) -> dict[str, Any]:
    """Constructor arguments of one of torch's linear maps, without bias.

    Example:
        >>> settings(nn.Linear(2, 3))
        {'in_features': 2, 'out_features': 3}
    """
    if isinstance(module, nn.Linear):
        return {"in_features": module.in_features, "out_features": module.out_features}
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    if module.transposed:
        names.append("output_padding")
    return {name: getattr(module, name) for name in names}


def parameter(value: Tensor | None) -> nn.Parameter | None:
    """A gain or bias as a parameter: a parameter as it is, a buffer as one that does not train."""
    if value is None or isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.clone(), requires_grad=False)


def predicted_layer(
    linear: Any, norm: Any, mean: Tensor, var: Tensor, seen: Coverage | None, center: bool
) -> layers.PredictedLayer:
    """A linear map that takes a normaliser in; weight, gain and bias are the parameters that were there.

    Args:
        linear: one of torch's linear maps; a bias that it has goes with the mean.
        norm: the normaliser.
        mean, var: predicted moments of the linear map's input channels.
        seen: how often its taps see the input.
        center: subtract each filter's mean.

    Returns:
        The layer.
    """
    weight, bias = (parameter(getattr(norm, name, None)) for name in ("weight", "bias"))
    made: Any = _PREDICTED[type(linear)](**settings(linear), bias=bias is not None, device="meta")
    made.weight = linear.weight
    made.register_parameter("gain", weight)
    if bias is not None:
        made.bias = bias
    fan_in = linear.weight.numel() // linear_outputs(linear)
    made.center = center and fan_in > 1
    made.eps = EPS
    made.seen = seen
    made.predict(mean.to(linear.weight), var.to(linear.weight))
    return made.train(linear.training)  # type: ignore[no-any-return]


def exact_layer(linear: Any, norm: Any, site: Site) -> nn.Module:
    """A NormProp layer with the function that linear map and normaliser have in evaluation.

    gain * W x / ||W|| + bias with gain = scale ||W|| and bias = shift + scale b, from the normaliser's scale and shift.
    """
    scale, shift = site.affine()
    made: Any = _NORMPROP[type(linear)](
        **settings(linear), activation=None, center=False, moments="fixed", device="meta"
    )
    rows = filters(linear.weight.detach().double(), getattr(linear, "groups", 1), made._transposed)
    length = torch.linalg.vector_norm(rows, dim=(1, 3)).flatten()
    gain = scale * length / math.sqrt(made._phases)
    bias = shift if linear.bias is None else shift + scale * linear.bias.detach().double()
    made.weight = linear.weight
    for name, value in (("gain", gain), ("bias", bias)):
        old = getattr(norm, {"gain": "weight"}.get(name, name), None)
        train = isinstance(old, nn.Parameter) and old.requires_grad
        setattr(made, name, nn.Parameter(value.to(linear.weight), requires_grad=train))
    return made.train(linear.training)  # type: ignore[no-any-return]


def predicted_norm(norm: Any, site: Site, mean: Tensor, var: Tensor, eps: float) -> layers.PredictedNorm:
    """A normaliser by given moments in the place of one by batch statistics; gain and bias stay."""
    weight, bias = (parameter(getattr(norm, name, None)) for name in ("weight", "bias"))
    made = layers.PredictedNorm(site.channels, eps, affine=False)
    made.register_parameter("weight", weight)
    made.register_parameter("bias", bias)
    made.affine = weight is not None
    like = weight if weight is not None else norm.running_mean if site.running_mean is not None else mean
    made.predict(mean.to(like), var.to(like))
    return made.train(norm.training)


def other_norm(name: str, norm: Any, site: Site, dims: int) -> nn.Module:
    """A drop-in normaliser of another method; gain and bias of the same names are taken over."""
    made: Any = norms.create(name, site.channels, dims)
    for own in ("weight", "bias"):
        value = getattr(norm, own, None)
        new = getattr(made, own, None)
        if isinstance(value, Tensor) and isinstance(new, nn.Parameter) and new.shape == value.shape:
            setattr(made, own, parameter(value))
    like = norm.weight if getattr(norm, "weight", None) is not None else None
    if like is not None:
        made.to(like.device, like.dtype)
    return made.train(norm.training)  # type: ignore[no-any-return]


def other_block(name: str, linear: Any, norm: Any) -> nn.Module:
    """The block of a method that works on weights, in the place of linear map and normaliser; the filters stay."""
    if getattr(linear, "transposed", False):
        raise ConversionError(f"convert: {name!r} has no transposed convolution")
    dims = 0 if isinstance(linear, nn.Linear) else linear.weight.ndim - 2
    arguments = settings(linear)
    plain = {key: arguments.pop(key) for key in ("dilation", "padding_mode") if key in arguments}
    made: Any = norms.block(name, dims)(**arguments, activation=None)
    shape = linear.weight.shape
    inner: Any = next((m for m in made.modules() if getattr(m, "weight", torch.empty(0)).shape == shape), None)
    if inner is None:
        raise ConversionError(
            f"convert: the block of {name!r} holds no layer for the filters of a {type(linear).__name__}"
        )
    for key, value in plain.items():
        setattr(inner, key, value)
    if plain.get("padding_mode", "zeros") != "zeros":
        inner._reversed_padding_repeated_twice = linear._reversed_padding_repeated_twice
    inner.weight = linear.weight
    return made.to(linear.weight.device, linear.weight.dtype).train(linear.training)  # type: ignore[no-any-return]


def with_tail(first: nn.Module, graph: Graph, site: Site, old: nn.Module) -> nn.Module:
    """A module followed by what the replaced one did after its batch norm: its own children, or its functions."""
    parts: list[nn.Module] = [first]
    seen: set[str] = set()
    for index in site.places[0].tail:
        node = graph.nodes[index]
        child = node.path.removeprefix(site.path).lstrip(".").split(".")[0]
        if child and child not in seen:
            seen.add(child)
            parts.append(old.get_submodule(child))
        elif not child:
            if any(not isinstance(leaf, (Ref, int, float, str, bool, type(None))) for leaf in leaves(node.args)):
                raise ConversionError(f"{site.path}: {node} after its batch norm takes a tensor of its own")
            arguments = replace(node.args, lambda leaf: Expression() if isinstance(leaf, Ref) else leaf)
            parts.append(ElementwiseActivation(Expression(node.overload, arguments)))
    return first if len(parts) == 1 else nn.Sequential(*parts).train(old.training)
