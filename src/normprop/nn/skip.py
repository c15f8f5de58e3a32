"""Skip connections by concatenation."""

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """What a branch makes of the input, and the input beside it, channel by channel: the skip of U-Nets.

    Channels of mean 0 and variance 1 stay so.

    Args:
        branch: module that keeps the input's size in space.

    Shape:
        (N, C, *S) to (N, C' + C, *S), for a branch from (N, C, *S) to (N, C', *S).

    Source:
        Ronneberger et al. 2015.

    Example:
        >>> from normprop.nn import Conv2d
        >>> Skip(Conv2d(4, 2, 3, padding=1, activation="relu"))(torch.randn(1, 4, 8, 8)).shape
        torch.Size([1, 6, 8, 8])
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, input: Tensor) -> Tensor:
        """Apply the branch and join."""
        return torch.cat([self.branch(input), input], 1)
