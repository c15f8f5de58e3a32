"""Solving for the constants of a transformed activation, out_scale * (f(in_scale * x + in_shift) + out_shift)."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from normprop.errors import ConfigError
from normprop.moments import Activation, Rule, resolve
from normprop.moments.gaussian import SQRT_2PI, legendre
from normprop.moments.quadrature import UNKNOWN
from normprop.moments.quadrature import slope as derivative
from normprop.moments.rule import widened

_NODES, _WEIGHTS = (torch.tensor(values, dtype=torch.float64) for values in legendre(12))
_REACH = 9.0  # deviations covered


class Transform(NamedTuple):
    """Constants of ``out_scale * (f(in_scale * x + in_shift) + out_shift)``."""

    in_scale: float = 1.0
    in_shift: float = 0.0
    out_scale: float = 1.0
    out_shift: float = 0.0


def constants(solver: Callable[[Activation, float], Transform]) -> Callable[[Activation, float], Transform]:
    """Make a solver remember its answers, refuse activations that learn and work on the CPU, whatever torch's default.

    Example:
        >>> constants(lambda activation, target: Transform(target))("relu", 2.0).in_scale
        2.0
    """

    @functools.lru_cache(maxsize=64)
    @functools.wraps(solver)
    def solved(activation: Activation, target: float) -> Transform:
        rule = resolve(activation)
        if rule.learnable:
            raise ConfigError(
                f"norms: {rule.name} learns its shape, which its constants depend on; use a fixed activation"
            )
        with torch.no_grad(), torch.device("cpu"):
            return solver(activation, target)

    return solved


class Expectations(NamedTuple):
    """Expectations of f(u), u = in_scale z + in_shift, z ~ N(0, 1), each with one element per pair of constants."""

    mean: Tensor
    square: Tensor  # E[f^2]
    tilt: Tensor  # E[f' z]
    square_tilt: Tensor  # E[f f' z]
    slope: Tensor  # E[f'^2]
    bend: Tensor  # E[f''^2]
    second: Tensor  # E[f'']


def expectations(rule: Rule, in_scale: Tensor, in_shift: Tensor) -> Expectations:
    """Integrate a function and its derivatives by Gauss-Legendre panels between likely kinks.

    Args:
        rule: the activation.
        in_scale: (starts,), float64.
        in_shift: (starts,), float64.

    Returns:
        Expectations, each (starts,).

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> round(expectations(Rule("f", torch.relu, UNKNOWN), one, 0 * one).mean.item(), 12)
        0.398942280401
    """
    function = widened(rule.function)
    kinks = (torch.tensor(UNKNOWN.breaks, dtype=torch.float64) - in_shift[:, None]) / in_scale[:, None]
    panels = torch.linspace(-_REACH, _REACH, 17, dtype=torch.float64).expand(len(in_scale), -1)
    edges = torch.cat([panels, kinks.clamp(-_REACH, _REACH)], 1).sort(1).values
    length = (edges[:, 1:] - edges[:, :-1]).unsqueeze(-1)
    z = (edges[:, :-1, None] + length * _NODES).flatten(1)
    weight = (length * _WEIGHTS).flatten(1) * torch.exp(z * z * -0.5) / SQRT_2PI
    u = in_scale[:, None] * z + in_shift[:, None]
    f, first = function(u.clone()), derivative(function, u)
    second = derivative(lambda at: derivative(function, at), u)
    rows = (f, f * f, first * z, f * first * z, first * first, second * second, second)
    return Expectations(*((row * weight).sum(1) for row in rows))


def solve(residual: Callable[[Tensor], Tensor], starts: Tensor) -> Tensor:
    """Newton's method from many starts at once: the roots that were found, (found, 2).

    Args:
        residual: from (starts, 2) to (starts, 2), row by row; nan where it is not defined.
        starts: (starts, 2), float64.

    Returns:
        Roots to a residual of 1e-9, in the order of their starts, repeated where starts lead to the same.

    Example:
        >>> solve(lambda x: x * x - 4.0, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)).tolist()
        [[2.0, 2.0], [2.0, -2.0]]
    """
    x = starts.clone()
    for _ in range(25):
        value = residual(x)
        (a, c), (b, d) = (((residual(x + nudge) - value) / 1e-7).unbind(1) for nudge in 1e-7 * torch.eye(2))
        r, s = value.unbind(1)
        step = torch.stack([d * r - b * s, a * s - c * r], 1) / (a * d - b * c)[:, None]
        x = x - step.clamp(-0.5, 0.5)
    return x[(residual(x).abs() < 1e-9).all(1)]


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function crosses zero between two numbers; the nearer end if it does not.

    Example:
        >>> round(bisect(lambda x: x * x - 2.0, 0.0, 2.0), 12)
        1.414213562373
    """
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def nearest(rule: Rule, roots: Tensor, method: str, goal: str) -> Tensor:
    """Choose the root with the smallest shift, and the positive one of a pair.

    Args:
        rule: the activation, for the message.
        roots: (found, 2 or more), log in_scale and in_shift first.
        method: name of the method.
        goal: what was to be had.

    Returns:
        One row of ``roots``.

    Raises:
        ConfigError: if there are none.

    Example:
        >>> nearest(Rule("f", torch.tanh, UNKNOWN), torch.tensor([[0.0, -1.0], [0.0, 0.5]]), "kernel-shaped", "")
        tensor([0.0000, 0.5000])
    """
    if not len(roots):
        raise ConfigError(
            f"norms.{method}: no input scale and shift give {rule.name} {goal}; use another activation or depth"
        )
    chosen: Tensor = min(roots, key=lambda root: (round(abs(float(root[1])), 6), -float(root[1])))
    return chosen


def grid(strength: float) -> Tensor:
    """Starts (log in_scale, in_shift) for :func:`solve`: a function bends as the square of its input scale.

    Example:
        >>> grid(0.1).shape
        torch.Size([27, 2])
    """
    scales = [math.log(factor * math.sqrt(strength)) for factor in (0.3, 1.0, 3.0)]
    shifts = torch.linspace(-2.4, 2.4, 9, dtype=torch.float64)
    return torch.cartesian_prod(torch.tensor(scales, dtype=torch.float64), shifts)
