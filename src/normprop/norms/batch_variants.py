r"""``sync-batch``, ``frozen-batch`` and ``ghost-batch``: batch norm with the statistics of other samples.

All three compute batch norm, :math:`y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta` per channel over batch
and space, and have its state dict: each loads a checkpoint of torch's batch norm. They differ in where the statistics
of training come from; in evaluation all use the running averages.

- ``sync-batch``: the batches of all processes together. One process alone: batch norm.
- ``frozen-batch``: the running averages, which never move: train and eval are the same function.
- ``ghost-batch``: a part of the batch, of about ``ghost_size`` samples.

Use ``sync-batch`` when the batch is spread so thin that a process has too few samples. Use ``frozen-batch`` to tune a
trained network further at a small batch; do not use it to train a new one, where it is a gain and a bias per channel.
Use ``ghost-batch`` with large batches, for the noise of small ones; do not use it at 16 samples or below, where it is
batch norm.

Source:
    Ioffe & Szegedy 2015; sync: torch's SyncBatchNorm; frozen: torchvision's FrozenBatchNorm2d, whose gain and bias are
    fixed as well (ours learn; ``requires_grad_(False)`` gives its behaviour); ghost: Hoffer et al. 2017.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.norms.plain import of_layers
from normprop.norms.running import RunningNorm, require_values


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; so is its gradient, as every process's output depends on every input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        """Return the sum."""
        ctx.group = group
        total = input.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum the gradients."""
        total: Tensor = _SumOverProcesses.apply(grad, ctx.group)
        return total, None


def moments_over_processes(input: Tensor, group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take mean and variance per channel of the batches of all processes of a group, which may differ in size.

    Two sums go over the wire, the second of deviations from the joint mean: no difference of large squares.

    Args:
        input: this process's batch (N, C, *space); N may be 0.
        group: process group; ``None`` for all processes.

    Returns:
        Mean and biased variance (C,), in float32 or better, and the number of values per channel.
    """
    values = at_least_float32(input).transpose(0, 1).flatten(1)
    sums = torch.cat([values.sum(1), values.new_full((1,), values.shape[1])])
    total: Tensor = _SumOverProcesses.apply(sums, group)
    count = total[-1].detach()
    mean = total[:-1] / count.clamp_min(1)
    squares: Tensor = _SumOverProcesses.apply((values - mean[:, None]).square().sum(1), group)
    return mean, squares / count.clamp_min(1), count


class SyncBatchNorm(nn.SyncBatchNorm):
    r"""Torch's synchronised batch norm, with processes on CPUs as well.

    Args: those of :class:`torch.nn.SyncBatchNorm`.

    Shape:
        (N, C, \*space) to the same.

    Raises:
        ValueError: from a training step with a single value per channel over all processes.

    Source:
        Ioffe & Szegedy 2015.

    Example:
        >>> SyncBatchNorm(4)(torch.randn(5, 4, 3)).mean((0, 2)).abs().max() < 1e-6
        tensor(True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise this process's share (N, C, *space) of a batch."""
        together = self.training and dist.is_available() and dist.is_initialized()
        if not together or input.device.type != "cpu":
            return super().forward(input)
        mean, var, count = moments_over_processes(input, self.process_group)
        require_values("sync-batch", input, int(count))
        self._track(mean, var, int(count))
        per_channel = (-1, *[1] * (input.ndim - 2))
        scale = (var + self.eps).rsqrt() * self.weight
        centered = at_least_float32(input) - mean.reshape(per_channel)
        return torch.addcmul(self.bias.reshape(per_channel), centered, scale.reshape(per_channel)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running averages as torch does, unless no process has a sample."""
        if count and self.running_mean is not None and self.running_var is not None:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            step = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), step)


class FrozenBatchNorm(RunningNorm):
    r"""Batch norm with fixed statistics: mean 0 and variance 1 until a state dict brings others.

    Args:
        num_features: channels C of the input.
        eps: added to the variance.
        momentum: has no effect.

    Shape:
        (N, C, \*space) to the same.

    Source:
        torchvision's FrozenBatchNorm2d; gain and bias learn here.

    Example:
        >>> trained = nn.BatchNorm1d(4)
        >>> _ = trained(torch.randn(8, 4))
        >>> frozen = FrozenBatchNorm(4)
        >>> _ = frozen.load_state_dict(trained.state_dict())
        >>> input = torch.randn(1, 4)
        >>> torch.equal(frozen(input), trained.eval()(input))
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, C, *space)."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class GhostBatchNorm(RunningNorm):
    r"""Batch norm within parts of the batch.

    The batch is cut, in order, into floor(N / ghost_size) parts as equal as can be, so a rest is spread over the others
    and no part is smaller than a ghost; a batch smaller than a ghost is one part. The running averages move once per
    part, as if the parts had come one after the other.

    Args:
        num_features: channels C of the input.
        ghost_size: samples per part.
        eps: added to the variance.
        momentum: weight of a new part in the running averages.

    Shape:
        (N, C, \*space) to the same.

    Raises:
        ConfigError: for a ghost size below one.
        ValueError: from a training step with a single value per channel in a part.

    Source:
        Hoffer et al. 2017; the equal parts are ours.

    Example:
        >>> norm = GhostBatchNorm(4, ghost_size=8)
        >>> norm(torch.randn(20, 4))[:10].mean(0).abs().max() < 1e-6
        tensor(True)
    """

    def __init__(self, num_features: int, ghost_size: int = 16, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        if ghost_size < 1:
            raise ConfigError(f"norms.ghost-batch: ghost_size must be 1 or more, got {ghost_size}")
        self.ghost_size = ghost_size

    def _normalize(self, input: Tensor) -> Tensor:
        """Batch norm of one part."""
        if self.training:
            self.begin_step("ghost-batch", input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, C, *space)."""
        ghosts = max(1, input.shape[0] // self.ghost_size) if self.training else 1
        return torch.cat([self._normalize(part) for part in input.tensor_split(ghosts)])

    def extra_repr(self) -> str:
        """Size of a ghost, then torch's."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


def sync_batch_norm(dims: int, channels: int) -> nn.Module:
    """Batch norm over all processes."""
    return SyncBatchNorm(channels)


def frozen_batch_norm(dims: int, channels: int) -> nn.Module:
    """Batch norm with fixed statistics."""
    return FrozenBatchNorm(channels)


def ghost_batch_norm(dims: int, channels: int) -> nn.Module:
    """Batch norm over parts of 16 samples."""
    return GhostBatchNorm(channels)


METHODS = {
    "sync-batch": of_layers("Ioffe & Szegedy 2015, Batch Normalization (torch's SyncBatchNorm)", sync_batch_norm),
    "frozen-batch": of_layers("Ioffe & Szegedy 2015, Batch Normalization (frozen statistics)", frozen_batch_norm),
    "ghost-batch": of_layers("Hoffer, Hubara & Soudry 2017, Train longer, generalize better", ghost_batch_norm),
}
