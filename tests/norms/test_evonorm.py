import math

import pytest
import torch
from torch import nn

from normprop import norms
from normprop.norms.evonorm import EvoNormS0


def randomise(layer):
    """Give gain, bias and v values that show where they are applied."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


def textbook(layer, input):
    """The layer by its definition, one value at a time."""
    size = input.shape[1] // layer.num_groups
    output = torch.empty_like(input)
    for n in range(input.shape[0]):
        for c in range(input.shape[1]):
            first = c // size * size
            values = [float(v) for v in input[n, first : first + size].flatten()]
            mean = sum(values) / len(values)
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + layer.eps)
            x = input[n, c]
            numerator = x if layer.v is None else x / (1 + torch.exp(-layer.v[c] * x))
            output[n, c] = numerator / std * layer.weight[c] + layer.bias[c]
    return output


@pytest.mark.parametrize("nonlinear", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("size", [(), (3,), (3, 2), (2, 3, 2)])
def test_equals_the_definition(size, groups, nonlinear):
    torch.manual_seed(0)
    layer = randomise(EvoNormS0(groups, 6, nonlinear=nonlinear, eps=0.1))
    input = torch.randn(3, 6, *size, dtype=torch.float64) + 1
    torch.testing.assert_close(layer(input).detach(), textbook(layer, input).detach())


def test_with_v_zero_it_is_half_the_linear_form_and_with_large_v_relu_of_it():
    torch.manual_seed(0)
    linear, gated = EvoNormS0(2, 6, nonlinear=False).double(), EvoNormS0(2, 6).double()
    input = torch.randn(3, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        gated.v.zero_()
        torch.testing.assert_close(gated(input), linear(input) / 2)
        gated.v.fill_(1e9)
        torch.testing.assert_close(gated(input), linear(input).relu())


def test_without_nonlinearity_centred_input_gives_group_norm():
    torch.manual_seed(0)
    input = torch.randn(3, 6, 4, dtype=torch.float64) + 2
    groups = input.unflatten(1, (2, 3))
    centred = (groups - groups.mean((2, 3), keepdim=True)).flatten(1, 2)
    expected = nn.functional.group_norm(input, 2)
    torch.testing.assert_close(EvoNormS0(2, 6, nonlinear=False).double()(centred), expected)


def test_gradients_of_all_parameters():
    torch.manual_seed(0)
    layer = randomise(EvoNormS0(2, 4))
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"weight", "bias", "v"}

    def call(input, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (input,))

    inputs = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), *parameters.values()]
    assert torch.autograd.gradcheck(call, inputs)


def test_groups():
    assert norms.create("evonorm-s0", 64).num_groups == 32
    assert norms.create("evonorm-s0", 48).num_groups == 8
    assert norms.create("evonorm-s0", 48, 0).num_groups == 1


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_its_nonlinearity_takes_the_place_of_any_activation(activation):
    torch.manual_seed(0)
    block = norms.block("evonorm-s0")(3, 8, 3, activation=activation)
    assert [key for key, _ in block.named_children()] == ["linear", "norm"]
    input = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(block(input), textbook(block.norm, block.linear(input).detach()), rtol=1e-4, atol=1e-5)


def test_without_activation_the_block_is_linear_up_to_the_scale():
    torch.manual_seed(0)
    block = norms.block("evonorm-s0")(3, 8, 3, activation=None).double()
    input = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(-input), -block(input))
    torch.testing.assert_close(block(3 * input), block(input), rtol=1e-3, atol=1e-5)


def test_one_value_per_group_is_refused():
    with pytest.raises(ValueError, match=r"more than 1 value per sample and group, got input size \(2, 4, 1, 1\)"):
        EvoNormS0(4, 4)(torch.randn(2, 4, 1, 1))
