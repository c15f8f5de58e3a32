r"""How do means and variances of channels grow with depth, before any training?

Along a network, at every layer and residual block: the mean size of the channels' means, the average of their squares,
and the average variance of the channels; of a residual block also what its branch adds. The average square
E[y^2] of a channel is the sum of its squared mean and its variance.

What theory says of a start with He's variance and unit-variance input: E[y^2] is 1 after every ReLU layer of a plain
network, because each halves what the weights double, while the channels' means take over from their variances; each
residual sum without normaliser adds a branch as strong as its input, so that E[y^2] doubles from block to block.

Source:
    Bjorck, Gomes, Selman & Weinberger 2018 (moments by depth; their definition here is ours); Brock, De & Smith 2021
    (signal propagation plots of residual blocks); He et al. 2015 (the start).
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normprop.diagnostics.diagnosis import Diagnosis, Subject
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.errors import ConfigError
from normprop.training import random_state
from normprop.training.statistics import watched


@dataclass(frozen=True)
class ChannelMoments:
    """Moments of a signal's channels.

    Args:
        mean_size: mean over channels of the absolute channel mean.
        squared_mean: mean over channels of the squared channel mean.
        variance: mean over channels of the channel variance, dividing by the count.
    """

    mean_size: float
    squared_mean: float
    variance: float

    @property
    def second(self) -> float:
        """Mean square of all values."""
        return self.squared_mean + self.variance


def channel_moments(values: Tensor, axis: int = 1) -> ChannelMoments:
    """Mean and variance of every channel over samples and positions, averaged over channels.

    Args:
        values: (N, channels, *space), or with the channels on another axis.
        axis: that of the channels.

    Returns:
        The averages.

    Source:
        Brock et al. 2021, section 3 (average squared channel mean, average channel variance).

    Example:
        >>> channel_moments(torch.tensor([[1.0, -2.0], [3.0, -2.0]]))
        ChannelMoments(mean_size=2.0, squared_mean=4.0, variance=0.5)
    """
    values = values.detach()
    values = (values if values.dtype == torch.float64 else values.float()).movedim(axis, 0).flatten(1)
    var, mean = (part.cpu().double() for part in torch.var_mean(values, 1, correction=0))
    return ChannelMoments(mean.abs().mean().item(), mean.square().mean().item(), var.mean().item())


@dataclass(frozen=True)
class Station:
    """Moments at one place along a network.

    Args:
        name: dotted path of the layer or residual block whose output it is.
        output: moments of that output.
        branch: moments of what a block's residual branch puts out, before any factor of the sum; ``None`` for layers.
    """

    name: str
    output: ChannelMoments
    branch: ChannelMoments | None = None


def measure(subject: Subject, branches: Sequence[str] | None = None) -> tuple[Station, ...]:
    """Measure the channels' moments after every layer and residual block of a network.

    Layers are those of :func:`normprop.training.statistics.watched` that are in no residual block. At their start
    networks are compared on Gaussian input.

    Args:
        subject: the network, in the mode it is to be looked at in, and a batch.
        branches: dotted paths of the residual branches, whose parents are the blocks; by default every child called
            "branch".

    Returns:
        One entry for each layer and block that was called, by the order of their first calls; of later calls nothing.

    Raises:
        ConfigError: if there is no layer, or no module where a branch should be.

    Example:
        >>> from normprop import models
        >>> found = measure(Subject("none", models.create("resnet8", (3, 8, 8), 10, "none"), torch.randn(8, 3, 8, 8)))
        >>> [station.name for station in found if station.branch]
        ['1', '2', '3']
    """
    model = copy.deepcopy(subject.model)
    blocks = dict(_blocks(model, branches))
    inside = {part for block in blocks for part in block.modules()}
    layers = {layer: name for name, layer in watched(model) if layer not in inside}
    if not layers and not blocks:
        raise ConfigError(f"depth-moments: {subject.name} has no linear map to look behind; give one that has")
    names: dict[nn.Module, str] = layers | {block: name for block, (name, _) in blocks.items()}
    found: dict[nn.Module, ChannelMoments] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and module not in found:
            found[module] = channel_moments(output, _axis(module))

    for module in [*names, *(branch for _, branch in blocks.values())]:
        module.register_forward_hook(record)
    with random_state.preserved(), torch.no_grad():
        model(subject.inputs.detach().clone())
    return tuple(
        Station(names[module], output, found.get(blocks[module][1]) if module in blocks else None)
        for module, output in found.items()
        if module in names
    )


def _blocks(model: nn.Module, branches: Sequence[str] | None) -> Iterator[tuple[nn.Module, tuple[str, nn.Module]]]:
    """Outermost residual blocks with their paths and branches."""
    modules = dict(model.named_modules())
    if branches is None:
        branches = [path for path in modules if path.rpartition(".")[2] == "branch"]
    done: list[str] = []
    for path in branches:
        if path not in modules or not path:
            raise ConfigError(
                f"depth-moments: no module {path!r} in {type(model).__name__}; give a branch's dotted path"
            )
        block = path.rpartition(".")[0]
        if not any(not other or block == other or block.startswith(f"{other}.") for other in done):
            yield modules[block], (block or type(model).__name__, modules[path])
            done.append(block)


def _axis(module: nn.Module) -> int:
    """Axis of the channels: the second after a convolution, the last after linear maps on tokens."""
    return -1 if all(parameter.ndim <= 2 for parameter in module.parameters()) else 1


def describe(results: Mapping[str, Sequence[Station]]) -> Diagnosis:
    """Say how the moments of some networks' channels change with depth.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of the means' size and the variance by depth, and of the variance that residual
        branches add, if there are any.

    Example:
        >>> first, last = ChannelMoments(0.5, 0.25, 0.75), ChannelMoments(1.0, 1.0, 7.0)
        >>> describe({"none": [Station("0", first), Station("1", last)]}).found
        'Average channel variance and mean size of the channel means, in the first and the last layer or block:
        none: 0.75 to 7 and 0.5 to 1 (from 0 to 1).'
    """
    found = {name: stations for name, stations in results.items() if stations}
    sentences = [
        f"{name}: {_change(stations, 'variance')} and {_change(stations, 'mean_size')} (from {stations[0].name} to "
        f"{stations[-1].name})"
        for name, stations in found.items()
    ]
    figures = [
        _plot("Size of the channel means", "mean |channel mean|", found, "mean_size"),
        _plot(
            "Variance of the channels", "average channel variance", found, "variance", [Reference(1.0, "unit variance")]
        ),
    ]
    added = [
        Line(name, [i for i, _ in points], [branch.variance or math.nan for _, branch in points])
        for name, stations in found.items()
        if (points := [(i, station.branch) for i, station in enumerate(stations, 1) if station.branch is not None])
    ]
    if added:
        title = "Variance that residual branches put out"
        figures.append(Plot(title, "layer or block", "average channel variance", added, y_scale="log"))
    return Diagnosis(
        name="depth-moments",
        title="How do means and variances of channels grow with depth?",
        look_for="With a normaliser both stay level; without one the means of the channels take over from their "
        "variances in plain networks, and variances double with every block in residual ones.",
        found=f"Average channel variance and mean size of the channel means, in the first and the last layer or block: "
        f"{'; '.join(sentences)}."
        if sentences
        else "No layers were looked at.",
        numbers={name: [_numbers(station) for station in stations] for name, stations in results.items()},
        figures=figures,
        source="Bjorck, Gomes, Selman & Weinberger 2018, Understanding Batch Normalization; Brock, De & Smith 2021, "
        "Characterizing signal propagation to close the performance gap in unnormalized ResNets",
    )


def _plot(
    title: str, label: str, found: Mapping[str, Sequence[Station]], field: str, references: Sequence[Reference] = ()
) -> Plot:
    """One moment by depth; a scale of powers, on which zeros leave gaps."""
    lines = [
        Line(name, range(1, len(stations) + 1), [getattr(station.output, field) or math.nan for station in stations])
        for name, stations in found.items()
    ]
    return Plot(title, "layer or block, from the input", label, lines, y_scale="log", references=references)


def _change(stations: Sequence[Station], field: str) -> str:
    return " to ".join(f"{getattr(station.output, field):.3g}" for station in (stations[0], stations[-1]))


def _numbers(station: Station) -> dict[str, Any]:
    def row(moments: ChannelMoments) -> dict[str, float | None]:
        values = {**vars(moments), "second": moments.second}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    branch = {} if station.branch is None else {"branch": row(station.branch)}
    return {"name": station.name, **row(station.output), **branch}
