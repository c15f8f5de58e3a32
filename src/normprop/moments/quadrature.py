"""Gaussian moments of any elementwise function by quadrature: a fixed rule for the graph and a checked, adaptive one.

Both place nodes in z, hold them constant, and let the weights, the density of N(mean, std^2) at the nodes, carry the
gradient in mean and std: this stays exact where the function has kinks or jumps and never differentiates it twice.
The function is taken relative to its value at the mean, so that a small deviation does not cancel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normprop.errors import MomentError
from normprop.moments.gaussian import SQRT_2PI, legendre
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

_NODES, _WEIGHTS = legendre(20)  # per panel of the fixed rule
_REACH = 7.5  # deviations it covers
_FAR_REACH = 20.0  # deviations covered by the adaptive rule
_TAIL = 17.0  # what lies beyond must not matter
_FINE_NODES, _FINE_WEIGHTS = legendre(16)  # per panel of the adaptive rule
_ROUNDS = 60
_PANELS = 2000  # per Gaussian
_RELIABLE = 1e-8  # largest relative error that the checked rule lets pass
_GROWS = (
    "{name}: at std {std:.4g} it grows too fast against the Gaussian for its moments to be computed, or even to exist; "
    "use an activation that grows more slowly, or a smaller std"
)


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
    value, pull = torch.func.vjp(function, z)
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
    wide, ratio = _widen(mean, std)
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
    density = measure * _density(z, mean.unsqueeze(-1), wide.unsqueeze(-1))
    centre = function(middle).detach()
    difference = function(z) - centre.unsqueeze(-1)
    weighted = difference * density
    first, second = weighted.sum(-1), (weighted * difference).sum(-1)
    var = ((second - first * first) * (ratio * ratio)).clamp_min(0.0)
    if not derivative:
        return Moments(centre + first, var)
    return Moments(centre + first, var, (slope(function, z).square() * density).sum(-1))


def _widen(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A deviation that z = mean + std * x can resolve, and the part of it that std is: f is linear on that scale."""
    wide = torch.maximum(std, torch.finfo(std.dtype).eps ** 0.5 * (1.0 + mean.detach().abs()))
    return wide, std / wide


def _density(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Density of N(mean, std^2)."""
    x = (z - mean) / std
    return torch.exp(x * x * -0.5) / (std * SQRT_2PI)


def adaptive(function: Function, mean: Tensor, std: Tensor, shape: Shape, name: str) -> Moments:
    """Moments by adaptive bisection, with an error estimate; raises when they are not reliable.

    Args:
        function: the function, in float64.
        mean: mean of the Gaussian, float64.
        std: its standard deviation, not negative.
        shape: known breaks and scale; kinks elsewhere are found.
        name: what to call the function in an error.

    Returns:
        The moments, elementwise, with the largest absolute error estimate.

    Raises:
        MomentError: if the function is not elementwise, not finite, grows faster than the Gaussian decays, or the
            integral does not converge.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> round(adaptive(torch.exp, 0 * one, one, Shape(), "exp").mean.item(), 12) == round(math.exp(0.5), 12)
        True
    """
    require_elementwise(function, mean, name)
    mean, std = torch.broadcast_tensors(mean, std)
    wide, ratio = (part.flatten() for part in _widen(mean, std))
    flat = mean.flatten()
    centre = function(flat.detach()).detach()
    low, high, owner, errors = _refine(function, flat.detach(), wide.detach(), centre, shape, name)

    nodes, weights = mean.new_tensor(_FINE_NODES), mean.new_tensor(_FINE_WEIGHTS)
    length = (high - low).unsqueeze(-1)
    z = low.unsqueeze(-1) + length * nodes
    density = length * weights * _density(z, flat[owner].unsqueeze(-1), wide[owner].unsqueeze(-1))
    difference = function(z) - centre[owner].unsqueeze(-1)
    slopes = slope(function, z)
    integrands = torch.stack([difference, difference.square(), slopes.square()], dim=-1) * density.unsqueeze(-1)

    distance = ((z - flat[owner].unsqueeze(-1)) / wide[owner].unsqueeze(-1)).abs().detach()
    sizes = integrands.detach().abs()
    outer = (sizes * (distance > _TAIL).unsqueeze(-1)).sum()
    if outer > 1e-12 * sizes.sum() + 1e-60 * (1.0 + centre.square().sum()):
        raise MomentError(_GROWS.format(name=name, std=float(wide.max())))
    sums = torch.zeros(len(flat), 3, dtype=mean.dtype, device=mean.device).index_add(0, owner, integrands.sum(1))
    first, second, squared_derivative = sums.unbind(-1)
    var = ((second - first * first) * ratio.square()).clamp_min(0.0)
    error = float(
        torch.stack([errors[:, 0], errors[:, 1] + 2.0 * first.detach().abs() * errors[:, 0], errors[:, 2]]).max()
    )
    return Moments(*((part.reshape(mean.shape)) for part in (centre + first, var, squared_derivative)), error=error)


@torch.no_grad()
def _refine(
    function: Function, mean: Tensor, std: Tensor, centre: Tensor, shape: Shape, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bisect panels until each agrees with its two halves: low, high, owner of every panel; errors per Gaussian."""
    steps = mean.new_tensor([-20, -17, -12, -8, -6, -4, -2, 0, 2, 4, 6, 8, 12, 17, 20])
    known = {*shape.breaks, *(sign * shape.scale * 2.0**k for sign in (-1, 1) for k in range(-1, 4))}
    low, high = (mean - _FAR_REACH * std).unsqueeze(-1), (mean + _FAR_REACH * std).unsqueeze(-1)
    own = torch.clamp(mean.new_tensor(sorted(known)).expand(len(mean), -1), low, high)
    edges = torch.cat([mean.unsqueeze(-1) + std.unsqueeze(-1) * steps, own], dim=-1).sort(-1).values
    keep = edges[:, 1:] > edges[:, :-1]
    low, high, owner = edges[:, :-1][keep], edges[:, 1:][keep], keep.nonzero()[:, 0]

    def integrate(low: Tensor, high: Tensor, owner: Tensor) -> Tensor:
        """Integrals of g, g^2, f'^2, |g| (g = f - centre), then the rounding noise of the first three; (panels, 7)."""
        nodes, weights = low.new_tensor(_FINE_NODES), low.new_tensor(_FINE_WEIGHTS)
        length = (high - low).unsqueeze(-1)
        z = low.unsqueeze(-1) + length * nodes
        value, slopes = function(z), slope(function, z)
        bad = ~(torch.isfinite(value) & torch.isfinite(slopes))
        if bool(bad.any()):
            raise MomentError(
                f"{name}: not finite, value {float(value[bad][0])} and slope {float(slopes[bad][0])} at z = "
                f"{float(z[bad][0]):.6g}, within {_FAR_REACH:g} deviations of the mean; the moments need a function "
                f"that is finite there"
            )
        g = value - centre[owner].unsqueeze(-1)
        size, square = g.abs(), slopes.square()
        x = ((z - mean[owner].unsqueeze(-1)) / std[owner].unsqueeze(-1)).abs()
        eps = torch.finfo(value.dtype).eps
        noise = eps * (value.abs() + centre[owner].unsqueeze(-1).abs() + z.abs() * (1.0 + slopes.abs()))
        density_noise = eps * (1.0 + x * x + x * z.abs() / std[owner].unsqueeze(-1))
        noises = (
            noise + size * density_noise,
            (2.0 * size + noise) * noise + size * size * density_noise,
            (2.0 * slopes.abs() + noise) * noise + square * density_noise,
        )
        rows = torch.stack([g, g * g, square, size, *noises], dim=1)
        density = length * weights * _density(z, mean[owner].unsqueeze(-1), std[owner].unsqueeze(-1))
        integrals = (rows * density.unsqueeze(1)).sum(-1)
        if not bool(torch.isfinite(integrals).all()):
            raise MomentError(_GROWS.format(name=name, std=float(std.max())))
        return integrals

    whole = integrate(low, high, owner)
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    errors = mean.new_zeros(len(mean), 3)
    total = mean.new_zeros(len(mean), 7).index_add(0, owner, whole.abs())
    settled = torch.zeros_like(total)
    count = 0
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        left, right = integrate(low, middle, owner), integrate(middle, high, owner)
        difference = (left + right - whole).abs()[:, :3]
        total = settled.index_add(0, owner, (left + right).abs())
        # Many panels at work on one Gaussian are rounding noise (few are kinks): each may then be less exact.
        crowd = torch.bincount(owner, minlength=len(mean))[owner].unsqueeze(-1) / 32.0
        allowed = 1e-14 * crowd.clamp_min(1.0) ** 4 * total[owner][:, [3, 1, 2]] + 10.0 * whole[:, 4:]
        narrow = (high - low) <= 8.0 * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
        accept = (difference <= allowed).all(-1) | narrow
        done.append((low[accept], high[accept], owner[accept]))
        count += int(accept.sum())
        settled = settled.index_add(0, owner[accept], whole[accept].abs())
        errors = errors.index_add(0, owner[accept], difference[accept])
        split = ~accept
        if not bool(split.any()) or count + 2 * int(split.sum()) > _PANELS * len(mean):
            break
        low, middle, high, owner = low[split], middle[split], high[split], owner[split]
        low, high, owner = torch.cat([low, middle]), torch.cat([middle, high]), owner.repeat(2)
        whole = torch.cat([left[split], right[split]])
    reliable = _RELIABLE * total[:, [3, 1, 2]] + 100.0 * total[:, 4:]
    if bool(split.any()) or bool((errors > reliable).any()):
        raise MomentError(
            f"{name}: the Gaussian integral does not converge at std {float(std.max()):.4g}; the function or its slope "
            f"has a singularity or oscillates too fast for moments to be reliable"
        )
    low, high, owner = (torch.cat(parts) for parts in zip(*done, strict=True))
    return low, high, owner, errors


@torch.no_grad()
def require_elementwise(function: Function, like: Tensor, name: str) -> None:
    """Raise unless a function acts on every element alone and the same way each time.

    Args:
        function: the function to try, on a few values.
        like: gives dtype and device.
        name: what to call the function in the error.

    Raises:
        MomentError: if it changes shape, mixes elements, is random or cannot be applied at all.

    Example:
        >>> require_elementwise(torch.tanh, torch.zeros(()), "tanh")
    """
    z = torch.linspace(-3.0, 3.0, 24, dtype=like.dtype, device=like.device)
    hint = "moments need an elementwise function of one tensor"
    try:
        value = function(z.clone())
        if not isinstance(value, Tensor) or value.shape != z.shape:
            raise MomentError(f"{name}: turns shape {tuple(z.shape)} into {_kind(value)}; {hint}")
        again, part, folded = function(z.clone()), function(z[:5].clone()), function(z.reshape(2, 3, 4).clone())
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, MomentError):
            raise
        raise MomentError(f"{name}: cannot be applied to a float64 tensor ({error}); {hint}") from error
    close = dict(rtol=1e-5, atol=1e-8, equal_nan=True)
    if not torch.allclose(value, again, **close):
        raise MomentError(f"{name}: gives different values for the same input; {hint}, so put it in eval mode")
    if part.shape != (5,) or folded.shape != (2, 3, 4):
        raise MomentError(f"{name}: does not keep the shape of its input; {hint}")
    if not (torch.allclose(value[:5], part, **close) and torch.allclose(value, folded.flatten(), **close)):
        raise MomentError(f"{name}: the value at one element depends on the others; {hint}")


def _kind(value: object) -> str:
    """Shape of a tensor, or the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
