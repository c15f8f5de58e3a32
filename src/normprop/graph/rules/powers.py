"""Roots, reciprocals and logarithms of positive values: statistics such as variances, norms and sums."""

import math

import torch
from torch import Tensor

from normprop.graph.affine import has_tensors
from normprop.graph.expression import nonnegative
from normprop.graph.rules import elementwise
from normprop.graph.rules.registry import Call, rule
from normprop.graph.signal import Signal

_EXPONENTS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


@rule("pow", "sqrt", "rsqrt", "reciprocal", "float_power")
def power(call: Call) -> Signal:
    """x^p: whole p > 0 by the Gaussian's moments; else x is log-normal, E[x^p] = m^p (1 + v/m^2)^(p (p-1) / 2)."""
    x, exponent = ([*call.arguments.values(), _EXPONENTS.get(call.node.op)])[:2]
    if not isinstance(x, Signal) or not isinstance(exponent, (int, float)):
        return elementwise.unary(call)
    if (exponent >= 0 and float(exponent).is_integer()) or not _open(x):
        return elementwise.unary(call)
    mean, var = log_normal(x.mean, x.var, float(exponent))
    return Signal(mean, var, x.shape, repeat=x.repeat)


@rule("log", "log2", "log10")
def logarithm(call: Call) -> Signal:
    """log x of a log-normal x: mean log m - s/2 and variance s = log(1 + v/m^2)."""
    (x,) = call.inputs
    if not _open(x):
        return elementwise.unary(call)
    scale = {"log": 1.0, "log2": 1 / math.log(2), "log10": 1 / math.log(10)}[call.node.op]
    spread = torch.log1p(x.var / x.mean.square())
    return Signal((x.mean.log() - spread / 2) * scale, spread * scale**2, x.shape, repeat=x.repeat)


def _open(x: Signal) -> bool:
    """Whether the law at hand is no better than mean and variance: the Gaussian behind x would reach below zero."""
    function = x.base().function
    return has_tensors(function) or not nonnegative(function)


def log_normal(mean: Tensor, var: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of a power of a log-normal value; of a reciprocal also where it is negative.

    Example:
        >>> [round(float(part), 4) for part in log_normal(torch.tensor(2.0), torch.tensor(0.0), -1.0)]
        [0.5, 0.0]
    """
    ratio = torch.log1p(var / mean.square())
    first = mean**exponent * torch.exp(ratio * (exponent * (exponent - 1) / 2))
    return first, first.square() * torch.expm1(ratio * exponent**2)


def inverse(x: Signal) -> Signal:
    """1 / x for denominators that stay away from zero: norms, deviations, sums of gates."""
    mean, var = log_normal(x.mean, x.var, -1.0)
    return Signal(mean, var, x.shape, repeat=x.repeat)
