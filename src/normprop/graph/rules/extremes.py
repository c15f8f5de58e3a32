"""The largest, smallest and sorted of many values, or of two."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normprop.graph.expression import Expression
from normprop.graph.rules import elementwise
from normprop.graph.rules.arithmetic import (
    aligned,
    distinct,
    moments_of,
    reduced_axes,
    reduced_shape,
    size_of,
    squeezed,
)
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Origin, Signal, averaged
from normprop.moments.gaussian import cdf, pdf

_CELLS = 801  # of the grid on which the law of a function of a Gaussian is sorted


def ranked(x: Signal, count: float, axes: list[int], ranks: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Moments of the values of given ranks, 1 the smallest, among those along some axes; ranks are the last axis.

    The r-th of n independent values has the density p^(r-1) (1-p)^(n-r) at the law's quantile p, up to a factor. Means
    that differ along the axes are taken as part of the deviation.

    Args:
        x: the values.
        count: how many independent ones there are.
        axes: where they stand; they stay, with size 1.
        ranks: (ranks,), from 1 to the number of independent values.
        sign: -1 for the ranks of -x.
    """
    base = x.base().plain() or Origin(None, x.mean, x.var, Expression())
    mean, var = torch.broadcast_tensors(base.mean, base.var)
    if axes:
        mean, var = averaged(mean, var, axes)
    std = var.clamp_min(torch.finfo(var.dtype).tiny ** 0.5).sqrt()
    grid = torch.linspace(-8.0, 8.0, _CELLS, dtype=torch.float64, device=mean.device)
    value = base.function(mean.double().unsqueeze(-1) + std.double().unsqueeze(-1) * grid).double() * sign
    value, order = value.sort(-1)
    mass = (pdf(grid) / pdf(grid).sum())[order]
    below = mass.cumsum(-1) - mass / 2
    above = mass.flip(-1).cumsum(-1).flip(-1) - mass / 2
    ranks = ranks.to(below).unsqueeze(-1)
    odds = (ranks - 1) * below.log().unsqueeze(-2) + (count - ranks) * above.log().unsqueeze(-2)
    chance = torch.softmax(odds + mass.log().unsqueeze(-2), -1)
    first = (chance * value.unsqueeze(-2)).sum(-1)
    spread = (chance * (value.unsqueeze(-2) - first.unsqueeze(-1)).square()).sum(-1)
    return first.to(x.mean.dtype), spread.to(x.mean.dtype)


def greatest(x: Signal, count: float, axes: list[int], sign: float = 1.0) -> tuple[Tensor, Tensor]:
    """Moments of the largest of so many independent values along axes, which stay; of -x for sign -1."""
    last = torch.tensor([count], dtype=torch.float64, device=x.mean.device)
    mean, var = ranked(x, count, axes, last, sign)
    return mean.squeeze(-1), var.squeeze(-1)


@rule("amax", "amin", "max", "min")
def extreme(call: Call) -> Any:
    """The largest of n independent values, P(max < t) = P(x < t)^n; of two tensors see maximum."""
    if "other" in call.arguments:
        return two(call)
    x, axes = call["self"], reduced_axes(call, call["self"])
    sign = -1.0 if call.node.op.endswith("min") else 1.0
    mean, var = squeezed(*greatest(x, distinct(size_of(x, axes), x.repeat), axes, sign), axes, call)
    result = Signal(sign * mean, var, reduced_shape(call, x, axes))
    return result if call.node.shape is not None else (result, _positions(result))


def _positions(values: Signal) -> Tensor:
    """Indices have no moments; the first position stands for them."""
    return torch.zeros(values.shape, dtype=torch.long, device=values.mean.device)


@rule("topk", "sort", "kthvalue", "median")
def by_rank(call: Call) -> Any:
    """Values by rank r of n, with the law of order statistics: density p^(r-1) (1-p)^(n-r) at the quantile p."""
    x, op = call["self"], call.node.op
    whole = op == "median" and "dim" not in call.arguments
    axes = [*range(len(x.shape))] if whole else [call.get("dim", -1) % len(x.shape)]
    count = size_of(x, axes)
    if op in ("topk", "sort"):
        number = call["k"] if op == "topk" else count
        falling = call.get("largest", True) if op == "topk" else call.get("descending", False)
        ranks = torch.arange(1, number + 1, dtype=torch.float64)
        ranks = count + 1 - ranks if falling else ranks
    else:
        ranks = torch.tensor([call["k"] if op == "kthvalue" else (count + 1) // 2], dtype=torch.float64)
    # Fewer independent values than elements: the same share of them.
    free = distinct(count, x.repeat)
    ranks = 1 + (ranks - 1) * ((free - 1) / max(count - 1, 1))
    mean, var = ranked(x, free, axes, ranks.to(x.mean.device))
    if op in ("topk", "sort"):
        mean, var = (part.transpose(-1, axes[0]).squeeze(-1) for part in (mean, var))
        shape = tuple(len(ranks) if i in axes else size for i, size in enumerate(x.shape))
    else:
        mean, var = squeezed(mean.squeeze(-1), var.squeeze(-1), axes, call)
        shape = reduced_shape(call, x, axes)
    result = Signal(mean, var, shape)
    return result if call.node.shape is not None else (result, _positions(result))


@rule("argmax", "argmin", "argsort")
def position(call: Call) -> Tensor:
    """Positions: without moments; zeros stand for them."""
    return torch.zeros(call.shape, dtype=torch.long, device=call.inputs[0].mean.device)


@rule("maximum", "minimum", "fmax", "fmin")
def two(call: Call) -> Signal:
    """The larger of two independent Gaussians: m1 cdf(t) + m2 cdf(-t) + s pdf(t), t = (m1 - m2) / s, s^2 = v1 + v2."""
    if elementwise.one_source(call) and len(call.inputs) > 1:
        return elementwise.unary(call)
    one, other = [*call.arguments.values()][:2]
    return larger(one, other, -1.0 if "min" in call.node.op else 1.0, call)


def larger(one: Any, other: Any, sign: float, call: Call) -> Signal:
    """The larger of a signal and another one or a constant; the smaller for sign -1.

    Source:
        C. E. Clark, The greatest of a finite set of random variables, Operations Research 1961.
    """
    one, other = aligned(one, call), aligned(other, call)
    signals = [part for part in (one, other) if isinstance(part, Signal)]
    like = signals[0].mean
    means, variances = zip(*(moments_of(part, like) for part in (one, other)), strict=True)
    first, second = (sign * part for part in means)
    std = (variances[0] + variances[1]).clamp_min(torch.finfo(like.dtype).tiny ** 0.5).sqrt()
    t = (first - second) / std
    above, at = cdf(t), pdf(t)
    # Relative to the second mean, so that a small difference does not cancel.
    gap = first - second
    mean = gap * above + std * at
    square = (gap.square() + variances[0]) * above + variances[1] * cdf(-t) + gap * std * at
    var = (square - mean.square()).clamp_min(0.0)
    return Signal(sign * (second + mean), var, call.shape, repeat=min(signal.repeat for signal in signals))


@rule("clamp", "clip", "clamp_min", "clamp_max")
def clamped(call: Call) -> Signal:
    """Clamping: by numbers an activation; by tensors the larger, then the smaller of two."""
    bounds = {name: value for name, value in call.arguments.items() if name in ("min", "max") and value is not None}
    if not any(isinstance(value, (Signal, Tensor)) for value in bounds.values()) or elementwise.one_source(call):
        return elementwise.unary(call)
    result: Signal = next(iter(call.arguments.values()))
    steps: dict[str, Callable[[Any, Any], Signal]] = {
        "min": lambda x, bound: larger(x, bound, 1.0, call),
        "max": lambda x, bound: larger(x, bound, -1.0, call),
    }
    for name, bound in bounds.items():
        result = steps[name](result, bound)
    return result
