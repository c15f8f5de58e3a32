"""Any activation inside a layer: under compile, export, vmap and autocast, with live and fixed moments."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, vmap

from normprop import nn, recipes


def own(x):
    return x * torch.sin(x).abs() + 0.3


ACTIVATIONS = [
    "gelu",
    "tanh",
    "silu",
    "elu",
    "hardswish",
    "abs",
    torch.nn.PReLU(),
    torch.nn.PReLU(4),
    torch.nn.Mish(),
    own,
]
activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", str(a)))
settings = pytest.mark.parametrize("recipe", [recipes.DEFAULT, recipes.PAPER], ids=["default", "paper"])


def build(activation, recipe, **options):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1, activation=copy.deepcopy(activation), **recipe, **options)
    with torch.no_grad():
        layer.gain.uniform_(0.5, 1.5)
        layer.bias.normal_(0, 0.3)
    return layer, torch.randn(3, 3, 5, 5, dtype=options.get("dtype"))


@activations
@settings
def test_compile_and_export(activation, recipe):
    torch.compiler.reset()
    layer, input = build(activation, recipe)
    output = layer(input)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), output)
    torch.testing.assert_close(torch.export.export(layer, (input,)).module()(input), output)


@activations
@settings
def test_per_sample_gradients_and_all_parameters_learn(activation, recipe):
    layer, input = build(activation, recipe)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, sample):
        return functional_call(layer, parameters, (sample.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, input)
    layer(input).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-3)


@activations
@settings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(activation, recipe, dtype):
    layer, input = build(activation, recipe)
    exact = layer(input)
    with torch.autocast("cpu", dtype):
        output = layer(input)
    output.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    error = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(output.float(), exact, rtol=16 * error, atol=24 * error)


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", torch.nn.PReLU()], ids=str)
@pytest.mark.parametrize("bias", [-30.0, -4.0, 4.0, 30.0])
@pytest.mark.parametrize("gain", [1e-6, 0.0, 1.0, -2.0, 30.0])
def test_extreme_gain_and_bias_stay_finite(activation, bias, gain):
    layer = nn.Linear(8, 4, activation=copy.deepcopy(activation))
    with torch.no_grad():
        layer.gain.fill_(gain)
        layer.bias.fill_(bias)
    output = layer(torch.randn(16, 8))
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    assert output.abs().max() < 1e3
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_dying_unit_is_not_amplified_without_bound():
    """At b = -4 g a ReLU fires for 3 samples in 100,000; unbounded it would return hundreds of standard deviations."""
    layer = nn.Linear(1000, 1, activation="relu")
    with torch.no_grad():
        layer.bias.fill_(-4.0)
    slope = layer(torch.randn(1000) * 0 + layer.weight[0] / layer.weight[0].norm() * 5) - layer(torch.zeros(1000))
    assert 0 < slope.item() < 1 / 1e-3**0.5 * 1.01
