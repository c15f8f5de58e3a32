"""A small U-Net for volumes or images."""

from torch import nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.nn import Skip


def unet(
    in_channels: int = 1,
    num_classes: int = 2,
    norm: str = "normprop",
    width: float = 1.0,
    dims: int = 3,
    activation: Activation = "relu",
) -> nn.Module:
    """Build a U-Net of three levels with 16, 32 and 64 channels, two 3x3x3 convolutions a level and direction.

    Args:
        in_channels: channels of the volume.
        num_classes: number of classes of a voxel.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of channels.
        dims: spatial dimensions, 3 for volumes or 2 for images.
        activation: activation of the hidden layers.

    Returns:
        A network from (N, in_channels, *S), S divisible by 4, to logits (N, num_classes, *S).

    Raises:
        ConfigError: for other dims.

    Source:
        Cicek et al. 2016, smaller, with padding and with the nearest value for upsampling.

    Example:
        >>> import torch
        >>> unet(1, 2, width=0.25)(torch.randn(1, 1, 8, 8, 8)).shape
        torch.Size([1, 2, 8, 8, 8])
    """
    if dims not in (2, 3):
        raise ConfigError(f"unet: dims must be 2 or 3, got {dims!r}")
    build = norms.block(norm, dims=dims)

    def twice(inputs: int, outputs: int) -> nn.Module:
        first = build(inputs, outputs, 3, padding=1, activation=activation)
        return nn.Sequential(first, build(outputs, outputs, 3, padding=1, activation=activation))

    def below(module: nn.Module) -> Skip:
        pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
        # Repeating values keeps their mean and variance, which interpolating between them would not.
        return Skip(nn.Sequential(pool, module, nn.Upsample(scale_factor=2, mode="nearest")))

    small, middle, large = (max(1, round(channels * width)) for channels in (16, 32, 64))
    lower = nn.Sequential(twice(small, middle), below(twice(middle, large)), twice(large + middle, middle))
    upper = nn.Sequential(twice(in_channels, small), below(lower), twice(middle + small, small))
    return norms.finish(norm, nn.Sequential(upper, norms.head(norm, dims=dims)(small, num_classes, 1)))
