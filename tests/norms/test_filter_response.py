import math

import pytest
import torch
from torch import nn

from normprop import norms
from normprop.norms.filter_response import FilterResponseNorm, ThresholdedLinearUnit


def randomise(layer):
    """Give gain, bias, threshold and epsilon values that show where they are applied."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


def textbook(layer, input, eps):
    """The norm by its definition, one sample and channel at a time."""
    output = torch.empty_like(input)
    for n in range(input.shape[0]):
        for c in range(input.shape[1]):
            values = input[n, c]
            square = sum(float(v) ** 2 for v in values.flatten()) / values.numel()
            output[n, c] = layer.weight[c] * values / math.sqrt(square + eps[c]) + layer.bias[c]
    return output


@pytest.mark.parametrize(
    ("size", "learnable"),
    [((), True), ((3,), True), ((3,), False), ((3, 2), True), ((3, 2), False), ((2, 3, 2), False)],
)
def test_equals_the_definition(size, learnable):
    torch.manual_seed(0)
    layer = randomise(FilterResponseNorm(5, len(size), eps=0.3, learnable_eps=learnable))
    input = torch.randn(4, 5, *size, dtype=torch.float64)
    eps = [1e-6 + abs(e) for e in layer.eps.tolist()] if learnable else [0.3] * 5
    torch.testing.assert_close(layer(input).detach(), textbook(layer, input, eps).detach())


def test_threshold():
    torch.manual_seed(0)
    for dims, size in [(0, ()), (1, (3,)), (2, (3, 2))]:
        unit = ThresholdedLinearUnit(2, dims)
        input = torch.randn(50, 2, *size)
        assert torch.equal(unit(input), input.relu())
        with torch.no_grad():
            unit.tau.copy_(torch.tensor([-0.5, 0.5]))
        output = unit(input)
        assert torch.equal(output[:, 0], input[:, 0].clamp_min(-0.5))
        assert torch.equal(output[:, 1], input[:, 1].clamp_min(0.5))
        output[:, 0].sum().backward()
        assert unit.tau.grad[0] == (input[:, 0] < -0.5).sum()


def test_epsilon_is_learnable_where_there_is_no_space():
    layer = norms.create("filter-response", 4, 0)
    assert isinstance(layer.eps, nn.Parameter)
    assert norms.create("filter-response", 4, 2).eps == 1e-6
    with torch.no_grad():
        layer.eps.copy_(torch.tensor([1.0, 0.0, -1.0, 4.0]))
    output = layer(torch.tensor([[2.0, 2.0, 2.0, 2.0]]))
    torch.testing.assert_close(output, 2 / torch.tensor([[5.0, 4.0, 5.0, 8.0]]).sqrt())


def test_one_position_needs_a_learnable_epsilon():
    input = torch.randn(2, 4, 1, 1)
    with pytest.raises(ValueError, match=r"norms.filter-response: expected more than 1 spatial .* \(2, 4, 1, 1\)"):
        FilterResponseNorm(4, 2)(input)
    features = FilterResponseNorm(4, 0)
    maps = FilterResponseNorm(4, 2, learnable_eps=True)
    torch.testing.assert_close(maps(input).flatten(1), features(input.flatten(1)))


def test_gradients_of_all_parameters():
    torch.manual_seed(0)
    layer = randomise(FilterResponseNorm(3, 1, learnable_eps=True))
    parameters = dict(layer.named_parameters())
    assert set(parameters) == {"eps", "weight", "bias"}

    def call(input, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (input,))

    inputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), *parameters.values()]
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("activation", ["relu", nn.ReLU(), torch.relu])
def test_the_threshold_takes_the_place_of_relu_alone(activation):
    block = norms.block("filter-response")(3, 8, 3, activation=activation)
    assert [type(part) for part in block] == [nn.Conv2d, FilterResponseNorm, ThresholdedLinearUnit]
    assert block.linear.bias is None
    with torch.no_grad():
        block.activation.tau.fill_(-0.25)
    assert block(torch.randn(2, 3, 6, 6)).min() == -0.25


def test_other_activations_stay():
    assert not hasattr(norms.block("filter-response")(3, 8, 3, activation=None), "activation")
    block = norms.block("filter-response")(3, 8, 3, activation="tanh")
    input = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(block(input), block.norm(block.linear(input)).tanh())


def test_scale_of_a_filter_or_of_the_input_does_not_matter():
    torch.manual_seed(0)
    block = norms.block("filter-response")(3, 8, 3).double()
    input = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = block(input)
    with torch.no_grad():
        block.linear.weight[2] *= 7
    # Epsilon is 1e-6 of the mean square or less.
    torch.testing.assert_close(block(3 * input), before, rtol=0, atol=1e-5)
