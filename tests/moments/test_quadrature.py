"""The adaptive rule: it is right or it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop.errors import MomentError
from normprop.moments import of, resolve


@pytest.mark.parametrize(
    ("function", "mean", "var", "squared_derivative"),
    [
        (torch.cos, math.exp(-0.5), (1 + math.exp(-2)) / 2 - math.exp(-1), (1 - math.exp(-2)) / 2),
        (lambda z: torch.sin(30 * z), 0.0, 0.5, 450.0),
        (torch.exp, math.exp(0.5), math.exp(2) - math.exp(1), math.exp(2)),
        (torch.square, 1.0, 2.0, 4.0),
        (lambda z: F.relu(z) ** 2, 0.5, 1.25, 2.0),
        (torch.sign, 0.0, 1.0, 0.0),
        (lambda z: torch.full_like(z, 3.0), 3.0, 0.0, 0.0),
        (
            nn.Sequential(nn.ReLU(inplace=True), nn.Hardtanh(-10, 1e9)),
            1 / math.sqrt(2 * math.pi),
            0.5 - 0.5 / math.pi,
            0.5,
        ),
        (nn.Dropout().eval(), 0.0, 1.0, 1.0),
    ],
)
def test_any_elementwise_function(function, mean, var, squared_derivative):
    result = of(function)
    for got, true in ((result.mean, mean), (result.var, var), (result.squared_derivative, squared_derivative)):
        assert got == pytest.approx(true, rel=1e-9, abs=1e-12)
        assert abs(got - true) <= 10 * result.error + 1e-12 * (1 + abs(true))
    assert result.error < 1e-5


@pytest.mark.parametrize("offset", [0.0, 1e-9, 1e-6, 1e-4, 1e-3, 3e-3, 0.05])
@pytest.mark.parametrize("edge", [-1.0, 0.0, 0.5, 2.0])
def test_jumps_anywhere_are_found(edge, offset):
    threshold = edge + offset
    above = 0.5 * math.erfc(threshold / math.sqrt(2))
    result = of(lambda z: (z > threshold).double())
    assert result.mean == pytest.approx(above, rel=1e-10)
    assert result.var == pytest.approx(above * (1 - above), rel=1e-10)
    kinked = of(lambda z: F.relu(z - threshold))
    assert kinked.squared_derivative == pytest.approx(above, rel=1e-10)


def test_growth_at_large_deviations():
    assert of(torch.exp, 0.0, 3.0).mean == pytest.approx(math.exp(4.5), rel=1e-10)
    with pytest.raises(MomentError, match="grows too fast"):
        of(torch.exp, 0.0, 8.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: torch.exp(z * z), "grows too fast"),
        (lambda z: torch.exp(z * z / 4), "grows too fast"),
        (lambda z: 1 / z, "singularity"),
        (torch.tan, "singularity"),
        (lambda z: torch.sin(1e6 * z), "oscillates"),
        (torch.sqrt, "not finite, value nan"),
        (lambda z: torch.sqrt(z.clamp_min(0)), "singularity"),
        (nn.Softmax(-1), "depends on the others"),
        (lambda z: z - z.mean(), "depends on the others"),
        (nn.Dropout(), "eval mode"),
        (nn.RReLU(), "eval mode"),
        (nn.GLU(), r"turns shape \(24,\) into \(12,\)"),
        (lambda z: z.flatten(), "does not keep the shape"),
        (lambda z: None, "into NoneType"),
        (nn.Conv1d(1, 1, 1), "cannot be applied"),
    ],
)
def test_unreliable_functions_are_refused(function, message):
    with pytest.raises(MomentError, match=message):
        of(function)


def test_modules_that_work_in_place_leave_the_input_alone():
    mean, std = torch.linspace(-1, 1, 5), torch.ones(5)
    for module in (nn.SiLU(inplace=True), nn.Mish(inplace=True), nn.Sequential(nn.ReLU(inplace=True))):
        for moments in (of(module, mean, std), resolve(module).moments(mean, std)):
            plain = of(nn.Sequential(type(module)() if not isinstance(module, nn.Sequential) else nn.ReLU()), mean, std)
            torch.testing.assert_close(moments.var, plain.var, rtol=1e-5, atol=0)
            torch.testing.assert_close(moments.squared_derivative, plain.squared_derivative, rtol=1e-4, atol=0)
    assert torch.equal(mean, torch.linspace(-1, 1, 5))


class Swish(nn.Module):
    def __init__(self, beta, dtype=torch.float64):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(beta, dtype=dtype))

    def forward(self, z):
        return z * torch.sigmoid(self.beta * z)


def test_parameters_in_single_precision_are_no_obstacle():
    result, expected = of(Swish(1.0, torch.float32)), of("silu")
    assert result.var.dtype == torch.float32
    assert result.var.item() == pytest.approx(expected.var, rel=1e-6)


def test_parameters_of_unknown_modules_stay_in_the_graph():
    step = 1e-5
    for moments in (of, lambda module: resolve(module).moments(0.0, 1.0)):
        module = Swish(1.3)
        result = moments(module)
        for field in ("mean", "var", "squared_derivative"):
            (got,) = torch.autograd.grad(getattr(result, field), module.beta, retain_graph=True)
            up, down = (getattr(moments(Swish(1.3 + sign * step)), field).item() for sign in (1, -1))
            assert got.item() == pytest.approx((up - down) / (2 * step), rel=1e-5)
