"""From a model and an example input to its graph of calls: torch.export first, a recorded execution where it fails."""

import linecache
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from normprop.errors import ConfigError, GraphError, first_line
from normprop.graph.node import Graph, Node, Ref, Scope, State, memory, replace
from normprop.graph.operators import bind, describe
from normprop.graph.random_state import preserved
from normprop.graph.record import record

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model from one example input.

    Args:
        x: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Returns:
        What to call the model with: ``model(*args, **kwargs)``.

    Raises:
        ConfigError: if there is no tensor in it.

    Example:
        >>> arguments(torch.zeros(2))
        ((tensor([0., 0.]),), {})
    """
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x if isinstance(x, tuple) else (x,)), {})
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise ConfigError(
            f"the example input holds no tensor, got {type(x).__name__}; give a tensor, a tuple of the model's "
            f"positional arguments or a dict of its keyword arguments"
        )
    return args, kwargs


def capture(model: nn.Module, x: Inputs) -> Graph:
    """Capture every call that a model makes for an example input, in the mode that its modules are in.

    Parameters, buffers, mode and random state stay as they are.

    Args:
        model: any module.
        x: example input, see :func:`arguments`; its values matter only to models whose code looks at them.

    Returns:
        The graph.

    Raises:
        GraphError: if the model cannot run on this input, or has parameters without a shape.

    Example:
        >>> graph = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
        >>> [node.op for node in graph.nodes]
        ['input', 'conv2d', 'relu']
    """
    args, kwargs = arguments(x)
    require_shapes(model)
    with preserved(model):
        try:
            graph = _export(model, args, kwargs)
        except Exception as failure:  # whatever export cannot take, running the model may
            graph = record(model, args, kwargs, note=f"{type(failure).__name__}: {first_line(failure)}")
    return graph.settled()


def require_shapes(model: nn.Module) -> None:
    """Refuse a model with lazy modules that have not been called.

    Raises:
        GraphError: if a parameter or buffer has no shape.
    """
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise GraphError(f"{type(model).__name__}: {name} has no shape yet; call the model on an input first")


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """The network in training mode; afterwards every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Graph:
    """Capture by torch.export, with the first axis of every tensor dynamic as far as the model allows."""

    def dynamic(leaf: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] > 1 else None

    shapes = None if kwargs else pytree.tree_map(dynamic, args)
    with warnings.catch_warnings(), _quiet("torch.fx", "torch.export"), _attributes_kept(model):
        warnings.simplefilter("ignore")  # what export thinks of the user's code
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    return _translate(model, program)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's attributes back: export leaves its own tensors and lists where a forward pass writes any."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    lists = [(value, [*value]) for _, own in before for value in own.values() if isinstance(value, list)]
    dicts = [(value, dict(value)) for _, own in before for value in own.values() if isinstance(value, dict)]
    try:
        yield
    finally:
        for module, own in before:
            vars(module).clear()
            vars(module).update(own)
        for changed, items in lists:
            changed[:] = items
        for table, entries in dicts:
            table.clear()
            table.update(entries)


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Keep loggers from reporting what is then tried in another way."""
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in loggers]
    levels += [
        (logging.getLogger(name), logging.getLogger(name).level)
        for name in [*logging.root.manager.loggerDict]
        if name.startswith(loggers)
    ]
    try:
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def _translate(model: nn.Module, program: torch.export.ExportedProgram) -> Graph:
    """Our nodes from an exported program."""
    signature = program.graph_signature
    state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    values: dict[fx.Node, Any] = {}
    nodes: list[Node] = []
    outputs: list[int] = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in state:
            path, _, name = state[node.name].rpartition(".")
            values[node] = State(path, name)
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            values[node] = program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
        elif node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                values[node] = Ref(len(nodes))
                nodes.append(Node(len(nodes), "input", {}, "", _shape(value), value.dtype))
            else:
                values[node] = value
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise GraphError(f"{node.target} holds a graph of its own")
            values[node] = Ref(len(nodes))
            nodes.append(_node(len(nodes), node, values, modules))
        elif node.op == "output":
            outputs = [
                values[leaf].index
                for leaf in pytree.tree_leaves(node.args)
                if isinstance(leaf, fx.Node) and isinstance(values[leaf], Ref)
            ]
    return Graph(model, nodes, outputs, "export")


def _node(index: int, node: fx.Node, values: dict[fx.Node, Any], modules: set[str]) -> Node:
    def argument(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    args = replace(tuple(_plain(part) for part in node.args), argument)
    kwargs = replace({key: _plain(part) for key, part in node.kwargs.items()}, argument)
    value = node.meta.get("val")
    op, overload, inplace = describe(node.target)
    return Node(
        index=index,
        op=op,
        args=bind(node.target, args, kwargs),
        overload=overload,
        shape=_shape(value),
        dtype=value.dtype if isinstance(value, Tensor) else None,
        view=not inplace and any(memory(value) & memory(part.meta.get("val")) for part in node.all_input_nodes[:1]),
        scopes=_scopes(node.meta.get("nn_module_stack", {}), modules),
        source=_source(node.meta.get("stack_trace") or ""),
        inplace=inplace,
    )


def _plain(value: Any) -> Any:
    """Nested lists and dicts of torch.fx as Python's own."""
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(part) for part in value) if type(value) in (list, tuple) else [*map(_plain, value)]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value


def _shape(value: Any) -> tuple[int, ...] | None:
    """Shape with the example's sizes in place of symbols."""
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else int(size.node.hint) for size in value.shape)


def _scopes(stack: Mapping[str, Any], modules: set[str]) -> tuple[Scope, ...]:
    scopes = []
    for key, (path, _) in stack.items():
        call, place = re.search(r"@(\d+)$", key), re.sub(r"@\d+$", "", path)
        if place in modules:  # export also writes names of its own where it has lost the module
            scopes.append(Scope(place, int(call[1]) if call else 0))
    return tuple(scopes) or (Scope(""),)


_TORCH = re.compile(r"[\\/]torch[\\/](nn|_|functional|fx|export|utils|overrides)")


def _source(trace: str) -> str:
    """The innermost line of a stack trace that is not torch's own."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    for file, line in reversed(frames):
        if not _TORCH.search(file):
            return f"{file}:{line}: {linecache.getline(file, int(line)).strip()}"
    return ""
