"""NormProp's LSTM; :mod:`normprop.nn.recurrence` has its mathematics."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from normprop.errors import ConfigError
from normprop.functional import MomentKind, normalize_weight
from normprop.nn.linear import Linear
from normprop.nn.recurrence import INPUT_GAIN, RECURRENT_GAIN, State, fixed_constants, live_constants, recur


class LSTMLayer(nn.Module):
    """One layer of :class:`LSTM` in one direction, time first.

    Args: those of :class:`LSTM`.

    Shape:
        (T, N, input_size) and a state of two (N, hidden_size) or ``None``, to (T, N, hidden_size) and the last state.

    Example:
        >>> output, (hidden, cell) = LSTMLayer(3, 5)(torch.randn(7, 2, 3))
        >>> output.shape, bool((output[-1] == hidden).all())
        (torch.Size([7, 2, 5]), True)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        center: bool = True,
        moments: MomentKind = "live",
        forget_bias: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        settings: dict[str, Any] = {"center": center, "moments": moments, **factory}
        self.input = Linear(input_size, 4 * hidden_size, bias=bias, gain=INPUT_GAIN, **settings)
        self.hidden = Linear(hidden_size, 4 * hidden_size, bias=False, gain=RECURRENT_GAIN, **settings)
        if forget_bias:
            with torch.no_grad():
                self.input.bias[:hidden_size] = forget_bias
        self._fixed = fixed_constants(forget_bias) if moments == "fixed" else None

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a sequence."""
        weight = normalize_weight(self.hidden.weight, self.hidden.gain, center=self.hidden.center)
        constants = self._fixed or live_constants(self.input.output_moments(), self.hidden)
        return recur(self.input(input), weight, state, *constants)


class StackedLSTM(nn.Module):
    """Recurrent layers one upon the other, in one or both directions, called like :class:`torch.nn.LSTM`.

    Args:
        layer: builds a layer for an input size; it is called with (T, N, input_size) and a state or ``None``.
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional: as in :class:`torch.nn.LSTM`.
        forget_bias: initial bias of the forget gates.

    Raises:
        ConfigError: for sizes below one, a forget bias without biases, a packed sequence, or an input or state whose
            shape does not fit.
    """

    def __init__(
        self,
        layer: Callable[[int], nn.Module],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        bidirectional: bool,
        forget_bias: float,
    ) -> None:
        super().__init__()
        if forget_bias and not bias:
            raise ConfigError(f"{type(self).__name__}: forget_bias={forget_bias:g} needs bias=True")
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be a whole number above zero, got {value!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.bidirectional = batch_first, bidirectional
        self._directions = 2 if bidirectional else 1
        sizes = [input_size, *[self._directions * hidden_size] * (num_layers - 1)]
        self.layers = nn.ModuleList(layer(size) for size in sizes for _ in range(self._directions))

    def forward(self, input: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a sequence; arguments and results are those of :class:`torch.nn.LSTM`."""
        batched = self._check(input, state)
        if not batched:
            input = input.unsqueeze(1)
            state = None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1))
        elif self.batch_first:
            input = input.transpose(0, 1)
        last = []
        for depth in range(self.num_layers):
            outputs = []
            for direction in range(self._directions):
                index = depth * self._directions + direction
                start = None if state is None else (state[0][index], state[1][index])
                output, end = self.layers[index](input.flip(0) if direction else input, start)
                outputs.append(output.flip(0) if direction else output)
                last.append(end)
            input = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
        hidden, cell = (torch.stack(values) for values in zip(*last, strict=True))
        if not batched:
            return input.squeeze(1), (hidden.squeeze(1), cell.squeeze(1))
        return input.transpose(0, 1) if self.batch_first else input, (hidden, cell)

    def _check(self, input: Tensor, state: State | None) -> bool:
        """Tell whether the input has a batch axis; refuse what does not fit."""
        name = type(self).__name__
        if isinstance(input, PackedSequence):
            raise ConfigError(f"{name}: packed sequences are not supported; pad them and pick each one's own last step")
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            raise ConfigError(
                f"{name}: expected (T, N, {self.input_size}), batch first (N, T, {self.input_size}) or without a batch "
                f"(T, {self.input_size}), got {tuple(input.shape)}"
            )
        batched = input.ndim == 3
        time = 1 if batched and self.batch_first else 0
        if input.shape[time] == 0:
            raise ConfigError(f"{name}: expected a sequence of at least one step, got {tuple(input.shape)}")
        expected = (len(self.layers), *([input.shape[1 - time]] if batched else []), self.hidden_size)
        for value in state or ():
            if tuple(value.shape) != expected:
                raise ConfigError(f"{name}: expected states of shape {expected}, got {tuple(value.shape)}")
        return batched

    def extra_repr(self) -> str:
        """The sizes, as torch shows them."""
        return f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class LSTM(StackedLSTM):
    r"""LSTM with Normalization Propagation: states of mean 0 and variance 1 at every step.

    .. math::
        c_t = f_t c_{t-1} + i_t (g_t - E g) \sqrt{\frac{1 - E[f^2]}{E[i^2] Var[g]}}, \qquad
        h_t = \frac{o_t \tanh(c_t)}{\sqrt{E[o^2] \, E[\tanh^2(z)]}}

    Use it when batches are small, or sequences longer or shorter than those trained on: there are no statistics per
    step. Do not use it on inputs that are not normalised: put a DataNorm first. There is no dropout between layers: it
    changes the variance that the next layer counts on.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional: as in :class:`torch.nn.LSTM`.
        center: subtract the mean of each weight row before normalising it.
        moments: ``"live"``: the constants follow gains and biases, per hidden unit and in the graph; ``"fixed"``: those
            at the initial gains and biases, three numbers for the layer, which costs less.
        forget_bias: initial bias of the forget gates; 1 makes a longer memory.
        device, dtype: of the parameters.

    Shape:
        As :class:`torch.nn.LSTM`. ``None`` for the state starts without one; a given state is taken to have mean 0
        and variance 1, so that ``None`` is not the same as zeros.

    Raises:
        ConfigError: for settings that cannot work.

    Source:
        Ours, after the abstract of Laurent, Ballas & Vincent 2017; see :mod:`normprop.nn.recurrence`.

    Example:
        >>> output, (hidden, cell) = LSTM(3, 5, num_layers=2, bidirectional=True)(torch.randn(7, 2, 3))
        >>> output.shape, hidden.shape
        (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]))
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
        center: bool = True,
        moments: MomentKind = "live",
        forget_bias: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        def layer(size: int) -> nn.Module:
            return LSTMLayer(size, hidden_size, bias, center, moments, forget_bias, device=device, dtype=dtype)

        super().__init__(layer, input_size, hidden_size, num_layers, bias, batch_first, bidirectional, forget_bias)
