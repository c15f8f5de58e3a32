"""Statistics over axes: variances, norms, running sums; of independent values, taken as Gaussian."""

import math
from typing import Any

import torch
from torch import Tensor

from normprop.errors import UnknownOperatorError
from normprop.graph.rules.arithmetic import distinct, reduced_axes, reduced_shape, size_of, squeezed
from normprop.graph.rules.powers import log_normal
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal
from normprop.moments.piecewise import rectifier


@rule("var", "std", "var_mean", "std_mean")
def variance(call: Call) -> Any:
    """Variance of n values: mean (1 - 1/n) v + spread of the means, variance 2 v^2 / (n - 1); its root log-normal."""
    x = call["self"]
    axes = reduced_axes(call, x)
    count = size_of(x, axes)
    free = distinct(count, x.repeat)
    means, variances = torch.broadcast_tensors(x.mean, x.var)
    middle, inner = means.mean(axes, keepdim=True), variances.mean(axes, keepdim=True)
    spread = (means - middle).square().mean(axes, keepdim=True)
    correction = call.get("correction")
    if correction is None:
        correction = 1 if call.get("unbiased", True) else 0
    scale = count / max(count - correction, 1e-9)
    mean = (inner * (1.0 - 1.0 / free) + spread) * scale
    var = (2.0 * inner.square() * (1.0 - 1.0 / free) + 4.0 * inner * spread) / free * scale**2
    if call.node.op.startswith("std"):
        mean, var = log_normal(mean, var, 0.5)
    moments = squeezed(mean, var, axes, call)
    shape = reduced_shape(call, x, axes)
    if not call.node.op.endswith("mean"):
        return Signal(*moments, shape)
    return Signal(*moments, shape), Signal(*squeezed(middle, inner / free, axes, call), shape)


@rule("norm", "linalg_vector_norm", "frobenius_norm")
def norm(call: Call) -> Signal:
    """Norms of order 1 and 2 from the sum of |x| and of x^2, whose root is taken as log-normal."""
    x = call["self"]
    order = float(call.get("ord", call.get("p", 2)))
    axes = reduced_axes(call, x)
    size = [size if i in axes else 1 for i, size in enumerate(x.shape)]
    mean, var = (part.expand(torch.broadcast_shapes(part.shape, size)) for part in (x.mean, x.var))
    if order == 1:
        moments = rectifier(mean, var.clamp_min(torch.finfo(var.dtype).tiny).sqrt(), -1.0)
        mean, var = torch.as_tensor(moments.mean), torch.as_tensor(moments.var)
    elif order == 2:
        mean, var = mean.square() + var, 2.0 * var.square() + 4.0 * mean.square() * var
    else:
        raise UnknownOperatorError(f"{call.node}: there is no rule for norms of order {order:g}, only 1 and 2")
    mean, var = mean.sum(axes, keepdim=True), var.sum(axes, keepdim=True) * x.repeat
    if order == 2:
        mean, var = log_normal(mean, var, 0.5)
    return Signal(*squeezed(mean, var, axes, call), call.shape)


@rule("cumsum")
def running_sum(call: Call) -> Signal:
    """Sums of the first 1, 2, ... independent values: their means and variances add up."""
    x, axis = call["self"], call["dim"]
    return Signal(_whole(x.mean, x, axis).cumsum(axis), _whole(x.var, x, axis).cumsum(axis), x.shape, repeat=x.repeat)


def _whole(value: Tensor, x: Signal, axis: int) -> Tensor:
    """A moment at every position of one axis."""
    axis %= len(x.shape)
    return value.expand([x.shape[i] if i == axis else size for i, size in enumerate(value.shape)])


@rule("prod")
def running_product(call: Call) -> Signal:
    """Products of independent values: their means and their second moments multiply."""
    x, axes = call["self"], reduced_axes(call, call["self"])
    mean, second = x.mean, x.mean.square() + x.var
    for axis in axes:
        mean, second = (_whole(part, x, axis).prod(axis, keepdim=True) for part in (mean, second))
    return Signal(*squeezed(mean, second - mean.square(), axes, call), call.shape)


@rule("all", "any")
def every(call: Call) -> Signal:
    """Truth over axes, of independent values true with probability p: p^n, or 1 - (1 - p)^n."""
    x, axes = call["self"], reduced_axes(call, call["self"])
    p = x.mean if call.node.op == "all" else 1.0 - x.mean
    count = math.prod(x.shape[axis] for axis in axes if p.shape[axis] == 1)
    for axis in axes:
        p = p.prod(axis, keepdim=True)
    p = p**count
    mean = p if call.node.op == "all" else 1.0 - p
    return Signal(*squeezed(mean, mean * (1.0 - mean), axes, call), call.shape)
