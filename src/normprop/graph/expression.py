"""Elementwise functions of one variable, read off the graph: how ``x * sigmoid(x)`` becomes one activation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.graph.node import functional, leaves, replace
from normprop.moments import Moments, Rule, resolve
from normprop.moments.quadrature import UNKNOWN, Shape


@dataclass(frozen=True)
class Expression:
    """A function of one variable z: an operator applied to other expressions and numbers, or z itself.

    Args:
        op: full name of the operator, "" for z.
        args: its arguments by name.

    Example:
        >>> z = Expression()
        >>> silu = Expression("aten.mul.Tensor", {"self": z, "other": Expression("aten.sigmoid.default", {"self": z})})
        >>> silu(torch.ones(1))
        tensor([0.7311])
    """

    op: str = ""
    args: dict[str, Any] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate at z."""
        if self.args is None:
            return z
        args = replace(self.args, lambda leaf: leaf(z) if isinstance(leaf, Expression) else leaf)
        first, *rest = args
        value: Tensor = functional(self.op)(args[first], **{name: args[name] for name in rest})
        return value

    @property
    def size(self) -> int:
        """Number of operators."""
        if self.args is None:
            return 0
        return 1 + sum(leaf.size for leaf in leaves(self.args) if isinstance(leaf, Expression))


def activation(expression: Expression) -> Rule:
    """The moment rule of an expression: the closed form where there is one, else quadrature.

    Example:
        >>> activation(Expression("aten.relu.default", {"self": Expression()})).name
        'relu'
    """
    if expression.args is None:
        return resolve(None)
    first, *rest = expression.args.values()
    if isinstance(first, Expression) and first.args is None and not any(isinstance(v, Expression) for v in rest):
        name = expression.op.split(".")[1].removesuffix("_")
        known = _KNOWN.get(name)
        if known is not None:
            return resolve(known(expression.args))
    return Rule("composite", expression, _shape(expression))


def _shape(expression: Expression) -> Shape:
    """Where an expression may have kinks: where a number stands in it, besides the customary places."""
    return UNKNOWN if _kinked(expression) else Shape()


def _kinked(expression: Expression) -> bool:
    if expression.args is None:
        return False
    name = expression.op.split(".")[1].removesuffix("_")
    return name not in _SMOOTH or any(_kinked(leaf) for leaf in leaves(expression.args) if isinstance(leaf, Expression))


def moments(expression: Expression, mean: Tensor, var: Tensor) -> Moments:
    """Moments of an expression of N(mean, var), elementwise.

    Example:
        >>> relu = Expression("aten.relu.default", {"self": Expression()})
        >>> moments(relu, torch.zeros(1), torch.ones(1)).mean
        tensor([0.3989])
    """
    # The floor keeps the square root's slope finite where a value is constant.
    std = var.clamp_min(torch.finfo(var.dtype).tiny ** 0.5).sqrt()
    return activation(expression).moments(mean, std, derivative=False)


def increasing(expression: Expression) -> bool:
    """Whether an expression never decreases, judged on a grid of four hundred points.

    Example:
        >>> increasing(Expression("aten.relu.default", {"self": Expression()}))
        True
    """
    with torch.no_grad():
        value = expression(torch.linspace(-8.0, 8.0, 401, dtype=torch.float64))
    return bool((value.diff() >= -1e-12).all())


_SMOOTH = {
    "sigmoid",
    "tanh",
    "mul",
    "add",
    "sub",
    "rsub",
    "neg",
    "square",
    "exp",
    "erf",
    "silu",
    "gelu",
    "softplus",
    "sin",
    "cos",
    "pow",
    "mish",
    "div",
    "log_sigmoid",
    "log1p",
    "expm1",
}

_KNOWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "relu": lambda args: "relu",
    "relu6": lambda args: "relu6",
    "leaky_relu": lambda args: functools.partial(F.leaky_relu, negative_slope=float(args["negative_slope"])),
    "elu": lambda args: _elu(args),
    "celu": lambda args: functools.partial(F.celu, alpha=float(args["alpha"])),
    "selu": lambda args: "selu",
    "gelu": lambda args: functools.partial(F.gelu, approximate=args["approximate"]),
    "hardtanh": lambda args: functools.partial(F.hardtanh, min_val=args["min_val"], max_val=args["max_val"]),
    "hardsigmoid": lambda args: "hardsigmoid",
    "hardswish": lambda args: "hardswish",
    "sigmoid": lambda args: "sigmoid",
    "tanh": lambda args: "tanh",
    "silu": lambda args: "silu",
    "softplus": lambda args: functools.partial(
        F.softplus, beta=float(args["beta"]), threshold=float(args["threshold"])
    ),
    "mish": lambda args: "mish",
    "abs": lambda args: "abs",
    "erf": lambda args: "erf",
}


def _elu(args: dict[str, Any]) -> Any:
    """ELU's operator also holds SELU's parameters."""
    if args.get("scale", 1) == 1 and args.get("input_scale", 1) == 1:
        return functools.partial(F.elu, alpha=float(args["alpha"]))
    return functools.partial(torch.ops.aten.elu, **{k: v for k, v in args.items() if k != "self"})
