r"""``batch-group``: batch group normalisation, a batch norm whose channels are cut or merged into G groups.

A sample of (C, \*space) is flattened to D numbers, channel after channel, and cut into G groups of D / G:

.. math:: \hat x_{ng} = (x_{ng} - \mu_g) / \sqrt{\sigma_g^2 + \epsilon}, \qquad y = \gamma_c \hat x + \beta_c

- axes of the statistics: the batch and the D / G numbers of a group; gain and bias per channel.
- train: statistics of the batch, and running averages of them per group. eval: the running averages.
- G = C is batch norm; with one sample and G dividing C it is group norm; G = D takes statistics over the batch alone.

Where G divides C, a group is a number of whole channels and any input size works. Otherwise G must divide D, and
groups are blocks of rows of the map: evaluate at the size of the training.

Use it when batches are small, down to one image, and a batch norm with running averages is wanted: fewer groups steady
the statistics. Do not use it where the samples must not depend on each other.

Source:
    Zhou et al. 2020 (abstract read; the definition is the usual account of it). The paper tunes G to the batch size:
    many groups for large batches. Our default, which does not know the batch size, is the one of ``group``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.norms.classic import default_groups
from normprop.norms.plain import of_layers
from normprop.norms.running import require_values


class BatchGroupNorm(nn.Module):
    r"""Batch norm over groups of channels, or over parts of channels.

    Args:
        num_features: channels C of the input.
        num_groups: groups G, a divisor of C or of C times the size of the map. Fewer groups give more values to each
            statistic; use C with large batches. ``None``: as many as group norm has for maps.
        eps: added to the variance.
        momentum: weight of a new batch in the running averages.

    Shape:
        (N, C, \*space) to the same; running averages (G,), gain and bias (C,).

    Raises:
        ConfigError: for a number of groups below one, or one that does not divide the size of the input.
        ValueError: from a training step with a single value per group.

    Source:
        Zhou et al. 2020.

    Example:
        >>> norm = BatchGroupNorm(8, num_groups=2)
        >>> norm(torch.randn(1, 8, 3, 3)).unflatten(1, (2, 4)).mean((2, 3, 4)).abs().max() < 1e-6
        tensor(True)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, num_groups: int | None = None, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_groups = default_groups(2, num_features) if num_groups is None else num_groups
        if self.num_groups < 1:
            raise ConfigError(f"norms.batch-group: num_groups must be 1 or more, got {num_groups}")
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(self.num_groups))
        self.register_buffer("running_var", torch.ones(self.num_groups))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, C, *space)."""
        size = math.prod(input.shape[1:])
        if size % self.num_groups:
            raise ConfigError(
                f"norms.batch-group: {self.num_groups} groups do not divide a sample of {size} values, input size "
                f"{tuple(input.shape)}; num_groups must divide the channels, or the channels times the map's size"
            )
        groups = input.reshape(input.shape[0], self.num_groups, size // self.num_groups)
        if self.training:
            require_values("batch-group", input, groups[:, 0].numel(), "group")
            self.num_batches_tracked.add_(1)
        normalized = F.batch_norm(
            groups, self.running_mean, self.running_var, None, None, self.training, self.momentum, self.eps
        ).reshape(input.shape)
        per_channel = (-1, *[1] * (input.ndim - 2))
        return torch.addcmul(
            self.bias.reshape(per_channel).to(input.dtype), normalized, self.weight.reshape(per_channel).to(input.dtype)
        )

    def extra_repr(self) -> str:
        """Channels and groups."""
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, momentum={self.momentum}"


def batch_group_norm(dims: int, channels: int) -> nn.Module:
    """Batch group norm with the default number of groups."""
    return BatchGroupNorm(channels)


METHODS = {"batch-group": of_layers("Zhou et al. 2020, Batch Group Normalization", batch_group_norm)}
