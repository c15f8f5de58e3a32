"""Gaussian moments of any elementwise function by a fixed rule, for the inside of a graph.

Nodes are placed in z and held constant; the weights, the density of N(mean, std^2) at the nodes, carry the gradient in
mean and std: this stays exact where the function has kinks or jumps and never differentiates it twice. The function
is taken relative to its value at the mean, so that a small deviation does not cancel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.moments.gaussian import density, legendre, widen
from normprop.moments.value import Moments

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """What the fixed rule knows of a function: where it has kinks and over what length it bends around 0.

    Args:
        breaks: increasing positions of kinks and jumps.
        scale: length over which the function changes around 0; nodes are uniform within it and geometric beyond.

    Example:
        >>> Shape().breaks
        (0.0,)
    """

    breaks: tuple[float, ...] = (0.0,)
    scale: float = 1.0


# Where functions that people write tend to have kinks: thresholds, clamps, shrinkage, hard gates.
UNKNOWN = Shape(breaks=(-6.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 6.0))

_NODES, _WEIGHTS = legendre(20)  # per panel
_REACH = 7.5  # deviations covered


def slope(function: Function, z: Tensor) -> Tensor:
    """Derivative of an elementwise function.

    Args:
        function: elementwise, differentiable almost everywhere.
        z: where.

    Returns:
        f'(z), same shape.

    Example:
        >>> slope(torch.square, torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    value, pull = torch.func.vjp(lambda leaf: function(leaf.clone()), z)[:2]
    derivative: Tensor = pull(torch.ones_like(value))[0]
    return derivative


def fixed(function: Function, mean: Tensor, std: Tensor, shape: Shape, derivative: bool = True) -> Moments:
    """Moments by Gauss-Legendre panels between the function's breaks, without data-dependent control flow.

    Within a panel the nodes follow z = scale * sinh(u): dense around 0, where the function bends, and geometric
    beyond, so that one rule serves a Gaussian much narrower and much wider than the function's own scale.

    Args:
        function: elementwise.
        mean: mean of the Gaussian.
        std: its standard deviation, not negative.
        shape: breaks and scale of the function.
        derivative: also integrate f'^2.

    Returns:
        The moments, elementwise; the error is not estimated.

    Example:
        >>> round(fixed(torch.tanh, torch.zeros(()), torch.ones(()), Shape()).var.item(), 5)
        0.39429
    """
    mean, std = torch.broadcast_tensors(mean, std)
    wide, ratio = widen(mean, std)
    middle, reach = mean.detach(), wide.detach() * _REACH
    low, high = middle - reach, middle + reach
    kinks = [torch.clamp(torch.full_like(low, position), low, high) for position in shape.breaks]
    edges = torch.stack([low, middle, *kinks, high], dim=-1).sort(dim=-1).values
    u = torch.asinh(edges / shape.scale).unsqueeze(-1)
    length = u[..., 1:, :] - u[..., :-1, :]
    nodes, weights = mean.new_tensor(_NODES), mean.new_tensor(_WEIGHTS)
    u = (u[..., :-1, :] + length * nodes).flatten(-2)
    z = shape.scale * torch.sinh(u)
    measure = torch.sqrt(z * z + shape.scale**2) * (length * weights).flatten(-2)
    weight = measure * density(z, mean.unsqueeze(-1), wide.unsqueeze(-1))
    # The function may work in place: it gets copies, or tensors that are not needed again.
    squared_derivative = (slope(function, z).square() * weight).sum(-1) if derivative else mean.new_tensor(math.nan)
    centre = function(middle.clone()).detach()
    difference = function(z) - centre.unsqueeze(-1)
    weighted = difference * weight
    first, second = weighted.sum(-1), (weighted * difference).sum(-1)
    var = ((second - first * first) * (ratio * ratio)).clamp_min(0.0)
    return Moments(centre + first, var, squared_derivative)
