"""Independent truth: mpmath quadrature of textbook definitions, in 30 digits, with panels at every break point."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from mpmath.calculus.quadrature import GaussLegendre
from torch import nn

DIGITS = 30


@dataclass(frozen=True)
class Case:
    """An activation as normprop sees it, and its definition and slope in mpmath."""

    activation: object
    value: Callable
    slope: Callable
    breaks: tuple[float, ...] = (0.0,)
    same: tuple = field(default=())  # other spellings


def _piecewise(*pieces):
    """(upper bound, value, slope) triples, the last without bound."""

    def pick(z, which):
        for bound, *functions in pieces:
            if bound is None or z < bound:
                return functions[which](z)
        raise AssertionError

    return lambda z: pick(z, 0), lambda z: pick(z, 1)


def _zero(z):
    return mp.mpf(0)


def _one(z):
    return mp.mpf(1)


def _itself(z):
    return z


def _two_slope(negative):
    a = mp.mpf(negative)
    return _piecewise((0, lambda z: a * z, lambda z: a), (None, _itself, _one))


def _exponential(height, scale, slope):
    h, r, p = (mp.mpf(part) for part in (height, scale, slope))
    return _piecewise(
        (0, lambda z: h * mp.expm1(z / r), lambda z: h / r * mp.exp(z / r)), (None, lambda z: p * z, lambda z: p)
    )


def _clamp(low, high):
    a, b = mp.mpf(low), mp.mpf(high)
    return _piecewise((a, lambda z: a, _zero), (b, _itself, _one), (None, lambda z: b, _zero))


def _sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def _softplus(beta, threshold):
    b, t = mp.mpf(beta), mp.mpf(threshold)
    return _piecewise((t / b, lambda z: mp.log1p(mp.exp(b * z)) / b, lambda z: _sigmoid(b * z)), (None, _itself, _one))


def _mish(z):
    return z * mp.tanh(mp.log1p(mp.exp(z)))


def _mish_slope(z):
    t = mp.tanh(mp.log1p(mp.exp(z)))
    return t + z * (1 - t * t) * _sigmoid(z)


def _gelu_tanh(z):
    return z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))


def _gelu_tanh_slope(z):
    t = mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3))
    inner = mp.sqrt(2 / mp.pi) * (1 + 3 * mp.mpf("0.044715") * z**2)
    return (1 + t) / 2 + z / 2 * (1 - t * t) * inner


def _silu_slope(z):
    s = _sigmoid(z)
    return s + z * s * (1 - s)


ALPHA = mp.mpf("1.6732632423543772848170429916717")
SCALE = mp.mpf("1.0507009873554804934193349852946")
_HARD_SIGMOID = _piecewise(
    (-3, _zero, _zero), (3, lambda z: z / 6 + mp.mpf(1) / 2, lambda z: mp.mpf(1) / 6), (None, _one, _zero)
)
_HARD_SWISH = _piecewise(
    (-3, _zero, _zero), (3, lambda z: z * (z + 3) / 6, lambda z: z / 3 + mp.mpf(1) / 2), (None, _itself, _one)
)

CASES = {
    "identity": Case("identity", _itself, _one, same=(None, nn.Identity(), "linear")),
    "relu": Case("relu", *_two_slope(0), same=(F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), nn.ReLU(True))),
    "leaky_relu": Case(
        nn.LeakyReLU(0.125), *_two_slope(0.125), same=(functools.partial(F.leaky_relu, negative_slope=0.125),)
    ),
    "prelu": Case("prelu", *_two_slope(0.25), same=(nn.PReLU(), nn.PReLU(1))),
    "abs": Case("abs", *_two_slope(-1), same=(torch.abs, abs, torch.Tensor.abs)),
    "elu": Case("elu", *_exponential(1, 1, 1), same=(F.elu, nn.ELU())),
    "elu_half": Case(nn.ELU(0.5), *_exponential(0.5, 1, 1), same=(functools.partial(F.elu, alpha=0.5),)),
    "celu": Case(nn.CELU(2.0), *_exponential(2, 2, 1), same=(functools.partial(F.celu, alpha=2.0),)),
    "selu": Case("selu", *_exponential(ALPHA * SCALE, 1, SCALE), same=(F.selu, nn.SELU())),
    "gelu": Case("gelu", lambda z: z * mp.ncdf(z), lambda z: mp.ncdf(z) + z * mp.npdf(z), same=(F.gelu, nn.GELU())),
    "erf": Case("erf", mp.erf, lambda z: 2 / mp.sqrt(mp.pi) * mp.exp(-z * z), same=(torch.erf,)),
    "hardtanh": Case("hardtanh", *_clamp(-1, 1), (-1.0, 1.0), same=(F.hardtanh, nn.Hardtanh())),
    "hardtanh_skew": Case(
        nn.Hardtanh(-0.5, 2.0),
        *_clamp(-0.5, 2),
        (-0.5, 2.0),
        same=(functools.partial(F.hardtanh, min_val=-0.5, max_val=2.0),),
    ),
    "relu6": Case("relu6", *_clamp(0, 6), (0.0, 6.0), same=(F.relu6, nn.ReLU6())),
    "hardsigmoid": Case("hardsigmoid", *_HARD_SIGMOID, (-3.0, 3.0), same=(F.hardsigmoid, nn.Hardsigmoid())),
    "hardswish": Case("hardswish", *_HARD_SWISH, (-3.0, 3.0), same=(F.hardswish, nn.Hardswish())),
    "sigmoid": Case(
        "sigmoid", _sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z)), same=(torch.sigmoid, F.sigmoid, nn.Sigmoid())
    ),
    "tanh": Case("tanh", mp.tanh, lambda z: mp.sech(z) ** 2, same=(torch.tanh, F.tanh, nn.Tanh(), torch.Tensor.tanh)),
    "silu": Case("silu", lambda z: z * _sigmoid(z), _silu_slope, same=("swish", F.silu, nn.SiLU(), nn.SiLU(True))),
    "softplus": Case("softplus", *_softplus(1, 20), (0.0, 20.0), same=(F.softplus, nn.Softplus())),
    "softplus_sharp": Case(
        nn.Softplus(4.0, 2.0), *_softplus(4, 2), (0.0, 0.5), same=(functools.partial(F.softplus, beta=4, threshold=2),)
    ),
    "mish": Case("mish", _mish, _mish_slope, same=(F.mish, nn.Mish())),
    "softsign": Case(
        "softsign", lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2, same=(F.softsign, nn.Softsign())
    ),
    "gelu_tanh": Case(
        "gelu_tanh",
        _gelu_tanh,
        _gelu_tanh_slope,
        same=(nn.GELU(approximate="tanh"), functools.partial(F.gelu, approximate="tanh")),
    ),
    # Not in the table: kinks and jumps that the adaptive rule has to find.
    "softshrink": Case(
        nn.Softshrink(0.3),
        *_piecewise(
            (-0.3, lambda z: z + mp.mpf(0.3), _one), (0.3, _zero, _zero), (None, lambda z: z - mp.mpf(0.3), _one)
        ),
        (-0.3, 0.3),
    ),
    "step": Case(lambda z: (z > 0.7).to(z.dtype), *_piecewise((0.7, _zero, _zero), (None, _one, _zero)), (0.7,)),
}


@functools.cache
def _nodes():
    with mp.workdps(DIGITS):
        return [(x, w) for x, w in GaussLegendre(mp.mp).calc_nodes(4, mp.mp.prec)]


@functools.cache
def _truth(name, mean, std):
    """(mean, var, mean squared derivative) of a case at N(mean, std^2)."""
    case = CASES[name]
    with mp.workdps(DIGITS):
        m, s = mp.mpf(mean), mp.mpf(std)
        inner = [*case.breaks, 0, *(sign * mp.mpf(2) ** k for sign in (-1, 1) for k in range(-1, 5))]
        edges = {mp.mpf(x) for x in range(-14, 15, 2)} | {x for x in ((b - m) / s for b in inner) if abs(x) < 14}
        edges = sorted(edges)
        centre = case.value(m)
        first = second = squared = mp.mpf(0)
        for low, high in itertools.pairwise(edges):
            half, middle = (high - low) / 2, (high + low) / 2
            for node, weight in _nodes():
                x = middle + half * node
                chance = half * weight * mp.npdf(x)
                g = case.value(m + s * x) - centre
                first += chance * g
                second += chance * g * g
                squared += chance * case.slope(m + s * x) ** 2
        return centre + first, second - first**2, squared


@pytest.fixture(scope="session")
def truth():
    return _truth


@pytest.fixture(scope="session")
def cases():
    return CASES


def pytest_generate_tests(metafunc):
    """A test that asks for `case_name` runs for every activation, for `known_name` without those with unknown kinks."""
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", list(CASES))
    if "known_name" in metafunc.fixturenames:
        metafunc.parametrize("known_name", [name for name in CASES if name not in ("softshrink", "step")])
