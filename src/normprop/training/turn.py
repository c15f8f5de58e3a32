"""A bound on the angle by which one update turns a filter."""

from collections.abc import Iterable

import torch

from normprop.fused import at_least_float32, filters
from normprop.nn import NormPropLayer


@torch.no_grad()
def bound_turns_(layers: Iterable[NormPropLayer], limit: float) -> None:
    r"""Shorten gradients in place to a length of at most ``limit``, filter by filter.

    .. math:: G_i \leftarrow \min(1, \lambda / \|G_i\|)\, G_i

    A filter's gradient is at right angles to the filter, so a step against it turns a filter of length 1 by an angle
    whose tangent is rate times :math:`\|G_i\|`; with momentum :math:`\mu`, gradients that stay the same turn it by
    :math:`1 / (1 - \mu)` times as much.

    Args:
        layers: those whose weights' gradients are shortened; layers without gradient are left alone.
        limit: lambda, the largest length of a filter's gradient.

    Source:
        Ours; clipping by unit: Brock et al. 2021.

    Example:
        >>> from normprop.nn import Linear
        >>> layer = Linear(2, 2, center=False)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> bound_turns_([layer], 1.0)
        >>> layer.weight.grad
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    moved = [layer for layer in layers if layer.weight.grad is not None]
    # Most updates need nothing, and a whole layer's norm tells so. On an accelerator the look would cost a wait.
    if moved and moved[0].weight.device.type == "cpu":
        norms = torch._foreach_norm([layer.weight.grad for layer in moved])
        moved = [layer for layer, norm in zip(moved, norms, strict=True) if not norm.item() <= limit]
    for layer in moved:
        gradient = layer.weight.grad
        rows = filters(at_least_float32(gradient), layer.groups, layer._transposed)
        norm = torch.linalg.vector_norm(rows, dim=(1, 3), keepdim=True)
        # A length of 0 makes the quotient infinite: factor 1.
        gradient.copy_((rows * (limit / norm).clamp_max(1.0)).reshape(gradient.shape))
