"""From an activation, however it is given, to its Gaussian moments: the table of activations and its look-up."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.errors import ConfigError
from normprop.moments.adaptive import adaptive
from normprop.moments.quadrature import UNKNOWN, Shape, fixed
from normprop.moments.table import ROWS, Formula, Row
from normprop.moments.value import Moments, Value


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
        Quadrature places a fixed number of nodes: for the activations that have a name the mean is good to about
        1e-6 standard deviations and the variance to 1e-5 of itself, much better near std 1; :func:`of` is exact.

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
        integrate = self.law
        if isinstance(integrate, Shape):
            integrate = functools.partial(fixed, widened(self.function), shape=integrate, derivative=derivative)
        if self.learnable or isinstance(mean, Tensor) or isinstance(std, Tensor):
            return _compute(self, integrate, mean, std)
        constant: Moments = _of_numbers(self, integrate, mean, std)
        return constant


Activation = str | Callable[[Tensor], Tensor] | Rule | None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler need not see how they come about
def _of_numbers(rule: Rule, integrate: Formula, mean: float, std: float) -> Moments:
    return _compute(rule, integrate, mean, std)


def _compute(rule: Rule, integrate: Formula, mean: Value, std: Value) -> Moments:
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
    if not reference:
        return Moments(float(result.mean), float(result.var), float(result.squared_derivative), result.error)
    target = functools.reduce(torch.promote_types, (value.dtype for value in reference), torch.float32)
    mean, var, squared_derivative = (
        field.to(target) if isinstance(field, Tensor) else field
        for field in (result.mean, result.var, result.squared_derivative)
    )
    return Moments(mean, var, squared_derivative, result.error)


def widened(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, with its own parameters, if any, in the type of its input.

    Example:
        >>> widened(nn.PReLU())(torch.ones(1, dtype=torch.float64)).dtype
        torch.float64
    """
    if isinstance(function, nn.Module) and (_parameters(function) or list(function.buffers())):
        return functools.partial(_call_wide, function)
    return function


def _call_wide(module: nn.Module, z: Tensor) -> Tensor:
    """Call a module with its floating-point parameters and buffers in the type of z."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {name: value.to(z.dtype) if value.is_floating_point() else value for name, value in state.items()}
    return torch.func.functional_call(module, wide, (z,))  # type: ignore[no-any-return]


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
    places = [value.device for value in (mean, std) if isinstance(value, Tensor)]
    # Numbers are computed with even where new tensors go to the meta device, as when a large network is laid out.
    with places[0] if places else torch.device("cpu"):
        for label, value in (("mean", mean), ("std", std)):
            checked = torch.as_tensor(value)
            if checked.is_complex() or not bool(torch.isfinite(checked).all()):
                raise ConfigError(f"{label} of the Gaussian must be finite, got {value}")
        if bool((torch.as_tensor(std) < 0).any()):
            raise ConfigError(f"std of the Gaussian must not be negative, got {std}")
        if isinstance(rule.law, Shape):
            integrate = functools.partial(adaptive, widened(rule.function), shape=rule.law, name=rule.name)
            return _compute(rule, integrate, mean, std)
        return rule.moments(mean, std)


_BY_MODULE = {row.module: row for row in ROWS if row.module is not None}
_BY_FUNCTION = {function: row for row in ROWS for function in row.functions}
_ARGUMENTS = {row.name: tuple(inspect.signature(row.law).parameters) for row in ROWS}


def _rule(row: Row, function: Callable[[Tensor], Tensor], arguments: Mapping[str, Any], name: str = "") -> Rule:
    """The rule of a row for given parameters."""
    return Rule(name or row.name, function, row.law(**arguments), row.homogeneous)


def _late(row: Row, module: nn.Module, mean: Tensor, std: Tensor) -> Moments:
    """Closed form with the parameters that the module has now: they may be swapped, as torch.func does."""
    formula = row.law(**{name: getattr(module, name) for name in _ARGUMENTS[row.name]})
    assert not isinstance(formula, Shape)
    return formula(mean, std)


def _named() -> dict[str, Rule]:
    """The rules that have a name, with torch's default parameters."""
    rules = {row.name: _rule(row, row.functions[0], {}) for row in ROWS if row.name != "prelu"}
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
        if _parameters(activation):
            law = functools.partial(_late, row, activation)
            return Rule(row.name, activation, law, row.homogeneous, learnable=True)
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
