r"""``cross-iteration``: batch norm with the statistics of the last k batches, corrected for the change of the weights.

The last batches were seen with other weights. Their mean and variance are carried to the present weights W by a Taylor
expansion to first order in the weights of the same layer, then averaged with those of the present batch:

.. math::
    \mu_\tau(W) \approx \mu_\tau + \langle \partial \mu_\tau / \partial W, W - W_\tau \rangle, \qquad
    \nu_\tau(W) \approx \nu_\tau + \langle \partial \nu_\tau / \partial W, W - W_\tau \rangle, \qquad
    \mu = \overline{\mu_\tau}, \quad \sigma^2 = \overline{\nu_\tau} - \mu^2

with :math:`\nu` the mean square. For W x both derivatives have a closed form: the mean patch of the input, one for all
filters of a group, and the weight gradient of :math:`2 y / n`. The mean is linear in W, so exact for a fixed input; the
mean square comes out too small by the mean of :math:`((W - W_\tau) x)^2`.

- axes of the statistics: batch and space, per channel, over the last k batches.
- train: for the first ``burn_in`` steps batch norm, then the window. Only the present batch has a gradient. Running
  averages are of the present batch alone. eval: the running averages, as batch norm.
- A past batch whose corrected variance is negative is left out, per channel.

Use it when batches are small, after a burn-in that has settled the weights. Do not use it from the first step: past
batches are constants to the gradient, and small networks then train worse than with batch norm. Nor where memory is
short: it keeps 2 (k - 1) copies of every weight.

Source:
    Yao et al. 2021, and its public code: left-out channels (``negative_variance="zero"`` is the other guard in use),
    derivatives kept without gradient. That code puts epsilon outside the square root, draws the initial
    gain from [0, 1), and burns in for 8 of 12 epochs; here epsilon is inside, the gain starts at 1, and the burn-in is
    a number of steps during which the window already fills.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as gradients

from normprop.errors import ConfigError
from normprop.fused import at_least_float32
from normprop.moments import Activation
from normprop.norms.plain import activation_module, linear_map, of_blocks
from normprop.norms.running import RunningNorm

_WEIGHT_GRADIENTS = (gradients.conv1d_weight, gradients.conv2d_weight, gradients.conv3d_weight)


class Past(NamedTuple):
    """Statistics of past batches, each with a leading axis for the batch; F is the fan-in, G the groups.

    ``weight`` (C, F) at the time, ``mean`` and ``var`` (C,), the derivatives ``mean_slope`` (G, F) and ``var_slope``
    (C, F).
    """

    weight: Tensor
    mean: Tensor
    var: Tensor
    mean_slope: Tensor
    var_slope: Tensor


def slopes(linear: Any, input: Tensor, centered: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate mean and variance of a linear map's output by its weight, in closed form.

    Args:
        linear: torch's linear map or convolution.
        input: its input (N, in, *space).
        centered: its output less the mean per channel (N, out, *space).

    Returns:
        Derivative of the mean, the same for every filter of a group, (groups, fan-in), and of the biased variance,
        (out, fan-in).

    Source:
        Yao et al. 2021, where autograd computes it; the closed form is ours.

    Example:
        >>> mean, var = slopes(nn.Linear(2, 1), torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[-1.0], [1.0]]))
        >>> mean.tolist(), var.tolist()
        ([[2.0, 1.0]], [[2.0, 2.0]])
    """
    if isinstance(linear, nn.Linear):  # a convolution over one pixel
        input, centered, groups, kernel, options = input[..., None], centered[..., None], 1, [1], {}
    else:
        mode = "constant" if linear.padding_mode == "zeros" else linear.padding_mode
        input = F.pad(input, linear._reversed_padding_repeated_twice, mode)
        groups, kernel = linear.groups, linear.kernel_size
        options = {"stride": linear.stride, "dilation": linear.dilation, "groups": groups}
    centered = centered.unflatten(1, (groups, -1))
    # One more filter per group, with a constant gradient, gives the mean patch.
    outer = torch.cat([2 * centered, torch.ones_like(centered[:, :, :1])], 2).flatten(1, 2)
    shape = (outer.shape[1], input.shape[1] // groups, *kernel)
    weight_gradient = _WEIGHT_GRADIENTS[len(kernel) - 1]
    both = weight_gradient(input, shape, outer / outer[:, 0].numel(), **options).reshape(
        groups, centered.shape[2] + 1, -1
    )
    return both[:, -1], both[:, :-1].flatten(0, 1)


def compensate(past: Past, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Carry mean and variance of past batches to a new weight, to first order in mean and mean square.

    In terms of the variance rather than of the mean square, which is the same but for rounding:
    var + <dvar, change> - <dmean, change>^2.

    Args:
        past: statistics of k batches.
        weight: present weight (C, F).

    Returns:
        Means and variances, each (k, C); a variance can come out negative.

    Source:
        Yao et al. 2021.
    """
    change = weight - past.weight
    by_group = change.unflatten(1, (past.mean_slope.shape[1], -1))
    shift = (by_group * past.mean_slope[:, :, None]).sum(3).flatten(1)
    return past.mean + shift, past.var + (past.var_slope * change).sum(2) - shift.square()


class CrossIterationNorm(RunningNorm):
    r"""Batch norm over the last batches, for the output of one linear map.

    Args:
        linear: the linear map, without bias, whose output is normalised; it is not kept.
        window: number of batches k, the present one included; 1 is batch norm.
        burn_in: training steps of plain batch norm before the window is used.
        negative_variance: what to do with a past batch whose corrected variance is negative, per channel: ``"drop"``
            it, or take its variance as ``"zero"``.
        eps: added to the variance.
        momentum: weight of a new batch in the running averages.

    Shape:
        output (N, C, \*space) and input (N, C_in, \*space') of the linear map, to (N, C, \*space).

    Raises:
        ConfigError: for a window below 1, a negative burn-in or an unknown treatment of negative variances.
        ValueError: from a training step with a single value per channel.

    Source:
        Yao et al. 2021.

    Example:
        >>> linear = nn.Linear(3, 4, bias=False)
        >>> norm = CrossIterationNorm(linear, burn_in=0)
        >>> input = torch.randn(5, 3)
        >>> norm(linear(input), input, linear).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        linear: Any,
        window: int = 4,
        burn_in: int = 500,
        negative_variance: Literal["drop", "zero"] = "drop",
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        if window < 1 or burn_in < 0:
            raise ConfigError(
                f"norms.cross-iteration: window must be >= 1 and burn_in >= 0, got {window} and {burn_in}"
            )
        if negative_variance not in ("drop", "zero"):
            raise ConfigError(
                f"norms.cross-iteration: negative_variance must be 'drop' or 'zero', got {negative_variance!r}"
            )
        weight = linear.weight.detach().flatten(1)
        super().__init__(weight.shape[0], eps, momentum)
        self.window = window
        self.burn_in = burn_in
        self.negative_variance = negative_variance
        channels, groups = weight[:, 0], weight[: getattr(linear, "groups", 1)]
        for name, part in Past(weight, channels, channels, groups, weight)._asdict().items():
            self.register_buffer(f"past_{name}", torch.zeros_like(part).expand(window - 1, *part.shape).clone())

    def past(self) -> Past:
        """Return what is kept of the last batches, in a cycle: step t is in row (t - 1) % (window - 1)."""
        return Past(*(at_least_float32(getattr(self, f"past_{name}")) for name in Past._fields))

    @torch.no_grad()
    def _remember(self, present: Past) -> None:
        """Put the present batch in the place of the oldest."""
        row = (self.num_batches_tracked[None] - 1) % (self.window - 1)
        for name, part in present._asdict().items():
            buffer = getattr(self, f"past_{name}")
            buffer.index_copy_(0, row, part[None].to(buffer.dtype))

    @torch.no_grad()
    def _compensated(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, variances and usability of the last batches, each (window - 1, C)."""
        past = self.past()
        mean, var = compensate(past, weight)
        step = self.num_batches_tracked
        kept = torch.arange(self.window - 1, device=step.device) < step - 1
        use = (kept & (step > self.burn_in))[:, None].expand_as(var)
        if self.negative_variance == "drop":
            use = use & (var >= 0)
        return mean.where(use, 0), var.clamp_min(0).where(use, 0), use

    def forward(self, output: Tensor, input: Tensor, linear: Any) -> Tensor:
        """Normalise the output that the linear map gave for an input."""
        if not self.training:
            return F.batch_norm(output, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        count = self.begin_step("cross-iteration", output)
        if count == 0:
            return output
        if self.window == 1:
            return F.batch_norm(
                output, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
            )
        values = at_least_float32(output)
        var, mean = torch.var_mean(values, [0, *range(2, output.ndim)], correction=0)
        per_channel = (-1, *[1] * (output.ndim - 2))
        weight = at_least_float32(linear.weight.detach()).flatten(1)
        past_mean, past_var, use = self._compensated(weight)
        with torch.no_grad():
            centered = values - mean.reshape(per_channel)
            self._remember(Past(weight, mean, var, *slopes(linear, input.to(values.dtype), centered)))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        batches = 1 + use.sum(0)
        window_mean = (mean + past_mean.sum(0)) / batches
        # The variance of the window's union: within the batches, and between their means.
        between = (mean - window_mean).square() + ((past_mean - window_mean).square() * use).sum(0)
        window_var = (var + past_var.sum(0) + between) / batches
        scale = (window_var + self.eps).rsqrt() * self.weight
        shifted = values - window_mean.reshape(per_channel)
        return torch.addcmul(self.bias.to(scale.dtype).reshape(per_channel), shifted, scale.reshape(per_channel)).to(
            output.dtype
        )

    def extra_repr(self) -> str:
        """Window and burn-in, after torch's."""
        return f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}"


class CrossIterationBlock(nn.Module):
    """Linear map without bias, cross-iteration norm, activation.

    Args:
        linear: torch's linear map or convolution, without bias.
        norm: made for it.
        activation: name, module, callable or ``None``.

    Example:
        >>> linear = nn.Conv2d(3, 8, 3, bias=False)
        >>> CrossIterationBlock(linear, CrossIterationNorm(linear))(torch.randn(2, 3, 5, 5)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, linear: nn.Module, norm: CrossIterationNorm, activation: Activation = "relu") -> None:
        super().__init__()
        self.linear = linear
        self.norm = norm
        self.activation = nn.Identity() if activation is None else activation_module(activation)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the three in turn."""
        output: Tensor = self.activation(self.norm(self.linear(input), input, self.linear))
        return output


def block(dims: int, *args: Any, activation: Activation = "relu", **kwargs: Any) -> nn.Module:
    """Linear map, cross-iteration norm with a window of 4 and a burn-in of 500 steps, activation."""
    linear = linear_map(dims, *args, activation=activation, bias=False, **kwargs)
    return CrossIterationBlock(linear, CrossIterationNorm(linear), activation)


METHODS = {"cross-iteration": of_blocks("Yao et al. 2021, Cross-Iteration Batch Normalization", block)}
