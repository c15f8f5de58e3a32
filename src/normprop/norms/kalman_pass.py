"""What the blocks of a Kalman network tell each other during a forward pass."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from normprop.moments import Activation, Moments, pool
from normprop.norms.kalman_prior import Gaussian, activated, deviation

MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
UNCHANGED = (
    *(nn.Identity, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
PASSED = (*MAX_POOLS, *DROPOUTS, *UNCHANGED)
"""Modules that may stand between two blocks."""


class Output(NamedTuple):
    """What a block puts out: Gaussians and the activation that follows them."""

    belief: Gaussian
    activation: Activation


class Source(NamedTuple):
    """Where a block's input comes from: a station of the pass and what happens on the way."""

    station: int
    effects: tuple[Callable[[Output], Output], ...] = ()


class Pass:
    """What the stations (blocks and residual sums) of a network tell each other during one forward pass.

    It is empty before and after a pass, and in copies and pickles, so that no graph outlives its pass.

    Args:
        stations: number of stations; the first to write begins a pass, the last ends it.

    Example:
        >>> current = Pass(2)
        >>> current.write(0, Output(Gaussian(torch.zeros(1), torch.ones(1)), None))
        >>> current.read(Source(0)).belief.var
        tensor([1.])
    """

    def __init__(self, stations: int = 0) -> None:
        self.stations = stations
        self.outputs: dict[int, Output] = {}

    def write(self, station: int, output: Output) -> None:
        """Note what a station puts out."""
        if station == 0:
            self.outputs.clear()
        self.outputs[station] = output
        if station == self.stations - 1:
            self.outputs.clear()

    def read(self, source: Source) -> Output:
        """Look up what comes out of a source.

        Raises:
            ValueError: if that station was not called in this pass.
        """
        if source.station not in self.outputs:
            raise ValueError("norms.kalman: the block before this one was not called in this forward pass")
        output = self.outputs[source.station]
        for effect in source.effects:
            output = effect(output)
        return output

    def __reduce__(self) -> tuple[type["Pass"], tuple[int]]:
        return Pass, (self.stations,)


def effect(module: nn.Module) -> Callable[[Output], Output] | None:
    """What a module between two blocks does to the output of the first; ``None`` if nothing.

    Args:
        module: one of :data:`PASSED`.

    Example:
        >>> largest = effect(nn.MaxPool2d(2))
        >>> largest(Output(Gaussian(torch.zeros(1), torch.ones(1)), "relu")).belief.mean
        tensor([1.0294])
    """
    if isinstance(module, MAX_POOLS):
        dims = next(dims for dims, kind in enumerate(MAX_POOLS, 1) if isinstance(module, kind))
        size = module.kernel_size
        largest = pool.max_pool(size**dims if isinstance(size, int) else math.prod(size), Moments(0.0, 1.0))
        return partial(_largest, float(largest.mean), float(largest.var))
    return partial(_dropped, module) if isinstance(module, DROPOUTS) else None


def _largest(mean: float, var: float, output: Output) -> Output:
    """The largest of several, given the moments of the largest of as many standard Gaussians."""
    (centre, spread), activation = output
    return Output(Gaussian(centre + mean * deviation(spread), var * spread), activation)


def _dropped(module: nn.modules.dropout._DropoutNd, output: Output) -> Output:
    """What dropout leaves of the activated output."""
    if not module.training:
        return output
    after = pool.dropout(Moments(*activated(*output)), module.p)
    return Output(Gaussian(torch.as_tensor(after.mean), torch.as_tensor(after.var)), None)


class Link(NamedTuple):
    """A station's place in its network; ``sources`` are its inputs, of which those of a sum are two."""

    current: Pass
    station: int
    sources: tuple[Source, ...]

    def outputs(self) -> list[Output]:
        """What the station's inputs are."""
        return [self.current.read(source) for source in self.sources]
