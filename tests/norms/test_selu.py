import math

import mpmath
import pytest
import torch

from normprop import models, norms
from normprop.errors import ConfigError
from normprop.norms.selu import AlphaDropout, SELUResidual, alpha_dropout, block, fixed_point, moment_map

DROPPED = -1.7580993408473766


def test_constants_of_the_standard_fixed_point_are_those_of_the_paper_and_of_torch():
    alpha, scale = fixed_point()
    e, r = math.erfc(1 / math.sqrt(2)), math.sqrt(math.e)
    assert alpha == pytest.approx(-math.sqrt(2 / math.pi) / (e * r - 1), rel=1e-14)
    denominator = 2 * math.erfc(math.sqrt(2)) * math.e**2 + math.pi * e**2 * math.e - 2 * (2 + math.pi) * e * r
    assert scale == pytest.approx((1 - e * r) * math.sqrt(2 * math.pi / (denominator + math.pi + 2)), rel=1e-13)
    far = torch.tensor([1.0, -100.0], dtype=torch.float64)
    torch.testing.assert_close(torch.nn.SELU()(far), torch.tensor([scale, -scale * alpha], dtype=torch.float64))


def moments_by_quadrature(alpha, scale, mean, std):
    with mpmath.workdps(30):

        def f(z):
            return scale * (z if z > 0 else alpha * mpmath.expm1(z))

        def expectation(power):
            points = sorted([mean - 12 * std, mean, 0.0, mean + 12 * std])
            return mpmath.quad(lambda z: f(z) ** power * mpmath.npdf(z, mean, std), points)

        first = expectation(1)
        return float(first), float(expectation(2) - first**2)


@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (0.3, 1.5), (-0.2, 0.5), (0.0, 4.0), (-0.5, 2.0)])
def test_any_fixed_point(mean, var):
    alpha, scale = fixed_point(mean, var)
    assert min(alpha, scale) > 0
    assert moments_by_quadrature(alpha, scale, 0.0, math.sqrt(var)) == pytest.approx((mean, var), abs=1e-12)


@pytest.mark.parametrize(("mean", "var"), [(5.0, 1.0), (0.0, 0.0), (math.nan, 1.0), (0.0, -1.0)])
def test_impossible_fixed_points_are_refused(mean, var):
    with pytest.raises(ConfigError, match="fixed point"):
        fixed_point(mean, var)


@pytest.mark.parametrize("arguments", [(0.0, 1.0, 0.0, 1.0), (0.1, 1.5, -0.1, 1.1), (-1.0, 3.0, 0.1, 0.8)])
def test_moment_map_equals_quadrature_and_the_papers_closed_form(arguments):
    mean, var, omega, tau = arguments
    m, z = mean * omega, var * tau
    result = moment_map(*arguments)
    assert result == pytest.approx(moments_by_quadrature(*fixed_point(), m, math.sqrt(z)), abs=1e-12)
    alpha, scale = fixed_point()
    bend = alpha * math.exp(m + z / 2) * math.erfc((m + z) / math.sqrt(2 * z))
    side = alpha * math.erfc(m / math.sqrt(2 * z))
    gauss = math.sqrt(2 * z / math.pi) * math.exp(-m * m / (2 * z))
    printed = scale / 2 * (m * math.erf(m / math.sqrt(2 * z)) + bend - side + gauss + m)
    assert result[0] == pytest.approx(printed, abs=1e-14)


def test_moment_map_contracts_to_the_fixed_point():
    point = torch.tensor([0.0, 1.0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda p: torch.stack(moment_map(p[0], p[1])), point)
    expected = torch.tensor([[0.0, 0.08883476], [0.0, 0.78264788]], dtype=torch.float64)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("means", "variances", "taus", "omegas", "holds"),
    [
        ((-0.1, 0.1), (0.8, 1.5), (0.95, 1.1), (-0.1, 0.1), lambda old, m, v: -0.1 < m < 0.1 and 0.8 < v < 1.5),
        ((-1.0, 1.0), (3.0, 16.0), (0.8, 1.25), (-0.1, 0.1), lambda old, m, v: v < old),
        ((-0.1, 0.1), (0.02, 0.16), (0.8, 1.25), (-0.1, 0.1), lambda old, m, v: v > old),
    ],
)
def test_domains_of_the_theorems(means, variances, taus, omegas, holds):
    def ends(low, high):
        return torch.linspace(low, high, 4).tolist()

    for mean in ends(*means):
        for var in ends(*variances):
            for tau in ends(*taus):
                assert all(holds(var, *moment_map(mean, var, omega, tau)) for omega in ends(*omegas))


def test_a_deep_perceptron_stays_at_the_fixed_point():
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[norms.block("selu", 0)(512, 512) for _ in range(100)])
    value = torch.randn(256, 512)
    with torch.no_grad():
        for layer in network:
            value = layer(value)
            assert abs(value.mean().item()) < 0.1
            assert 0.8 < value.var().item() < 1.5


def test_a_deep_residual_network_stays_at_the_fixed_point():
    torch.manual_seed(0)
    value = torch.randn(256, 512)
    with torch.no_grad():
        for _ in range(30):
            branch = torch.nn.Sequential(block(0, 512, 512), block(0, 512, 512, activation=None))
            value = SELUResidual(branch, spatial_dims=0)(value)
    assert abs(value.mean().item()) < 0.1
    assert 0.8 < value.var().item() < 1.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("activated", [False, True])
def test_alpha_dropout_keeps_mean_and_variance(p, activated):
    """2^20 values: five standard errors are 0.005 of the mean and, at a kurtosis up to 5, 0.01 of the variance."""
    torch.manual_seed(0)
    input = torch.randn(2**20)
    input = torch.nn.functional.selu(input) if activated else input
    output = AlphaDropout(p)(input)
    assert output.mean().item() == pytest.approx(0.0, abs=0.007)
    assert output.var().item() == pytest.approx(1.0, abs=0.012)


@pytest.mark.parametrize(("keep", "a", "b"), [(0.95, 0.9548444760, 0.0839355722), (0.5, 0.8864048947, 0.7791939305)])
def test_alpha_dropout_scales_and_shifts_by_the_papers_constants(keep, a, b):
    torch.manual_seed(0)
    input = torch.linspace(1.0, 2.0, 1000, dtype=torch.float64)
    output = alpha_dropout(input, 1 - keep)
    kept = output > a + b - 1e-6
    torch.testing.assert_close(output[kept], a * input[kept] + b, rtol=0, atol=1e-8)
    torch.testing.assert_close(output[~kept], torch.full_like(output[~kept], a * DROPPED + b), rtol=0, atol=1e-8)
    # five standard errors of a share of 1000
    assert kept.double().mean().item() == pytest.approx(keep, abs=5 * math.sqrt(keep * (1 - keep) / 1000))


def test_alpha_dropout_at_another_fixed_point_and_in_evaluation():
    torch.manual_seed(0)
    mean, var = 0.3, 1.5
    alpha, scale = fixed_point(mean, var)
    input = torch.randn(2**20) * math.sqrt(var) + mean
    layer = AlphaDropout(0.2, mean, var, saturation=-alpha * scale)
    output = layer(input)
    assert (output.mean().item(), output.var().item()) == pytest.approx((mean, var), abs=0.015)
    assert layer.eval()(input) is input
    for wrong in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="p must be"):
            AlphaDropout(wrong)


def test_block_is_selu_whatever_activation_is_asked_for_with_lecuns_weights():
    torch.manual_seed(0)
    layer = norms.block("selu", 0)(1000, 1000, activation="tanh")
    input = torch.randn(2, 1000)
    torch.testing.assert_close(layer(input), torch.nn.functional.selu(layer.linear(input)))
    # standard error of a deviation over a million weights: 0.07 %
    assert layer.linear.weight.std().item() == pytest.approx(1000**-0.5, rel=0.005)
    assert not layer.linear.bias.any()
    assert [*dict(block(0, 2, 2, dropout=0.1).named_children())] == ["linear", "activation", "dropout"]
    assert len(norms.block("selu", 0)(4, 4, activation=None)) == 1
    with pytest.raises(ConfigError, match="not known"):
        norms.block("selu", 0)(4, 4, activation="nonsense")


def test_reference_networks_have_no_other_activation():
    network = models.resnet(8, norm="selu", width=0.25)
    assert sum(isinstance(module, torch.nn.SELU) for module in network.modules()) == 7
    assert not any(isinstance(module, torch.nn.ReLU) for module in network.modules())
