"""From an activation, however it is given, to its Gaussian moments: the table of activations and its look-up."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError, MomentError
from normprop.moments.exponential import exponential
from normprop.moments.gelu import erf, gelu
from normprop.moments.piecewise import hardsigmoid, hardswish, hardtanh, rectifier
from normprop.moments.quadrature import UNKNOWN, Shape, adaptive, fixed
from normprop.moments.value import Moments, Value

Formula = Callable[[Tensor, Tensor], Moments]
Integrator = Callable[[Tensor, Tensor], Moments]


@dataclass(frozen=True)
class Rule:
    """How to compute the moments of one activation.

    Args:
        name: name of the activation, for messages.
        function: the activation itself.
        law: its closed form, or the shape that quadrature needs to know.
        homogeneous: f(a z) = a f(z) for every a > 0.
        learnable: the activation has parameters, whose gradient flows through the moments.

    Example:
        >>> rule = resolve("relu")
        >>> rule.homogeneous, rule.function(torch.tensor([-1.0, 2.0]))
        (True, tensor([0., 2.]))
    """

    name: str
    function: Callable[[Tensor], Tensor]
    law: Formula | Shape
    homogeneous: bool = False
    learnable: bool = False

    def moments(self, mean: Value, std: Value, *, derivative: bool = True) -> Moments:
        """Moments of f(Z), Z ~ N(mean, std^2), without checks; made for the inside of a graph.

        Tensors give tensors, elementwise after broadcasting, in the type of the input (float32 or better), computed
        in float64 where the device has it. Differentiable in mean and std; no data-dependent control flow.
        Quadrature places a fixed number of nodes, good to about 1e-7 for smooth activations.

        Args:
            mean: mean of the Gaussian.
            std: its standard deviation, not negative.
            derivative: also E[f'(Z)^2] where that takes work; without it the field may be nan.

        Returns:
            The moments: floats for floats (tensors for a learnable activation), tensors for tensors.

        Example:
            >>> resolve("relu").moments(torch.zeros(2), torch.ones(2)).squared_derivative
            tensor([0.5000, 0.5000])
        """
        if isinstance(self.law, Shape):
            integrate = functools.partial(fixed, self.function, shape=self.law, derivative=derivative)
            return _compute(self, integrate, mean, std)
        return _compute(self, self.law, mean, std)


Activation = str | Callable[[Tensor], Tensor] | Rule | None


def _compute(rule: Rule, integrate: Integrator, mean: Value, std: Value) -> Moments:
    """Bring numbers and tensors to float64 for the formula, and its results back to the type of the input."""
    inputs = [value for value in (mean, std) if isinstance(value, Tensor)]
    reference = inputs or (_parameters(rule.function) if rule.learnable else [])
    device = reference[0].device if reference else torch.device("cpu")
    dtype = torch.float64 if device.type != "mps" else torch.float32
    mean, std = (
        value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device=device)
        for value in (mean, std)
    )
    result = integrate(mean, std)
    fields = (result.mean, result.var, result.squared_derivative)
    if not reference:
        return Moments(*(float(field) for field in fields), error=result.error)
    target = functools.reduce(torch.promote_types, (value.dtype for value in reference), torch.float32)
    converted = (field.to(target) if isinstance(field, Tensor) else field for field in fields)
    return Moments(*converted, error=result.error)


def _parameters(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Tensors that a function learns."""
    if isinstance(function, nn.Module):
        return list(function.parameters())
    if isinstance(function, functools.partial):
        return [value for value in function.keywords.values() if isinstance(value, nn.Parameter)]
    return []


def of(activation: Activation, mean: Value = 0.0, std: Value = 1.0) -> Moments:
    """Moments of f(Z) for Z ~ N(mean, std^2), checked.

    Closed forms are exact to rounding; anything else is integrated adaptively, and the largest absolute error
    estimate is returned in `error`.

    Args:
        activation: a name, module, callable or `None`, see :func:`resolve`.
        mean: mean of the Gaussian, a number or a tensor (any shape, broadcast against `std`).
        std: its standard deviation, not negative.

    Returns:
        Floats for floats; tensors, differentiable in mean and std, for tensors or a learnable activation.

    Raises:
        ConfigError: if the activation is unknown or std is negative or not finite.
        MomentError: if the activation is not elementwise or the integral is not reliable.

    Source:
        Arpit et al., Normalization Propagation, ICML 2016, remark 1 and equation 12.

    Example:
        >>> relu = of("relu")
        >>> round(relu.mean, 6), round(relu.std, 6), relu.squared_derivative
        (0.398942, 0.583819, 0.5)
        >>> round(of(torch.cos).mean, 6)  # exp(-1 / 2)
        0.606531
    """
    rule = resolve(activation)
    for label, value in (("mean", mean), ("std", std)):
        checked = torch.as_tensor(value)
        if checked.is_complex() or not bool(torch.isfinite(checked).all()):
            raise ConfigError(f"{label} of the Gaussian must be finite, got {value}")
    if bool((torch.as_tensor(std) < 0).any()):
        raise ConfigError(f"std of the Gaussian must not be negative, got {std}")
    if isinstance(rule.law, Shape):
        integrate = functools.partial(adaptive, rule.function, shape=rule.law, name=rule.name)
        return _compute(rule, integrate, mean, std)
    return rule.moments(mean, std)


# What follows are the laws: each takes the parameters of torch's own function by name, and returns a closed form or
# the shape that quadrature needs.


def _relu() -> Formula:
    return rectifier


def _leaky_relu(negative_slope: float = 0.01) -> Formula:
    return functools.partial(rectifier, slope=float(negative_slope))


def _prelu(weight: Tensor) -> Formula:
    return functools.partial(_parametric, weight)


def _parametric(weight: Tensor, mean: Tensor, std: Tensor) -> Moments:
    slope = weight.to(mean.dtype)
    return rectifier(mean, std, slope.reshape(()) if slope.numel() == 1 else slope)


def _absolute() -> Formula:
    return functools.partial(rectifier, slope=-1.0)


def _identity() -> Formula:
    return _unchanged


def _unchanged(mean: Tensor, std: Tensor) -> Moments:
    mean, std = torch.broadcast_tensors(mean, std)
    return Moments(mean, std * std, torch.ones_like(mean))


def _elu(alpha: float = 1.0) -> Formula:
    return functools.partial(exponential, height=float(alpha))


def _celu(alpha: float = 1.0) -> Formula:
    return functools.partial(exponential, height=float(alpha), scale=float(alpha))


def _selu() -> Formula:
    # Klambauer et al., Self-Normalizing Neural Networks, NeurIPS 2017: moments (0, 1) are a fixed point.
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return functools.partial(exponential, height=alpha * scale, slope=scale)


def _gelu(approximate: str = "none") -> Formula | Shape:
    return gelu if approximate == "none" else Shape()


def _erf() -> Formula:
    return erf


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Formula:
    return functools.partial(hardtanh, min_val=float(min_val), max_val=float(max_val))


def _relu6() -> Formula:
    return functools.partial(hardtanh, min_val=0.0, max_val=6.0)


def _hardsigmoid() -> Formula:
    return hardsigmoid


def _hardswish() -> Formula:
    return hardswish


def _smooth() -> Shape:
    return Shape()


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Shape:
    return Shape(breaks=tuple(sorted((0.0, threshold / beta))), scale=1.0 / abs(beta))


@dataclass(frozen=True)
class _Row:
    """One activation: torch's function (then its other spellings), torch's module, the law."""

    name: str
    functions: tuple[Callable[..., Tensor], ...]
    module: type[nn.Module] | None
    law: Callable[..., Formula | Shape]
    homogeneous: bool = False


def _same(z: Tensor) -> Tensor:
    """The identity."""
    return z


_ROWS = (
    _Row("identity", (_same,), nn.Identity, _identity, True),
    _Row("relu", (F.relu, torch.relu, torch.relu_, Tensor.relu, F.relu_), nn.ReLU, _relu, True),
    _Row("leaky_relu", (F.leaky_relu, F.leaky_relu_), nn.LeakyReLU, _leaky_relu, True),
    _Row("prelu", (F.prelu, torch.prelu, Tensor.prelu), nn.PReLU, _prelu, True),
    _Row("abs", (torch.abs, torch.absolute, Tensor.abs, abs), None, _absolute, True),
    _Row("elu", (F.elu, F.elu_), nn.ELU, _elu),
    _Row("celu", (F.celu, torch.celu), nn.CELU, _celu),
    _Row("selu", (F.selu, torch.selu), nn.SELU, _selu),
    _Row("gelu", (F.gelu,), nn.GELU, _gelu),
    _Row("erf", (torch.erf, torch.special.erf, Tensor.erf), None, _erf),
    _Row("hardtanh", (F.hardtanh, F.hardtanh_), nn.Hardtanh, _hardtanh),
    _Row("relu6", (F.relu6,), nn.ReLU6, _relu6),
    _Row("hardsigmoid", (F.hardsigmoid,), nn.Hardsigmoid, _hardsigmoid),
    _Row("hardswish", (F.hardswish,), nn.Hardswish, _hardswish),
    _Row("sigmoid", (torch.sigmoid, F.sigmoid, torch.special.expit, Tensor.sigmoid), nn.Sigmoid, _smooth),
    _Row("tanh", (torch.tanh, F.tanh, Tensor.tanh), nn.Tanh, _smooth),
    _Row("silu", (F.silu,), nn.SiLU, _smooth),
    _Row("softplus", (F.softplus,), nn.Softplus, _softplus),
    _Row("mish", (F.mish,), nn.Mish, _smooth),
    _Row("softsign", (F.softsign,), nn.Softsign, _smooth),
)
_BY_MODULE = {row.module: row for row in _ROWS if row.module is not None}
_BY_FUNCTION = {function: row for row in _ROWS for function in row.functions}
_ARGUMENTS = {row.name: tuple(inspect.signature(row.law).parameters) for row in _ROWS}


def _rule(row: _Row, function: Callable[[Tensor], Tensor], arguments: Mapping[str, Any], name: str = "") -> Rule:
    """The rule of a row for given parameters."""
    return Rule(name or row.name, function, row.law(**arguments), row.homogeneous, bool(_parameters(function)))


def _named() -> dict[str, Rule]:
    """The rules that have a name, with torch's default parameters."""
    rules = {row.name: _rule(row, row.functions[0], {}) for row in _ROWS if row.name != "prelu"}
    quarter = functools.partial(F.leaky_relu, negative_slope=0.25)  # torch.nn.PReLU() before it has learned
    tanh_form = functools.partial(F.gelu, approximate="tanh")
    rules["prelu"] = _rule(_BY_FUNCTION[F.leaky_relu], quarter, quarter.keywords, "prelu")
    rules["gelu_tanh"] = _rule(_BY_FUNCTION[F.gelu], tanh_form, tanh_form.keywords, "gelu_tanh")
    for alias, name in (("swish", "silu"), ("linear", "identity"), ("leakyrelu", "leaky_relu"), ("none", "identity")):
        rules[alias] = rules[name]
    return rules


_BY_NAME = _named()


def resolve(activation: Activation) -> Rule:
    """Find the rule of an activation.

    Args:
        activation: a name; a module (its parameters count; a learnable slope stays in the graph); torch's own
            function, also in a `functools.partial` with keywords; any other elementwise callable, which is
            integrated numerically; a rule; or `None` for the identity. The name "prelu" has the fixed slope 0.25:
            give `torch.nn.PReLU()` to learn it.

    Returns:
        The rule.

    Raises:
        ConfigError: if the name is not known, or it is nothing that can be called.

    Example:
        >>> resolve(torch.nn.LeakyReLU(0.2)).name, resolve(None).name, resolve(torch.cos).name
        ('leaky_relu', 'identity', 'cos')
    """
    if isinstance(activation, Rule):
        return activation
    if activation is None:
        return _BY_NAME["identity"]
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ConfigError(f"activation {activation!r} is not known; choose one of {', '.join(sorted(_BY_NAME))}")
        return _BY_NAME[activation]
    if isinstance(activation, nn.Module):
        row = _BY_MODULE.get(type(activation))
        if row is None:
            return Rule(type(activation).__name__, activation, UNKNOWN, learnable=bool(_parameters(activation)))
        return _rule(row, activation, {name: getattr(activation, name) for name in _ARGUMENTS[row.name]})
    if isinstance(activation, functools.partial):
        row = _BY_FUNCTION.get(activation.func)
        if (
            row is not None
            and not activation.args
            and activation.keywords.keys() - {"inplace"} <= {*_ARGUMENTS[row.name]}
        ):
            return _rule(row, activation, {k: v for k, v in activation.keywords.items() if k != "inplace"})
        return Rule(repr(activation.func), activation, UNKNOWN, learnable=bool(_parameters(activation)))
    if not callable(activation):
        raise ConfigError(f"an activation is a name, a module, a callable or None, got {type(activation).__name__}")
    row = _BY_FUNCTION.get(activation)
    if row is not None and row.name != "prelu":
        return _rule(row, activation, {})
    return Rule(getattr(activation, "__name__", type(activation).__name__), activation, UNKNOWN)
