"""The moment map against its published closed form, quadrature and sampled units."""

import math

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from normprop.diagnostics.moment_map import DOMAINS, Domain, image, jacobian, moment_map
from normprop.errors import ConfigError

ALPHA, SCALE = 1.6732632423543772848, 1.0507009873554804934


def published_map(mean, var, omega, tau):
    """The closed form as printed, with erfc and without protection against overflow."""
    m, z = mean * omega, var * tau
    s, root, erfc = np.sqrt(z), np.sqrt(2 * z), special.erfc
    bell = math.sqrt(2 / math.pi) * s * np.exp(-m * m / (2 * z))
    once = np.exp(m + z / 2) * erfc((m + z) / root)
    first = SCALE / 2 * (m * special.erf(m / root) + ALPHA * once - ALPHA * erfc(m / root) + bell + m)
    second = (m * m + z) * (2 - erfc(m / root)) + m * bell
    second += ALPHA**2 * (-2 * once + np.exp(2 * (m + z)) * erfc((m + 2 * z) / root) + erfc(m / root))
    return first, SCALE**2 / 2 * second - first**2


def test_map_equals_the_published_closed_form():
    rng = np.random.default_rng(0)
    mean, var = rng.uniform(-2, 2, 300), rng.uniform(0.02, 16, 300)
    omega, tau = rng.uniform(-1, 1, 300), rng.uniform(0.3, 2, 300)
    found = moment_map(*(torch.as_tensor(part) for part in (mean, var, omega, tau)))
    for ours, theirs in zip(found, published_map(mean, var, omega, tau), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-10, rtol=1e-10)
    assert moment_map(0.4, 1.3, 0.2, 0.9)[1] == pytest.approx(float(published_map(0.4, 1.3, 0.2, 0.9)[1]), rel=1e-12)


def test_fixed_point():
    mean, var = moment_map(0.0, 1.0)
    assert abs(mean) < 1e-15
    assert var == pytest.approx(1.0, abs=3e-15)


@pytest.mark.parametrize("activation", ["tanh", "gelu", torch.sin])
def test_map_of_any_activation_by_quadrature(activation):
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    function = {"tanh": np.tanh, "gelu": lambda z: z * special.ndtr(z)}.get(activation, np.sin)
    values = function(0.3 * 0.5 + math.sqrt(1.2 * 0.8) * nodes)
    mean = weights @ values / weights.sum()
    var = weights @ (values - mean) ** 2 / weights.sum()
    assert moment_map(0.3, 1.2, 0.5, 0.8, activation) == (pytest.approx(mean, abs=1e-9), pytest.approx(var, abs=1e-9))


def test_map_of_sampled_units():
    """A unit of many inputs that are far from Gaussian: mean and variance within their standard errors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, generator=generator).double() / 20 + 0.002
    inputs = torch.rand(20_000, 400, generator=generator).double() * 3 - 1  # mean 0.5, variance 0.75
    outputs = nn.functional.selu(inputs @ weight)
    mean, var = moment_map(0.5, 0.75, weight.sum().item(), weight.square().sum().item())
    error = outputs.std().item() / math.sqrt(20_000)
    assert abs(outputs.mean().item() - mean) < 4 * error
    assert outputs.var().item() == pytest.approx(var, rel=0.05)


def test_published_jacobian():
    found = jacobian()
    expected = torch.tensor([[0.0, 0.08883476], [0.0, 0.78264788]], dtype=torch.float64)
    assert (found - expected).abs().max() < 5.1e-9
    assert round(torch.linalg.matrix_norm(found, 2).item(), 7) == 0.7876734


@pytest.mark.parametrize("activation", ["selu", "tanh", "relu"])
def test_jacobian_is_the_derivative(activation):
    at, step = (0.3, 1.4, 0.2, 0.9), 1e-5
    found = jacobian(*at, activation)
    for column in range(2):
        low, high = list(at), list(at)
        low[column] -= step
        high[column] += step
        lower, upper = moment_map(*low, activation), moment_map(*high, activation)
        for row in range(2):
            assert found[row, column].item() == pytest.approx((upper[row] - lower[row]) / (2 * step), abs=1e-7)


def test_published_image_of_the_first_domain():
    """The published image is that of 40,000 random points; on the grid, corners included, it is a little larger."""
    rng = np.random.default_rng(1)
    points = np.array(
        [[*rng.uniform(-0.1, 0.1, 2), rng.uniform(0.8, 1.5), rng.uniform(0.95, 1.1)] for _ in range(40_000)]
    )
    mean, omega, var, tau = (torch.as_tensor(column) for column in points.T)
    new_mean, new_var = moment_map(mean, var, omega, tau)
    assert [round(float(end), 3) for end in (new_mean.min(), new_mean.max())] == [-0.029, 0.063]
    assert [round(float(end), 3) for end in (new_var.min(), new_var.max())] == [0.807, 1.476]
    whole = image(DOMAINS["theorem 1"], 15)
    assert whole.mean[0] <= new_mean.min() < new_mean.max() <= whole.mean[1]
    assert whole.var[0] <= new_var.min() < new_var.max() <= whole.var[1]
    assert image(DOMAINS["theorem 1"], 5).var == pytest.approx(whole.var, abs=1e-3)  # a finer grid changes nothing


def test_theorems_hold_and_can_fail():
    for domain in DOMAINS.values():
        assert image(domain, 11).holds
    assert image(DOMAINS["theorem 2"]).ratio[1] < 1 < image(DOMAINS["theorem 3, first box"]).ratio[0]
    small = (-0.1, 0.1)
    assert not image(Domain("maps into itself", small, (0.8, 1.5), small, (0.95, 1.3))).holds  # weights too long
    assert not image(Domain("variance falls", small, (0.8, 1.5), small, (0.95, 1.1))).holds
    assert not image(Domain("variance rises", small, (0.02, 1.5), small, (0.9, 1.25))).holds
    assert not image(DOMAINS["theorem 1"], 5, "relu").holds
    assert not image(DOMAINS["theorem 1"], 3, "tanh").holds


def test_a_variance_below_0_is_an_error():
    with pytest.raises(ConfigError, match="std of the Gaussian must be finite"):
        moment_map(0.0, -1.0)
