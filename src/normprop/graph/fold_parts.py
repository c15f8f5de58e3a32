"""What folding is made of meanwhile: affine maps and floors, each of which ends inside a layer or as one operation."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn


class Part(nn.Module):
    """What affine maps and floors share: tensors that broadcast against the input in one way.

    A tensor without axes is a number; one axis lies ``dims`` axes before the last, or along axis 1 where ``dims`` is
    ``None``; several are the last ones.
    """

    def __init__(self, dims: int | None, **tensors: Tensor) -> None:
        super().__init__()
        self.dims = dims
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def aligned(self, value: Tensor, axes: int) -> Tensor:
        """A tensor in the shape in which it broadcasts against an input of so many axes."""
        dims = axes - 2 if self.dims is None else self.dims
        return value.reshape(-1, *[1] * dims) if value.ndim == 1 else value


class Affine(Part):
    """``x * scale + shift``.

    Args:
        scale: a number, one per channel or one per element.
        shift: of the same shape.
        dims: axes after the channels, see :class:`Part`.

    Example:
        >>> Affine(torch.ones(2), torch.tensor([0.0, 1.0]))(torch.zeros(1, 2, 1)).flatten()
        tensor([0., 1.])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dims: int | None = None) -> None:
        super().__init__(dims, scale=scale, shift=shift)

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift."""
        return input * self.aligned(self.scale, input.ndim) + self.aligned(self.shift, input.ndim)

    def is_identity(self) -> bool:
        """Whether it does nothing."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    def plainly(self) -> "Affine":
        """The same map, as a number where all channels or elements have the same."""
        scale, shift = _number(self.scale), _number(self.shift)
        return Affine(scale, shift) if scale.ndim == shift.ndim == 0 else self

    def then(self, other: "Affine") -> "Affine | None":
        """This map, then another, as one; ``None`` where their tensors lie along different axes."""
        along = [part.dims for part in (self, other) if part.scale.ndim == 1 and part.dims is not None]
        shapes = {part.scale.shape for part in (self, other) if part.scale.ndim}
        if len(shapes) > 1 or len({*along}) > 1:
            return None
        return Affine(self.scale * other.scale, self.shift * other.scale + other.shift, along[0] if along else None)

    def equals(self, other: "Affine") -> bool:
        """Whether another is the same map."""
        pairs = ((self.scale, other.scale), (self.shift, other.shift))
        return self.dims == other.dims and all(torch.equal(own, its) for own, its in pairs)

    def repeated(self, shape: tuple[int, ...]) -> Iterator["Affine"]:
        """This map for tensors of another shape, in which every channel is a run of features along some axis."""
        if self.scale.ndim == 0:
            yield self
        elif self.scale.ndim == 1:
            for axis in (*range(1, len(shape)), 0):
                count, rest = divmod(shape[axis], len(self.scale)) if len(shape) else (0, 0)
                if count and not rest:
                    scale, shift = (value.repeat_interleave(count) for value in (self.scale, self.shift))
                    yield Affine(scale, shift, len(shape) - 1 - axis)


class Floor(Part):
    """``max(x, floor)``: a ReLU and what is added behind it, once the same is added in front.

    Args:
        floor: a number, one per channel or one per element.
        dims: axes after the channels, see :class:`Part`.
        inplace: whether the input may be overwritten.

    Example:
        >>> Floor(torch.tensor(-1.0))(torch.tensor([-3.0, 2.0]))
        tensor([-1.,  2.])
    """

    floor: Tensor

    def __init__(self, floor: Tensor, dims: int | None = None, inplace: bool = False) -> None:
        super().__init__(dims, floor=floor)
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        """Raise what is below the floor."""
        return torch.maximum(input, self.aligned(self.floor, input.ndim))

    def after(self, affine: Affine) -> "Floor | None":
        """The floor behind an affine map that does the same as this one in front of it; ``None`` if none does.

        For s > 0 is max(x, c) s + t = max(s x + t, s c + t).
        """
        axes = self.floor.ndim in (0, affine.scale.ndim) and (not self.floor.ndim or self.dims == affine.dims)
        if not axes or not bool((affine.scale > 0).all()):
            return None
        return Floor(affine.scale * self.floor + affine.shift, affine.dims, self.inplace)


def as_floor(module: nn.Module | None) -> Floor | None:
    """A ReLU or a threshold as a floor.

    Example:
        >>> as_floor(nn.ReLU()).floor
        tensor(0., dtype=torch.float64)
    """
    if isinstance(module, nn.ReLU):
        return Floor(torch.tensor(0.0, dtype=torch.float64), None, module.inplace)
    if isinstance(module, nn.Threshold) and module.threshold == module.value:
        return Floor(torch.tensor(module.value, dtype=torch.float64), None, module.inplace)
    return module if isinstance(module, Floor) else None


def settled(part: nn.Module, axes: int | None) -> nn.Module | None:
    """The plain module for what is left of an affine map or a floor: one pass over the activations, or none.

    A product and a sum by elements take a third to a tenth of the time of a depthwise 1x1 convolution, and a floor
    that of a ReLU.

    Args:
        part: the map.
        axes: axes of its input; ``None`` if not known.

    Returns:
        The module, or ``None`` if the axes have to be known and are not.

    Example:
        >>> settled(Floor(torch.tensor([-1.0, -1.0])), None)
        Threshold(threshold=-1.0, value=-1.0)
    """
    assert isinstance(part, Part)
    tensors = [_number(tensor) for tensor in part.buffers()]
    if axes is None and part.dims is None and any(tensor.ndim == 1 for tensor in tensors):
        return None
    values = [part.aligned(tensor, axes or 2).clone() for tensor in tensors]
    if isinstance(part, Floor):
        (floor,) = values
        if floor.ndim:
            return function_module(torch.clamp_min_ if part.inplace else torch.clamp_min, floor=floor)
        level = float(floor)
        return nn.Threshold(level, level, inplace=part.inplace) if level else nn.ReLU(inplace=part.inplace)
    scale, shift = values
    if _is(shift, 0):
        return nn.Identity() if _is(scale, 1) else function_module(torch.mul, scale=scale)
    if _is(scale, 1):
        return function_module(torch.add, shift=shift)
    return function_module(lambda x, scale, shift: torch.addcmul(shift, x, scale), scale=scale, shift=shift)


def _is(value: Tensor, number: int) -> bool:
    return bool((value == number).all())


def _number(value: Tensor) -> Tensor:
    """One number where all are the same."""
    first = value.flatten()[:1]
    return first.reshape(()) if first.numel() and bool((value == first).all()) else value


def function_module(function: Callable[..., Any], **tensors: Tensor) -> nn.Module:
    """A function of the input and of some tensors as a module of torch's own, with the tensors as buffers.

    Example:
        >>> function_module(torch.mul, factor=torch.tensor(2.0))(torch.ones(1))
        tensor([2.])
    """
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    nodes = [graph.placeholder("input"), *map(graph.get_attr, tensors)]
    graph.output(function(*(fx.Proxy(node, tracer) for node in nodes)).node)
    return fx.GraphModule(dict(tensors), graph, "Elementwise")
