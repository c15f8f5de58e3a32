"""A network with two branches, one for each half of an image, joined before the classifier."""

import torch
from torch import Tensor, nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.moments import Activation
from normprop.norms.regbn import RegBN
from normprop.norms.ridge import Constraint


class Concatenate(nn.Module):
    """Put the features of two branches side by side.

    Example:
        >>> Concatenate()(torch.zeros(2, 3), torch.zeros(2, 4)).shape
        torch.Size([2, 7])
    """

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Join along axis 1."""
        return torch.cat([left, right], 1)


class RegressAndConcatenate(nn.Module):
    """Take out of the left features what is linear in the right ones, then put both side by side.

    Args:
        regbn: the RegBN of left against right.

    Example:
        >>> RegressAndConcatenate(RegBN(3, 4))(torch.randn(5, 3), torch.randn(5, 4)).shape
        torch.Size([5, 7])
    """

    def __init__(self, regbn: RegBN) -> None:
        super().__init__()
        self.regbn = regbn

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Normalise and join along axis 1."""
        return torch.cat(self.regbn(left, right), 1)


class TwoViews(nn.Module):
    """Send the left and the right half of an image through a branch each and join their features.

    Args:
        left: branch for the columns 0 to W // 2 - 1.
        right: branch for the other columns.
        fusion: takes the features of both branches, (N, F) each, to (N, G).

    Shape:
        (N, C, H, W) to (N, G), with W at least 2.

    Raises:
        ValueError: for an image of a single column.

    Example:
        >>> views = TwoViews(nn.Flatten(), nn.Flatten(), Concatenate())
        >>> views(torch.arange(4.0).reshape(1, 1, 2, 2))
        tensor([[0., 2., 1., 3.]])
    """

    def __init__(self, left: nn.Module, right: nn.Module, fusion: nn.Module) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.fusion = fusion

    def forward(self, images: Tensor) -> Tensor:
        """Split, run both branches, join."""
        middle = images.shape[-1] // 2
        if not middle:
            raise ValueError(f"two-view: an image needs 2 columns to have two halves, got size {list(images.shape)}")
        joined: Tensor = self.fusion(self.left(images[..., :middle]), self.right(images[..., middle:]))
        return joined


def two_view(
    in_channels: int,
    num_classes: int,
    norm: str = "normprop",
    width: float = 1.0,
    activation: Activation = "relu",
    constraint: Constraint = "code",
) -> nn.Sequential:
    """Build the network: per half three 3x3 convolutions (32, 64 and 64 channels) and a global average, then a joint
    linear classifier.

    With ``norm="reg"`` the branches are those of batch norm and their features meet in one RegBN, left regressed on
    right, as its paper has it; with all other methods they are put side by side.

    Args:
        in_channels: channels of the image.
        num_classes: number of outputs.
        norm: name of the method (:func:`normprop.norms.names`).
        width: multiplies the number of channels.
        activation: activation of the hidden layers.
        constraint: how RegBN's penalty is found, "code", "paper" or "none"; for ``norm="reg"`` alone.

    Returns:
        A network from (N, in_channels, H, W) to logits (N, num_classes); its first part is a :class:`TwoViews`.

    Raises:
        ConfigError: for a constraint other than "code" with another method, where there is nothing to constrain.

    Source:
        Ours; the fusion is that of Ghahremani & Wachinger 2023.

    Example:
        >>> two_view(1, 10, norm="reg", width=0.25)(torch.randn(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """
    if norm != "reg" and constraint != "code":
        raise ConfigError(f"two-view: constraint={constraint!r} is a setting of the method 'reg', but norm is {norm!r}")
    method = "batch" if norm == "reg" else norm
    build = norms.block(method, dims=2)
    narrow, wide = (max(2, round(channels * width)) for channels in (32, 64))

    def branch() -> nn.Module:
        layers = nn.Sequential(
            build(in_channels, narrow, 3, padding=1, activation=activation),
            nn.MaxPool2d(3, 2, 1),
            build(narrow, wide, 3, padding=1, activation=activation),
            build(wide, wide, 3, padding=1, activation=activation),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        # Each branch is a chain of its own to methods that link a layer to the one before.
        return norms.finish(method, layers)

    fusion = RegressAndConcatenate(RegBN(wide, wide, constraint)) if norm == "reg" else Concatenate()
    return nn.Sequential(TwoViews(branch(), branch(), fusion), norms.head(method, dims=0)(2 * wide, num_classes))
