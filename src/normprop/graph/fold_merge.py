"""Affine maps into the layers next to them, where that is exact."""

from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph.absorb import LINEAR_MAPS, linear_inputs, linear_outputs
from normprop.graph.fold_flow import Flow, Reader
from normprop.graph.fold_lower import linear_map
from normprop.graph.fold_parts import Affine, Floor, Part, as_floor


def merge(model: nn.Module, flow: Flow) -> None:
    """Take up affine maps in the linear maps before and behind them; what is left stays.

    Args:
        model: a network of plain modules, affine maps and floors, changed in place.
        flow: who feeds whom in it.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, Part)]
    for path in paths:
        _backward(model, flow, path)
    for path in paths:
        _forward(model, flow, path)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let a module stand wherever the one of a path stands now."""
    old = model.get_submodule(path)
    for parent in [*model.modules()]:
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = module


def _linear(model: nn.Module, path: str | None) -> Any:
    """The linear map of a path, if there is one that is nothing else."""
    module: Any = model.get_submodule(path) if path else None
    hooked = module is not None and (module._forward_hooks or module._forward_pre_hooks)
    return module if type(module) in LINEAR_MAPS and not hooked else None


def _backward(model: nn.Module, flow: Flow, path: str) -> None:
    """Take an affine map up in what alone feeds it, if it alone is fed."""
    affine, before = model.get_submodule(path), flow.before(path)
    linear = _linear(model, before)
    if not isinstance(affine, Affine) or before is None:
        return
    source = model.get_submodule(before)
    if linear is not None and _fits(linear, linear_outputs(linear), affine, flow.axes(path)):
        put(model, before, scaled_outputs(linear, affine))
    elif isinstance(source, Affine) and (both := source.then(affine)) is not None:
        put(model, before, both)
    else:
        return
    put(model, path, nn.Identity())
    flow.remove(path)


def _forward(model: nn.Module, flow: Flow, path: str) -> None:
    """Take an affine map, or what was added behind a ReLU, up in all that read it."""
    part = model.get_submodule(path)
    if isinstance(part, Affine):
        if _absorb(model, flow, path, part) or _through_floor(model, flow, path, part):
            put(model, path, nn.Identity())
            flow.remove(path)
    elif isinstance(part, Floor):
        _relax(model, flow, path, part)


def _through_floor(model: nn.Module, flow: Flow, path: str, affine: Affine) -> bool:
    """Take an affine map behind a ReLU up in front of it, so that a floor is left of both."""
    middle = flow.before(path)
    floor = as_floor(model.get_submodule(middle)) if middle else None
    if middle is None or floor is None or (raised := floor.after(affine)) is None:
        return False
    before = flow.before(middle)
    linear = _linear(model, before)
    if before is None or linear is None or not _fits(linear, linear_outputs(linear), affine, flow.axes(path)):
        return False
    put(model, before, scaled_outputs(linear, affine))
    put(model, middle, raised)
    _relax(model, flow, middle, raised)
    return True


def _relax(model: nn.Module, flow: Flow, path: str, floor: Floor) -> None:
    """Make a floor that differs between channels a ReLU where all readers can take the difference up."""
    before = flow.before(path)
    linear = _linear(model, before)
    one = torch.ones_like(floor.floor)
    lift = Affine(one, -floor.floor, floor.dims)
    if not floor.floor.ndim or linear is None or before is None:
        return
    if not _fits(linear, linear_outputs(linear), lift, flow.axes(path)):
        return
    if _absorb(model, flow, path, Affine(one, floor.floor, floor.dims)):
        put(model, before, scaled_outputs(linear, lift))
        put(model, path, nn.ReLU(inplace=floor.inplace))


def _absorb(model: nn.Module, flow: Flow, path: str, affine: Affine) -> bool:
    """Take a change of a module's output up in all that read it, if all can."""
    axes = flow.axes(path)
    if affine.scale.ndim > 1:
        return False
    if affine.dims is None and axes is not None:
        affine = Affine(affine.scale, affine.shift, axes - 2)
    readers = flow.readers(path, affine)
    if not readers or not all(_takes(model, reader) for reader in readers):
        return False
    for reader in readers:
        put(model, reader.path, scaled_inputs(_linear(model, reader.path), reader.change))
    return True


def _takes(model: nn.Module, reader: Reader) -> bool:
    """Whether a linear map can take up a change of its input exactly, borders included."""
    linear, change = _linear(model, reader.path), reader.change
    if linear is None or not _fits(linear, linear_inputs(linear), change, None):
        return False
    unshifted = bool((change.shift == 0).all())
    if isinstance(linear, nn.Linear) or unshifted:
        return True
    if isinstance(linear, nn.modules.conv._ConvTransposeNd):
        return False
    return linear.padding_mode != "zeros" or not any(linear._reversed_padding_repeated_twice)


def _fits(linear: Any, channels: int, affine: Affine, axes: int | None) -> bool:
    """Whether an affine map lies along the channels of a linear map's input or output."""
    space = 0 if isinstance(linear, nn.Linear) else len(linear.kernel_size)
    dims = axes - 2 if affine.dims is None and axes is not None else affine.dims
    if affine.scale.ndim == 0:
        return True
    return affine.scale.ndim == 1 and len(affine.scale) == channels and dims in (None, space)


def scaled_outputs(linear: Any, affine: Affine) -> nn.Module:
    """A linear map followed by an affine one, as one.

    Example:
        >>> both = scaled_outputs(nn.Linear(2, 1), Affine(torch.tensor(2.0), torch.tensor(1.0)))
        >>> both.in_features, both.out_features
        (2, 1)
    """
    scale, shift = (value.expand(linear_outputs(linear)) for value in (affine.scale, affine.shift))
    bias = shift if linear.bias is None else linear.bias * scale + shift
    return _like(linear, linear.weight * _by_filter(linear, scale), bias)


def scaled_inputs(linear: Any, affine: Affine) -> nn.Module:
    """An affine map followed by a linear one, as one; exact where no zeros are padded, or the map only scales."""
    scale, shift = (value.expand(linear_inputs(linear)) for value in (affine.scale, affine.shift))
    weight = linear.weight
    if isinstance(linear, nn.modules.conv._ConvTransposeNd):
        return _like(linear, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), linear.bias)
    groups = getattr(linear, "groups", 1)
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # the last axis is the kernel
    scale, shift = (value.reshape(groups, 1, -1, 1) for value in (scale, shift))
    added = (rows * shift).sum((2, 3)).flatten()
    if not bool((added == 0).all()):
        added = added if linear.bias is None else added + linear.bias
        return _like(linear, (rows * scale).reshape(weight.shape), added)
    return _like(linear, (rows * scale).reshape(weight.shape), linear.bias)


def _by_filter(linear: Any, value: Tensor) -> Tensor:
    """One number per output channel in the shape of a weight."""
    weight = linear.weight
    if not isinstance(linear, nn.modules.conv._ConvTransposeNd):
        return value.reshape(-1, *[1] * (weight.ndim - 1))
    by_group = value.reshape(linear.groups, 1, -1).expand(-1, weight.shape[0] // linear.groups, -1)
    return by_group.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))


def _like(linear: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A linear map of the same kind with another weight and bias."""
    options = {}
    if not isinstance(linear, nn.Linear):
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(linear, name) for name in names}
        if isinstance(linear, nn.modules.conv._ConvTransposeNd):
            options["output_padding"] = linear.output_padding
    layer: Any = linear_map(type(linear), weight, bias, **options)
    layer.requires_grad_(linear.weight.requires_grad)
    return layer  # type: ignore[no-any-return]
