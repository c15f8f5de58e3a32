"""Batch norm without the batch: layers that normalise by predicted mean and variance.

Where batch norm measures the mean and variance of its input, these layers know them: from the moments of what comes
before, sent through the network by its own weights. A sample's output never depends on the other samples, and train()
equals eval().
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normprop.fused import at_least_float32
from normprop.moments.linear import Coverage, as_rows, filtered
from normprop.nn.conv import Conv1d, Conv2d, Conv3d
from normprop.nn.conv_transpose import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from normprop.nn.linear import Linear

Source = Callable[[], tuple[Tensor, Tensor]]


class Predicted(nn.Module):
    """What layers that normalise by prediction share: mean and variance of their input's channels.

    Fixed moments are buffers ``mean`` and ``var``. Live ones are worked out in every forward pass by ``source``, from
    the present weights, gains and biases of the layers before, and gradients flow through them. ``correction`` is one
    number, by which the predicted variance of what is normalised is multiplied.
    """

    mean: Tensor
    var: Tensor
    correction: Tensor
    source: Source | None

    def predict(self, mean: Tensor, var: Tensor, source: Source | None = None) -> None:
        """Set the moments of the input.

        Args:
            mean: mean of every channel, (channels,).
            var: variance of every channel.
            source: what works them out anew in every forward pass; ``None`` for moments that stay.
        """
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("var", var.detach().clone())
        self.register_buffer("correction", torch.ones((), device=var.device, dtype=var.dtype))
        self.source = source

    def predicted(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of the input's channels as they are predicted now."""
        return (self.mean, self.var) if self.source is None else self.source()


class PredictedNorm(Predicted):
    r"""Normalise every channel by its predicted mean and variance: :math:`(x - m) / \sqrt{v + \epsilon} \, g + b`.

    Args:
        num_features: channels C.
        eps: added to the variance.
        affine: whether there are a gain ``weight`` and a ``bias``.
        device, dtype: of parameters and buffers.

    Shape:
        (N, C, \*space) to the same.

    Example:
        >>> norm = PredictedNorm(2)
        >>> norm.predict(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 1.0]))
        >>> norm(torch.tensor([[3.0, 3.0]])).detach()
        tensor([[1.0000, 3.0000]])
    """

    weight: Any
    bias: Any

    def __init__(
        self, num_features: int, eps: float = 1e-5, affine: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.affine = affine
        new = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features, **new)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features, **new)) if affine else None)
        self.predict(torch.zeros(num_features, **new), torch.ones(num_features, **new))

    def reset_parameters(self) -> None:
        """Set the gain to 1 and the bias to 0."""
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as ``x * scale + shift``, (channels,) each, in float32 or better."""
        mean, var = self.predicted()
        scale = (at_least_float32(var) * self.correction + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -at_least_float32(mean) * scale
        return scale, shift if self.bias is None else shift + self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the channels, axis 1."""
        size = [-1] + [1] * (input.ndim - 2)
        scale, shift = (part.to(input.dtype).reshape(size) for part in self.scale_and_shift())
        return torch.addcmul(shift, input, scale)

    def extra_repr(self) -> str:
        """Channels and settings."""
        kind = "fixed" if self.source is None else "live"
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, moments={kind}"


class PredictedLayer(Predicted):
    r"""A linear map with the normalisation of its output absorbed into weight and bias.

    .. math:: o_i = g_i \, (W_i * x - W_i m) / \sqrt{W_i^2 v + \epsilon} + b_i

    m and v are the predicted mean and variance of the input's channels; with ``center`` each filter's mean is
    subtracted first. Mixed into torch's own layers. What a bias of the linear map adds, the normalisation takes away.
    """

    weight: Any
    bias: Any
    gain: Any
    groups: Any = 1
    center: bool = False
    eps: float = 0.0
    seen: Coverage | None = None
    _transposed: bool = False

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer of the same class that does the same, in float32 or better."""
        weight = at_least_float32(self.weight)
        if self.center:
            axes = [*range(1, weight.ndim)]
            rows = as_rows(weight, self.groups) if self._transposed else weight
            middle = rows.mean(axes, keepdim=True)
            weight = weight - (self._as_weight(middle) if self._transposed else middle)
        rows = as_rows(weight, self.groups) if self._transposed else weight
        mean, var = filtered(rows, *self.predicted(), self.groups, self.seen)
        scale = (var * self.correction + self.eps).rsqrt()
        if self.gain is not None:
            scale = scale * self.gain
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        factor = scale.reshape([-1] + [1] * (weight.ndim - 1))
        scaled = weight * (self._as_weight(factor) if self._transposed else factor)
        # Strides of axes of length 1 are anyone's guess, and a compiler may take a 1x1 filter for channels-last.
        return scaled.flatten().view(scaled.shape), shift

    def _as_weight(self, value: Tensor) -> Tensor:
        """One number per filter, (out, 1, ...), so that it broadcasts against a transposed convolution's weight."""
        fan = self.weight.shape[0] // self.groups
        shape = [self.groups, 1, -1] + [1] * (self.weight.ndim - 2)
        return value.reshape(shape).expand(-1, fan, *[-1] * (len(shape) - 2)).flatten(0, 1)

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """Apply the layer; the arguments are those of torch's own class."""
        weight, bias = self.effective()
        output: Tensor = self._linear(input, weight.to(self.weight.dtype), bias.to(self.weight.dtype), *args)  # type: ignore[operator]
        return output

    def extra_repr(self) -> str:
        """Torch's own description, then the settings of the normalisation."""
        kind = "fixed" if self.source is None else "live"
        return f"{super().extra_repr()}, center={self.center}, moments={kind}"


class PredictedLinear(PredictedLayer, nn.Linear):
    """Fully connected layer with predicted normalisation, see :class:`PredictedLayer`."""

    _linear = Linear._linear


class PredictedConv1d(PredictedLayer, nn.Conv1d):
    """One-dimensional convolution with predicted normalisation, see :class:`PredictedLayer`."""

    _linear = Conv1d._linear


class PredictedConv2d(PredictedLayer, nn.Conv2d):
    """Two-dimensional convolution with predicted normalisation, see :class:`PredictedLayer`."""

    _linear = Conv2d._linear


class PredictedConv3d(PredictedLayer, nn.Conv3d):
    """Three-dimensional convolution with predicted normalisation, see :class:`PredictedLayer`."""

    _linear = Conv3d._linear


class PredictedConvTranspose1d(PredictedLayer, nn.ConvTranspose1d):
    """One-dimensional transposed convolution with predicted normalisation, see :class:`PredictedLayer`."""

    _transposed = True
    _spatial_dims = 1
    _conv_transpose = ConvTranspose1d._conv_transpose
    _linear = ConvTranspose1d._linear


class PredictedConvTranspose2d(PredictedLayer, nn.ConvTranspose2d):
    """Two-dimensional transposed convolution with predicted normalisation, see :class:`PredictedLayer`."""

    _transposed = True
    _spatial_dims = 2
    _conv_transpose = ConvTranspose2d._conv_transpose
    _linear = ConvTranspose2d._linear


class PredictedConvTranspose3d(PredictedLayer, nn.ConvTranspose3d):
    """Three-dimensional transposed convolution with predicted normalisation, see :class:`PredictedLayer`."""

    _transposed = True
    _spatial_dims = 3
    _conv_transpose = ConvTranspose3d._conv_transpose
    _linear = ConvTranspose3d._linear
