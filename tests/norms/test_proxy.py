import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import moments, norms
from normprop.errors import ConfigError
from normprop.norms.proxy import ProxyNorm, proxy_moments, quantiles
from normprop.training.groups import parameter_groups

C2 = 1 / math.sqrt(2 * math.pi)
C1 = math.sqrt((1 - 1 / math.pi) / 2)
NAMES = ["proxy-layer", "proxy-group", "proxy-instance"]


def parameters(count=3, **fixed):
    """Random γ, β, γ~ and β~ in float64, with those given by name set."""
    values = {
        name: torch.randn(count, dtype=torch.float64) for name in ("weight", "bias", "proxy_weight", "proxy_bias")
    }
    for name, value in fixed.items():
        values[name] = torch.full((count,), float(value), dtype=torch.float64)
    return tuple(values.values())


def at_the_start(activation, count):
    """Mean and variance of the proxy of a new layer."""
    mean, var = proxy_moments(activation, *parameters(1, weight=1, bias=0, proxy_weight=0, proxy_bias=0), count)
    return float(mean), float(var)


def randomise(layer):
    """Move all parameters away from their start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer.double()


def test_quantiles_are_those_of_the_normal_distribution():
    middle = torch.distributions.Normal(0.0, 1.0).cdf(quantiles(200, torch.zeros((), dtype=torch.float64)))
    torch.testing.assert_close(middle, (torch.arange(200, dtype=torch.float64) + 0.5) / 200)


def test_moments_by_200_quantiles_are_those_of_the_public_code():
    mean, var = at_the_start("relu", 200)
    assert (mean, var) == pytest.approx((0.3984512, 0.3380348), abs=5e-8)
    assert (var + 0.03) ** -0.5 == pytest.approx(1.6483734, abs=2e-7)  # its last digit is not rounded well
    assert at_the_start("swish", 200) == pytest.approx((0.2060484, 0.3100036), abs=5e-8)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "leaky_relu"])
def test_moments_approach_the_exact_ones_as_quantiles_grow(activation):
    torch.manual_seed(0)
    values = parameters()
    exact = torch.stack(proxy_moments(activation, *values, None))
    errors = [
        float((torch.stack(proxy_moments(activation, *values, count)) - exact).abs().max())
        for count in (20, 200, 2000, 200_000)
    ]
    assert errors == sorted(errors, reverse=True)
    # What the outermost quantile leaves out of the variance is of order log(K) / K.
    assert errors[-1] < 50 / 200_000 * float(exact.abs().max() + 1)


def test_exact_moments_are_those_of_the_gaussian_that_the_parameters_say():
    weight, bias, proxy_weight, proxy_bias = (torch.tensor([v], dtype=torch.float64) for v in (-2.0, 0.3, 0.5, 0.1))
    expected = moments.of("relu", mean=-2 * 0.1 + 0.3, std=2 * 1.5)
    mean, var = proxy_moments("relu", weight, bias, proxy_weight, proxy_bias, None)
    assert (float(mean), float(var)) == pytest.approx((expected.mean, expected.var), rel=1e-12)


@pytest.mark.parametrize("count", [50, None])
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_moments_are_differentiable_in_all_four_parameters(activation, count):
    torch.manual_seed(0)
    values = [value.requires_grad_() for value in parameters()]
    assert torch.autograd.gradcheck(lambda *v: proxy_moments(activation, *v, count), values)


def test_gradient_of_the_mean_by_finite_differences():
    torch.manual_seed(0)
    weight, *others = parameters()
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(proxy_moments("relu", weight, *others, 200)[0].sum(), weight)
    step = 1e-7
    with torch.no_grad():
        above, below = (proxy_moments("relu", weight + s, *others, 200)[0] for s in (step, -step))
    torch.testing.assert_close(grad, (above - below) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("count", "tolerance"), [(None, 1e-12), (1_000_000, 1e-4)])
def test_without_epsilon_and_with_many_quantiles_it_starts_as_normprops_activation(count, tolerance):
    torch.manual_seed(0)
    input = torch.randn(4, 6, 5, 5, dtype=torch.float64) * 2 + 1
    layer = ProxyNorm(1, 6, eps=0.0, proxy_eps=0.0, quantiles=count).double()
    normalised = F.layer_norm(input, input.shape[1:], eps=0.0)
    torch.testing.assert_close(layer(input), (normalised.relu() - C2) / C1, rtol=0, atol=tolerance * 10)


@pytest.mark.parametrize("count", [200, None])
def test_identity_standardises_by_the_proxy(count):
    torch.manual_seed(0)
    layer = randomise(ProxyNorm(2, 6, None, eps=0.0, proxy_eps=0.0, quantiles=count))
    input = torch.randn(4, 6, 5, dtype=torch.float64)
    y = F.group_norm(input, 2, eps=0.0)
    gamma, beta, proxy_gamma, proxy_beta = (
        p.reshape(-1, 1) for p in (layer.norm.weight, layer.norm.bias, layer.proxy_weight, layer.proxy_bias)
    )
    # 200 quantiles of variance less than 1.
    std = 1.0 if count is None else float(quantiles(count, input).std(correction=0))
    expected = (gamma * y + beta - gamma * proxy_beta - beta) / (gamma.abs() * (1 + proxy_gamma).abs() * std)
    torch.testing.assert_close(layer(input), expected)


@pytest.mark.parametrize(("name", "groups"), [("proxy-layer", 1), ("proxy-group", 4), ("proxy-instance", 8)])
def test_block_equals_the_textbook(name, groups):
    torch.manual_seed(0)
    block = randomise(norms.block(name)(3, 8, 3))
    input = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    x = block.linear(input).unflatten(1, (groups, -1))
    mean, var = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), correction=0, keepdim=True)
    y = ((x - mean) / (var + 1e-3).sqrt()).flatten(1, 2)
    norm = block.norm
    for channel in range(8):
        gamma, beta = norm.norm.weight[channel], norm.norm.bias[channel]
        levels = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
        xi = math.sqrt(2) * torch.erfinv(2 * levels - 1)
        proxy = (gamma * ((1 + norm.proxy_weight[channel]) * xi + norm.proxy_bias[channel]) + beta).relu()
        mean, var = proxy.mean(), (proxy - proxy.mean()).square().mean()
        expected = ((gamma * y[:, channel] + beta).relu() - mean) / (var + 0.03).sqrt()
        torch.testing.assert_close(block(input)[:, channel], expected)


def test_zero_gain_gives_zero():
    layer = ProxyNorm(1, 4)
    with torch.no_grad():
        layer.norm.weight.zero_()
        layer.norm.bias.fill_(0.7)
    output = layer(torch.randn(2, 4, 3))
    torch.testing.assert_close(output, torch.zeros(2, 4, 3), rtol=0, atol=1e-5)  # rounding of 0.7 / sqrt(0.03)
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_itself_alone_in_training_as_in_evaluation(name):
    torch.manual_seed(0)
    block = norms.block(name)(3, 8, 3)
    input = torch.randn(4, 3, 6, 6)
    together = block(input)
    torch.testing.assert_close(torch.cat([block(input[i : i + 1]) for i in range(4)]), together)
    assert torch.equal(block.eval()(input), together)


@pytest.mark.parametrize("name", NAMES)
def test_without_activation_the_norm_has_a_gain_alone(name):
    block = norms.block(name)(3, 8, 3, activation=None)
    assert {key for key, _ in block.named_parameters()} == {"linear.weight", "norm.weight"}
    input = torch.randn(2, 3, 6, 6)
    expected = F.group_norm(block.linear(input), block.norm.num_groups, eps=1e-3)
    torch.testing.assert_close(block(input), expected)


def test_the_proxy_decays_and_the_affine_map_does_not():
    block = norms.block("proxy-layer")(3, 8, 3)
    decayed, free = parameter_groups(block, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in (block.linear.weight, block.norm.proxy_weight, block.norm.proxy_bias)
    }
    assert {id(p) for p in free["params"]} == {id(block.norm.norm.weight), id(block.norm.norm.bias)}


def test_all_parameters_learn():
    torch.manual_seed(0)
    layer = randomise(ProxyNorm(2, 4, "tanh", quantiles=20))
    values = dict(layer.named_parameters())

    def call(input, *given):
        return torch.func.functional_call(layer, dict(zip(values, given, strict=True)), (input,))

    input = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (input, *values.values()))


@pytest.mark.parametrize("count", [200, None])
def test_a_learnable_activation_learns_through_the_proxy_too(count):
    torch.manual_seed(0)
    layer = ProxyNorm(1, 4, nn.PReLU(4), quantiles=count).double()
    slope = layer.activation.weight
    (grad,) = torch.autograd.grad(_mean(layer, count).sum(), slope)
    # d/da E[max(z, 0) + a min(z, 0)] = E[min(z, 0)]
    expected = -at_the_start("relu", count)[0]
    torch.testing.assert_close(grad, torch.full((4,), expected, dtype=torch.float64))


def _mean(layer, count):
    """Mean of a layer's proxy."""
    values = (layer.norm.weight, layer.norm.bias, layer.proxy_weight, layer.proxy_bias)
    return proxy_moments(layer.activation, *values, count)[0]


def test_errors():
    with pytest.raises(ConfigError, match="a linear layer has none"):
        norms.block("proxy-instance", 0)(3, 4)
    with pytest.raises(ConfigError, match="quantiles must be 2 or more"):
        ProxyNorm(1, 4, quantiles=1)
    for activation in ("relu", None):
        with pytest.raises(ValueError, match=r"more than 1 value per sample and group, got input size \(2, 4, 1, 1\)"):
            norms.block("proxy-instance")(3, 4, 1, activation=activation)(torch.randn(2, 3, 1, 1))
    with pytest.raises(ConfigError, match="no drop-in layer"):
        norms.create("proxy-layer", 8)
