"""Live moments: the part of the network's propagation that a layer evaluates in every forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normprop.graph.node import Graph, Node, State, leaves
from normprop.graph.propagate import Propagation, evaluate
from normprop.graph.signal import Signal


@dataclass
class Step:
    """One node of the propagation, and what its rule keeps."""

    node: Node
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class Program:
    """Work out the moments of a layer's input from the present state of the layers before it.

    A plain object that a layer holds: it is copied and pickled with the network, and refers to the network's own
    modules, so that gradients reach their parameters.

    Args:
        modules: the modules whose parameters it reads, by path.
        constants: signals that no parameter changes.
        steps: the nodes to evaluate, in order.
        reads: node and channel axis of each call of the layer; moments of several calls are mixed.
    """

    modules: dict[str, nn.Module]
    constants: dict[int, Any]
    steps: list[Step]
    reads: list[tuple[int, int]]

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the channels."""
        values = dict(self.constants)
        for step in self.steps:
            values[step.node.index] = evaluate(step.node, self.modules.__getitem__, values, step.memory)
        return mixed([values[index].channels(axis) for index, axis in self.reads])

    def to(self, device: torch.device) -> "Program":
        """Move what it holds of its own to a device."""
        self.constants = {index: _moved(value, device) for index, value in self.constants.items()}
        return self


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Signal):
        return value.to(device)
    return value.to(device) if isinstance(value, Tensor) else value


def mixed(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Moments of a value that is drawn from several sources equally often.

    Example:
        >>> one, other = torch.zeros(1), torch.ones(1)
        >>> mixed([(one, one), (2 * other, one)])
        (tensor([1.]), tensor([1.]))
    """
    if len(parts) == 1:
        return parts[0]
    means, variances = (torch.stack(kind) for kind in zip(*parts, strict=True))
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def program(
    graph: Graph,
    known: Propagation,
    reads: list[tuple[int, int]],
    roots: Mapping[int, tuple[str, str]],
    modules: Mapping[str, nn.Module],
) -> Program:
    """The part of a propagation that leads to what a layer reads.

    Args:
        graph: the graph, with every converted normaliser as a batch norm.
        known: its propagation.
        reads: nodes and channel axes.
        roots: nodes of converted normalisers; the path of the module that holds their gain and bias, and the gain's
            name there.
        modules: the converted network's modules, by path.

    Returns:
        The program.
    """
    needed: set[int] = set()
    stack = [index for index, _ in reads]
    while stack:
        index = stack.pop()
        if index in needed:
            continue
        needed.add(index)
        if index not in roots:
            stack.extend(graph.nodes[index].inputs)
    steps: list[Step] = []
    constants: dict[int, Any] = {}
    used: dict[str, nn.Module] = {}
    moving: set[int] = set()
    for index in sorted(needed):
        node = graph.nodes[index]
        if index in roots:
            node = _root(node, *roots[index])
        states = [leaf for leaf in leaves(node.args) if isinstance(leaf, State)]
        if not states and not moving.intersection(node.inputs) and node.op != "module":
            continue
        moving.add(index)
        steps.append(Step(node))
        used.update({state.path: modules[state.path] for state in states})
        if node.op == "module":
            used[node.path] = modules[node.path]
    for step in steps:
        constants.update({i: known.values[i] for i in step.node.inputs if i not in moving})
    constants.update({index: known.values[index] for index, _ in reads if index not in moving})
    return Program(used, constants, steps, reads)


def _root(node: Node, path: str, gain: str) -> Node:
    """A converted normaliser: its output is N(bias, gain^2) whatever goes in."""
    args = {name: State(path, own) for name, own in (("weight", gain), ("bias", "bias")) if node.args[name] is not None}
    return Node(node.index, "normalised", args, "", node.shape, node.dtype, node.scopes, node.source)
