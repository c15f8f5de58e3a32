"""Adaptive gradient clipping: a unit's gradient may not be too large for its weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

from normprop.fused import at_least_float32


@torch.no_grad()
def adaptive_gradient_clip_(parameters: Tensor | Iterable[Tensor], clipping: float = 0.01, eps: float = 1e-3) -> None:
    r"""Clip gradients in place, unit by unit, relative to the norm of the unit's weights.

    .. math:: G_i \leftarrow \lambda \frac{\max(\|W_i\|, \varepsilon)}{\|G_i\|} G_i
        \quad\text{where}\quad \frac{\|G_i\|}{\max(\|W_i\|, \varepsilon)} > \lambda

    A unit is a row (filter) of a parameter of two or more dimensions, along axis 0, and the whole of any other.
    Call it between ``backward()`` and ``optimizer.step()``; the authors leave the classifier out.

    Args:
        parameters: what to clip; those without gradient are left alone.
        clipping: lambda, the largest ratio of the norms.
        eps: smallest norm that a unit's weights are taken to have, so that zero weights can move.

    Source:
        Brock et al. 2021, High-Performance Large-Scale Image Recognition Without Normalization.

    Example:
        >>> weight = torch.ones(1, 4, requires_grad=True)
        >>> weight.grad = torch.ones(1, 4)
        >>> adaptive_gradient_clip_(weight)
        >>> weight.grad
        tensor([[0.0100, 0.0100, 0.0100, 0.0100]])
    """
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if parameter.grad is None:
            continue
        limit = clipping * _unit_norm(parameter).clamp_min(eps)
        # A gradient of zero keeps factor 1: limit / 0 is infinite.
        factor = (limit / _unit_norm(parameter.grad)).clamp_max(1.0)
        parameter.grad.mul_(factor.to(parameter.grad.dtype))


def _unit_norm(value: Tensor) -> Tensor:
    """Norm of every unit, shaped to broadcast against the parameter."""
    axes = tuple(range(1, value.ndim)) if value.ndim >= 2 else None
    norm: Tensor = torch.linalg.vector_norm(at_least_float32(value), dim=axes, keepdim=value.ndim >= 2)
    return norm
