"""Residual networks for small images."""

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
    build, add = norms.block(norm, dims=2), norms.residual(norm, dims=2)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        branch = nn.Sequential(
            build(inputs, outputs, 3, stride=stride, padding=1, activation=activation),
            build(outputs, outputs, 3, padding=1, activation=None),
        )
        same = stride == 1 and inputs == outputs
        shortcut = None if same else build(inputs, outputs, 1, stride=stride, activation=None)
        return add(branch, shortcut, activation=activation)

    stages = [max(1, round(channels * width)) for channels in (16, 32, 64)]
    layers = [build(in_channels, stages[0], 3, padding=1, activation=activation)]
    inputs = stages[0]
    for stage, outputs in enumerate(stages):
        for index in range((depth - 2) // 6):
            layers.append(block(inputs, outputs, 2 if stage and not index else 1))
            inputs = outputs
    head = norms.head(norm, dims=0)(inputs, num_classes)
    return norms.finish(norm, nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head))
