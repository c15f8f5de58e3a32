"""Mean and variance of each channel of what goes into layers or comes out of them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def channel_axis(module: nn.Module) -> int:
    """Axis of the channels around a module: the second for a convolution, the last for linear maps on tokens.

    Example:
        >>> channel_axis(nn.Conv2d(3, 4, 3)), channel_axis(nn.Linear(3, 4))
        (1, -1)
    """
    return -1 if all(parameter.ndim <= 2 for parameter in module.parameters()) else 1


def channel_moments(values: Tensor, axis: int = 1) -> Tensor:
    """Mean and variance of every channel over samples and positions.

    Args:
        values: (N, channels, *space), or with the channels on another axis.
        axis: that of the channels.

    Returns:
        (2, channels), without a graph, in float32 or better; the variance divides by the count.

    Example:
        >>> channel_moments(torch.tensor([[1.0, -2.0], [3.0, -2.0]]))
        tensor([[ 2., -2.],
                [ 1.,  0.]])
    """
    values = values.detach()
    values = (values if values.dtype == torch.float64 else values.float()).movedim(axis, 0).flatten(1)
    var, mean = torch.var_mean(values, 1, correction=0)
    return torch.stack([mean, var])


@contextmanager
def recording(layers: Sequence[tuple[str, nn.Module]], inputs: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    """Record the moments of the channels at some layers for the block.

    Args:
        layers: names and modules.
        inputs: look at what goes in instead of what comes out.

    Returns:
        For each layer that was called :func:`channel_moments`, one for each call, in the order of the first calls.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> with recording([("layer", layer)]) as found:
        ...     _ = layer(torch.ones(2, 4))
        >>> [moments.shape for moments in found["layer"]]
        [torch.Size([2, 3])]
    """
    found: dict[str, list[Tensor]] = {}

    def look(name: str, axis: int, value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(name, []).append(channel_moments(value, axis))

    def hook(name: str, axis: int) -> Any:
        if inputs:
            return lambda module, args: look(name, axis, args[0] if args else None)
        return lambda module, args, output: look(name, axis, output)

    with ExitStack() as stack:
        for name, layer in layers:
            register = layer.register_forward_pre_hook if inputs else layer.register_forward_hook
            stack.callback(register(hook(name, channel_axis(layer))).remove)
        yield found


def pooled(calls: Tensor) -> Tensor:
    """Moments over some calls, which take in equally many values.

    Args:
        calls: :func:`channel_moments` of each call, (calls, 2, channels).

    Returns:
        (2, channels).

    Example:
        >>> pooled(torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]]))
        tensor([[1.],
                [3.]])
    """
    means, variances = calls.unbind(1)
    return torch.stack([means.mean(0), variances.mean(0) + means.var(0, correction=0)])  # Var = E[Var] + Var[E]
