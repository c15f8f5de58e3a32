"""Elementwise functions of one variable, read off the graph: how ``x * sigmoid(x)`` becomes one activation."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normprop.graph.node import leaves, replace
from normprop.graph.operators import functional
from normprop.moments import Moments, Rule, resolve
from normprop.moments.quadrature import UNKNOWN, Shape


@dataclass(frozen=True)
class Expression:
    """A function of one variable z: an operator applied to other expressions and constants, or z itself.

    Constants are numbers, or tensors with no axes or with those of the value.

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
        logical = _name(self) in _LOGICAL

        def value_of(leaf: Any) -> Any:
            if isinstance(leaf, Expression):
                value = leaf(z)
                return value.to(z.dtype) if value.dtype == torch.bool and not logical else value
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.to(z.dtype) if leaf.is_floating_point() else leaf
            # Quadrature puts its nodes on an axis after those of the value.
            return leaf[(..., *[None] * (z.ndim - leaf.ndim))] if leaf.ndim else leaf

        args = replace(self.args, value_of)
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
        known = _KNOWN.get(_name(expression))
        if known is not None:
            return resolve(known(expression.args))
    return Rule("composite", functools.partial(_number, expression), _shape(expression))


def _number(expression: Expression, z: Tensor) -> Tensor:
    """What an expression is worth as a number: 0 or 1 for a comparison."""
    value = expression(z)
    return value if value.is_floating_point() else value.to(z.dtype)


def _name(expression: Expression) -> str:
    return expression.op.split(".")[1].removesuffix("_")


def _shape(expression: Expression) -> Shape:
    """Where an expression may have kinks: at the numbers that stand in it and in the customary places."""
    if not _kinked(expression):
        return Shape()
    numbers = {float(number) for number in _numbers(expression) if 1e-3 <= abs(number) <= 1e3}
    return Shape(tuple(sorted({*UNKNOWN.breaks, *numbers, *(-number for number in numbers)})))


def _numbers(expression: Expression) -> Iterator[float]:
    for leaf in leaves(expression.args):
        if isinstance(leaf, Expression):
            if leaf.args is not None:
                yield from _numbers(leaf)
        elif isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            yield leaf


def _kinked(expression: Expression) -> bool:
    if expression.args is None:
        return False
    parts = leaves(expression.args)
    return _name(expression) not in _SMOOTH or any(_kinked(leaf) for leaf in parts if isinstance(leaf, Expression))


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
    return bool((_sampled(expression).diff() >= -1e-12).all())


def nonnegative(expression: Expression) -> bool:
    """Whether an expression is never below zero, judged on the same grid.

    Example:
        >>> nonnegative(Expression("aten.relu.default", {"self": Expression()}))
        True
    """
    return bool((_sampled(expression) >= 0).all())


def _sampled(expression: Expression) -> Tensor:
    with torch.no_grad():
        return expression(torch.linspace(-8.0, 8.0, 401, dtype=torch.float64))


# Operators that take truth values, which others take as numbers.
_LOGICAL = {
    "where",
    "masked_fill",
    "logical_not",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_not",
    "bitwise_and",
}

# Operators without kinks or jumps.
_SMOOTH = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "neg",
    "square",
    "pow",
    "exp",
    "exp2",
    "expm1",
    "log1p",
    "sigmoid",
    "tanh",
    "softplus",
    "silu",
    "gelu",
    "mish",
    "erf",
    "erfc",
    "log_sigmoid",
    "logaddexp",
    "sin",
    "cos",
    "sinh",
    "cosh",
    "tan",
    "atan",
    "asinh",
    "reciprocal",
    "sqrt",
    "rsqrt",
    "special_ndtr",
    "special_expit",
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
