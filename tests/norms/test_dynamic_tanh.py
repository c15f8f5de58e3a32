import math

import pytest
import torch

from normprop import moments, norms
from normprop.norms.dynamic_tanh import DynamicTanh


@pytest.mark.parametrize(("dims", "size"), [(0, ()), (1, (3,)), (2, (3, 2)), (3, (2, 3, 2))])
def test_equals_the_formula(dims, size):
    torch.manual_seed(0)
    layer = DynamicTanh(2, dims, alpha=0.8).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, -3.0]))
        layer.bias.copy_(torch.tensor([0.5, 0.25]))
        layer.alpha.fill_(0.8)
    input = torch.randn(4, 2, *size, dtype=torch.float64)
    output = layer(input)
    for channel, (gain, bias) in enumerate([(2.0, 0.5), (-3.0, 0.25)]):
        expected = [gain * math.tanh(0.8 * float(value)) + bias for value in input[:, channel].flatten()]
        torch.testing.assert_close(output[:, channel].flatten(), torch.tensor(expected, dtype=torch.float64))


def test_starts_as_the_paper_says_with_one_learnable_scale():
    layer = norms.create("dynamic-tanh", 8)
    assert layer.alpha.shape == (1,)
    assert layer.alpha.item() == 0.5
    assert torch.equal(layer.weight, torch.ones(8))
    assert torch.equal(layer.bias, torch.zeros(8))


def test_features_are_the_last_axis_whatever_stands_before():
    layer = DynamicTanh(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    output = layer(torch.ones(2, 5, 3))
    torch.testing.assert_close(output[1, 4] / output[0, 0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_gradients_of_all_parameters():
    torch.manual_seed(0)
    layer = DynamicTanh(3, 1).double()
    parameters = dict(layer.named_parameters())

    def call(input, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (input,))

    inputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), *parameters.values()]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_the_block_keeps_the_second_moment_at_the_start(activation):
    torch.manual_seed(0)
    block = norms.block("dynamic-tanh", 0)(1000, 1000, activation=activation)
    input = torch.randn(500, 1000)
    rule = moments.resolve(activation)
    # E f(tanh(z / 2))^2 by a Riemann sum over the normal density, which is exact for smooth functions.
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    second = float((rule.function(torch.tanh(z / 2)).square() * density).sum())
    with torch.no_grad():
        output = block(input * second**0.5)
    assert output.square().mean() == pytest.approx(second, rel=0.02)
