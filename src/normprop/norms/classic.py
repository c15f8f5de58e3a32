"""``batch``, ``group``, ``layer`` and ``instance``: the norms that take statistics of activations, from torch.

All normalise ``(x - mean) / std`` and then apply a gain and a bias per channel; they differ in the axes of mean and
std.

- ``batch``: batch and space, per channel. Running averages in evaluation. Source: Ioffe & Szegedy 2015.
- ``layer``: channels and space, per sample. Source: Ba et al. 2016.
- ``instance``: space, per sample and channel. Source: Ulyanov et al. 2016.
- ``group``: a group of channels and space, per sample. Source: Wu & He 2018.

Use ``batch`` with batches of 16 or more on one device, ``group`` or ``layer`` below, ``layer`` in transformers. Do not
use ``batch`` where samples must not depend on each other, nor ``instance`` on maps of 1x1 or where the strength of a
channel tells the classes apart: it removes that.
"""

import math

from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.norms.plain import of_layers

_BATCH = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batch_norm(dims: int, channels: int) -> nn.Module:
    """Batch norm with torch's settings (momentum 0.1)."""
    return _BATCH[dims](channels)


def default_groups(dims: int, channels: int) -> int:
    """Return 32, or as many groups as divide the channels into groups of two or more, eight or more without space.

    Without space a group of two has two values, of which normalisation leaves no more than the order.

    Args:
        dims: spatial dimensions.
        channels: number of channels.

    Returns:
        The number of groups, a divisor of the channels; 1 where there is no other.

    Example:
        >>> default_groups(2, 192), default_groups(2, 48), default_groups(2, 5), default_groups(0, 64)
        (32, 8, 1, 8)
    """
    least = 2 if dims else 8
    return 1 if channels % least else math.gcd(channels // least, 32)


def group_norm(dims: int, channels: int) -> nn.Module:
    """Group norm with :func:`default_groups`."""
    return nn.GroupNorm(default_groups(dims, channels), channels)


def layer_norm(dims: int, channels: int) -> nn.Module:
    """Layer norm over channels and space, with a gain and a bias per channel."""
    return nn.GroupNorm(1, channels)


class InstanceNorm(nn.GroupNorm):
    """Instance norm over any number of spatial dimensions, with a gain and a bias per channel.

    Group norm with one channel per group is the same function as torch's instance norms, and takes empty batches.

    Args:
        channels: number of channels.

    Example:
        >>> import torch
        >>> InstanceNorm(2)(torch.tensor([[[1.0, 3.0], [5.0, 9.0]]])).round(decimals=2).tolist()
        [[[-1.0, 1.0], [-1.0, 1.0]]]
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each sample over space."""
        if input.shape[2:].numel() <= 1:
            size = tuple(input.shape)
            raise ValueError(f"norms.instance: expected more than 1 spatial element, got input size {size}")
        return super().forward(input)


def instance_norm(dims: int, channels: int) -> nn.Module:
    """Instance norm with a gain and a bias per channel.

    Raises:
        ConfigError: for a linear layer, which has no space to take statistics over.
    """
    if dims == 0:
        raise ConfigError("norms.instance: instance norm takes its statistics over space; a linear layer has none")
    return InstanceNorm(channels)


METHODS = {
    "batch": of_layers("Ioffe & Szegedy 2015, Batch Normalization", batch_norm),
    "group": of_layers("Wu & He 2018, Group Normalization", group_norm),
    "layer": of_layers("Ba, Kiros & Hinton 2016, Layer Normalization", layer_norm),
    "instance": of_layers("Ulyanov, Vedaldi & Lempitsky 2016, Instance Normalization", instance_norm),
}
