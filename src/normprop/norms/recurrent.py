r"""``recurrent-normprop``: a row LSTM with Normalization Propagation, and a layer-norm LSTM to compare it with.

The block is an LSTM that reads the rows of its map one after the other (the first spatial axis is time; other spatial
axes belong to the batch). Its gates are a NormProp convolution of the input plus a NormProp 1x1 map of the row before,
and the constants of :mod:`normprop.nn.recurrence` keep cell and hidden state at mean 0 and variance 1:

.. math:: a_t = \gamma_x W * x_t / \|W\| + \gamma_h R h_{t-1} / \|R\| + b, \qquad o_t = (f(h_t) - c_2) / c_1

with c2, c1 of f(N(0, 1)); without an activation the output is h itself. For a linear layer it is one step from the zero
state. No statistics of activations: train and eval are the same function, a sample's output depends on it alone.

Use it when rows of a map are a sequence, with small batches; as a sequence layer use :class:`normprop.nn.LSTM`.
Do not use it for speed (rows are worked off one by one) or on inputs that are not normalised: put a DataNorm first.

Source:
    Ours. The LSTM: after the abstract of Laurent, Ballas & Vincent 2017, Recurrent Normalization Propagation, whose
    equations were not available to us. Rows as time: van den Oord et al. 2016, Pixel Recurrent Neural Networks (their
    row LSTM masks the convolution and also convolves the state).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normprop import nn as np_nn
from normprop.functional import normalize_weight, per_channel, standard_deviation
from normprop.fused import at_least_float32
from normprop.moments import Activation, Moments, resolve
from normprop.nn.layer import standard_moments
from normprop.nn.lstm import StackedLSTM
from normprop.nn.recurrence import INPUT_GAIN, RECURRENT_GAIN, State, cell_constants, live_constants, recur, step
from normprop.norms import normprop
from normprop.norms.registry import Method
from normprop.recipes import DEFAULT


class NormalizedActivation(nn.Module):
    """``(f(x) - c2) / c1`` with the moments of f(N(0, 1)), for an input of mean 0 and variance 1.

    Args:
        activation: f.
        spatial_dims: axes after the channels.

    Example:
        >>> NormalizedActivation("relu", 0)(torch.tensor([[-1.0, 1.0]]))
        tensor([[-0.6833,  1.0295]])
    """

    def __init__(self, activation: Activation, spatial_dims: int) -> None:
        super().__init__()
        self.activation = activation
        self.spatial_dims = spatial_dims
        standard = standard_moments(activation)
        self._standard = None if resolve(activation).learnable else standard

    def forward(self, input: Tensor) -> Tensor:
        """Apply the activation and its normalisation."""
        rule = resolve(self.activation)
        moments = self._standard or rule.moments(0.0, 1.0, derivative=False)
        mean = per_channel(moments.mean, input, self.spatial_dims)
        std = per_channel(standard_deviation(rule, moments, 1.0), input, self.spatial_dims)
        return (rule.function(input) - mean) / std


class RowLSTM(nn.Module):
    """NormProp LSTM over the rows of a map, its input part a NormProp convolution with four filters per channel.

    Args:
        linear: NormProp convolution without activation, to 4 * channels, of gain ``INPUT_GAIN``. Each of its groups
            holds the forget, input, output and candidate filters of its channels, in this order.

    Shape:
        (N, in_channels, rows, *space) to (N, channels, rows', *space').

    Example:
        >>> RowLSTM(np_nn.Conv2d(3, 20, 3, gain=INPUT_GAIN))(torch.randn(2, 3, 8, 6)).shape
        torch.Size([2, 5, 6, 4])
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        channels = linear.out_channels // 4
        self.linear = linear
        self.hidden = np_nn.Linear(channels, 4 * channels, bias=False, center=linear.center, gain=RECURRENT_GAIN)

    def forward(self, input: Tensor) -> Tensor:
        """Run over the rows."""
        gates: Tensor = self.linear(input)
        samples, _, rows, *rest = gates.shape
        # From (N, groups, 4, channels, rows, *rest) to (rows, N, *rest, 4, groups, channels).
        gates = gates.unflatten(1, (self.linear.groups, 4, -1)).permute(4, 0, *range(5, 5 + len(rest)), 2, 1, 3)
        gates = gates.reshape(rows, samples * math.prod(rest), self.hidden.out_features)
        weight = normalize_weight(self.hidden.weight, self.hidden.gain, center=self.hidden.center)
        hidden, _ = recur(gates, weight, None, *live_constants(self._input_moments(), self.hidden))
        return hidden.reshape(rows, samples, *rest, self.hidden.in_features).movedim((1, -1), (0, 1))

    def _input_moments(self) -> Moments:
        """Moments of the input part, gate by gate as the recurrence has them."""
        moments = self.linear.output_moments()
        mean, var = (
            value.unflatten(0, (self.linear.groups, 4, -1)).transpose(0, 1).flatten()
            for value in (moments.mean, moments.var)
        )
        return Moments(mean, var)


class OneStep(nn.Module):
    """The first step of a NormProp LSTM: ``i (g - E g)`` and ``o tanh(c)``, each divided by its standard deviation.

    Args:
        linear: NormProp linear layer without activation, to the pre-activations of i, o and g.

    Shape:
        (..., in_features) to (..., out_features / 3 of the linear layer).

    Example:
        >>> OneStep(np_nn.Linear(4, 15))(torch.randn(2, 4)).shape
        torch.Size([2, 5])
    """

    def __init__(self, linear: np_nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        """Take the step."""
        moments: Any = self.linear.output_moments()
        mean, var = (value.unflatten(0, (3, -1)) for value in (moments.mean, moments.var))
        gates = self.linear(input)
        (constants,) = cell_constants(at_least_float32(mean), at_least_float32(var).clamp_min(1e-12).sqrt())
        return step(gates, None, constants.to(gates.dtype))[0]


def block(
    dims: int, in_channels: int, out_channels: int, *args: Any, activation: Activation = "relu", **kwargs: Any
) -> nn.Module:
    """Build a row LSTM, for ``dims`` 0 a single step, and the activation with its normalisation."""
    parts = nn.Sequential()
    layer = normprop.LAYERS[dims]
    if dims == 0:
        parts.add_module("lstm", OneStep(np_nn.Linear(in_channels, 3 * out_channels, *args, **kwargs)))
    else:
        parts.add_module("lstm", RowLSTM(layer(in_channels, 4 * out_channels, *args, gain=INPUT_GAIN, **kwargs)))
    if activation is not None:
        parts.add_module("activation", NormalizedActivation(activation, dims))
    return parts


class LayerNormLSTMLayer(nn.Module):
    r"""One layer of :class:`LayerNormLSTM` in one direction, time first.

    Args: those of :class:`LayerNormLSTM`.

    Shape:
        (T, N, input_size) and a state of two (N, hidden_size) or ``None``, to (T, N, hidden_size) and the last state.
    """

    def __init__(self, input_size: int, hidden_size: int, bias: bool, forget_bias: float, **factory: Any) -> None:
        super().__init__()
        self.input = nn.Linear(input_size, 4 * hidden_size, bias=False, **factory)
        self.hidden = nn.Linear(hidden_size, 4 * hidden_size, bias=False, **factory)
        self.input_norm = nn.LayerNorm(4 * hidden_size, bias=bias, **factory)
        self.hidden_norm = nn.LayerNorm(4 * hidden_size, bias=False, **factory)
        self.cell_norm = nn.LayerNorm(hidden_size, bias=bias, **factory)
        if forget_bias:
            with torch.no_grad():
                self.input_norm.bias[:hidden_size] = forget_bias

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a sequence."""
        gates = self.input_norm(self.input(input))
        size = gates.shape[-1] // 4
        zero = gates.new_zeros(gates.shape[1], size)
        hidden, cell = (zero, zero) if state is None else state
        outputs = []
        for part in gates.unbind(0):
            total = part + self.hidden_norm(self.hidden(hidden))
            forget, admit, expose = total[:, :-size].sigmoid().chunk(3, 1)
            cell = torch.addcmul(admit * total[:, -size:].tanh(), forget, cell)
            hidden = expose * self.cell_norm(cell).tanh()
            outputs.append(hidden)
        return torch.stack(outputs), (hidden, cell)


class LayerNormLSTM(StackedLSTM):
    r"""LSTM with layer norm of the input part, the recurrent part and the cell.

    .. math::
        a_t = LN(W x_t) + LN(R h_{t-1}) + b, \quad c_t = f_t c_{t-1} + i_t g_t, \quad h_t = o_t \tanh(LN(c_t))

    Statistics of each sample at each step: of all 4 * hidden gates at once, and of the cell. Every LN has gains; the
    one bias of the gates stands for the three that the paper adds up.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional: as in :class:`torch.nn.LSTM`.
        forget_bias: initial bias of the forget gates.
        device, dtype: of the parameters.

    Shape:
        As :class:`torch.nn.LSTM`.

    Raises:
        ConfigError: for settings that cannot work.

    Source:
        Ba, Kiros & Hinton 2016, Layer Normalization, its LSTM.

    Example:
        >>> LayerNormLSTM(3, 5)(torch.randn(7, 2, 3))[0].shape
        torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        *,
        bidirectional: bool = False,
        forget_bias: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def layer(size: int) -> nn.Module:
            return LayerNormLSTMLayer(size, hidden_size, bias, forget_bias, device=device, dtype=dtype)

        super().__init__(layer, input_size, hidden_size, num_layers, bias, batch_first, bidirectional, forget_bias)


METHODS = {
    "recurrent-normprop": Method(
        "ours, after Laurent, Ballas & Vincent 2017, Recurrent Normalization Propagation",
        block,
        partial(normprop.head, DEFAULT),
        np_nn.Residual,
    )
}
