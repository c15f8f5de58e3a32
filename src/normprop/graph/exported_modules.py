"""An exported program as ordinary modules: torch's own layers where it calls them, ``torch.fx.GraphModule`` around."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normprop.graph.node import bind

_CONVOLUTIONS = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def modules(program: ExportedProgram) -> nn.Module:
    """Rebuild the modules of an exported program, under the paths that they had.

    Args:
        program: the program; inputs and outputs of any form of tuples, lists and dicts.

    Returns:
        A module that takes the program's input tensors one by one and returns what the program does.

    Example:
        >>> program = torch.export.export(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.zeros(4, 2),))
        >>> dict(modules(program).named_children())["0"]
        Linear(in_features=2, out_features=3, bias=True)
    """
    root = torch.export.unflatten(program)
    spec = program.call_spec.out_spec
    made = _rebuilt(root)
    last = next(iter(reversed(made.graph.nodes)))
    last.args = (pytree.tree_unflatten(last.args[0], spec),)
    made.recompile()
    return made


def _rebuilt(module: Any) -> Any:
    """A submodule and what is in it."""
    layer = _layer(module)
    if layer is not None:
        return layer
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, _rebuilt(child) if hasattr(child, "graph") else child)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        holder.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        holder.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.meta = {}  # it holds tensors without values, which cannot be copied
    return fx.GraphModule(holder, graph)


def _layer(module: Any) -> nn.Module | None:
    """The layer of torch's own that a module was, if all it does is to call one with its own parameters."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    counter = [node for node in calls if node.target == torch.ops.aten.add_.Tensor and not node.users]
    calls = [node for node in calls if node not in counter]
    if len(calls) != 1 or len(given) != 1 or any(module.named_children()):
        return None
    call = calls[0]
    arguments = bind(call.target, call.args, call.kwargs)
    if arguments.get("input") is not given[0]:
        return None
    state = {
        name: getattr(module, value.target)
        for name, value in arguments.items()
        if isinstance(value, fx.Node) and value.op == "get_attr"
    }
    numbers = {name: value for name, value in arguments.items() if not isinstance(value, fx.Node)}
    name = call.target.__name__.split(".")[0]
    weight, bias = state.get("weight"), state.get("bias")
    if name == "linear" and weight is not None:
        return _with(nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta"), state)
    if name in _CONVOLUTIONS and weight is not None:
        settings = {
            key: numbers[key] for key in ("stride", "padding", "output_padding", "dilation", "groups") if key in numbers
        }
        channels = weight.shape[0], weight.shape[1] * numbers["groups"]
        sizes = channels if "transpose" in name else channels[::-1]
        kernel = tuple(weight.shape[2:])
        return _with(_CONVOLUTIONS[name](*sizes, kernel, bias=bias is not None, device="meta", **settings), state)
    shape = call.meta["val"].shape if isinstance(call.meta.get("val"), Tensor) else ()
    if name == "batch_norm" and len(shape) in _BATCH_NORMS:
        tracks = "running_mean" in state
        layer = _BATCH_NORMS[len(shape)](
            shape[1], numbers["eps"], numbers["momentum"], weight is not None, tracks, device="meta"
        )
        if tracks:
            state["num_batches_tracked"] = getattr(module, "num_batches_tracked", torch.zeros((), dtype=torch.long))
        return _with(layer, state).train(numbers["training"])
    return None


def _with(layer: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A layer with a program's own parameters and buffers."""
    for name, value in state.items():
        setattr(layer, name, value)
    return layer
