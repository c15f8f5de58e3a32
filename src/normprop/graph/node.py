"""What a captured network is made of: one node per call of an operator or of a module with a rule of its own."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normprop.errors import GraphError


@dataclass(frozen=True)
class Ref:
    """The output of another node, in a node's arguments.

    Args:
        index: which node.
    """

    index: int


@dataclass(frozen=True)
class State:
    """A parameter or buffer of the network, in a node's arguments.

    Args:
        path: dotted path of its module.
        name: its name there.
    """

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass(frozen=True)
class Scope:
    """One call of a module.

    Args:
        path: dotted path of the module, "" for the network itself.
        call: how many times it was called before.
    """

    path: str
    call: int = 0

    def __str__(self) -> str:
        return (self.path or "(the model itself)") + (f" (call {self.call + 1})" if self.call else "")


@dataclass
class Node:
    """One call of an operator, or an input of the network.

    Args:
        index: position in the graph.
        op: name of the operator without overload and in-place mark, such as "relu"; "input"; or "module".
        args: its arguments by name, defaults included, with :class:`Ref`, :class:`State` or plain tensors where tensors
            stand.
        overload: the operator's full name, such as "aten.relu_.default"; "" where there is none.
        shape: shape of the output; ``None`` for what is no tensor.
        dtype: its type.
        scopes: the modules whose calls it stands in, from the network to the innermost.
        source: file and line of the innermost code that is not torch's, and its text.
        inplace: the first argument was overwritten.
        view: the output lies in the memory of an argument.
        moving: it depends on the network's input; set by :meth:`Graph.settled`.

    Example:
        >>> Node(0, "relu", {"self": Ref(1)}, shape=(2, 3), scopes=(Scope("net.act"),)).path
        'net.act'
    """

    index: int
    op: str
    args: dict[str, Any]
    overload: str = ""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    scopes: tuple[Scope, ...] = (Scope(""),)
    source: str = ""
    inplace: bool = False
    view: bool = False
    moving: bool = False

    @property
    def path(self) -> str:
        """Dotted path of the innermost module."""
        return self.scopes[-1].path

    @property
    def inputs(self) -> list[int]:
        """Indices of the nodes whose outputs it takes, in the order of its arguments."""
        return [leaf.index for leaf in leaves(self.args) if isinstance(leaf, Ref)]

    @property
    def overwrites(self) -> int | None:
        """Index of the node whose output it overwrites, if it works in place."""
        first = next(iter(self.args.values()), None)
        return first.index if self.inplace and isinstance(first, Ref) else None

    def __str__(self) -> str:
        where = f" [{self.source}]" if self.source else ""
        return f"{self.op} in {self.scopes[-1]}{where}"


@dataclass
class Graph:
    """A network's calls in the order in which they ran.

    Args:
        model: the network.
        nodes: its calls and inputs.
        outputs: indices of the nodes that the network returns.
        how: "export" or "recorded".
        note: why the network was recorded, if it was.
    """

    model: nn.Module
    nodes: list[Node]
    outputs: list[int]
    how: str
    note: str = ""
    _readers: list[list[int]] = field(default_factory=list)

    def settled(self) -> "Graph":
        """The same graph without writing in place: every argument is what the tensor holds by then.

        A part that is overwritten goes back into its whole by a scatter. Tensors that do not depend on the network's
        input are really overwritten when they are computed.

        Raises:
            GraphError: if a part is overwritten through a view that has no scatter, and the whole is read afterwards.
        """
        made: list[Node] = []
        number: dict[int, int] = {}
        holds: dict[int, int] = {}  # the node whose output a node's tensor holds by now
        viewed: dict[int, tuple[int, Node]] = {}  # the node that a view looks at, and the view
        stale: dict[int, Node] = {}

        def latest(index: int) -> int:
            while index in holds:
                index = holds[index]
            return index

        def follow(leaf: Any, sizes: bool = False) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            if number[leaf.index] in stale and not sizes:
                raise GraphError(
                    f"{stale[number[leaf.index]]}: it overwrites a part of a tensor that is read again as a whole; "
                    f"write it without working in place"
                )
            return Ref(latest(number[leaf.index]))

        def append(node: Node) -> int:
            made.append(node)
            return node.index

        for node in self.nodes:
            arguments = partial(follow, sizes=node.op.startswith("sym_"))
            new = dataclasses.replace(node, index=len(made), args=replace(node.args, arguments))
            new.moving = node.op == "input" or any(made[source].moving for source in new.inputs)
            number[node.index] = append(new)
            first = next(iter(node.args.values()), None)
            if node.view and isinstance(first, Ref):
                seen = number[first.index]
                # A part of several is a part of what they are parts of.
                viewed[new.index] = (viewed[seen][0] if node.op == "getitem" and seen in viewed else seen, new)
            if node.overwrites is None or not new.moving:
                continue
            part = number[node.overwrites]
            holds[latest(part)] = source = new.index
            while part in viewed:
                whole, view = viewed[part]
                if view.op not in ("slice", "select") or part in stale:
                    stale[whole] = node
                    part = whole
                    continue
                where = {name: value for name, value in view.args.items() if name != "self"}
                args = {"self": Ref(latest(whole)), "src": Ref(source), **where}
                name = f"{view.op}_scatter"
                form: dict[str, Any] = {"op": name, "args": args, "overload": f"aten.{name}.default"}
                form |= {"index": len(made), "inplace": False, "moving": True}
                source = append(dataclasses.replace(made[whole], **form))
                holds[args["self"].index] = source
                part = whole
        outputs = [follow(Ref(index)).index for index in self.outputs]
        return Graph(self.model, made, outputs, self.how, self.note)

    def depends(self, index: int) -> bool:
        """Whether a node depends on the network's input, rather than on its state alone, as counters do."""
        return self.nodes[index].moving

    def readers(self, index: int) -> list[Node]:
        """The nodes that take a node's output."""
        if not self._readers:
            self._readers = [[] for _ in self.nodes]
            for node in self.nodes:
                for source in dict.fromkeys(node.inputs):
                    self._readers[source].append(node.index)
        return [self.nodes[reader] for reader in self._readers[index]]

    def state(self, state: State) -> Tensor:
        """The tensor behind a parameter or buffer."""
        value: Tensor = getattr(self.model.get_submodule(state.path), state.name)
        return value


def memory(value: Any) -> set[int]:
    """Identities of the memory that tensors lie in.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> memory(x) == memory(x.mT), memory(x) == memory(x + 1)
        (True, False)
    """
    tensors = (leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested tuples, lists and dicts, in order.

    Example:
        >>> list(leaves(([1, 2], {"a": 3})))
        [1, 2, 3]
    """
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    else:
        yield value


def replace(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dicts with a function applied to what is inside.

    Example:
        >>> replace(([1, 2], {"a": 3}), lambda leaf: -leaf)
        ([-1, -2], {'a': -3})
    """
    if isinstance(value, tuple):
        return tuple(replace(part, function) for part in value)
    if isinstance(value, list):
        return [replace(part, function) for part in value]
    if isinstance(value, dict):
        return {key: replace(part, function) for key, part in value.items()}
    return function(value)
