"""Send moments through a graph, call by call."""

import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normprop.errors import GraphError, MomentError, UnknownOperatorError
from normprop.graph.node import Graph, Node, Ref, State, leaves, replace
from normprop.graph.operators import execute, overwrite
from normprop.graph.rules import Call, elementwise, module_rule, operator_rule
from normprop.graph.signal import Signal
from normprop.moments import Moments

OnUnknown = Literal["error", "warn", "measure"]
Measure = Callable[[Node], Moments]


@dataclass
class Propagation:
    """What is known of every node's output.

    Args:
        values: per node a signal if it depends on the network's input, else the tensor or number that it is.
        unknown: the nodes without a rule that were measured or passed, with what was done.
    """

    values: dict[int, Any]
    unknown: dict[int, str]

    def signal(self, index: int) -> Signal | None:
        """The signal of a node, if it has one."""
        value = self.values.get(index)
        return value if isinstance(value, Signal) else None


def propagate(
    graph: Graph,
    given: Mapping[int, Moments | None] | None = None,
    *,
    on_unknown: OnUnknown = "error",
    measure: Measure | None = None,
) -> Propagation:
    """Predict the moments of every value in a graph.

    Args:
        graph: the graph.
        given: moments of the inputs by position, mean 0 and variance 1 by default.
        on_unknown: what to do at an operator without a rule: ``"error"``; ``"warn"`` and pass the first input's
            moments on; or ``"measure"`` what its output is for the example input.
        measure: how to measure a node.

    Returns:
        The signals.

    Raises:
        UnknownOperatorError: for an operator without a rule.

    Example:
        >>> from normprop.graph.capture import capture
        >>> graph = capture(nn.Sequential(nn.ReLU()), torch.zeros(2, 3))
        >>> round(float(propagate(graph).signal(1).mean), 4)
        0.3989
    """
    values: dict[int, Any] = {}
    unknown: dict[int, str] = {}
    position = 0
    device = _device(graph.model)
    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "input":
                moments = (given or {}).get(position) or Moments(0.0, 1.0)
                position += 1
                values[node.index] = input_signal(node, moments).to(device)
                continue
            try:
                value = evaluate(node, graph.state, graph.model.get_submodule, values)
            except UnknownOperatorError as error:
                if on_unknown == "error":
                    raise
                value, unknown[node.index] = _unknown(node, values, on_unknown, measure, error)
            values[node.index] = replace(value, lambda leaf: leaf.to(device) if isinstance(leaf, Signal) else leaf)
    return Propagation(values, unknown)


def _device(model: nn.Module) -> torch.device:
    """Where a network works out its values: with its parameters."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def input_signal(node: Node, moments: Moments) -> Any:
    """The signal of an input; integers have no moments, zeros stand for them."""
    assert node.shape is not None
    if node.dtype is not None and not node.dtype.is_floating_point:
        return torch.zeros(node.shape, dtype=node.dtype)
    axis = 1 if len(node.shape) > 1 else None
    return Signal.of(moments.mean, moments.var, node.shape, axis).made_by(node.index)


def evaluate(
    node: Node,
    state_of: Callable[[State], Tensor],
    module_at: Callable[[str], nn.Module],
    values: Mapping[int, Any],
    memory: dict[str, Any] | None = None,
) -> Any:
    """The output of one node: by its rule if an input is a signal, by calling it if none is.

    Args:
        node: the node.
        state_of: from a parameter or buffer in the graph to the tensor that it is now.
        module_at: from the path of a module to the module.
        values: outputs of the nodes before.
        memory: what its rule may keep.

    Returns:
        A signal, or a tuple of them, or what the operator returns for constants.

    Raises:
        UnknownOperatorError: if there is no rule.
        GraphError: if a rule fails, or the call does not fit its rule.
    """

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return values[leaf.index]
        if isinstance(leaf, State):
            return state_of(leaf)
        return leaf

    arguments = replace(node.args, resolve)
    if node.op == "getitem":
        return arguments["0"][arguments["1"]]
    module = module_at(node.path) if node.op == "module" else None
    call = Call(node, arguments, module, {} if memory is None else memory)
    drawn = node.op in _DRAWN or (node.op in _LOOKED_UP and node.moving)
    if not call.inputs and node.op != "module" and not drawn:
        return _constant(node, arguments)
    if node.op == "sym_size":
        return call.inputs[0].shape[arguments["dim"]]
    if node.op in ("sym_numel", "sym_stride", "sym_storage_offset"):
        raise UnknownOperatorError(f"{node}: its value depends on how a tensor is stored; {_HINT}")
    function = module_rule(module) if module is not None else operator_rule(node.op)
    if function is None and elementwise.applies(call):
        function = elementwise.unary
    if function is None:
        raise UnknownOperatorError(f"{node}: no rule says what it does to mean and variance; {_HINT}")
    try:
        answer = function(call)
    except (UnknownOperatorError, MomentError):
        raise
    except (RuntimeError, IndexError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise GraphError(f"{node}: its rule failed ({type(error).__name__}: {error})") from error
    return _finished(answer, node, call.inputs[0].mean.device if call.inputs else None)


_HINT = (
    "register one with @normprop.graph.rule, or pass on_unknown='measure' to take its output's moments from the "
    "example input"
)


def _finished(answer: Any, node: Node, device: torch.device | None = None, output: int = 0) -> Any:
    """An answer as signals of a node, on the device of the node's inputs."""
    if isinstance(answer, (tuple, list)):
        return type(answer)(_finished(part, node, device, position) for position, part in enumerate(answer))
    if isinstance(answer, Moments):
        assert node.shape is not None
        answer = Signal.of(answer.mean, answer.var, node.shape, axis=1 if len(node.shape) > 1 else None)
    if not isinstance(answer, Signal):
        return answer
    answer = answer if device is None else answer.to(device)
    return answer.bounded(_LARGEST).made_by(node.index, output)


# Moments of one call; more of them, as of every token of an attention map, take time and tell little.
_LARGEST = 2**16

# What has moments although no signal goes in: random draws, and look-ups by whole numbers from the input.
_DRAWN = {"normalised", "bernoulli", "rand", "randn", "rand_like", "randn_like"}
_LOOKED_UP = {"embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"}


def _constant(node: Node, arguments: dict[str, Any]) -> Any:
    """What does not depend on the input is computed; whatever it would overwrite stays."""
    if not node.overload:
        function = getattr(operator, node.op, getattr(torch, node.op, None))
        if function is None:
            raise UnknownOperatorError(f"{node}: unknown function of numbers")
        return function(*arguments.values())
    if node.overwrites is not None:
        return overwrite(node, arguments)
    return execute(node, arguments)


def _unknown(
    node: Node, values: Mapping[int, Any], policy: OnUnknown, measure: Measure | None, error: Exception
) -> tuple[Any, str]:
    """What stands for the output of a node without a rule, and what to say about it."""
    if policy == "measure" and measure is not None and node.shape is not None:
        moments = measure(node)
        return _finished(moments, node), "measured on the example input"
    signals = [
        leaf
        for leaf in leaves(replace(node.args, lambda leaf: values[leaf.index] if isinstance(leaf, Ref) else leaf))
        if isinstance(leaf, Signal)
    ]
    if node.shape is None or not signals:
        what = "returns several tensors" if node.shape is None else "takes no tensor with moments to pass on"
        raise GraphError(f"{node}: it {what} and has no rule; {_HINT}") from error
    first = signals[0].overall()
    warnings.warn(f"{node}: no rule; its first input's overall moments stand for its output's", stacklevel=4)
    return _finished(Signal.of(first.mean, first.var, node.shape), node), "passed with its input's moments"
