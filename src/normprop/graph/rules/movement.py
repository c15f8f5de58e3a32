"""Operators that only move, repeat or drop elements: run once on labels, they say where every moment goes."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normprop.errors import UnknownOperatorError
from normprop.graph import node as nodes
from normprop.graph.node import leaves
from normprop.graph.operators import execute
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Origin, Signal

_SAME = (
    "clone",
    "contiguous",
    "detach",
    "alias",
    "to",
    "_to_copy",
    "type_as",
    "lift_fresh",
    "identity",
    "requires_grad",
    "positive",
    "float",
    "double",
    "half",
    "bfloat16",
    "cpu",
    "cuda",
    "_assert_tensor_metadata",
)


@rule(*_SAME)
def same(call: Call) -> Signal:
    """What changes nothing but the type, the place or the memory."""
    x = call.inputs[0]
    return x


@rule("col2im")
def folded(call: Call) -> Any:
    """Patches back in their places; there is a rule only for patches that do not overlap."""
    if any(size > step for size, step in zip(call["kernel_size"], call["stride"], strict=True)):
        raise UnknownOperatorError(f"{call.node}: there is no rule for patches that overlap")
    return moved(call)


@rule("copy")
def copied(call: Call) -> Signal:
    """Another tensor written over the first."""
    source = call["src"]
    if isinstance(source, Tensor):
        return Signal.of(source.reshape([1] * (len(call.shape) - source.ndim) + [*source.shape]), 0.0, call.shape)
    missing = [1] * (len(call.shape) - len(source.shape))
    mean, var = (part.reshape([*missing, *part.shape]) for part in (source.mean, source.var))
    return Signal(mean, var, call.shape)


@rule(
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "take_along_dim",
    "scatter",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "numpy_T",
    "mT",
    "squeeze",
    "unsqueeze",
    "expand",
    "repeat",
    "repeat_interleave",
    "tile",
    "slice",
    "select",
    "narrow",
    "index",
    "index_select",
    "gather",
    "flip",
    "roll",
    "rot90",
    "movedim",
    "swapaxes",
    "swapdims",
    "unfold",
    "im2col",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "dstack",
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "unbind",
    "unsafe_chunk",
    "unsafe_split",
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "_pad_circular",
    "broadcast_to",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "tril",
    "triu",
    "diagonal",
    "view_copy",
    "ravel",
    "as_strided",
    "index_put",
    "slice_scatter",
    "select_scatter",
    "masked_select",
    "column_stack",
    "matrix_H",
    "adjoint",
    "moveaxis",
    "block_diag",
    "meshgrid",
    "diag_embed",
)
def moved(call: Call) -> Any:
    """Every element of the output is an element of an input, or a constant."""
    sources = [leaf for leaf in leaves(call.arguments) if _moves(leaf)]
    fields = [_fields(leaf) for leaf in sources]
    if "plan" not in call.memory:
        call.memory["plan"] = _plan(call, [torch.broadcast_shapes(*(part.shape for part in parts)) for parts in fields])
    outputs, single, shapes = call.memory["plan"]
    flat = [
        torch.cat([field.broadcast_to(shape).flatten() for field, shape in zip(kind, shapes, strict=True)])
        for kind in zip(*fields, strict=True)
    ]
    signals = [leaf for leaf in sources if isinstance(leaf, Signal)]
    repeat = min(signal.repeat for signal in signals)
    count = max(math.prod(signal.shape) for signal in signals)
    results = [_gather(output, flat, sources, repeat, count) for output in outputs]
    if single and len(sources) == 1 and call.node.op in ("view", "reshape", "_unsafe_view", "expand"):
        kept = sources[0].simplex and sources[0].shape[-1] == results[0].shape[-1]
        return replace(results[0], simplex=kept)
    return results[0] if single else results


@rule("view_as", "reshape_as", "expand_as")
def like(call: Call) -> Any:
    """Elements in the shape of another tensor."""
    shape = torch.empty((), dtype=torch.bool).expand(call["other"].shape)
    return moved(Call(call.node, {**call.arguments, "other": shape}, memory=call.memory))


def _moves(leaf: Any) -> bool:
    return isinstance(leaf, Signal) or (isinstance(leaf, Tensor) and leaf.is_floating_point())


def _fields(leaf: Signal | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance, and mean and variance of the Gaussian behind."""
    if isinstance(leaf, Tensor):
        value = leaf.detach() if not leaf.requires_grad else leaf
        return value, torch.zeros_like(value), value, torch.zeros_like(value)
    origin = leaf.origin and leaf.origin.plain()
    return (leaf.mean, leaf.var, *((leaf.mean, leaf.var) if origin is None else (origin.mean, origin.var)))


# Labels start here, so that numbers that an operator fills in can be told from them.
_FIRST = 2**40

# Operators of one axis: along the others, where nothing varies, one element stands for all.
_ALONG = {
    "cat",
    "concat",
    "concatenate",
    "chunk",
    "split",
    "split_with_sizes",
    "unsafe_chunk",
    "unsafe_split",
    "unbind",
    "slice",
    "select",
    "narrow",
    "stack",
    "index_select",
}
_ANY_SIZE = {"permute", "transpose", "t", "numpy_T", "mT", "movedim", "swapaxes", "swapdims", "moveaxis", "adjoint"}


def _plan(call: Call, compact: list[torch.Size]) -> tuple[list[tuple[Any, ...]], bool, list[torch.Size]]:
    """Run the operator on labels: for every output where its elements come from, or the number that they are."""
    position, first = 0, _FIRST
    axis = call.arguments.get("dim", 0) if call.node.op in _ALONG else None

    def label(leaf: Any) -> Any:
        nonlocal position, first
        if not _moves(leaf):
            return leaf.cpu() if isinstance(leaf, Tensor) else leaf  # an index, next to the labels
        shape = compact[position]
        position += 1
        count = math.prod(shape)
        labels = torch.arange(first, first + count, dtype=torch.float64).reshape(shape)
        first += count
        if call.node.op in _ANY_SIZE:
            return labels
        full = [*leaf.shape]
        if axis is not None and isinstance(axis, int):
            at = axis % (len(full) + (call.node.op == "stack"))
            varies = [any(len(part) <= i or part[i] != 1 for part in compact) for i in range(len(full))]
            full = [size if i == at or varies[i] else 1 for i, size in enumerate(full)]
        return labels.expand(full).contiguous()

    labelled = nodes.replace(call.arguments, label)
    output = execute(call.node, labelled)
    if isinstance(output, Tensor):
        return [_compressed(output, call.shape)], True, compact
    full = execute(call.node, nodes.replace(call.arguments, _shape_only))
    return [_compressed(part, tuple(whole.shape)) for part, whole in zip(output, full, strict=True)], False, compact


def _shape_only(leaf: Any) -> Any:
    return torch.empty(leaf.shape, device="meta") if isinstance(leaf, (Signal, Tensor)) else leaf


def _compressed(labels: Tensor, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Index into the elements of all inputs, literal numbers, where they are, and the shape in full."""
    for axis in range(labels.ndim):
        head = labels.narrow(axis, 0, min(1, labels.shape[axis]))
        if labels.shape[axis] > 1 and bool((labels == head).all()):
            labels = head
    labels = labels.contiguous()  # what is gathered has the index's strides, but a compiler takes it as contiguous
    literal = labels < _FIRST
    index = torch.where(literal, _FIRST, labels).sub(_FIRST).long()
    return index, (labels.where(literal, 0.0).float() if bool(literal.any()) else None), literal, shape


def _gather(output: tuple[Any, ...], flat: list[Tensor], sources: list[Any], repeat: float, count: int) -> Signal:
    index, numbers, literal, shape = output
    fields = [kind[index.to(kind.device)] for kind in flat]
    if numbers is not None:
        fields = [
            torch.where(literal.to(field.device), value.to(field) if position % 2 == 0 else 0.0, field)
            for position, (field, value) in enumerate(zip(fields, [numbers] * 4, strict=True))
        ]
    origins = [s.origin and s.origin.plain() for s in sources if isinstance(s, Signal)]
    functions = [origin.function if origin else None for origin in origins]
    alike = len(functions) == len(sources) and numbers is None and all(part == functions[0] for part in functions)
    origin = Origin(None, fields[2], fields[3], functions[0]) if alike and functions[0] is not None else None
    repeat = max(repeat, repeat * math.prod(shape) / count) if len(sources) == 1 else repeat
    return Signal(fields[0], fields[1], shape, repeat=repeat, origin=origin)
