"""Operators of torch: their names, their arguments by name, and how to call them without writing in place."""

from collections.abc import Callable
from typing import Any

import torch

from normprop.graph.node import Node


def describe(target: Any) -> tuple[str, str, bool]:
    """Name of an operator, its full name, and whether it overwrites its first argument.

    Example:
        >>> describe(torch.ops.aten.add_.Tensor)
        ('add', 'aten.add_.Tensor', True)
    """
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", type(target).__name__), "", False
    namespace, _, name = target._schema.name.partition("::")
    inplace = name.endswith("_") and not name.endswith("__")
    name = name.removesuffix("_") if inplace else name
    return name if namespace == "aten" else f"{namespace}.{name}", str(target), inplace


def bind(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an operator by the names of its schema, with defaults.

    Example:
        >>> bind(torch.ops.aten.leaky_relu.default, (1,), {})
        {'self': 1, 'negative_slope': 0.01}
    """
    if not isinstance(target, torch._ops.OpOverload):
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    bound = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def execute(node: Node, arguments: dict[str, Any]) -> Any:
    """Call a node's operator, in the form that overwrites nothing, on other arguments of the same names."""
    function: Callable[..., Any] = functional(node.overload)
    if not arguments:
        return function()
    first, *rest = arguments
    return function(arguments[first], **{name: arguments[name] for name in rest})


def overwrite(node: Node, arguments: dict[str, Any]) -> Any:
    """Call a node's operator as it is, in place."""
    if not arguments:
        return operator(node.overload)()
    # The forms in place call their first argument by another name at times.
    first, *rest = arguments
    return operator(node.overload)(arguments[first], **{name: arguments[name] for name in rest})


def operator(overload: str) -> torch._ops.OpOverload:
    """The operator of a full name.

    Example:
        >>> operator("aten.relu_.default")
        <OpOverload(op='aten.relu_', overload='default')>
    """
    namespace, name, variant = overload.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), variant)
    return found


def functional(overload: str) -> Callable[..., Any]:
    """The operator of a full name, in the form that overwrites nothing.

    Example:
        >>> functional("aten.relu_.default")
        <OpOverload(op='aten.relu', overload='default')>
    """
    namespace, name, variant = overload.split(".")
    bare = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    packet = getattr(getattr(torch.ops, namespace), bare)
    function: Callable[..., Any] = getattr(packet, variant, packet)
    return function
