"""What the relatives of batch norm share with it: gain, bias, running averages and the count of values."""

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase


def require_values(name: str, input: Tensor, count: int, unit: str = "channel") -> None:
    """Refuse to train on a single value per channel, whose variance is zero.

    Args:
        name: name of the method.
        input: what it is to normalise.
        count: values per unit.
        unit: what the statistics are of.

    Raises:
        ValueError: if the count is one.

    Example:
        >>> import torch
        >>> require_values("batch", torch.zeros(1, 4), 1)
        Traceback (most recent call last):
        ValueError: norms.batch: expected more than 1 value per channel when training, got input size (1, 4)
    """
    if count == 1:
        size = tuple(input.shape)
        raise ValueError(f"norms.{name}: expected more than 1 value per {unit} when training, got input size {size}")


class RunningNorm(_NormBase):
    """Gain, bias and running averages under torch's names, so that a batch norm's state dict loads.

    Not one of torch's batch norms by type: what converts those, to synchronised ones for example, leaves this alone.

    Args:
        num_features: channels C of the input.
        eps: added to the variance.
        momentum: weight of a new batch in the running averages.
    """

    momentum: float  # type: ignore[assignment]
    running_mean: Tensor  # type: ignore[assignment]
    running_var: Tensor  # type: ignore[assignment]
    num_batches_tracked: Tensor  # type: ignore[assignment]

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)

    def begin_step(self, name: str, input: Tensor) -> int:
        """Count a training step, and return the values per channel of its batch (N, C, *space).

        Raises:
            ValueError: if there is one value per channel.
        """
        count = input[:, 0].numel()
        require_values(name, input, count)
        self.num_batches_tracked.add_(1)
        return count
