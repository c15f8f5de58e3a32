"""Straight lines inside expressions: f(a z + b) of a Gaussian z is f of another Gaussian."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from normprop.graph.expression import Expression
from normprop.graph.node import leaves, replace

Number = float | Tensor


@dataclass(frozen=True)
class Line:
    """``slope * z + offset``.

    Args:
        slope: a number, or a tensor with the axes of the value.
        offset: likewise.
    """

    slope: Number = 1.0
    offset: Number = 0.0

    def same(self, other: "Line") -> bool:
        """Whether both are the same line for certain; tensors are compared by identity."""
        pairs = ((self.slope, other.slope), (self.offset, other.offset))
        return all(
            one is two or (not isinstance(one, Tensor) and not isinstance(two, Tensor) and one == two)
            for one, two in pairs
        )


def line(expression: Expression) -> Line | None:
    """The line that an expression is, if it is one by its form.

    Example:
        >>> line(Expression("aten.add.Tensor", {"self": Expression(), "other": 2.0, "alpha": 3}))
        Line(slope=1.0, offset=6.0)
    """
    if expression.args is None:
        return Line()
    name = expression.op.split(".")[1].removesuffix("_")
    if name in ("addcmul", "lerp"):
        return line(_spelled(name, [*expression.args.values()]))
    if name not in ("add", "sub", "rsub", "mul", "div", "neg") or expression.args.get("rounding_mode") is not None:
        return None
    one, other = ([*expression.args.values(), 0.0])[:2]
    first, second = (line(part) if isinstance(part, Expression) else part for part in (one, other))
    if first is None or second is None:
        return None
    if name == "neg":
        return Line(-first.slope, -first.offset) if isinstance(first, Line) else None
    if name == "mul" and not isinstance(first, Line):
        first, second = second, first
    if name in ("mul", "div"):
        if not isinstance(first, Line) and not isinstance(second, Line):
            return Line(0.0, first * second if name == "mul" else first / second)
        if isinstance(second, Line) or not isinstance(first, Line):
            return None
        factor = second if name == "mul" else 1.0 / second
        return Line(first.slope * factor, first.offset * factor)
    alpha = expression.args.get("alpha", 1)
    if name == "rsub":
        first, second = second, first
    weight = alpha if name == "add" else -alpha
    parts = [part if isinstance(part, Line) else Line(0.0, part) for part in (first, second)]
    return Line(parts[0].slope + weight * parts[1].slope, parts[0].offset + weight * parts[1].offset)


def _spelled(name: str, args: list[Any]) -> Expression:
    """Sums and products in the place of one operator for both."""
    if name == "lerp":
        start, end, weight = args
        away = Expression("aten.sub.Tensor", {"self": end, "other": start, "alpha": 1})
        return Expression("aten.add.Tensor", {"self": start, "other": _product(away, weight), "alpha": 1})
    base, one, other, value = ([*args, 1])[:4]
    return Expression("aten.add.Tensor", {"self": base, "other": _product(one, other), "alpha": value})


def _product(one: Any, other: Any) -> Expression:
    return Expression("aten.mul.Tensor", {"self": one, "other": other})


def reduced(expression: Expression) -> tuple[Expression, Line]:
    """An expression of z as one of a line in z, if z stands in it within one line only.

    Example:
        >>> twice = Expression("aten.mul.Tensor", {"self": Expression(), "other": 2.0})
        >>> reduced(Expression("aten.relu.default", {"self": twice}))
        (Expression(op='aten.relu.default', args={'self': Expression(op='', args=None)}), Line(slope=2.0, offset=0.0))
    """
    found: list[Line] = []

    def strip(part: Expression) -> Expression:
        straight = line(part)
        if straight is None:
            return Expression(part.op, replace(part.args, lambda leaf: strip(leaf) if _is(leaf) else leaf))
        found.append(straight)
        return Expression()

    inner = strip(expression)
    return (inner, found[0]) if all(found[0].same(other) for other in found) else (expression, Line())


def has_tensors(expression: Expression) -> bool:
    """Whether tensors of more than one element stand in an expression."""
    parts = () if expression.args is None else leaves(expression.args)
    return any(has_tensors(leaf) if isinstance(leaf, Expression) else _wide(leaf) for leaf in parts)


def _is(leaf: object) -> bool:
    return isinstance(leaf, Expression)


def _wide(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0
