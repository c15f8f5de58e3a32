r"""``batch-renorm``: batch norm that is pulled towards its running averages, the farther the longer it trains.

.. math::
    y = \gamma \left(\frac{x - \mu_B}{\sigma_B} \, r + d\right) + \beta, \qquad
    r = \mathrm{clip}(\sigma_B / \sigma, 1 / r_{max}, r_{max}), \quad
    d = \mathrm{clip}((\mu_B - \mu) / \sigma, -d_{max}, d_{max})

with :math:`\mu, \sigma` the running averages before this batch. r and d are constants to the gradient. Unclipped, the
output is that of evaluation; with r_max = 1 and d_max = 0 it is batch norm.

- axes of the statistics: batch and space, per channel.
- train: as above, then the running averages move. eval: the running averages, as batch norm.
- schedule: batch norm for the first steps, then r_max grows linearly to 3 and d_max to 5. The training step is
  ``num_batches_tracked``, so a checkpoint carries it on.
- A training step with one value per channel is refused at every stage of the schedule: there the value less its mean
  is zero, and so is every gradient below.

Use it when batches are small or not independent and the training is long enough for the ramp. Do not use it at batch
size 1 without space, or with a training too short to leave its first steps: that is batch norm.

Source:
    Ioffe 2017, from memory: limits and steps of the schedule are the customary ones, not checked against the paper.
    Our running averages keep the unbiased variance, torch's meaning, so that checkpoints of a batch norm load.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.norms.plain import of_layers
from normprop.norms.running import RunningNorm

STEPS = (5_000, 40_000, 25_000)
"""Batch norm until the first step; r_max is reached at the second, d_max at the third: for 100,000 steps and more."""


def ramp(step: Tensor, start: int, end: int) -> Tensor:
    """Return how far a step is from start to end, from 0 to 1.

    Example:
        >>> ramp(torch.tensor([5, 10, 15, 20, 25]), 10, 20)
        tensor([0.0000, 0.0000, 0.5000, 1.0000, 1.0000])
    """
    return ((step - start) / (end - start)).clamp(0, 1)


class BatchRenorm(RunningNorm):
    r"""Batch renormalisation with its schedule.

    Args:
        num_features: channels C of the input.
        r_max: largest correction of the standard deviation, as a factor, at the end of the schedule.
        d_max: largest correction of the mean, in standard deviations, at the end of the schedule.
        steps: training steps until which it is batch norm, at which r_max is reached, and at which d_max is.
        eps: added to the variances.
        momentum: weight of a new batch in the running averages.

    Shape:
        (N, C, \*space) to the same.

    Raises:
        ConfigError: for r_max below 1, d_max below 0, or steps out of order.
        ValueError: from a training step with a single value per channel.

    Source:
        Ioffe 2017.

    Example:
        >>> norm = BatchRenorm(4, steps=(0, 10, 10))
        >>> norm.limits()
        (tensor(1.), tensor(0.))
        >>> _ = norm(torch.randn(8, 4))
        >>> norm.limits()
        (tensor(1.2000), tensor(0.5000))
    """

    def __init__(
        self,
        num_features: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        steps: tuple[int, int, int] = STEPS,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        if not (r_max >= 1 and d_max >= 0):
            raise ConfigError(f"norms.batch-renorm: r_max must be >= 1 and d_max >= 0, got {r_max} and {d_max}")
        if not 0 <= steps[0] < min(steps[1:]):
            raise ConfigError(
                f"norms.batch-renorm: steps must be (start, r_end, d_end) with 0 <= start < both ends, got {steps}"
            )
        self.r_max = r_max
        self.d_max = d_max
        self.steps = steps

    def limits(self) -> tuple[Tensor, Tensor]:
        """Return r_max and d_max at the present step."""
        step, (start, r_end, d_end) = self.num_batches_tracked, self.steps
        return 1 + (self.r_max - 1) * ramp(step, start, r_end), self.d_max * ramp(step, start, d_end)

    @torch.no_grad()
    def _corrections(self, input: Tensor, limits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return r and d of a batch, and move the running averages."""
        values = at_least_float32(input)
        var, mean = torch.var_mean(values, [0, *range(2, input.ndim)], correction=0)
        count = input.numel() // input.shape[1]
        r_max, d_max = limits
        std = (self.running_var.to(values.dtype) + self.eps).sqrt()
        r = ((var + self.eps).sqrt() / std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / std).clamp(-d_max, d_max)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return r, d

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, C, *space)."""
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        limits = self.limits()
        if self.begin_step("batch-renorm", input) == 0:
            return input
        r, d = self._corrections(input, limits)
        weight, bias = self.weight.to(r.dtype), self.bias.to(r.dtype)
        # Renormalisation is batch norm with another gain and bias, constants to the gradient.
        return F.batch_norm(input, None, None, weight * r, torch.addcmul(bias, weight, d), True, 0.0, self.eps)

    def extra_repr(self) -> str:
        """Limits and schedule, then torch's."""
        return f"{super().extra_repr()}, r_max={self.r_max}, d_max={self.d_max}, steps={self.steps}"


def batch_renorm(dims: int, channels: int) -> nn.Module:
    """Batch renorm with a schedule ten times shorter: the reference trainings have some thousand steps."""
    start, r_end, d_end = STEPS
    return BatchRenorm(channels, steps=(start // 10, r_end // 10, d_end // 10))


METHODS = {"batch-renorm": of_layers("Ioffe 2017, Batch Renormalization", batch_renorm)}
