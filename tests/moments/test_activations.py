"""Moments of every activation against mpmath: accuracy, stability, gradients, spellings."""

import mpmath as mp
import pytest
import torch
from torch import nn

from normprop.errors import ConfigError
from normprop.moments import Moments, of, resolve

# papers.md, table A: mean, std, E[f'^2] at N(0, 1).
TABLE_A = {
    "relu": (0.39894228, 0.58381937, 0.5),
    "prelu": (0.29920671, 0.66462421, 0.53125),
    "leaky_relu": (0.39495286, 0.58656819, 0.50005),
    "tanh": (0.0, 0.62792873, 0.4644029),
    "sigmoid": (0.5, 0.20827634, 0.0448362),
    "softplus": (0.80605918, 0.52107053, 0.2933790),
    "elu": (0.16052057, 0.78687900, 0.6681020),
    "selu": (0.0, 1.0, 1.0715750),
    "gelu": (0.28209479, 0.58791497, 0.4558509),
    "silu": (0.20662096, 0.55953847, 0.3794824),
    "softsign": (0.0, 0.42780138, 0.2276713),
    "erf": (0.0, 0.68158569, 0.5694100),
}

# Means and deviations: tiny, ordinary and huge deviations; |mean| / std from 0 to 30, on both sides of kinks.
GRID = [
    (0.0, 1e-6), (1.0, 1e-6), (-1.0, 1e-6), (3e-5, 1e-6), (2e-6, 1e-6), (0.5, 1e-3), (-1e-3, 1e-3), (1.5, 0.05),
    (-8.0, 1.0), (3.0, 0.5), (8.0, 1.0), (30.0, 1.0), (0.0, 30.0), (240.0, 8.0), (-90.0, 30.0), (-900.0, 30.0),
]  # fmt: skip


def fields(moments: Moments):
    return moments.mean, moments.var, moments.squared_derivative


def close(got, expected, relative, absolute):
    return abs(mp.mpf(float(got)) - expected) <= relative * abs(expected) + absolute


def test_standard_gaussian(case_name, cases, truth):
    result = of(cases[case_name].activation)
    expected = truth(case_name, 0.0, 1.0)
    assert all(isinstance(value, float) for value in (*fields(result), result.error))
    for got, true in zip(fields(result), expected, strict=True):
        assert close(got, true, 1e-12, 1e-14 if abs(true) < 1e-10 else 0.0)
    assert close(result.second, expected[0] ** 2 + expected[1], 1e-12, 0)
    assert close(result.std, mp.sqrt(expected[1]), 1e-12, 0)


@pytest.mark.parametrize("name", TABLE_A)
def test_published_table(name):
    mean, std, squared_derivative = TABLE_A[name]
    result = of(name)
    assert result.mean == pytest.approx(mean, abs=5.1e-9)
    assert result.std == pytest.approx(std, abs=5.1e-9)
    assert result.squared_derivative == pytest.approx(squared_derivative, abs=5.1e-8)


def stable(name, got, mean, std, truth, relative):
    """Mean, variance and mean squared derivative of one Gaussian agree with the truth."""
    true_mean, true_var, true_squared = truth(name, mean, std)
    deviation = mp.sqrt(true_var)
    assert close(got[0], true_mean, relative * 1e-3, relative * deviation + 1e-30), f"mean at {mean}, {std}"
    assert float(got[1]) >= 0.0
    if true_var > 1e-30:
        rounding = 4 * mp.mpf(2) ** -52 * abs(true_mean) / deviation  # of the values of a saturated function
        assert close(got[1], true_var, relative + rounding, 0), f"var at {mean}, {std}"
    if true_squared > 1e-15:
        assert close(got[2], true_squared, relative, 0), f"squared derivative at {mean}, {std}"


def test_stable_in_double(case_name, cases, truth):
    means, stds = torch.tensor(GRID, dtype=torch.float64).unbind(1)
    result = of(cases[case_name].activation, means, stds)
    for i, (mean, std) in enumerate(GRID):
        stable(case_name, [field[i] for field in fields(result)], mean, std, truth, 1e-6)


def test_stable_in_single(case_name, cases, truth):
    means, stds = torch.tensor(GRID, dtype=torch.float32).unbind(1)
    result = of(cases[case_name].activation, means, stds)
    for i, (mean, std) in enumerate(zip(means.tolist(), stds.tolist(), strict=True)):
        if i % 3:  # a third of the points: each needs a truth of its own, at the rounded position
            continue
        assert result.mean.dtype == result.var.dtype == result.squared_derivative.dtype == torch.float32
        stable(case_name, [field[i] for field in fields(result)], mean, std, truth, 1e-3)


@pytest.mark.parametrize("name", ["relu", "elu", "gelu", "tanh"])
def test_tiny_deviation_sees_the_slope(name):
    mean = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(resolve(name).function(mean), mean)
    result = of(name, 1.0, 1e-6)
    assert result.var == pytest.approx(slope.item() ** 2 * 1e-12, rel=1e-6)


def test_point_mass(case_name, cases):
    activation = cases[case_name].activation
    mean = torch.tensor([-2.0, -0.3, 0.0, 0.4, 5.0], dtype=torch.float64, requires_grad=True)
    std = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    result = of(activation, mean, std)
    expected = resolve(activation).function(mean.detach())
    torch.testing.assert_close(result.mean, expected, rtol=1e-7, atol=1e-7)
    assert torch.equal(result.var, torch.zeros(5, dtype=torch.float64))
    gradients = torch.autograd.grad((result.mean + result.var + result.squared_derivative).sum(), (mean, std))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def check_gradients(function):
    mean = torch.tensor([-1.3, 0.0, 0.2, 2.1], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.4, 1.0, 0.7, 1.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: fields(function(m, s)), (mean, std))


def test_gradients_of_the_checked_rule(case_name, cases):
    check_gradients(lambda mean, std: of(cases[case_name].activation, mean, std))


def test_gradients_of_the_unchecked_rule(known_name, cases):
    check_gradients(resolve(cases[known_name].activation).moments)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.8), (-1.2, 0.5)])
def test_gradients_of_the_truth(case_name, cases, truth, mean, std):
    step = 1e-7
    inputs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, std)]
    result = of(cases[case_name].activation, *inputs)
    for which, field in enumerate(fields(result)):
        constant = not field.requires_grad
        gradient = (0.0, 0.0) if constant else torch.autograd.grad(field, inputs, retain_graph=True, allow_unused=True)
        for i, got in enumerate(gradient):
            up, down = (
                truth(case_name, mean + sign * step * (i == 0), std + sign * step * (i == 1)) for sign in (1, -1)
            )
            expected = (up[which] - down[which]) / (2 * step)
            assert close(0.0 if got is None else got, expected, 1e-6, 1e-8)


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 3.0, 8.0])
def test_unchecked_rule_follows_the_checked_one(known_name, cases, std):
    activation = cases[known_name].activation
    mean = std * torch.linspace(-3.0, 3.0, 7, dtype=torch.float64)
    checked, unchecked = of(activation, mean, torch.tensor(std)), resolve(activation).moments(mean, std)
    deviation = checked.var.sqrt()
    assert bool(((unchecked.mean - checked.mean).abs() <= 1e-6 * deviation + 1e-9 * checked.mean.abs()).all())
    torch.testing.assert_close(unchecked.var, checked.var, rtol=2e-5, atol=0.0)
    torch.testing.assert_close(unchecked.squared_derivative, checked.squared_derivative, rtol=2e-5, atol=1e-9)
    without = resolve(activation).moments(mean, std, derivative=False)
    assert torch.equal(without.mean, unchecked.mean)
    assert torch.equal(without.var, unchecked.var)


def test_every_spelling_gives_the_same(case_name, cases):
    case = cases[case_name]
    expected = of(case.activation, 0.3, 1.7)
    for spelling in case.same:
        result = of(spelling, 0.3, 1.7)
        for got, true in zip(fields(result), fields(expected), strict=True):
            got = float(got.detach() if isinstance(got, torch.Tensor) else got)
            assert got == pytest.approx(true, rel=1e-6 if isinstance(spelling, nn.PReLU) else 1e-12)
        z = torch.linspace(-4.0, 4.0, 9)
        torch.testing.assert_close(resolve(spelling).function(z.clone()), resolve(case.activation).function(z.clone()))


def test_rules_know_homogeneous_and_learnable(cases):
    z = torch.linspace(-4.0, 4.0, 9)
    for case in cases.values():
        rule = resolve(case.activation)
        homogeneous = torch.allclose(rule.function(2.5 * z), 2.5 * rule.function(z))
        assert rule.homogeneous == homogeneous
        assert not rule.learnable
    assert resolve(nn.PReLU()).learnable
    assert resolve(resolve("relu")) is resolve("relu")


def test_learnable_slope_stays_in_the_graph():
    module = nn.PReLU(3, init=0.3).double()
    mean = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
    std = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def function(slopes):
        parameters = {"weight": slopes}
        rule = resolve(module)
        with torch.nn.utils.stateless._reparametrize_module(module, parameters):
            return fields(rule.moments(mean, std))

    slopes = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (slopes,))
    got = function(slopes)
    for i, slope in enumerate(slopes.tolist()):
        expected = of(nn.LeakyReLU(slope), mean[i].item(), std[i].item())
        assert [field[i].item() for field in got] == pytest.approx(list(fields(expected)), rel=1e-12)


def test_learnable_slope_with_numbers_gives_tensors():
    module = nn.PReLU()
    result = of(module)
    assert result.mean.dtype == torch.float32
    result.var.backward()
    # papers.md: c1^2 = ((1 + a^2) - (1 - a)^2 / pi) / 2
    assert module.weight.grad.item() == pytest.approx(0.25 + 0.75 / torch.pi, rel=1e-6)


def test_unknown_activations_are_refused():
    with pytest.raises(ConfigError, match=r"'rellu' is not known; choose one of .*relu"):
        of("rellu")
    with pytest.raises(ConfigError, match="got int"):
        resolve(3)


@pytest.mark.parametrize(("mean", "std"), [(0.0, -1.0), (0.0, float("nan")), (float("inf"), 1.0)])
def test_impossible_gaussians_are_refused(mean, std):
    for activation in ("relu", "tanh"):
        with pytest.raises(ConfigError, match="of the Gaussian must"):
            of(activation, mean, std)


def test_shapes_broadcast():
    result = of("tanh", torch.zeros(3, 1), torch.ones(4))
    assert result.mean.shape == result.var.shape == result.squared_derivative.shape == (3, 4)
    assert of("relu", torch.zeros(2, dtype=torch.bfloat16), 1.0).mean.dtype == torch.float32
    assert of("relu", torch.zeros(2), torch.ones(2, dtype=torch.float64)).var.dtype == torch.float64
