"""How costs grow: a training step with width, depth and batch size, conversion and inspection with parameters."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from normprop import models
from normprop.experiments import machine
from normprop.experiments.bench_cases import check_methods
from normprop.experiments.timing import step_times
from normprop.graph.convert import convert
from normprop.graph.inspect import inspect

TOOLS: Mapping[str, Callable[[nn.Module, torch.Tensor], object]] = {"convert": convert, "inspect": inspect}
_SHAPE, _CLASSES = (3, 32, 32), 10
_REPEATS = 3


@dataclass(frozen=True)
class Axis:
    """One thing that grows.

    Args:
        name: what it is.
        label: what its numbers are.
        of: the network and what is held fixed, in words.
        values: the numbers, rising.
        network: builds the network for a number and a method.
        batch_size: samples per step for a number.
    """

    name: str
    label: str
    of: str
    values: tuple[float, ...]
    network: Callable[[float, str], nn.Module]
    batch_size: Callable[[float], int]


def _nin(width: float, norm: str) -> nn.Module:
    return models.create("nin", _SHAPE, _CLASSES, norm=norm, width=width)


def _resnet(blocks: float, norm: str) -> nn.Module:
    return models.create(f"resnet{2 * int(blocks) + 2}", _SHAPE, _CLASSES, norm=norm)


AXES = (
    Axis("width", "width, share of the paper's", "NIN, batch 8", (0.125, 0.25, 0.5, 1.0), _nin, lambda width: 8),
    Axis("depth", "residual blocks", "ResNet 8 to 50, batch 8", (3, 6, 12, 24), _resnet, lambda blocks: 8),
    Axis(
        "batch size", "samples per step", "NIN at half width", (1, 2, 4, 8, 16, 32, 64),
        lambda size, norm: _nin(0.5, norm), int,
    ),
)  # fmt: skip
TOOL_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0)


def grow(
    methods: Sequence[str],
    *,
    seconds: float = 5.0,
    axes: Sequence[Axis] = AXES,
    tool_widths: Sequence[float] = TOOL_WIDTHS,
    device: torch.device | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Time training steps along the axes, and conversion and inspection of a residual network with batch norm.

    Args:
        methods: names of normalisers; "none" is added.
        seconds: time for each point of an axis, shared by the methods; at least five rounds.
        axes: what grows.
        tool_widths: factors on the channels of ResNet-14 for conversion and inspection, which run on the CPU.
        device: where training steps run; by default the CPU.
        progress: called before each point, and after the last, with the number of points done, of all, and the next in
            words.
        command: the command line, for the document.

    Returns:
        A document of plain JSON values: ``axes``, each with its points (``value``, ``batch_size`` and ``times``, one
        for each method as :class:`normprop.experiments.timing.StepTime` has it), and ``tools``, points with
        ``parameters`` and the seconds of each tool, the median of three.

    Raises:
        ConfigError: for a method that does not exist or has no two-dimensional block.

    Example:
        >>> document = grow(["none"], seconds=0, axes=[], tool_widths=[0.25])
        >>> sorted(document["tools"][0])
        ['convert', 'inspect', 'parameters']
    """
    device = device or torch.device("cpu")
    methods = check_methods(methods, ["nin", "resnet18"])
    total = sum(len(axis.values) for axis in axes) + len(tool_widths)
    tell, done = progress or (lambda done, total, words: None), 0
    measured = []
    for axis in axes:
        points = []
        for value in axis.values:
            tell(done, total, f"{axis.name} {value:g}")
            points.append(_point(axis, value, methods, seconds, device))
            done += 1
        measured.append({"name": axis.name, "label": axis.label, "of": axis.of, "points": points})
    tools = []
    for width in tool_widths:
        tell(done, total, f"tools at width {width:g}")
        tools.append(_tools(width))
        done += 1
    tell(done, total, "")
    return {
        "title": "How costs grow",
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device.type),
        "versions": machine.versions(),
        "methods": methods,
        "axes": measured,
        "tools": tools,
    }


def _point(axis: Axis, value: float, methods: Sequence[str], seconds: float, device: torch.device) -> dict[str, Any]:
    """The step times of all methods at one number of an axis."""
    torch.manual_seed(0)
    batch_size = axis.batch_size(value)
    networks = {method: axis.network(value, method).to(device) for method in methods}
    images = torch.randn(batch_size, *_SHAPE, device=device)
    labels = torch.randint(_CLASSES, (batch_size,), device=device)
    times = step_times(networks, images, labels, seconds)
    return {"value": value, "batch_size": batch_size, "times": [vars(time) for time in times]}


def _tools(width: float) -> dict[str, float]:
    """Seconds of conversion and inspection at one width."""
    torch.manual_seed(0)
    net = models.create("resnet14", _SHAPE, _CLASSES, norm="batch", width=width)
    x = torch.randn(2, *_SHAPE)
    point: dict[str, float] = {"parameters": sum(parameter.numel() for parameter in net.parameters())}
    for name, tool in TOOLS.items():
        taken = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            tool(net, x)
            taken.append(time.perf_counter() - start)
        point[name] = statistics.median(taken)
    return point
