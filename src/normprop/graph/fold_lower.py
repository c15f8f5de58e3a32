"""From the calls of a traced forward to plain modules, affine maps and floors."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normprop.graph.fold_parts import Affine
from normprop.graph.fold_trace import constant
from normprop.moments.table import ROWS

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_MAPS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, ()),
    F.conv1d: (nn.Conv1d, _CONV),
    F.conv2d: (nn.Conv2d, _CONV),
    F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED),
}
_ACTIVATIONS = {
    getattr(function, "__name__", ""): row.module for row in ROWS if row.module for function in row.functions
}
_BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def lower(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Put a module in the place of every call that can be one.

    Args:
        root: the module whose forward was traced, with the constants of the graph.
        graph: its calls.

    Returns:
        The graph with its modules; those of ``root`` under their names.
    """
    parts: dict[str, Any] = {}
    for node in [*graph.nodes]:
        if node.op == "call_method" and node.target == "to":  # to the type that everything has here
            node.replace_all_uses_with(node.args[0])
            continue
        if node.op not in ("call_function", "call_method"):
            continue
        found = _lowered(root, node)
        if found is None:
            continue
        part, source = found
        name = f"{type(part).__name__.lower()}{len(parts) or ''}"
        while hasattr(root, name):
            name += "_"
        parts[name] = part
        with graph.inserting_before(node):
            call = graph.call_module(name, (source,))
        node.replace_all_uses_with(call)
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in parts:
            parts[str(node.target)] = root.get_submodule(str(node.target))
        elif node.op == "get_attr":
            parts[str(node.target)] = constant(root, node)
    # What the tracer remembers would travel along: its class when the module is pickled, the values of the example.
    graph._tracer_cls = None
    for node in graph.nodes:
        node.meta.clear()
    module = fx.GraphModule(parts, graph, type(root).__name__)
    module.graph.eliminate_dead_code()
    return module


def _lowered(root: nn.Module, node: fx.Node) -> tuple[nn.Module, fx.Node] | None:
    """The module that does what a call does to its one activation, and that activation."""

    def known(value: Any) -> Any:
        return constant(root, value) if isinstance(value, fx.Node) and value.op == "get_attr" else value

    args = tuple(known(arg) for arg in node.args)
    kwargs = {name: known(value) for name, value in node.kwargs.items()}
    sources = [value for value in (*args, *kwargs.values()) if isinstance(value, fx.Node)]
    if len(sources) != 1:
        return None
    (source,) = sources
    if node.target in _MAPS and source is args[0]:
        return _linear(node, args, kwargs)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _ACTIVATIONS and len(args) == 1:
        inplace = name.endswith("_") or kwargs.pop("inplace", False)
        module: Any = _ACTIVATIONS[name](**kwargs)
        if inplace and hasattr(module, "inplace"):
            module.inplace = True
        return module, source
    if name in ("threshold", "threshold_") and len(args) == 3:
        return nn.Threshold(args[1], args[2], inplace=name.endswith("_")), source
    affine = _affine(name.strip("_"), args, kwargs)
    return None if affine is None else (affine, source)


def _linear(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[nn.Module, fx.Node] | None:
    """A linear map with constant weight and bias; a padding that is not with zeros becomes its mode."""
    kind, names = _MAPS[node.target]
    options = dict(zip(("input", "weight", "bias", *names), args, strict=False)) | kwargs
    source, weight, bias = (options.pop(name, None) for name in ("input", "weight", "bias"))
    if isinstance(source, fx.Node) and source.target is F.pad and len(source.users) == 1:
        padded: dict[str, Any] = dict(zip(("input", "pad", "mode"), source.args, strict=False)) | source.kwargs
        before, after = padded["pad"][::2], padded["pad"][1::2]
        if padded.get("mode", "constant") != "constant" and [*before] == [*after]:
            options |= {"padding": tuple(reversed(before)), "padding_mode": padded["mode"]}
            source = padded["input"]
    return linear_map(kind, weight, bias, **options), source


def linear_map(kind: type[nn.Module], weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Module:
    """One of torch's linear maps with given weight and bias.

    Example:
        >>> linear_map(nn.Conv1d, torch.ones(4, 2, 3), None, groups=2)
        Conv1d(4, 4, kernel_size=(3,), stride=(1,), groups=2, bias=False)
    """
    outer, inner = weight.shape[:2]
    groups = options.get("groups", 1)
    sizes = (inner, outer) if not issubclass(kind, nn.modules.conv._ConvNd) else (inner * groups, outer)
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):
        sizes = (outer, inner * groups)
    kernel = [tuple(weight.shape[2:])] if weight.ndim > 2 else []
    layer: Any = nn.utils.skip_init(kind, *sizes, *kernel, bias=bias is not None, dtype=weight.dtype, **options)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer  # type: ignore[no-any-return]


def _affine(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Affine | None:
    """Products, sums and normalisations with constants."""
    if name == "batch_norm":
        options = dict(zip(("input", *_BATCH_NORM), args, strict=False)) | kwargs
        if options.get("training") or options["running_mean"] is None:
            return None
        scale = (options["running_var"] + options.get("eps", 1e-5)).rsqrt()
        scale = scale if options.get("weight") is None else scale * options["weight"]
        shift = -options["running_mean"] * scale
        return Affine(scale, shift if options.get("bias") is None else shift + options["bias"])
    if kwargs or not 1 <= len(args) <= 3:
        return None
    if len(args) == 3:
        return _of(args[2], args[0]) if name == "addcmul" and isinstance(args[1], fx.Node) else None
    if len(args) == 1:
        return _of(-1.0, 0.0) if name == "neg" else None
    ahead = isinstance(args[0], fx.Node)
    number = args[1] if ahead else args[0]
    if name in ("mul", "imul", "rmul"):
        return _of(number, 0.0)
    if name in ("add", "iadd", "radd"):
        return _of(1.0, number)
    if name in ("sub", "isub"):
        return _of(1.0, -number) if ahead else _of(-1.0, number)
    return _of(1.0 / number, 0.0) if name in ("truediv", "div", "itruediv") and ahead else None


def _of(scale: Any, shift: Any) -> Affine:
    """An affine map of tensors that lie along the last axes."""
    scale, shift = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (scale, shift)))
    if scale.numel() == 1:
        return Affine(scale.reshape(()).clone(), shift.reshape(()).clone())
    while scale.ndim > 1 and scale.shape[0] == 1:
        scale, shift = scale[0], shift[0]
    if scale[0].numel() == 1:
        return Affine(scale.flatten().clone(), shift.flatten().clone(), scale.ndim - 1)
    return Affine(scale.clone(), shift.clone())
