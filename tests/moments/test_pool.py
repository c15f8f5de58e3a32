"""Pools and dropout against published constants, scipy and Monte Carlo."""

import math

import pytest
import scipy.integrate
import scipy.stats
import torch

from normprop.errors import ConfigError, MomentError
from normprop.moments import Moments, of
from normprop.moments.pool import dropout, max_pool, max_pool_of, mean_pool

UNIT = Moments(mean=0.0, var=1.0)


@pytest.mark.parametrize(("k", "mean", "std"), [(4, 1.029375, 0.701224), (9, 1.485013, 0.597790)])
def test_published_maxima_of_gaussians(k, mean, std):
    result = max_pool(k, UNIT)
    assert result.mean == pytest.approx(mean, abs=5.1e-7)
    assert result.std == pytest.approx(std, abs=5.1e-7)


@pytest.mark.parametrize(("k", "mean", "std"), [(4, 1.107900, 1.149251), (9, 1.860710, 1.022791)])
def test_published_maxima_of_normprop_outputs(k, mean, std):
    relu, result = of("relu"), max_pool_of(k, "relu")
    assert (result.mean - relu.mean) / relu.std == pytest.approx(mean, abs=6e-7)
    assert result.std / relu.std == pytest.approx(std, abs=6e-7)


@pytest.mark.parametrize("k", [1, 2, 3, 16, 100])
def test_maxima_of_gaussians_against_scipy(k):
    def moment(power):
        density = lambda x: x**power * k * scipy.stats.norm.pdf(x) * scipy.stats.norm.cdf(x) ** (k - 1)  # noqa: E731
        return scipy.integrate.quad(density, -12, 12, epsabs=1e-13, epsrel=1e-12, points=[0.0, 3.0])[0]

    result = max_pool(k, Moments(mean=2.0, var=9.0))
    assert result.mean == pytest.approx(2.0 + 3.0 * moment(1), rel=1e-10)
    assert result.var == pytest.approx(9.0 * (moment(2) - moment(1) ** 2), rel=1e-9)


def sample(k, rho, count=400_000):
    generator = torch.Generator().manual_seed(k)
    shared = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(count, k, generator=generator, dtype=torch.float64)
    return math.sqrt(rho) * shared + math.sqrt(1.0 - rho) * own


def within_five_standard_errors(values, expected):
    count = len(values)
    centred = values - values.mean()
    mean_error = values.std().item() / math.sqrt(count)
    var_error = (centred.square().std() / math.sqrt(count)).item()
    assert abs(values.mean().item() - expected.mean) < 5 * mean_error
    assert abs(values.var().item() - expected.var) < 5 * var_error


@pytest.mark.parametrize(("k", "rho"), [(4, 0.0), (4, 0.5), (9, 0.9)])
def test_pools_of_gaussians_by_simulation(k, rho):
    z = 1.0 + 2.0 * sample(k, rho)
    moments = Moments(mean=1.0, var=4.0)
    within_five_standard_errors(z.amax(1), max_pool(k, moments, rho))
    within_five_standard_errors(z.mean(1), mean_pool(k, moments, rho))


@pytest.mark.parametrize("activation", ["relu", "tanh", "abs", "gelu", torch.cos])
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_maxima_of_outputs_by_simulation(activation, rho):
    from normprop.moments import resolve

    z = resolve(activation).function(0.3 + 1.5 * sample(4, rho))
    within_five_standard_errors(z.amax(1), max_pool_of(4, activation, 0.3, 1.5, rho))


def test_maxima_of_outputs_meet_the_exact_ones():
    for k, rho in ((1, 0.0), (4, 0.0), (4, 0.3), (9, 1.0)):
        exact, numeric = max_pool(k, Moments(mean=0.5, var=4.0), rho), max_pool_of(k, "identity", 0.5, 2.0, rho)
        assert numeric.mean == pytest.approx(exact.mean, abs=2e-6)
        assert numeric.var == pytest.approx(exact.var, abs=2e-6)
    one, alone = max_pool_of(1, "elu"), of("elu")
    assert (one.mean, one.var) == pytest.approx((alone.mean, alone.var), abs=1e-6)


def test_pools_of_tensors_are_differentiable():
    mean = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    var = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def function(mean, var):
        pooled = dropout(mean_pool(3, max_pool(4, Moments(mean, var), 0.2), 0.1), 0.3)
        return pooled.mean, pooled.var

    assert torch.autograd.gradcheck(function, (mean, var))


def test_average_of_independent_units():
    for k in (4, 9):
        assert mean_pool(k, UNIT).std == pytest.approx(1 / math.sqrt(k), rel=1e-15)
    assert mean_pool(4, UNIT, rho=1.0).var == 1.0
    assert mean_pool(4, UNIT, rho=-1 / 3).var == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_dropout(p):
    keep = 1 - p
    assert dropout(UNIT, p).std == pytest.approx(1 / math.sqrt(keep), rel=1e-14)
    assert keep * dropout(UNIT, p).std == pytest.approx(math.sqrt(keep), rel=1e-14)  # the form without rescaling
    moments = Moments(mean=0.7, var=1.3, squared_derivative=0.5)
    result = dropout(moments, p)
    assert result.second == pytest.approx(moments.second / keep, rel=1e-14)
    assert result.squared_derivative == pytest.approx(0.5 / keep)
    torch.manual_seed(0)
    values = 0.7 + math.sqrt(1.3) * torch.randn(400_000, dtype=torch.float64)
    within_five_standard_errors(torch.nn.functional.dropout(values, p), result)


def test_impossible_pools_are_refused():
    for wrong in (
        lambda: max_pool(0, UNIT),
        lambda: max_pool(4, UNIT, 1.1),
        lambda: max_pool(4, UNIT, -0.1),
        lambda: mean_pool(4, UNIT, -0.5),
        lambda: max_pool_of(4, "relu", rho=2.0),
        lambda: dropout(UNIT, 1.0),
    ):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(MomentError):
        max_pool_of(4, torch.nn.Softmax(0))
