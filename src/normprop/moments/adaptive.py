"""Gaussian moments of any elementwise function by adaptive bisection, with an error estimate and a refusal.

Nodes and weights play the parts that they have in the fixed rule; where the panels end is decided by the function.
"""

import numpy as np
import torch
from torch import Tensor

from normprop.errors import MomentError
from normprop.moments.gaussian import density, widen
from normprop.moments.quadrature import Function, Shape
from normprop.moments.value import Moments


def _lobatto(count: int) -> tuple[list[float], list[float]]:
    """Gauss-Lobatto nodes and weights on [0, 1]: a kink close to the end of a panel cannot hide outside the last node.

    The end nodes lie a little inside, on the panel's own side of a kink at its very end.
    """
    polynomial = np.polynomial.legendre.Legendre.basis(count - 1)
    inner = np.sort(polynomial.deriv().roots().real)
    nodes = np.concatenate([[-1.0 + 2e-9], inner, [1.0 - 2e-9]])
    exact = np.zeros(count)
    exact[0] = 2.0
    weights = np.linalg.solve(np.polynomial.legendre.legvander(nodes, count - 1).T, exact)
    return ((nodes + 1.0) / 2.0).tolist(), (weights / 2.0).tolist()


_NODES, _WEIGHTS = _lobatto(17)  # per panel
_REACH = 20.0  # deviations covered
_TAIL = 17.0  # what lies beyond must not matter
_ROUNDS = 60
_PANELS = 2000  # per Gaussian
_RELIABLE = 1e-8  # largest relative error that passes
_INFINITE = (
    "{name}: at std {std:.4g} its moments are infinite or too large to compute, as it has a singularity or grows too "
    "fast against the Gaussian; use a tamer activation or a smaller std"
)


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
        >>> round(adaptive(torch.exp, 0 * one, one, Shape(), "exp").mean.item(), 12)  # exp(1 / 2)
        1.6487212707
    """
    require_elementwise(function, mean, name)
    mean, std = torch.broadcast_tensors(mean, std)
    wide, ratio = (part.flatten() for part in widen(mean, std))
    flat = mean.flatten()
    centre = function(flat.detach().clone())
    graph, centre = centre.requires_grad, centre.detach()
    low, high, owner, errors = _refine(function, flat.detach(), wide.detach(), centre, shape, name)

    nodes, weights = mean.new_tensor(_NODES), mean.new_tensor(_WEIGHTS)
    length = (high - low).unsqueeze(-1)
    z = low.unsqueeze(-1) + length * nodes
    weight = length * weights * density(z, flat[owner].unsqueeze(-1), wide[owner].unsqueeze(-1))
    value, slopes = _evaluate(function, z.detach(), graph)
    difference = value - centre[owner].unsqueeze(-1)
    integrands = torch.stack([difference, difference.square(), slopes.square()], dim=-1) * weight.unsqueeze(-1)

    distance = ((z - flat[owner].unsqueeze(-1)) / wide[owner].unsqueeze(-1)).abs().detach()
    sizes = integrands.detach().abs()
    outer = (sizes * (distance > _TAIL).unsqueeze(-1)).sum()
    if outer > 1e-12 * sizes.sum() + 1e-60 * (1.0 + centre.square().sum()):
        raise MomentError(_INFINITE.format(name=name, std=float(wide.max())))
    sums = torch.zeros(len(flat), 3, dtype=mean.dtype, device=mean.device).index_add(0, owner, integrands.sum(1))
    first, second, squared_derivative = sums.unbind(-1)
    var = ((second - first * first) * ratio.square()).clamp_min(0.0)
    error = float(
        torch.stack([errors[:, 0], errors[:, 1] + 2.0 * first.detach().abs() * errors[:, 0], errors[:, 2]]).max()
    )
    first, var, squared_derivative = (part.reshape(mean.shape) for part in (centre + first, var, squared_derivative))
    return Moments(first, var, squared_derivative, error)


@torch.no_grad()
def _refine(
    function: Function, mean: Tensor, std: Tensor, centre: Tensor, shape: Shape, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bisect panels until each agrees with its two halves: low, high, owner of every panel; errors per Gaussian."""
    steps = mean.new_tensor([-20, -17, -12, -8, -6, -4, -2, 0, 2, 4, 6, 8, 12, 17, 20])
    known = {*shape.breaks, *(sign * shape.scale * 2.0**k for sign in (-1, 1) for k in range(-1, 4))}
    low, high = (mean - _REACH * std).unsqueeze(-1), (mean + _REACH * std).unsqueeze(-1)
    own = torch.clamp(mean.new_tensor(sorted(known)).expand(len(mean), -1), low, high)
    edges = torch.cat([mean.unsqueeze(-1) + std.unsqueeze(-1) * steps, own], dim=-1).sort(-1).values
    keep = edges[:, 1:] > edges[:, :-1]
    low, high, owner = edges[:, :-1][keep], edges[:, 1:][keep], keep.nonzero()[:, 0]

    def integrate(low: Tensor, high: Tensor, owner: Tensor) -> Tensor:
        """Integrals of g, g^2, f'^2, |g| (g = f - centre), then the rounding noise of the first three; (panels, 7)."""
        nodes, weights = low.new_tensor(_NODES), low.new_tensor(_WEIGHTS)
        length = (high - low).unsqueeze(-1)
        z = low.unsqueeze(-1) + length * nodes
        value, slopes = _evaluate(function, z, graph=False)
        bad = ~(torch.isfinite(value) & torch.isfinite(slopes))
        if bool(bad.any()):
            raise MomentError(
                f"{name}: not finite, value {float(value[bad][0])} and slope {float(slopes[bad][0])} at z = "
                f"{float(z[bad][0]):.6g}, within {_REACH:g} deviations of the mean; the moments need a function "
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
        weight = length * weights * density(z, mean[owner].unsqueeze(-1), std[owner].unsqueeze(-1))
        integrals = (rows * weight.unsqueeze(1)).sum(-1)
        if not bool(torch.isfinite(integrals).all()):
            raise MomentError(_INFINITE.format(name=name, std=float(std.max())))
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
    if part.shape != (5,) or folded.shape != (2, 3, 4):
        raise MomentError(f"{name}: does not keep the shape of its input; {hint}")
    if not _close(value, again):
        raise MomentError(f"{name}: gives different values for the same input; {hint}, so put it in eval mode")
    if not (_close(value[:5], part) and _close(value, folded.flatten())):
        raise MomentError(f"{name}: the value at one element depends on the others; {hint}")


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to how vectorised arithmetic may differ with the position of an element."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True)


def _kind(value: object) -> str:
    """Shape of a tensor, or the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _evaluate(function: Function, z: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    """Value and slope, eagerly; with `graph` both can be differentiated in the function's own parameters."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = function(leaf.clone())
        if not value.requires_grad:
            return value, torch.zeros_like(z)
        (slopes,) = torch.autograd.grad(value, leaf, torch.ones_like(value), create_graph=graph, allow_unused=True)
    slopes = torch.zeros_like(z) if slopes is None else slopes
    return (value, slopes) if graph else (value.detach(), slopes.detach())
