import pytest
import torch

from normprop import nn, recipes
from normprop.experiments.bench_memory import saved_bytes
from normprop.functional import normalized_sum
from normprop.moments import Moments
from tests.nn.textbook import gaussian_moments


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("kind", ["live", "fixed"])
def test_sum_equals_the_textbook_form(activation, kind):
    dtype = torch.float64
    skip, branch = torch.randn(6, 2, dtype=dtype), torch.randn(6, 2, dtype=dtype)
    mean, var = torch.tensor([0.3, -0.5], dtype=dtype), torch.tensor([0.5, 2.0], dtype=dtype)
    moments = [Moments(0.0, 1.0), Moments(mean, var) if kind == "live" else Moments(0.0, 0.25)]
    output = normalized_sum([skip, branch], moments, activation)
    for unit in range(2):
        m, v = (mean[unit].item(), 1 + var[unit].item()) if kind == "live" else (0.0, 1.25)
        c2, variance = gaussian_moments(activation, m / v**0.5, 1.0)
        f = getattr(torch.nn.functional, activation)
        expected = (f((skip + branch)[:, unit] / v**0.5) - c2) / variance**0.5
        torch.testing.assert_close(output[:, unit], expected, rtol=1e-9, atol=1e-10)
    plain = normalized_sum([skip, branch], [Moments(1.0, 1.0), Moments(0.0, 3.0)])
    torch.testing.assert_close(plain, (skip + branch - 1) / 2)


@pytest.mark.parametrize("recipe", [recipes.DEFAULT, recipes.PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("activation", ["relu", "tanh", None])
def test_residual_blocks_keep_mean_0_and_variance_1(recipe, activation):
    """Wide, with the trained gain and bias that live moments follow; sampling error of var over 2^19 values: 0.3 %."""
    torch.manual_seed(0)
    width = 512
    branch = nn.Linear(width, width, **recipe)
    shortcut = nn.Linear(width, width, **recipe)
    if recipe["moments"] == "live":
        with torch.no_grad():
            branch.gain.uniform_(0.3, 2.0)
            branch.bias.normal_(0, 0.7)
    block = nn.Residual(branch, shortcut, activation=activation, spatial_dims=0)
    with torch.no_grad():
        output = block(torch.randn(1024, width))
    assert abs(output.mean()) < 0.02
    assert output.var() == pytest.approx(1.0, abs=0.03)


def test_without_a_shortcut_the_input_counts_with_variance_1():
    torch.manual_seed(0)
    block = nn.Residual(torch.nn.Sequential(nn.Linear(512, 512)), activation=None, spatial_dims=0)
    with torch.no_grad():
        output = block(torch.randn(1024, 512))
    assert output.var() == pytest.approx(1.0, abs=0.02)


def test_predicted_moments_carry_gradients():
    layer = nn.Linear(3, 3)
    moments = nn.output_moments(torch.nn.Sequential(torch.nn.Identity(), layer))
    moments.var.sum().backward()
    torch.testing.assert_close(layer.gain.grad, 2 * layer.gain.detach())
    assert nn.output_moments(None) == Moments(0.0, 1.0) or nn.output_moments(None).var == 1.0
    assert nn.output_moments(nn.Linear(3, 3, **recipes.PAPER)).var == pytest.approx(1.0)
    assert nn.output_moments(nn.Linear(3, 3, moments="fixed", gain=0.5)).var == pytest.approx(0.25)


@pytest.mark.parametrize("recipe", [recipes.PAPER, recipes.DEFAULT], ids=["paper", "default"])
def test_compiles_and_exports(recipe):
    torch.compiler.reset()
    branch = torch.nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, activation="relu", **recipe), nn.Conv2d(4, 4, 3, padding=1, **recipe)
    )
    block = nn.Residual(branch)
    input = torch.randn(2, 4, 5, 5)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input), block(input))
    torch.testing.assert_close(torch.export.export(block, (input,)).module()(input), block(input))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("activation", ["relu", None])
def test_gradients_of_a_sum_are_those_of_finite_differences(live, activation):
    skip, branch = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=live)
    var = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=live)

    def run(skip, branch, *moments):
        other = Moments(*moments) if moments else Moments(0.3, 0.5)
        return normalized_sum([skip, branch], [Moments(0.0, 1.0), other], activation, spatial_dims=2)

    inputs = (skip, branch, mean, var) if live else (skip, branch)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_a_sum_through_relu_keeps_its_output_alone():
    skip, branch = (torch.randn(4, 3, 8, 8, requires_grad=True) for _ in range(2))
    moments = [Moments(0.0, 1.0), Moments(torch.zeros(3), torch.ones(3, requires_grad=True))]
    kept = saved_bytes(lambda: normalized_sum([skip, branch], moments, "relu", 2).exp(), [skip, branch])
    one = skip.numel() * skip.element_size()
    assert 2 * one <= kept < 2 * one + 1000  # and that of the exponential
