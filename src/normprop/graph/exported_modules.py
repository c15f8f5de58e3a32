"""An exported program as ordinary modules: torch's own layers where it calls them, ``torch.fx.GraphModule`` around."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from normprop.graph.operators import bind

_CONVOLUTIONS: dict[str, Callable[..., nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")
_BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's about its own code
        root = torch.export.unflatten(program)
    made = _container(root)
    last = next(iter(reversed(made.graph.nodes)))
    last.args = (pytree.tree_unflatten(last.args[0], program.call_spec.out_spec),)
    made.recompile()
    return made


def _container(module: Any) -> fx.GraphModule:
    """A submodule with what is in it, under the name of the class that it had."""
    holder, layers = nn.Module(), dict[Any, nn.Module]()
    for name, child in module._modules.items():
        if hasattr(child, "graph"):
            child = _layer(child, layers) or _container(child)
        holder.add_module(_plain(name), child)
    for name, parameter in module._parameters.items():
        holder.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        holder.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.meta = {}  # it holds tensors without values, which cannot be copied
        if node.op == "call_module":
            node.target = _plain(node.target)
    return fx.GraphModule(holder, graph, str(module._ty).rpartition(".")[2])


def _plain(name: str) -> str:
    """The name of a module that torch calls "name@1" in its second call."""
    return name.replace("@", "_call_")


def _layer(module: Any, layers: dict[Any, nn.Module]) -> nn.Module | None:
    """The layer of torch's own that a module was, if all it does is to call one with its own parameters.

    The same layer for the same parameters in the same use: one that is called twice is two in the program.
    """
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
        name: getattr(module, str(value.target))
        for name, value in arguments.items()
        if isinstance(value, fx.Node) and value.op == "get_attr"
    }
    numbers = {name: value for name, value in arguments.items() if not isinstance(value, fx.Node)}
    identity = call.target, str(numbers), *((name, id(value)) for name, value in state.items())
    if state and identity not in layers:
        layer = _made(call, numbers, state, getattr(module, "num_batches_tracked", None))
        if layer is None:
            return None
        layers[identity] = layer
    return layers.get(identity)


def _made(call: fx.Node, numbers: dict[str, Any], state: dict[str, Tensor], batches: Tensor | None) -> nn.Module | None:
    """The layer that computes a call."""
    name = str(call.target).split(".")[1]
    weight, bias = state.get("weight"), state.get("bias")
    if name == "linear" and weight is not None:
        return _with(nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta"), state)
    if name in _CONVOLUTIONS and weight is not None:
        settings = {key: numbers[key] for key in _SETTINGS if key in numbers}
        first, second, *kernel = list(weight.shape)
        second *= numbers["groups"]
        sizes = (first, second) if "transpose" in name else (second, first)
        layer = _CONVOLUTIONS[name](*sizes, tuple(kernel), bias=bias is not None, device="meta", **settings)
        return _with(layer, state)
    shape: tuple[int, ...] = call.meta["val"].shape if isinstance(call.meta.get("val"), Tensor) else ()
    if name == "batch_norm" and len(shape) in _BATCH_NORMS and (weight is None) == (bias is None):
        tracks = "running_mean" in state
        settings = {"affine": weight is not None, "track_running_stats": tracks, "device": "meta"}
        layer = _BATCH_NORMS[len(shape)](shape[1], numbers["eps"], numbers["momentum"], **settings)
        if tracks:
            state = {**state, "num_batches_tracked": torch.tensor(0) if batches is None else batches}
        return _with(layer, state).train(numbers["training"])
    return None


def _with(layer: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A layer with a program's own parameters and buffers."""
    for name, value in state.items():
        setattr(layer, name, value)
    return layer
