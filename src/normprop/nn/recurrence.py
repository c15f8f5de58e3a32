r"""The recurrence of NormProp's LSTM: states keep mean 0 and variance 1 over time, without statistics per step.

Every gate's pre-activation is the sum of an input and a recurrent part with unit-norm weight rows,

.. math:: a_t = \gamma_x \frac{W x_t}{\|W\|} + \gamma_h \frac{R h_{t-1}}{\|R\|} + b,

of law :math:`N(b, \gamma_x^2 + \gamma_h^2)` for a normalised input. With f, i, o the sigmoids of three of them and
g the tanh of the fourth, cell and hidden state are

.. math::
    c_t = f_t c_{t-1} + i_t (g_t - E g) \sqrt{\frac{1 - E[f^2]}{E[i^2] Var[g]}}, \qquad
    h_t = \frac{o_t \tanh(c_t)}{\sqrt{E[o^2] \, E[\tanh^2(z)]}}, \quad z \sim N(0, 1).

At bias 0 and gains of 1 in squared sum the factor of the update is 2.471543 and the divisor of the output 0.340114.
The first step of a sequence that starts without a state has no recurrent part and nothing to forget: its gates are
N(b, gamma_x^2) and E[f^2] counts as 0, so that the variance is 1 from the start.

Why the update is scaled and not the whole right side: ``(f c + i g) / 0.639575`` has variance 1 as well if every step's
gates are independent of all that was before. They are not: they follow h_{t-1}, which changes slowly. A forget gate
that stays above 0.64 then makes the cell grow without bound, within some hundred steps of independent inputs and
sooner on a constant input. Here f < 1 always holds, so the cell is bounded for any input.

What the constants take for granted holds roughly:

- Past and present gates are independent. The dependence enters with gamma_h^2, which starts at 0.1 for this reason:
  in a random network on independent inputs Var c is 1.05 and Var h 1.04 (1.17 and 1.06 with forget bias 1). With
  gamma_h^2 = 1/2 Var c is 1.6, and 3.5 with forget bias 1.
- Inputs at different steps are independent. Where they are alike, as the rows of an image, the cell adds them up.
- The rows of a unit's gates are orthogonal. Random ones are nearly so: E c is up to about 0.2 for a fan-in of 64.

Source:
    Ours. Laurent, Ballas & Vincent 2017, Recurrent Normalization Propagation, describe such an LSTM in their abstract
    (means and variances of states kept over time, no statistics per step); their equations were not available to us.
    Scaling what enters by what is forgotten: De et al. 2024, Griffin, in their gated linear recurrence.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normprop.functional import standard_deviation
from normprop.fused import VARIANCE_FLOOR, at_least_float32
from normprop.moments import Moments, resolve
from normprop.nn.layer import NormPropLayer

State = tuple[Tensor, Tensor]
RECURRENT_GAIN = math.sqrt(0.1)
"""Initial gain of the recurrent part; small, see the module's text on what the constants take for granted."""
INPUT_GAIN = math.sqrt(1.0 - RECURRENT_GAIN**2)
"""Initial gain of the input part: the squares add up to 1, so that every gate has variance 1."""

_SIGMOID, _TANH = resolve("sigmoid"), resolve("tanh")
_TANH_POWER = float(_TANH.moments(0.0, 1.0, derivative=False).second)


class CellConstants(NamedTuple):
    """Mean of the candidate, factor of the update and reciprocal divisor of the output, numbers or (hidden,)."""

    candidate: Tensor | float
    update: Tensor | float
    output: Tensor | float

    def to(self, dtype: torch.dtype, *shape: int) -> "CellConstants":
        """Cast tensors to a type and expand them to a shape; numbers stay numbers."""
        values = (value.to(dtype) if isinstance(value, Tensor) else value for value in self)
        if shape:
            values = (value.expand(shape) if isinstance(value, Tensor) else value for value in values)
        return CellConstants(*values)


def cell_constants(mean: Tensor, *stds: Tensor) -> list[CellConstants]:
    """Work out what keeps cell and output at mean 0 and variance 1, for Gaussian pre-activations.

    A gate that is almost always closed (E[gate^2] below 1e-3) stays so: it is not amplified to make up for it.

    Args:
        mean: means of the pre-activations of forget, input and output gate and of the candidate, (4, hidden), or of the
            last three of them.
        stds: their standard deviations in several kinds of step, (4, hidden) each; without the first row, (3, hidden),
            for a step that has nothing to forget.

    Returns:
        The constants of each kind of step, differentiable.

    Example:
        >>> (constants,) = cell_constants(torch.zeros(4, 1), torch.ones(4, 1))
        >>> [round(constants.update.item(), 5), round(1 / constants.output.item(), 5)]
        [2.47154, 0.34011]
    """
    counts = [len(std) for std in stds]
    # All in one call: tanh(z) = 2 sigmoid(2 z) - 1.
    stretch = mean.new_ones(4, 1)
    stretch[3] = 2.0
    means, spreads = (
        torch.cat([row * stretch[-count:] for row, count in zip(rows, counts, strict=True)])
        for rows in ([mean[-count:] for count in counts], stds)
    )
    moments: Any = _SIGMOID.moments(means, spreads, derivative=False)
    constants = []
    for centre, var, std in zip(moments.mean.split(counts), moments.var.split(counts), stds, strict=True):
        candidate = Moments(2.0 * centre[-1] - 1.0, 4.0 * var[-1])
        deviation: Any = standard_deviation(_TANH, candidate, std[-1])
        *forget, input, output = (var + centre.square())[:-1].clamp_min(VARIANCE_FLOOR).unbind(0)
        free = (1.0 - sum(forget)).clamp_min(VARIANCE_FLOOR) if forget else 1.0
        update: Any = (free / input).sqrt() / deviation
        constants.append(CellConstants(candidate.mean, update, (output * _TANH_POWER).rsqrt()))
    return constants


def fixed_constants(forget_bias: float) -> list[CellConstants]:
    """Constants of the first and of the later steps at the initial gains and biases, as numbers.

    Example:
        >>> first, later = fixed_constants(1.0)
        >>> round(later.update, 4)  # a bias of 1 opens the forget gate: less is forgotten, less needs to come in
        2.0396
    """
    with torch.device("cpu"):  # whatever the default device, e.g. meta
        mean = torch.tensor([[forget_bias], [0.0], [0.0], [0.0]], dtype=torch.float64)
        std = torch.ones_like(mean)
        pair = cell_constants(mean, INPUT_GAIN * std[1:], std)
    return [CellConstants(*(float(value) for value in constants)) for constants in pair]


def live_constants(inputs: Moments, hidden: NormPropLayer) -> list[CellConstants]:
    """Constants of the first and of the later steps at the present gains and biases, per hidden unit.

    Args:
        inputs: moments of the input part, (4 * hidden,) each, in the order of :func:`cell_constants`.
        hidden: the recurrent map.

    Returns:
        Two sets of constants, in the graph.
    """
    mean, first, recurrent = (
        torch.as_tensor(value).unflatten(0, (4, -1)) for value in (inputs.mean, inputs.var, hidden.output_moments().var)
    )
    first, later = (at_least_float32(var).clamp_min(1e-12).sqrt() for var in (first[1:], first + recurrent))
    return cell_constants(at_least_float32(mean), first, later)


def step(gates: Tensor, cell: Tensor | None, constants: CellConstants) -> State:
    """Advance hidden state and cell by one step.

    Args:
        gates: pre-activations (..., 4 * hidden) of forget, input and output gate and of the candidate; without the
            forget gate, (..., 3 * hidden), where there is no cell yet.
        cell: (..., hidden), or ``None``.
        constants: of this step.

    Returns:
        Hidden state and cell, each (..., hidden).
    """
    size = gates.shape[-1] // (3 if cell is None else 4)
    *forget, input, output = gates[..., :-size].sigmoid().split(size, -1)
    candidate = gates[..., -size:].tanh()
    if isinstance(constants.candidate, Tensor):
        candidate = candidate - constants.candidate
    update = input * (candidate * constants.update)
    cell = update if cell is None else torch.addcmul(update, forget[0], cell)
    return output * cell.tanh() * constants.output, cell


def recur(
    gates: Tensor, weight: Tensor, state: State | None, first: CellConstants, later: CellConstants
) -> tuple[Tensor, State]:
    """Run the recurrence over the input parts of all steps.

    Args:
        gates: input part of the gates, (T, N, 4 * hidden), in the order of :func:`step`.
        weight: weight of the recurrent part, (4 * hidden, hidden).
        state: hidden state and cell before the first step, each (N, hidden), or ``None``.
        first: constants of the first step when there is no state.
        later: constants of all other steps.

    Returns:
        Hidden states (T, N, hidden), and the last hidden state and cell.
    """
    samples, size = gates.shape[1], weight.shape[1]
    steps = gates.unbind(0)
    outputs = []
    if state is None:
        hidden, cell = step(steps[0][:, size:], None, first.to(gates.dtype))
        outputs.append(hidden)
        steps = steps[1:]
    else:
        hidden, cell = (value.to(gates.dtype) for value in state)
    transposed = weight.to(gates.dtype).t()
    # Expanded once, so that the backward sums a gradient over the samples once and not at every step.
    later = later.to(gates.dtype, samples, size)
    for input in steps:
        hidden, cell = step(torch.addmm(input, hidden, transposed), cell, later)
        outputs.append(hidden)
    return torch.stack(outputs), (hidden, cell)
