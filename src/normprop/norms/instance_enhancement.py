r"""``instance-enhancement``: batch norm whose gain is gated by the sample (IEBN).

.. math:: y_{nc} = \hat x_{nc} \, \gamma_c \, \delta_{nc} + \beta_c, \qquad \delta_{nc} = \sigma(a_c m_{nc} + b_c)

with :math:`\hat x` the batch-normalised input and m the mean over space of the *raw* input: the gate sees how strongly
the channel responds to this sample. a = 0 and b = -1 at the start, so the gate is :math:`\sigma(-1) \approx 0.27`.

- axes of the statistics: batch and space, per channel; the gate's mean: space, per sample and channel.
- train: statistics of the batch, and running averages of them. eval: the running averages. The gate is the sample's own
  in both.
- Two more parameters per channel, ``gate_weight`` (a) and ``gate_bias`` (b). Without space the mean is the value.

Use it when batch norm's batches are noisy and the two parameters per channel are affordable. Do not use it at batch
sizes where batch norm fails: the statistics are the same. The scale of the gate follows the raw activations.

Source:
    Liang et al. 2020. Their network keeps plain batch norm on the projections of the skip path; ours has the same
    method everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.fused import at_least_float32
from normprop.norms.plain import of_layers
from normprop.norms.running import RunningNorm


class InstanceEnhancementBatchNorm(RunningNorm):
    r"""Batch norm with a gate per sample and channel.

    Args:
        num_features: channels C of the input.
        eps: added to the variance.
        momentum: weight of a new batch in the running averages.

    Shape:
        (N, C, \*space) to the same.

    Raises:
        ValueError: from a training step with a single value per channel.

    Source:
        Liang et al. 2020.

    Example:
        >>> norm = InstanceEnhancementBatchNorm(4)
        >>> input = torch.randn(5, 4, 3)
        >>> ratio = norm(input) / nn.BatchNorm1d(4)(input)
        >>> torch.allclose(ratio, torch.tensor(-1.0).sigmoid())
        True
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.gate_weight = nn.Parameter(torch.zeros(num_features))
        self.gate_bias = nn.Parameter(torch.full((num_features,), -1.0))

    def gate(self, input: Tensor) -> Tensor:
        """Return the gate of a batch (N, C, *space) as (N, C, *ones), in float32 or better."""
        mean = at_least_float32(input).flatten(2).mean(2) if input.ndim > 2 else at_least_float32(input)
        gate = torch.sigmoid(torch.addcmul(self.gate_bias.to(mean.dtype), self.gate_weight.to(mean.dtype), mean))
        return gate.reshape(*gate.shape, *[1] * (input.ndim - 2))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, C, *space)."""
        if self.training:
            self.begin_step("instance-enhancement", input)
        scaled = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, None, self.training, self.momentum, self.eps
        )
        bias = self.bias.to(input.dtype).reshape(-1, *[1] * (input.ndim - 2))
        return torch.addcmul(bias, scaled, self.gate(input).to(input.dtype))


def instance_enhancement_norm(dims: int, channels: int) -> nn.Module:
    """Batch norm gated per sample, with the paper's initial values."""
    return InstanceEnhancementBatchNorm(channels)


METHODS = {
    "instance-enhancement": of_layers("Liang et al. 2020, Instance Enhancement Batch Norm", instance_enhancement_norm)
}
