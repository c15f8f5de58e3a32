"""Residual networks: for small images, and the one of 18 layers for ImageNet."""

from collections.abc import Sequence

from torch import nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.moments import Activation


def resnet(
    depth: int,
    in_channels: int = 3,
    num_classes: int = 10,
    norm: str = "normprop",
    width: float = 1.0,
    activation: Activation = "relu",
) -> nn.Module:
    """Build the residual network of 6n + 2 layers: three stages of n blocks with 16, 32 and 64 channels.

    Where the size changes, the skip path is a 1x1 projection with stride 2 (option B).

    Args:
        depth: number of layers, 6n + 2: 8, 14, 20, ...
        in_channels: channels of the image.
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of channels.
        activation: activation of the hidden layers.

    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ConfigError: for a depth that is not 6n + 2.

    Source:
        He et al. 2016, section 4.2.

    Example:
        >>> import torch
        >>> resnet(8, width=0.5)(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    if depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"resnet: depth must be 6n + 2 (8, 14, 20, ...), got {depth}")
    stages = [max(1, round(channels * width)) for channels in (16, 32, 64)]
    stem = norms.block(norm, dims=2)(in_channels, stages[0], 3, padding=1, activation=activation)
    return _network(norm, [stem], stages, (depth - 2) // 6, num_classes, activation)


def resnet18(
    in_channels: int = 3,
    num_classes: int = 1000,
    norm: str = "normprop",
    width: float = 1.0,
    activation: Activation = "relu",
) -> nn.Module:
    """Build the residual network of 18 layers: four stages of two blocks with 64, 128, 256 and 512 channels.

    A 7x7 convolution and a max pooling, both with stride 2, come first, as for ImageNet; images of 64x64 leave maps of
    2x2 at the end. Where the size changes, the skip path is a 1x1 projection with stride 2 (option B).

    Args:
        in_channels: channels of the image.
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of channels.
        activation: activation of the hidden layers.

    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).

    Source:
        He et al. 2016, table 1.

    Example:
        >>> import torch
        >>> resnet18(3, 10, width=0.125)(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    stages = [max(1, round(channels * width)) for channels in (64, 128, 256, 512)]
    stem = norms.block(norm, dims=2)(in_channels, stages[0], 7, stride=2, padding=3, activation=activation)
    return _network(norm, [stem, nn.MaxPool2d(3, 2, 1)], stages, 2, num_classes, activation)


def _network(
    norm: str, stem: list[nn.Module], stages: Sequence[int], blocks: int, num_classes: int, activation: Activation
) -> nn.Module:
    """The stem, stages of residual blocks of two 3x3 convolutions, the average over the map and the head."""
    build, add = norms.block(norm, dims=2), norms.residual(norm, dims=2)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        branch = nn.Sequential(
            build(inputs, outputs, 3, stride=stride, padding=1, activation=activation),
            build(outputs, outputs, 3, padding=1, activation=None),
        )
        same = stride == 1 and inputs == outputs
        shortcut = None if same else build(inputs, outputs, 1, stride=stride, activation=None)
        return add(branch, shortcut, activation=activation)

    layers, inputs = stem, stages[0]
    for stage, outputs in enumerate(stages):
        for index in range(blocks):
            layers.append(block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    head = norms.head(norm, dims=0)(inputs, num_classes)
    return norms.finish(norm, nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
