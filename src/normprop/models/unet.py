"""A small U-Net for volumes or images."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.moments import Activation


class UpAndJoin(nn.Module):
    """Double the size of one map and put it beside another, channel by channel.

    Shape:
        (N, C, *S) and (N, C', *2S) to (N, C + C', *2S).

    Example:
        >>> UpAndJoin()(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 6, 6)).shape
        torch.Size([1, 6, 6, 6])
    """

    def __init__(self) -> None:
        super().__init__()
        # Repeating values keeps their mean and variance, which interpolating between them would not.
        self.up = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        """Join the two maps."""
        return torch.cat([self.up(small), large], 1)


class Level(nn.Module):
    """One level of a U: convolutions down, the levels below at half the size, convolutions up.

    Args:
        down: module on the way down; its output also skips what is below.
        below: the next level.
        up: module on the way up, from the channels of ``below`` and ``down`` together.
        dims: spatial dimensions, 2 or 3.

    Shape:
        (N, C, *S) with even S to what ``up`` makes of (N, C', *S).
    """

    _pools: ClassVar = {2: nn.MaxPool2d, 3: nn.MaxPool3d}

    def __init__(self, down: nn.Module, below: nn.Module, up: nn.Module, dims: int) -> None:
        super().__init__()
        self.down = down
        self.pool = self._pools[dims](2)
        self.below = below
        self.join = UpAndJoin()
        self.up = up

    def forward(self, input: Tensor) -> Tensor:
        """Apply the level and everything below it."""
        wide = self.down(input)
        output: Tensor = self.up(self.join(self.below(self.pool(wide)), wide))
        return output


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
        >>> unet(1, 2, width=0.25)(torch.randn(1, 1, 8, 8, 8)).shape
        torch.Size([1, 2, 8, 8, 8])
    """
    if dims not in (2, 3):
        raise ConfigError(f"unet: dims must be 2 or 3, got {dims!r}")
    build = norms.block(norm, dims=dims)

    def twice(inputs: int, outputs: int) -> nn.Module:
        first = build(inputs, outputs, 3, padding=1, activation=activation)
        return nn.Sequential(first, build(outputs, outputs, 3, padding=1, activation=activation))

    small, middle, large = (max(1, round(channels * width)) for channels in (16, 32, 64))
    lowest = twice(middle, large)
    lower = Level(twice(small, middle), lowest, twice(large + middle, middle), dims)
    upper = Level(twice(in_channels, small), lower, twice(middle + small, small), dims)
    return norms.finish(norm, nn.Sequential(upper, norms.head(norm, dims=dims)(small, num_classes, 1)))
