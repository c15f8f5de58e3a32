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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normprop.diagnostics.channels import recording
from normprop.diagnostics.diagnosis import Diagnosis, Subject, by_network, finite
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.diagnostics.quiet import call, quietly
from normprop.errors import ConfigError
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


def averages(moments: Tensor) -> ChannelMoments:
    """Averages over channels.

    Args:
        moments: mean and variance of each, (2, channels).

    Returns:
        The averages.

    Source:
        Brock et al. 2021, section 3 (average squared channel mean, average channel variance).

    Example:
        >>> from torch import tensor
        >>> averages(tensor([[2.0, -2.0], [1.0, 0.0]]))
        ChannelMoments(mean_size=2.0, squared_mean=4.0, variance=0.5)
    """
    mean, var = moments.cpu().double()
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
        >>> from torch import randn
        >>> from normprop import models
        >>> found = measure(Subject("none", models.create("resnet8", (3, 8, 8), 10, "none"), randn(8, 3, 8, 8)))
        >>> [station.name for station in found if station.branch]
        ['1', '2', '3']
    """
    with quietly(subject.model, subject.inputs) as model:
        blocks = _blocks(model, branches)
        inside = {part for block, _ in blocks.values() for part in block.modules()}
        layers = {name: layer for name, layer in watched(model) if layer not in inside}
        if not layers and not blocks:
            raise ConfigError(f"depth-moments: {subject.name} has no linear map to look behind; give one that has")
        places = [*layers.items(), *((name, block) for name, (block, _) in blocks.items())]
        branched = [(name, branch) for name, (_, branch) in blocks.items()]
        with recording(places) as outputs, recording(branched) as added:
            call(model, subject.inputs.detach().clone(), subject.name)
    return tuple(
        Station(name, averages(calls[0]), averages(added[name][0]) if name in added else None)
        for name, calls in outputs.items()
    )


def _blocks(model: nn.Module, branches: Sequence[str] | None) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Outermost residual blocks and their branches, by the paths of the blocks."""
    modules = dict(model.named_modules())
    if branches is None:
        branches = [path for path in modules if path.rpartition(".")[2] == "branch"]
    done: list[str] = []
    found = {}
    for path in branches:
        if path not in modules or not path:
            raise ConfigError(
                f"depth-moments: no module {path!r} in {type(model).__name__}; give a branch's dotted path"
            )
        block = path.rpartition(".")[0]
        if not any(not other or block == other or block.startswith(f"{other}.") for other in done):
            found[block or type(model).__name__] = modules[block], modules[path]
            done.append(block)
    return found


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
        'none: from layer or block 0 to 1 the average variance of a channel goes from 0.75 to 7, and the mean size of
        the channel means from 0.5 to 1.'
    """
    found = {name: stations for name, stations in results.items() if stations}
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
        found=by_network(found, _words) or "No layers were looked at.",
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


def _words(stations: Sequence[Station]) -> str:
    """What was found in one network."""
    first, last = stations[0], stations[-1]
    return (
        f"from layer or block {first.name} to {last.name} the average variance of a channel goes from "
        f"{first.output.variance:.3g} to {last.output.variance:.3g}, and the mean size of the channel means from "
        f"{first.output.mean_size:.3g} to {last.output.mean_size:.3g}."
    )


def _numbers(station: Station) -> dict[str, Any]:
    def row(moments: ChannelMoments) -> dict[str, float | None]:
        values = {**vars(moments), "second": moments.second}
        return {name: finite(value) for name, value in values.items()}

    branch = {} if station.branch is None else {"branch": row(station.branch)}
    return {"name": station.name, **row(station.output), **branch}
