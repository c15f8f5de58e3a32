import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models, norms
from normprop import nn as npnn
from normprop.diagnostics.preactivations import preactivations
from normprop.errors import ConfigError


def kept(values):
    return values


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("moments", ["fixed", "live"])
@pytest.mark.parametrize("activation", ["relu", "tanh", nn.PReLU()])
def test_normprop_layers(center, moments, activation):
    layer = npnn.Conv2d(3, 5, 3, padding=1, activation=activation, center=center, moments=moments, gain=0.7)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 3, 6, 6)
    weight = layer.weight.detach()
    weight = weight - weight.mean((1, 2, 3), keepdim=True) if center else weight
    weight = 0.7 * weight / weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    expected = F.conv2d(x, weight, layer.bias.detach(), padding=1)
    found = preactivations(nn.Sequential(layer), x, kept)
    assert list(found) == ["0"]
    torch.testing.assert_close(found["0"], expected.flatten(2))


def test_normprop_linear_on_tokens_and_transposed_convolution():
    layer = npnn.Linear(4, 6, activation="relu")
    x = torch.randn(3, 5, 4)
    bare = npnn.Linear(4, 6)
    bare.load_state_dict(layer.state_dict())
    torch.testing.assert_close(preactivations(layer, x, kept)["Linear"], bare(x).detach().movedim(-1, 1))
    layer = npnn.ConvTranspose2d(3, 5, 2, stride=2, activation="relu", center=False)
    bare = npnn.ConvTranspose2d(3, 5, 2, stride=2, center=False)
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(3, 3, 4, 4)
    found = preactivations(layer, x, kept)["ConvTranspose2d"]
    torch.testing.assert_close(found, bare(x).detach().flatten(2))


def test_normprop_layer_without_activation_has_none():
    model = nn.Sequential(npnn.Linear(4, 3), nn.ReLU())
    assert list(preactivations(model, torch.randn(2, 4), kept)) == ["1"]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("project", [False, True])
def test_normprop_sums(activation, project):
    branch = npnn.Conv2d(4, 4, 3, padding=1)
    nn.init.constant_(branch.gain, 0.5)
    shortcut = npnn.Conv2d(4, 4, 1, center=False) if project else None
    block = npnn.Residual(branch, shortcut, activation=activation)
    x = torch.randn(2, 4, 5, 5)
    found = preactivations(nn.Sequential(block), x, kept)
    skip = shortcut(x) if project else x
    assert list(found) == ["0"]
    expected = (skip + branch(x)) / math.sqrt(1 + 0.25)
    torch.testing.assert_close(found["0"], expected.detach().flatten(2))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 3), nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.act(self.second(x))
        x = self.act(self.second(x).clone())
        return F.gelu(self.second(x)).relu_().sigmoid()


def test_functions_and_shared_modules_are_found_in_order():
    model = Functional()
    x = torch.randn(5, 4)
    found = preactivations(model, x, kept)
    assert list(found) == ["Functional", "act", "act (2)", "Functional (2)", "Functional (3)", "Functional (4)"]
    first = model.first(x).detach()
    torch.testing.assert_close(found["Functional"][..., 0], first)
    torch.testing.assert_close(found["act"][..., 0], model.second(first.relu()).detach())


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.PReLU(), nn.RReLU(), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(),
     nn.SiLU(), nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(),
     nn.Hardshrink(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(), nn.LogSigmoid(), nn.Threshold(0.1, 0.0)],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_every_activation_of_torch_counts_once(activation):
    linear = nn.Linear(3, 4)
    x = torch.randn(5, 3)
    found = preactivations(nn.Sequential(linear, activation), x, kept)
    assert list(found) == ["1"]
    torch.testing.assert_close(found["1"][..., 0], linear(x).detach())


def test_units_of_tokens_are_on_the_last_axis():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    x = torch.randn(2, 7, 3)
    torch.testing.assert_close(preactivations(model, x, kept)["1"], model[0](x).detach().mT)
    found = preactivations(nn.Sequential(nn.Conv1d(3, 4, 1), nn.GELU()), torch.randn(2, 3, 7), kept)
    assert found["1"].shape == (2, 4, 7)


@pytest.mark.parametrize("name", norms.names())
def test_every_method(name):
    """A ResNet-8 calls seven activations, whatever else a method computes; C = N must not let tables pass for maps."""
    model = models.create("resnet8", (3, 8, 8), 10, norm=name, width=0.25).train()
    found = preactivations(model, torch.randn(16, 3, 8, 8), lambda values: tuple(values.shape))
    gated = {"evonorm-s0": 3}  # in its blocks the activation is part of the norm
    assert len(found) == gated.get(name, 7)
    assert {len(shape) for shape in found.values()} == {3}
    assert {shape[0] for shape in found.values()} == {16}
    assert [shape[1] for shape in found.values()] == sorted(shape[1] for shape in found.values())
    assert "2.branch.0" in " ".join(found) or name in gated


def test_gates_of_an_lstm_are_no_activations():
    model = models.create("lstm", (3, 8, 8), 10, norm="recurrent-normprop", width=0.25)
    with pytest.raises(ConfigError, match="calls no activation"):
        preactivations(model, torch.randn(2, 3, 8, 8), kept)


def test_batch_norm_in_both_modes():
    model = norms.block("batch")(3, 4, 3)
    x = torch.randn(8, 3, 6, 6)
    for mode in (True, False):
        twin = copy.deepcopy(model).train(mode)
        expected = twin.norm(twin.linear(x)).detach().flatten(2)
        torch.testing.assert_close(preactivations(model.train(mode), x, kept)["activation"], expected)
