"""Live moments: the part of the network's propagation that a layer evaluates in every forward pass."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.fused_layer import under_autocast
from normprop.graph.expression import Expression
from normprop.graph.forward_pass import ForwardPass
from normprop.graph.node import Graph, Node, State, leaves
from normprop.graph.propagate import Propagation, evaluate
from normprop.graph.signal import Origin, Signal


@dataclass(frozen=True)
class Slot:
    """The place of a tensor that a program holds."""

    index: int


@dataclass
class Step:
    """One node of the propagation, and what its rule keeps."""

    node: Node
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Program:
    """Work out the moments of a layer's input from the present state of the layers before it.

    A plain object that a layer holds: it is copied and pickled with the network, and refers to the network's own
    modules, so that gradients reach their parameters.

    Args:
        modules: the modules whose parameters it reads, by path.
        constants: signals that no parameter changes.
        steps: the nodes to evaluate, in order.
        reads: node and channel axis of each call of the layer; moments of several calls are mixed.
        forward_pass: what other programs of the network have worked out.
    """

    modules: dict[str, nn.Module]
    constants: dict[int, Any]
    steps: list[Step]
    reads: list[tuple[int, int]]
    forward_pass: ForwardPass

    def __post_init__(self) -> None:
        states = (leaf for step in self.steps for leaf in leaves(step.node.args) if isinstance(leaf, State))
        self.states = [*dict.fromkeys(states)]
        self.held: list[Tensor] = []
        _make_traceable()

    def __eq__(self, other: object) -> bool:
        """A program equals itself alone; torch.compile asks."""
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _make_traceable()

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the channels."""
        tensors = [getattr(self.modules[state.path], state.name) for state in self.states]
        if self.held and tensors and self.held[0].device != tensors[0].device:
            self.held = [tensor.to(tensors[0].device) for tensor in self.held]
        if not tensors or not under_autocast(tensors[0]):
            return _evaluate(self, tensors, self.held)
        with torch.autocast(tensors[0].device.type, enabled=False):  # a few channels: digits cost nothing
            return _evaluate(self, tensors, self.held)

    def rehearse(self) -> "Program":
        """Evaluate once, so that rules keep what they keep and what is left depends on tensors alone."""
        with torch.no_grad():
            self()
        self.held = []
        parts = (self.constants, [step.memory for step in self.steps])
        constants, memories = _mapped(parts, Tensor, self._hold)
        self.constants = constants
        self.steps = [Step(step.node, memory) for step, memory in zip(self.steps, memories, strict=True)]
        return self

    def _hold(self, tensor: Tensor) -> "Slot":
        self.held.append(tensor)
        return Slot(len(self.held) - 1)


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """A structure of containers and dataclasses with a function applied to everything of one type."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(part, kind, function) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(part, kind, function) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, kind, function) for part in value)
    if isinstance(value, (Signal, Origin, Expression)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: _mapped(part, kind, function) for name, part in fields.items()})
    return value


def _evaluate(program: Program, tensors: list[Tensor], held: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Run a program on the tensors that it reads and those that it holds.

    torch.compile takes this function for one call and looks at the operators inside only: what the rules decide in
    Python depends on shapes and numbers, never on values.
    """
    state = dict(zip(program.states, tensors, strict=True))
    values = program.forward_pass.values(state)
    for index, constant in program.constants.items():
        if index not in values:
            values[index] = _mapped(constant, Slot, lambda slot: held[slot.index])
    for step in program.steps:
        if step.node.index in values:
            continue
        memory = _mapped(step.memory, Slot, lambda slot: held[slot.index]) if held else step.memory
        values[step.node.index] = evaluate(step.node, state.__getitem__, program.modules.__getitem__, values, memory)
    return mixed([values[index].channels(axis) for index, axis in program.reads])


@functools.cache
def _make_traceable() -> None:
    """Tell torch.compile, whose import takes a while, about :func:`_evaluate`, once there is a program."""
    import torch._dynamo

    pytree.register_constant(Program)
    globals()["_evaluate"] = torch._dynamo.nonstrict_trace(_evaluate)


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
    steps: dict[int, Step],
    forward_pass: ForwardPass,
) -> Program:
    """The part of a propagation that leads to what a layer reads.

    Args:
        graph: the graph, with every converted normaliser as a batch norm.
        known: its propagation.
        reads: nodes and channel axes.
        roots: nodes of converted normalisers; the path of the module that holds their gain and bias, and the gain's
            name there.
        modules: the converted network's modules, by path.
        steps: the steps of the network's programs so far, by node; new ones are added.
        forward_pass: what the network's programs have in common.

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
    own: list[Step] = []
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
        own.append(steps.setdefault(index, Step(node)))
        used.update({state.path: modules[state.path] for state in states})
        if node.op == "module":
            used[node.path] = modules[node.path]
    for step in own:
        constants.update({i: known.values[i] for i in step.node.inputs if i not in moving})
    constants.update({index: known.values[index] for index, _ in reads if index not in moving})
    return Program(used, constants, own, reads, forward_pass)


def _root(node: Node, path: str, gain: str) -> Node:
    """A converted normaliser: its output is N(bias, gain^2) whatever goes in."""
    args = {name: State(path, own) for name, own in (("weight", gain), ("bias", "bias")) if node.args[name] is not None}
    return Node(node.index, "normalised", args, "", node.shape, node.dtype, node.scopes, node.source)
