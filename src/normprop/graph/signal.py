"""What is known of a value in the network: its moments, what it shares with others, how its neighbours correlate."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normprop.graph.affine import has_tensors, reduced
from normprop.graph.expression import Expression, moments
from normprop.moments import Moments

Source = tuple[int, int]  # a node, and which of its outputs


@dataclass(frozen=True)
class Origin:
    """A value that is an elementwise function of a Gaussian.

    Args:
        source: which Gaussian, values of one source share it; ``None`` until the value has a place in the network.
        mean: its mean, broadcastable to the value's shape.
        var: its variance.
        function: the function.
    """

    source: Source | None
    mean: Tensor
    var: Tensor
    function: Expression

    def plain(self) -> "Origin | None":
        """The same without tensors in the function, of the Gaussian that a line of this one is; ``None`` if none is.

        The place of every element in tensors matters no more, so that elements may be moved.
        """
        if not has_tensors(self.function):
            return self
        inner, line = reduced(self.function)
        if has_tensors(inner):
            return None
        return Origin(None, self.mean * line.slope + line.offset, self.var * line.slope**2, inner)


@dataclass(frozen=True)
class Signal:
    """Moments of a tensor in the network, over the data, for each of its elements.

    Args:
        mean: mean, with as many axes as the tensor; an axis on which it does not depend has length 1.
        var: variance, likewise.
        shape: shape of the tensor for the example input.
        source: the node that made it, and which of its outputs it is.
        repeat: how many neighbouring positions share one independent value, at least 1 (2 x 2 after upsampling by 2).
        parts: the independent values that it is a sum of, with their coefficients and variances, if it is a sum.
        origin: the Gaussian that it is an elementwise function of, if it is one.
        simplex: along its last axis it adds up to one, as the output of softmax does.

    Example:
        >>> Signal.of(torch.zeros(2), torch.ones(2), (8, 2, 4, 4), axis=1).mean.shape
        torch.Size([1, 2, 1, 1])
    """

    mean: Tensor
    var: Tensor
    shape: tuple[int, ...]
    source: Source | None = None
    repeat: float = 1.0
    parts: Mapping[Source, tuple[float | Tensor, Tensor]] = field(default_factory=dict)
    origin: Origin | None = None
    simplex: bool = False

    @staticmethod
    def of(mean: Tensor | float, var: Tensor | float, shape: tuple[int, ...], axis: int | None = None) -> "Signal":
        """A signal from moments per channel of one axis, or from moments for the whole tensor."""
        mean, var = (
            torch.as_tensor(part, dtype=None if isinstance(part, Tensor) else torch.float32) for part in (mean, var)
        )
        if axis is not None:
            size = [1] * len(shape)
            size[axis] = -1
            mean, var = (part.reshape(size) if part.ndim == 1 else part for part in (mean, var))
        mean, var = (part.reshape([1] * len(shape)) if part.ndim == 0 else part for part in (mean, var))
        return Signal(mean, var, shape)

    def made_by(self, node: int, output: int = 0) -> "Signal":
        """The same signal, as an output of a node, unless it already is that of another."""
        if self.source is not None:
            return self
        source = (node, output)
        parts = self.parts or {source: (1.0, self.var)}
        origin = self.origin
        if origin is not None and origin.source is None:
            origin = replace(origin, source=source)
        return replace(self, source=source, parts=parts, origin=origin)

    def base(self) -> Origin:
        """What it is an elementwise function of; itself, taken as Gaussian, if nothing else is known."""
        assert self.source is not None
        return self.origin or Origin(self.source, self.mean, self.var, Expression())

    def through(self, function: Expression, origin: Origin | None = None) -> "Signal":
        """The signal after an elementwise function of what it comes from."""
        base = origin or self.base()
        inner, line = reduced(function)
        result = moments(inner, base.mean * line.slope + line.offset, base.var * line.slope**2)
        mean, var = torch.as_tensor(result.mean), torch.as_tensor(result.var)
        return Signal(mean, var, self.shape, repeat=self.repeat, origin=replace(base, function=function))

    def scaled(self, factor: float | Tensor) -> "Signal":
        """The signal times a constant; a tensor has as many axes."""
        parts = {source: (factor * weight, var) for source, (weight, var) in self.parts.items()}
        return Signal(self.mean * factor, self.var * factor**2, self.shape, None, self.repeat, parts)

    def shifted(self, offset: Tensor | float) -> "Signal":
        """The signal plus a constant."""
        mean = self.mean + offset
        return Signal(mean, self.var, self.shape, None, self.repeat, self.parts)

    def bounded(self, limit: int) -> "Signal":
        """The signal with at most so many moments: averaged over axes, what differs along them becomes variance.

        The axes in the middle of a tensor (positions, tokens, windows) and the first (samples) go before the second
        and the last, where channels stand.
        """
        mean, var = torch.broadcast_tensors(self.mean, self.var)
        last = len(self.shape) - 1
        order = sorted(range(len(self.shape)), key=lambda axis: (axis in (1, last), axis == last, -mean.shape[axis]))
        axes = []
        while mean.numel() > limit:
            axis = next(axis for axis in order if mean.shape[axis] > 1)
            axes.append(axis)
            mean, var = averaged(mean, var, axis)
        if not axes:
            return self
        origin = self.origin
        if origin is not None:
            middle, spread = torch.broadcast_tensors(origin.mean, origin.var)
            for axis in axes:
                middle, spread = averaged(middle, spread, axis)
            origin = replace(origin, mean=middle, var=spread, source=None)
        return Signal(mean, var, self.shape, repeat=self.repeat, origin=origin, simplex=self.simplex)

    def to(self, device: torch.device) -> "Signal":
        """The same signal with its moments on another device."""
        if self.mean.device == self.var.device == device:
            return self
        parts = {
            source: (weight.to(device) if isinstance(weight, Tensor) else weight, var.to(device))
            for source, (weight, var) in self.parts.items()
        }
        origin = self.origin
        if origin is not None:
            origin = replace(origin, mean=origin.mean.to(device), var=origin.var.to(device))
        return replace(self, mean=self.mean.to(device), var=self.var.to(device), parts=parts, origin=origin)

    def channels(self, axis: int) -> tuple[Tensor, Tensor]:
        """Mean and variance per element of one axis, over the data and all other axes; vectors of the axis' length."""
        axis %= len(self.shape)
        others = [i for i in range(len(self.shape)) if i != axis]
        mean, var = torch.broadcast_tensors(self.mean, self.var)
        average = mean.mean(others, keepdim=True) if others else mean
        spread = (mean - average).square() + var
        spread = spread.mean(others) if others else spread
        return average.flatten().expand(self.shape[axis]), spread.flatten().expand(self.shape[axis])

    def overall(self) -> Moments:
        """Mean and variance over the data and every axis, as numbers."""
        with torch.no_grad():
            mean, var = torch.broadcast_tensors(self.mean.double(), self.var.double())
            return Moments(float(mean.mean()), float(var.mean() + mean.var(correction=0)))


def averaged(mean: Tensor, var: Tensor, axes: int | list[int]) -> tuple[Tensor, Tensor]:
    """Moments of one shape over some axes more, which stay with length 1; what differs along them becomes variance."""
    average = mean.mean(axes, keepdim=True)
    return average, var.mean(axes, keepdim=True) + (mean - average).square().mean(axes, keepdim=True)


def add(one: Signal, other: Signal, weight: float | Tensor, shape: tuple[int, ...]) -> Signal:
    """``one + weight * other``, with the covariance of the independent values that both are sums of.

    Example:
        >>> x = Signal.of(0.0, 1.0, (4, 2)).made_by(0)
        >>> add(x, x, 1.0, (4, 2)).var.flatten(), add(x, x.scaled(1.0), -1.0, (4, 2)).var.flatten()
        (tensor([4.]), tensor([0.]))
    """
    parts = dict(one.parts)
    shared = False
    for source, (coefficient, var) in other.parts.items():
        before = parts.get(source)
        shared = shared or before is not None
        parts[source] = (weight * coefficient + (before[0] if before else 0.0), var)
    var = one.var + weight**2 * other.var
    if shared:
        var = torch.zeros_like(var)
        for coefficient, part in parts.values():
            var = var + coefficient**2 * part
    return Signal(one.mean + weight * other.mean, var, shape, repeat=min(one.repeat, other.repeat), parts=parts)
