"""The network-in-network of the Normalization Propagation paper."""

from torch import nn

from normprop import norms
from normprop.moments import Activation


def nin(
    in_channels: int,
    num_classes: int,
    norm: str = "normprop",
    width: float = 1.0,
    activation: Activation = "relu",
    printed_padding: bool = False,
) -> nn.Module:
    """Build the paper's network: nine convolutions, two poolings, global average.

    The last map is averaged over whatever size is left (8x8 for 32x32 inputs), so other image sizes work.

    Args:
        in_channels: channels of the image.
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of channels.
        activation: activation of the hidden layers.
        printed_padding: pad the last 5x5 convolution by 0 and the 1x1 after it by 2, as the paper prints it: the outer
            ring of the map then sees only padding. Otherwise by 2 and 0, almost surely what was meant.

    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes).

    Source:
        Arpit et al. 2016, section 5; Lin et al. 2014.

    Example:
        >>> import torch
        >>> nin(3, 10, width=0.125)(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    build = norms.block(norm, dims=2)

    def channels(count: int) -> int:
        return max(1, round(count * width))

    def conv(inputs: int, outputs: int, kernel_size: int, padding: int) -> nn.Module:
        return build(inputs, outputs, kernel_size, padding=padding, activation=activation)

    c192, c160, c96 = channels(192), channels(160), channels(96)
    wide, narrow = (0, 2) if printed_padding else (2, 0)
    network = nn.Sequential(
        conv(in_channels, c192, 5, 2),
        conv(c192, c160, 1, 0),
        nn.MaxPool2d(3, 2, 1),
        conv(c160, c96, 1, 0),
        conv(c96, c192, 5, 2),
        conv(c192, c192, 1, 0),
        nn.AvgPool2d(3, 2, 1),
        conv(c192, c192, 1, 0),
        conv(c192, c192, 5, wide),
        conv(c192, c192, 1, narrow),
        norms.head(norm, dims=2)(c192, num_classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return norms.finish(norm, network)
