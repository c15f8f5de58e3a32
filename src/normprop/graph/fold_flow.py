"""Who feeds whom in a network that is folded: from the graph of its calls, or from its sequences alone."""

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx, nn

from normprop.graph.absorb import LINEAR_MAPS
from normprop.graph.fold_parts import Affine
from normprop.graph.node import Graph, Node, Ref, State, leaves, replace
from normprop.graph.operators import execute

_TOLERANCE = 1e-9


class Reader(NamedTuple):
    """A module that reads what another puts out.

    Attributes:
        path: its path.
        change: a change of the other's output as it arrives here.
    """

    path: str
    change: Affine


class Flow(Protocol):
    """What folding asks of a network; paths are those of modules without children."""

    def before(self, path: str) -> str | None:
        """The one module that feeds this one, if this one is all that it feeds, in every call of both."""

    def readers(self, path: str, change: Affine) -> list[Reader] | None:
        """The modules that read this one's output, at once or through what a change of it passes; ``None`` if more."""

    def axes(self, path: str) -> int | None:
        """Number of axes of a module's output."""

    def remove(self, path: str) -> None:
        """Take a module out that does nothing any more."""


class SequenceFlow:
    """What the order of ``nn.Sequential`` and the graphs of ``torch.fx`` tell without an example input.

    Args:
        model: in evaluation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._follows: dict[str, str] = {}
        name = {id(module): path for path, module in model.named_modules()}
        places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        for chain in _chains(model):
            for first, second in itertools.pairwise(chain):
                if places[id(first)] == places[id(second)] == 1:
                    self._follows[name[id(first)]] = name[id(second)]

    def before(self, path: str) -> str | None:
        """The one module that feeds this one, see :class:`Flow`."""
        return next((first for first, second in self._follows.items() if second == path), None)

    def readers(self, path: str, change: Affine) -> list[Reader] | None:
        """The modules that read this one's output, see :class:`Flow`."""
        second = self._follows.get(path)
        return None if second is None else [Reader(second, change)]

    def axes(self, path: str) -> int | None:
        """Number of axes of a module's output, see :class:`Flow`."""
        return None

    def remove(self, path: str) -> None:
        """Take a module out, see :class:`Flow`."""
        first, second = self.before(path), self._follows.pop(path, None)
        if first is not None and second is not None:
            self._follows[first] = second
        elif first is not None:
            del self._follows[first]


def _chains(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Modules that run one after the other, each the only reader of the one before."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            calls = Counter(node.target for node in module.graph.nodes)
            for node in module.graph.nodes:
                pair = (node, *node.users)
                if len(pair) == 2 and all(part.op == "call_module" and calls[part.target] == 1 for part in pair):
                    first, second = (_steps(module.get_submodule(str(part.target))) for part in pair)
                    yield [*first[-1:], *second[:1]]
        elif _is_sequence(module):
            yield _steps(module)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _steps(module: nn.Module) -> list[nn.Module]:
    """What runs when a module does, sequences inside of it opened."""
    if _is_sequence(module):
        return [step for child in module.children() for step in _steps(child)]
    return [] if isinstance(module, nn.Identity) else [module]


class GraphFlow:
    """What the graph of all calls tells.

    Args:
        graph: of the model in evaluation.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        names: dict[int, str] = {}
        canonical = {
            path: names.setdefault(id(module), path)
            for path, module in graph.model.named_modules(remove_duplicate=False)
        }
        self._inputs = [[*dict.fromkeys(node.inputs)] for node in graph.nodes]
        self._users: list[list[int]] = [[] for _ in graph.nodes]
        for index, inputs in enumerate(self._inputs):
            for source in inputs:
                self._users[source].append(index)
        self._outputs = {*graph.outputs}
        self._call = [node.scopes[-1] for node in graph.nodes]
        self._path = [canonical.get(call.path, call.path) for call in self._call]
        self._nodes: dict[str, list[int]] = {}
        for index, path in enumerate(self._path):
            self._nodes.setdefault(path, []).append(index)
        # A weight that is also read outside of its module must stay as it is.
        self._lent = {
            canonical.get(leaf.path, leaf.path)
            for node, path in zip(graph.nodes, self._path, strict=True)
            for leaf in leaves(node.args)
            if isinstance(leaf, State) and canonical.get(leaf.path, leaf.path) != path
        }

    def _entries(self, path: str) -> set[int]:
        """Outputs of other calls that a module reads."""
        own = self._nodes.get(path, [])
        return {i for index in own for i in self._inputs[index] if self._call[i] != self._call[index]}

    def _exits(self, path: str) -> set[int]:
        """Outputs of a module that others read."""
        return {
            index
            for index in self._nodes.get(path, [])
            if index in self._outputs or any(self._call[user] != self._call[index] for user in self._users[index])
        }

    def before(self, path: str) -> str | None:
        """The one module that feeds this one, see :class:`Flow`."""
        entries = self._entries(path)
        sources = {self._path[entry] for entry in entries}
        if len(sources) != 1:
            return None
        (source,) = sources
        exits = self._exits(source)
        alone = not exits & self._outputs and all(self._path[user] == path for i in exits for user in self._users[i])
        return source if alone and entries == exits and source not in self._lent else None

    def axes(self, path: str) -> int | None:
        """Number of axes of a module's output, see :class:`Flow`."""
        axes = {len(self._graph.nodes[i].shape or ()) for i in self._exits(path)}
        return axes.pop() if len(axes) == 1 else None

    def remove(self, path: str) -> None:
        """Take a module out, see :class:`Flow`."""
        for index in self._nodes.pop(path, []):
            passed = next((i for i in self._inputs[index] if self._graph.nodes[i].shape is not None), None)
            for source in self._inputs[index]:
                self._users[source].remove(index)
            if passed is None:
                continue
            for user in self._users[index]:
                self._inputs[user] = [*dict.fromkeys(passed if i == index else i for i in self._inputs[user])]
                if user not in self._users[passed]:
                    self._users[passed].append(user)
            if index in self._outputs:
                self._outputs = self._outputs - {index} | {passed}
            self._inputs[index] = []

    def readers(self, path: str, change: Affine) -> list[Reader] | None:
        """The modules that read this one's output, see :class:`Flow`."""
        found: dict[str, Reader] = {}
        seen: set[int] = set()
        waiting = [(index, change) for index in self._exits(path)]
        while waiting:
            index, change = waiting.pop()
            seen.add(index)
            if index in self._outputs:
                return None
            for user in self._users[index]:
                node, owner = self._graph.nodes[user], self._graph.model.get_submodule(self._path[user])
                if node.shape is None:  # a size
                    continue
                if type(owner) in LINEAR_MAPS:
                    reader = found.setdefault(self._path[user], Reader(self._path[user], change))
                    if not reader.change.equals(change) or reader.path in self._lent:
                        return None
                else:
                    passed = self._passed(node, change)
                    if passed is None:
                        return None
                    waiting.append((user, passed))
        return [*found.values()] if all(self._entries(path) <= seen for path in found) else None

    def _passed(self, node: Node, change: Affine) -> Affine | None:
        """The change of a call's output for a change of its one input, if it is one; measured."""
        sources = [i for i in node.inputs if self._graph.nodes[i].shape is not None]
        if len(sources) != 1 or not node.overload or any(isinstance(leaf, State) for leaf in leaves(node.args)):
            return None
        shape = self._graph.nodes[sources[0]].shape
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)  # type: ignore[arg-type]
        noise = noise * 10.0 ** torch.randint(-2, 5, noise.shape, generator=generator)

        def run(input: Tensor) -> Any:
            def value(leaf: Any) -> Any:
                if not isinstance(leaf, Ref):
                    return leaf
                size = self._graph.nodes[leaf.index]
                return input if leaf.index == sources[0] else shape[size.args["dim"]]  # type: ignore[index]

            return execute(node, replace(node.args, value))

        try:
            before, after = run(noise), run(change(noise))
        except Exception:  # it takes something else
            return None
        if not isinstance(before, Tensor) or before.dtype != torch.float64:
            return None
        for candidate in change.repeated(tuple(before.shape)):
            expected = candidate(before)
            if bool(((after - expected).abs() <= _TOLERANCE * (expected.abs() + change.shift.abs().max())).all()):
                return candidate
        return None
