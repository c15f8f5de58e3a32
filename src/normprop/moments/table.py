"""The table of activations: a new one is a law, a function below, and a row."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop.moments.exponential import exponential
from normprop.moments.gelu import erf, gelu
from normprop.moments.piecewise import hardsigmoid, hardswish, hardtanh, rectifier
from normprop.moments.quadrature import Shape
from normprop.moments.value import Moments

Formula = Callable[[Tensor, Tensor], Moments]


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
class Row:
    """One activation.

    Args:
        name: its name.
        functions: torch's function that takes the parameters of the law by name, then other spellings.
        module: torch's module with the parameters as attributes.
        law: from torch's parameters to the closed form, or to the shape that quadrature needs to know.
        homogeneous: f(a z) = a f(z) for every a > 0.

    Example:
        >>> [row.name for row in ROWS if row.homogeneous]
        ['identity', 'relu', 'leaky_relu', 'prelu', 'abs']
    """

    name: str
    functions: tuple[Callable[..., Tensor], ...]
    module: type[nn.Module] | None
    law: Callable[..., Formula | Shape]
    homogeneous: bool = False


def _same(z: Tensor) -> Tensor:
    """The identity."""
    return z


ROWS = (
    Row("identity", (_same,), nn.Identity, _identity, True),
    Row("relu", (F.relu, torch.relu, torch.relu_, Tensor.relu, F.relu_), nn.ReLU, _relu, True),
    Row("leaky_relu", (F.leaky_relu, F.leaky_relu_), nn.LeakyReLU, _leaky_relu, True),
    Row("prelu", (F.prelu, torch.prelu, Tensor.prelu), nn.PReLU, _prelu, True),
    Row("abs", (torch.abs, torch.absolute, Tensor.abs, abs), None, _absolute, True),
    Row("elu", (F.elu, F.elu_), nn.ELU, _elu),
    Row("celu", (F.celu, torch.celu), nn.CELU, _celu),
    Row("selu", (F.selu, torch.selu), nn.SELU, _selu),
    Row("gelu", (F.gelu,), nn.GELU, _gelu),
    Row("erf", (torch.erf, torch.special.erf, Tensor.erf), None, _erf),
    Row("hardtanh", (F.hardtanh, F.hardtanh_), nn.Hardtanh, _hardtanh),
    Row("relu6", (F.relu6,), nn.ReLU6, _relu6),
    Row("hardsigmoid", (F.hardsigmoid,), nn.Hardsigmoid, _hardsigmoid),
    Row("hardswish", (F.hardswish,), nn.Hardswish, _hardswish),
    Row("sigmoid", (torch.sigmoid, F.sigmoid, torch.special.expit, Tensor.sigmoid), nn.Sigmoid, _smooth),
    Row("tanh", (torch.tanh, F.tanh, Tensor.tanh), nn.Tanh, _smooth),
    Row("silu", (F.silu,), nn.SiLU, _smooth),
    Row("softplus", (F.softplus,), nn.Softplus, _softplus),
    Row("mish", (F.mish,), nn.Mish, _smooth),
    Row("softsign", (F.softsign,), nn.Softsign, _smooth),
)
