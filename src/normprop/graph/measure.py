"""Run a captured graph on real input, call by call, with the network left as it is."""

import operator as python_operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from normprop.errors import ConfigError, GraphError
from normprop.graph.capture import Inputs, arguments
from normprop.graph.node import Graph, Node, Ref, State, leaves, replace
from normprop.graph.operators import execute, operator, overwrite
from normprop.graph.random_state import preserved
from normprop.graph.rules import operator_rule, random
from normprop.moments import Moments

Enter = Callable[[Node, dict[str, Any]], None]
Leave = Callable[[Node, Tensor], None]
Resolve = Callable[[dict[int, Any], Any], Any]

# Rules of operators that take an input's shape and none of its values.
_VALUE_FREE = (random.filled, random.noise)


@dataclass
class Run:
    """What one execution of a graph leaves.

    Args:
        outputs: what the network returned, in the graph's order.
        starts: the tensors that gradients end at: the inputs, and what follows a call that has no derivative.
    """

    outputs: list[Any]
    starts: list[Tensor] = field(default_factory=list)


def measure(graph: Graph, x: Inputs) -> dict[int, Moments]:
    """Measure mean and variance of every floating point value that depends on the input.

    Args:
        graph: the graph.
        x: real input, as for :func:`~normprop.graph.capture.capture`, of the captured shapes.

    Returns:
        Moments by node: vectors over axis 1 for tensors of two and more axes, else numbers; variances divide by the
        count. Operators work on copies of buffers, random draws are undone.

    Raises:
        ConfigError: if x does not fit the graph's inputs.
        GraphError: if an operator fails.

    Example:
        >>> from normprop.graph.capture import capture
        >>> x = torch.tensor([[-1.0, 2.0], [1.0, 2.0]])
        >>> found = measure(capture(nn.Sequential(nn.ReLU()), x), x)
        >>> found[1].mean, found[1].var
        (tensor([0.5000, 2.0000]), tensor([0.2500, 0.0000]))
    """
    found: dict[int, Moments] = {}

    def leave(node: Node, value: Tensor) -> None:
        found[node.index] = moments(value)

    with preserved(graph.model), torch.no_grad():
        run(graph, x, leave)
    return found


def moments(value: Tensor) -> Moments:
    """Mean and variance per element of axis 1, over all other axes; over everything where there is no axis 1.

    Example:
        >>> moments(torch.tensor([1.0, 3.0]))
        Moments(mean=tensor(2.), var=tensor(1.), squared_derivative=nan, error=0.0)
    """
    value = value.detach() if value.dtype == torch.float64 else value.detach().float()
    axes = [axis for axis in range(value.ndim) if axis != 1 or value.ndim == 1]
    var, mean = torch.var_mean(value, axes, correction=0)
    return Moments(mean, var)


def run(graph: Graph, x: Inputs, leave: Leave, enter: Enter | None = None) -> Run:
    """Call every operator of a graph with real tensors, in place where that matters to what follows.

    Under autograd the inputs are where gradients end, never the network's parameters. Random draws advance the state.

    Args:
        graph: the graph.
        x: real input.
        leave: is called with each node and its output if that is a floating point tensor, not empty, that depends on
            the input, before anything overwrites it.
        enter: is called with each node that depends on the input, and with its arguments, before the call.

    Returns:
        The outputs and where gradients end.

    Raises:
        ConfigError: if x does not fit the graph's inputs.
        GraphError: if an operator fails.
    """
    inputs = [leaf for leaf in pytree.tree_leaves(arguments(x)) if isinstance(leaf, Tensor)]
    expected = [node.shape for node in graph.nodes if node.op == "input"]
    if [tuple(leaf.shape) for leaf in inputs] != expected:
        raise ConfigError(f"input of shapes {[tuple(leaf.shape) for leaf in inputs]}, captured were {expected}")
    resolve, result = _resolver(graph), Run([])
    values: dict[int, Any] = {}
    dependent: set[int] = set()

    def module(path: str) -> Callable[..., Any]:
        return _module(graph.model.get_submodule(path), path, resolve)

    for node in graph.nodes:
        given: dict[str, Any] = {}
        if node.op == "input":
            value = inputs.pop(0).detach().clone()
            depends = True
        else:
            given = replace(node.args, lambda leaf: resolve(values, leaf))
            depends = _depends(node, given, dependent)
            if depends and enter is not None:
                enter(node, given)
            value = _call(node, given, inplace=not (depends and _alone(graph, node, values)), module=module)
        if depends and any(isinstance(leaf, Tensor) for leaf in leaves(value)):
            dependent.add(node.index)
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                if torch.is_grad_enabled() and not value.requires_grad:
                    result.starts.append(value.detach().requires_grad_())
                    value = result.starts[-1].clone()  # which in-place operators may overwrite
                leave(node, value)
        values[node.index] = value
    result.outputs = [values[index] for index in graph.outputs]
    return result


def _resolver(graph: Graph) -> Resolve:
    """Leaves of arguments as what they stand for: buffers and constants as copies that may change during the run."""
    written = {
        node.args[argument.name]
        for node in graph.nodes
        if node.overload
        for argument in operator(node.overload)._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(node.args.get(argument.name), State)
    }
    copies: dict[Any, Tensor] = {}

    def resolve(values: dict[int, Any], leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return values[leaf.index]
        if not isinstance(leaf, State | Tensor):
            return leaf
        key = leaf if isinstance(leaf, State) else id(leaf)
        if key not in copies:
            tensor = graph.state(leaf) if isinstance(leaf, State) else leaf
            kept = isinstance(tensor, nn.Parameter) and leaf not in written
            copies[key] = tensor.detach() if kept else tensor.detach().clone()
        return copies[key]

    return resolve


def _call(node: Node, given: dict[str, Any], inplace: bool, module: Callable[[str], Callable[..., Any]]) -> Any:
    """The output of a node's own operator."""
    if node.op == "getitem":
        return given["0"][given["1"]]
    try:
        if node.op == "module":
            return module(node.path)(*given.values())
        if not node.overload:
            return getattr(python_operator, node.op)(*given.values())
        if not inplace:
            return execute(node, given)
        return overwrite(node, given)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise GraphError(f"{node}: the captured call fails on the input ({type(error).__name__}: {error})") from error


def _alone(graph: Graph, node: Node, values: dict[int, Any]) -> bool:
    """Whether nobody reads later what a node overwrites, but by the node's output.

    Then it need not be overwritten, which derivatives and hooks on gradients may not survive.
    """
    if node.overwrites is None:
        return False
    memory = values[node.overwrites].untyped_storage().data_ptr()
    return not any(
        isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() == memory
        for index, value in values.items()
        if index in graph.outputs or any(reader.index > node.index for reader in graph.readers(index))
        for leaf in leaves(value)
    )


def _module(module: nn.Module, path: str, resolve: Resolve) -> Callable[..., Any]:
    """A module that is one call, with its buffers as copies like everybody's."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    places = {name: State(*f"{path}.{name}".removeprefix(".").rpartition(".")[::2]) for name in names}
    states = {name: resolve({}, place) for name, place in places.items()}
    return lambda *inputs: functional_call(module, states, inputs)


def _depends(node: Node, given: dict[str, Any], dependent: set[int]) -> bool:
    """Whether a node's output depends on the input's values, through what it reads or what was written there."""
    if operator_rule(node.op) in _VALUE_FREE:
        return False
    through = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(given))
    return through or any(index in dependent for index in node.inputs)
