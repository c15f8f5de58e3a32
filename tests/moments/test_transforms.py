"""`Rule.moments` inside torch's program transformations, as a layer uses it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from normprop.moments import resolve


class Layer(nn.Module):
    """Scale, shift, activate, normalise: the use that layers make of a rule."""

    def __init__(self, activation, derivative=True):
        super().__init__()
        self.derivative = derivative
        self.activation = activation
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.bias = nn.Parameter(torch.linspace(-1.0, 1.0, 6))

    def forward(self, input):
        rule = resolve(self.activation)
        moments = rule.moments(self.bias, self.gain.abs(), derivative=self.derivative)
        output = rule.function(input * self.gain + self.bias)
        output = (output - moments.mean) / moments.var.sqrt()
        return output + moments.squared_derivative if self.derivative else output


def swish(z):
    return z * torch.sigmoid(1.5 * z)


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.5))

    def forward(self, z):
        return z * torch.sigmoid(self.beta * z)


ACTIVATIONS = {
    "relu": "relu",
    "elu": "elu",
    "gelu": "gelu",
    "hardswish": "hardswish",
    "tanh": "tanh",
    "prelu": nn.PReLU(6),
    "leaky": nn.LeakyReLU(0.2),
    "softplus": nn.Softplus(2.0),
    "own": swish,
    "own_learnable": Swish(),
}
every = pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)


def parameters(layer):
    return dict(layer.named_parameters())


@every
def test_compiles_without_graph_breaks(activation):
    torch._dynamo.reset()
    layer, input = Layer(activation), torch.linspace(-2.0, 2.0, 24).reshape(4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, got = layer(input), compiled(input)
    torch.testing.assert_close(got, expected)
    gradients = (torch.autograd.grad(output.square().sum(), [*layer.parameters()]) for output in (expected, got))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_exports(activation):
    layer, input = Layer(activation, derivative=False), torch.linspace(-2.0, 2.0, 24).reshape(4, 6)
    torch.testing.assert_close(torch.export.export(layer, (input,)).module()(input), layer(input))


@every
def test_per_sample_gradients(activation):
    layer, input = Layer(activation), torch.linspace(-2.0, 2.0, 18).reshape(3, 6)

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters(layer), input)
    for i, sample in enumerate(input):
        alone = torch.autograd.grad(loss(parameters(layer), sample), [*layer.parameters()])
        for name, expected in zip(parameters(layer), alone, strict=True):
            torch.testing.assert_close(together[name][i], expected, rtol=1e-4, atol=1e-4)


@every
def test_meta_tensors(activation):
    layer = copy.deepcopy(Layer(activation)).to("meta")
    assert layer(torch.empty(4, 6, device="meta")).shape == (4, 6)


@every
def test_rules_copy_and_pickle(activation):
    mean, std = torch.linspace(-1.0, 1.0, 6), torch.linspace(0.5, 1.5, 6)
    rule = resolve(activation)
    expected = rule.moments(mean, std).var
    for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(other.moments(mean, std).var, expected)


def test_a_copied_rule_has_its_own_parameters():
    rule = resolve(nn.PReLU(init=0.5))
    other = copy.deepcopy(rule)
    with torch.no_grad():
        other.function.weight.fill_(0.0)
    assert other.moments(0.0, 1.0).squared_derivative.item() == pytest.approx(0.5)
    assert rule.moments(0.0, 1.0).squared_derivative.item() == pytest.approx(0.625)
