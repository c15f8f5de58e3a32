r"""``selu``: self-normalising blocks, :math:`\mathrm{selu}(W x + b)`.

.. math:: \mathrm{selu}(x) = \lambda \, (x \text{ if } x > 0 \text{ else } \alpha (e^x - 1))

with alpha and lambda such that a N(0, 1) pre-activation gives an output of mean 0 and variance 1, a stable fixed point:
no statistics are taken, neither of activations nor of weights. Weights start as N(0, 1 / fan_in), biases at 0; later
nothing holds the weights there. Train and eval are the same function (but for :class:`AlphaDropout`), and a sample's
output depends on that sample alone. Maps (N, C_in, \*space) to (N, C_out, \*space').

The activation is SELU whatever activation is asked for, since the fixed point belongs to it; ``activation=None`` means
none. Residual sums are :math:`\mathrm{selu}((s + r) / \sqrt 2)`: a sum of two independent paths has twice the variance,
which the fixed point would have to work off in every block. That division is ours; the paper has no residual networks.

Use it when the network is a deep perceptron on standardised inputs. Do not use it with weight decay, max-pooling,
ordinary dropout or He's initialisation, all of which leave the fixed point.

Source:
    Klambauer et al. 2017, Self-Normalizing Neural Networks.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from normprop import moments
from normprop.errors import ConfigError
from normprop.moments import Activation, Value
from normprop.norms.plain import linear_map, of_blocks


def fixed_point(mean: float = 0.0, var: float = 1.0) -> tuple[float, float]:
    r"""Constants alpha and lambda that map N(0, var) to mean ``mean`` and variance ``var``.

    With Z ~ N(0, var), A = E[Z; Z > 0], B = E[e^Z - 1; Z < 0], C = E[Z^2; Z > 0], D = E[(e^Z - 1)^2; Z < 0] the output
    has mean :math:`\lambda (A + \alpha B)` and second moment :math:`\lambda^2 (C + \alpha^2 D)`: eliminating lambda
    leaves a quadratic equation. For mean 0 it is :math:`\alpha = -A / B`.

    Args:
        mean: mean of the fixed point, for weights that sum to 0 and whose squares sum to 1.
        var: its variance.

    Returns:
        alpha and lambda; ``lambda * F.elu(x, alpha)`` is the activation.

    Raises:
        ConfigError: if no positive alpha and lambda have this fixed point.

    Source:
        Klambauer et al. 2017, for (0, 1); the general form is ours.

    Example:
        >>> alpha, scale = fixed_point()
        >>> round(alpha, 12), round(scale, 12)
        (1.673263242354, 1.050700987355)
    """
    if not (math.isfinite(mean) and math.isfinite(var) and var > 0):
        raise ConfigError(f"selu: a fixed point has a finite mean and a variance above 0, got {mean} and {var}")
    std = math.sqrt(var)

    def below(power: int) -> float:
        """E[e^(power Z); Z < 0]."""
        x = power * std
        return math.exp(x * x / 2) * math.erfc(x / math.sqrt(2)) / 2

    a, c = std / math.sqrt(2 * math.pi), var / 2
    b, d = below(1) - 0.5, below(2) - 2 * below(1) + 0.5
    second = var + mean * mean
    root = second * (b * b * c + a * a * d) - mean * mean * c * d
    leading = b * b * second - mean * mean * d
    # The root whose output mean, a + alpha b, has the sign that was asked for.
    alpha = (-a * b * second - mean * math.sqrt(root)) / leading if root >= 0 and leading > 0 else 0.0
    if alpha <= 0:
        raise ConfigError(f"selu: no alpha and lambda above 0 have the fixed point ({mean}, {var}); use a smaller mean")
    return alpha, math.sqrt(second / (c + alpha * alpha * d))


_ALPHA, _SCALE = fixed_point()
SATURATION = -_ALPHA * _SCALE
"""Value of selu far on the left, -1.758: what alpha dropout puts in place of a dropped unit."""


def moment_map(mean: Value, var: Value, omega: Value = 0.0, tau: Value = 1.0) -> tuple[Value, Value]:
    r"""Mean and variance of a unit, given those of its inputs.

    The pre-activation is taken as N(mean omega, var tau), which selu maps in closed form.

    Args:
        mean: mean of the inputs, a number or a tensor.
        var: their variance.
        omega: sum of the unit's weights.
        tau: sum of the squares of its weights.

    Returns:
        Mean and variance; tensors, differentiable, if one of the arguments is one.

    Raises:
        ConfigError: if the variance of the pre-activation is negative or not finite.

    Source:
        Klambauer et al. 2017.

    Example:
        >>> mean, var = moment_map(0.0, 1.0)
        >>> abs(mean) < 1e-15, round(var, 12)
        (True, 1.0)
    """
    spread = var * tau
    std = spread.sqrt() if isinstance(spread, Tensor) else math.sqrt(spread) if spread >= 0 else math.nan
    result = moments.of("selu", mean * omega, std)
    return result.mean, result.var


def alpha_dropout(
    input: Tensor,
    p: float = 0.1,
    training: bool = True,
    mean: float = 0.0,
    var: float = 1.0,
    saturation: float = SATURATION,
) -> Tensor:
    r"""Drop units to selu's saturation and rescale so that mean and variance stay: :math:`a (x d + s (1 - d)) + b`.

    With keep probability q = 1 - p, :math:`a = \sqrt{\nu / (q ((1 - q)(s - \mu)^2 + \nu))}` and
    :math:`b = \mu - a (q \mu + (1 - q) s)`.

    Args:
        input: activations of mean ``mean`` and variance ``var``, any shape.
        p: probability of dropping an element, in [0, 1).
        training: whether to drop at all; otherwise the input is returned.
        mean: mu, mean of the fixed point.
        var: nu, its variance.
        saturation: s, the value of a dropped element: -lambda alpha of the activation in use.

    Returns:
        Same shape and dtype.

    Raises:
        ConfigError: if p is not in [0, 1) or var is not positive.

    Source:
        Klambauer et al. 2017, "New dropout technique"; the general fixed point: the authors' code.

    Example:
        >>> alpha_dropout(torch.zeros(3), p=0.0)
        tensor([0., 0., 0.])
    """
    _check_dropout(p, var)
    if not training or p == 0:
        return input
    keep = 1.0 - p
    scale = math.sqrt(var / (keep * (p * (saturation - mean) ** 2 + var)))
    shift = mean - scale * (keep * mean + p * saturation)
    # Drawn in float32: a half-precision draw has too few values for a rate.
    kept = torch.empty(input.shape, device=input.device).bernoulli_(keep).bool()
    return torch.where(kept, input, saturation) * scale + shift


def _check_dropout(p: float, var: float) -> None:
    if not 0 <= p < 1:
        raise ConfigError(f"AlphaDropout: p must be at least 0 and below 1, got {p}")
    if not var > 0:
        raise ConfigError(f"AlphaDropout: var must be above 0, got {var}")


class AlphaDropout(nn.Module):
    """Dropout that keeps the mean and the variance of selu activations; see :func:`alpha_dropout`.

    Args:
        p: probability of dropping an element; 0.05 to 0.1 are usual.
        mean: mean of the fixed point.
        var: its variance.
        saturation: value of a dropped element, that of the activation far on the left.

    Raises:
        ConfigError: if p is not in [0, 1) or var is not positive.

    Shape:
        Any; the identity in evaluation.

    Source:
        Klambauer et al. 2017.

    Example:
        >>> AlphaDropout(0.05).eval()(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, p: float = 0.1, mean: float = 0.0, var: float = 1.0, saturation: float = SATURATION) -> None:
        super().__init__()
        _check_dropout(p, var)
        self.p = p
        self.mean = mean
        self.var = var
        self.saturation = saturation

    def forward(self, input: Tensor) -> Tensor:
        """Drop in training."""
        return alpha_dropout(input, self.p, self.training, self.mean, self.var, self.saturation)

    def extra_repr(self) -> str:
        """The settings."""
        return f"p={self.p}, mean={self.mean}, var={self.var}, saturation={self.saturation:.4f}"


def _selu(activation: Activation) -> nn.Module:
    """SELU in place of any activation that exists, nothing in place of none."""
    moments.resolve(activation)
    return nn.Identity() if activation is None else nn.SELU(inplace=True)


def block(dims: int, *args: Any, activation: Activation = "selu", dropout: float = 0.0, **kwargs: Any) -> nn.Module:
    """Linear map with LeCun's initialisation and bias, SELU, alpha dropout at rate ``dropout``.

    Example:
        >>> [name for name, _ in block(0, 4, 3, dropout=0.1).named_children()]
        ['linear', 'activation', 'dropout']
    """
    parts = nn.Sequential()
    parts.add_module("linear", linear_map(dims, *args, **kwargs))
    if activation is not None:
        parts.add_module("activation", _selu(activation))
        if dropout:
            parts.add_module("dropout", AlphaDropout(dropout))
    return parts


class SELUResidual(nn.Module):
    r"""Residual block that keeps the fixed point: :math:`\mathrm{selu}((s + r) / \sqrt 2)`.

    Args:
        branch: module of r, ending in a block without activation.
        shortcut: module of the skip path s, or ``None`` for the identity.
        activation: ``None`` for none; anything else is SELU.
        spatial_dims: not needed here.

    Source:
        Ours; the paper has no residual networks.

    Example:
        >>> SELUResidual(block(0, 4, 4, activation=None), spatial_dims=0)(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        branch: nn.Module,
        shortcut: nn.Module | None = None,
        activation: Activation = "selu",
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = _selu(activation)

    def forward(self, input: Tensor) -> Tensor:
        """Add the two paths, halve the variance, apply SELU."""
        skip = input if self.shortcut is None else self.shortcut(input)
        output: Tensor = self.activation((skip + self.branch(input)) * math.sqrt(0.5))
        return output


METHODS = {
    "selu": of_blocks("Klambauer et al. 2017, Self-Normalizing Neural Networks", block, residual=SELUResidual),
}
