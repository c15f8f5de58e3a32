import copy
import json
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models, norms
from normprop import nn as npnn
from normprop.diagnostics import gaussianity as G
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kept(values):
    return values


# --- statistics


def test_statistics_agree_with_scipy():
    values = torch.randn(3, 500, dtype=torch.float64).exp()
    found = G.statistics(values)
    for unit, row in enumerate(values.numpy()):
        assert found.mean[unit].item() == pytest.approx(row.mean())
        assert found.std[unit].item() == pytest.approx(row.std())
        assert found.skew[unit].item() == pytest.approx(scipy.stats.skew(row))
        assert found.kurtosis[unit].item() == pytest.approx(scipy.stats.kurtosis(row))
        expected = scipy.stats.kstest((row - row.mean()) / row.std(), "norm").statistic
        assert found.distance[unit].item() == pytest.approx(expected, abs=1e-12)


def test_statistics_of_a_constant_unit_are_not_numbers():
    found = G.statistics(torch.tensor([[2.0, 2.0, 2.0], [0.0, 1.0, 2.0]]))
    assert found.std[0] == 0
    assert found.skew.isnan().tolist() == [True, False]
    assert found.distance.isnan().tolist() == [True, False]


def autoregressive(shape, rho):
    noise = torch.randn(shape, dtype=torch.float64)
    rows = [noise[..., 0]]
    for position in range(1, shape[-1]):
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * noise[..., position])
    return torch.stack(rows, -1)


@pytest.mark.parametrize(("power", "moment", "factor"), [(3, "skew", 6), (4, "kurtosis", 24)])
def test_standard_errors_hold_for_correlated_positions(power, moment, factor):
    replicates, samples, positions, rho = 2000, 80, 20, 0.9
    lags = (torch.arange(positions)[:, None] - torch.arange(positions)).abs()
    count = samples * positions**2 / (rho ** (lags * power)).sum().item()
    field = autoregressive((replicates, samples, positions), rho)
    measured = getattr(G.statistics(field.flatten(1)), moment).var().item()
    # 2,000 replicates give a variance to 1/sqrt(1000) = 3.2%, heavier tails and the terms in 1/n^2 to somewhat less.
    assert measured == pytest.approx(factor / count, rel=0.12)
    assert measured > 1.5 * factor / (samples * positions)  # taking positions as independent is well off
    estimated = G.effective(autoregressive((20000, 2, positions), rho).transpose(0, 0), power)
    assert (estimated / (20000 * count / samples)).tolist() == pytest.approx([1, 1], rel=0.05)


def test_effective_counts_independent_positions_in_full():
    values = torch.randn(4000, 2, 16, dtype=torch.float64)
    assert (G.effective(values, 4) / (4000 * 16)).tolist() == pytest.approx([1, 1], rel=0.02)


# --- oracles


def test_gaussian_input_gives_gaussian_preactivations():
    model = nn.Sequential(nn.Linear(20, 400), nn.ReLU())
    (found,) = G.measure(Subject("net", model, torch.randn(2000, 20)))
    skew = found.units.skew / found.skew_error
    kurtosis = found.units.kurtosis / found.kurtosis_error
    # Units share 20 inputs, so their statistics are less than 400 independent ones.
    assert skew.square().mean().sqrt().item() == pytest.approx(1, abs=0.25)
    assert kurtosis.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
    assert found.within == pytest.approx(0.91, abs=0.08)
    assert found.units.distance.median() < 0.9 / math.sqrt(2000)
    assert found.quantiles.tolist() == pytest.approx(torch.special.ndtri(torch.tensor(G.LEVELS)).tolist(), abs=0.05)


def test_convolutions_of_gaussian_images_are_gaussian_with_fewer_effective_values():
    inputs = torch.randn(64, 3, 20, 20)
    (found,) = G.measure(Subject("net", nn.Sequential(nn.Conv2d(3, 100, 5), nn.ReLU()), inputs))
    assert found.count == 4096
    assert (6 / found.skew_error.square()).median() < 4096
    assert found.within == pytest.approx(0.91, abs=0.08)
    # Zeros around the map leave less variance at its rim: a mixture of Gaussians, with heavier tails than one.
    (padded,) = G.measure(Subject("net", nn.Sequential(nn.Conv2d(3, 100, 5, padding=2), nn.ReLU()), inputs))
    assert padded.within < 0.85
    assert padded.units.kurtosis.median() > found.units.kurtosis.median() + 0.1


LAWS = {
    "laplace": (lambda shape: torch.distributions.Laplace(0.0, 1.0).sample(shape), 3.0),
    "uniform": (lambda shape: torch.rand(shape) - 0.5, -1.2),
}


@pytest.mark.parametrize("law", LAWS)
def test_kurtosis_of_a_weighted_sum(law):
    sample, kurtosis = LAWS[law]
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU())
    weight = model[0].weight.detach().double()
    expected = kurtosis * weight.pow(4).sum(1) / weight.square().sum(1).square()
    inputs = sample((100_000, 6))
    (found,) = G.measure(Subject(law, model, inputs), limit=100_000)
    blocks = G.statistics(F.linear(inputs.double(), weight).T.unflatten(1, (50, -1))).kurtosis
    error = blocks.std(1) / math.sqrt(50)
    assert ((found.units.kurtosis - expected).abs() < 4 * error).all()
    assert (found.units.kurtosis.abs() > 10 * error).any()
    assert found.within == 0


def test_skew_of_rectified_inputs():
    model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[1].weight)
    found = G.measure(Subject("net", model, torch.randn(100_000, 1)), limit=100_000)
    assert [layer.layer for layer in found] == ["0", "2"]
    third = 2 / math.sqrt(2 * math.pi)  # of relu(z): E = 1/sqrt(2 pi), E^2 = 1/2, E^3 = 2/sqrt(2 pi)
    mean, var = 1 / math.sqrt(2 * math.pi), 0.5 * (1 - 1 / math.pi)
    expected = (third - 3 * mean * 0.5 + 2 * mean**3) / var**1.5
    assert found[1].units.skew.item() == pytest.approx(expected, abs=0.04)
    assert found[1].units.mean.item() == pytest.approx(mean, abs=0.01)
    assert found[1].pooled.std.item() == pytest.approx(math.sqrt(var), abs=0.01)


# --- pre-activations


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
    found = G.preactivations(nn.Sequential(layer), x, kept)
    assert list(found) == ["0"]
    torch.testing.assert_close(found["0"], expected.flatten(2))


def test_normprop_linear_on_tokens_and_transposed_convolution():
    layer = npnn.Linear(4, 6, activation="relu")
    x = torch.randn(3, 5, 4)
    bare = npnn.Linear(4, 6)
    bare.load_state_dict(layer.state_dict())
    torch.testing.assert_close(G.preactivations(layer, x, kept)["Linear"], bare(x).detach().movedim(-1, 1))
    layer = npnn.ConvTranspose2d(3, 5, 2, stride=2, activation="relu", center=False)
    bare = npnn.ConvTranspose2d(3, 5, 2, stride=2, center=False)
    bare.load_state_dict(layer.state_dict())
    x = torch.randn(3, 3, 4, 4)
    found = G.preactivations(layer, x, kept)["ConvTranspose2d"]
    torch.testing.assert_close(found, bare(x).detach().flatten(2))


def test_normprop_layer_without_activation_has_none():
    model = nn.Sequential(npnn.Linear(4, 3), nn.ReLU())
    assert list(G.preactivations(model, torch.randn(2, 4), kept)) == ["1"]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("project", [False, True])
def test_normprop_sums(activation, project):
    branch = npnn.Conv2d(4, 4, 3, padding=1)
    nn.init.constant_(branch.gain, 0.5)
    shortcut = npnn.Conv2d(4, 4, 1, center=False) if project else None
    block = npnn.Residual(branch, shortcut, activation=activation)
    x = torch.randn(2, 4, 5, 5)
    found = G.preactivations(nn.Sequential(block), x, kept)
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
    found = G.preactivations(model, x, kept)
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
    found = G.preactivations(nn.Sequential(linear, activation), x, kept)
    assert list(found) == ["1"]
    torch.testing.assert_close(found["1"][..., 0], linear(x).detach())


def test_units_of_tokens_are_on_the_last_axis():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU())
    x = torch.randn(2, 7, 3)
    torch.testing.assert_close(G.preactivations(model, x, kept)["1"], model[0](x).detach().mT)
    found = G.preactivations(nn.Sequential(nn.Conv1d(3, 4, 1), nn.GELU()), torch.randn(2, 3, 7), kept)
    assert found["1"].shape == (2, 4, 7)


@pytest.mark.parametrize("name", norms.names())
def test_every_method(name):
    """A ResNet-8 calls seven activations, whatever else a method computes; C = N must not let tables pass for maps."""
    model = models.create("resnet8", (3, 8, 8), 10, norm=name, width=0.25).train()
    found = G.preactivations(model, torch.randn(16, 3, 8, 8), lambda values: tuple(values.shape))
    gated = {"evonorm-s0": 3}  # in its blocks the activation is part of the norm
    assert len(found) == gated.get(name, 7)
    assert {len(shape) for shape in found.values()} == {3}
    assert {shape[0] for shape in found.values()} == {16}
    assert [shape[1] for shape in found.values()] == sorted(shape[1] for shape in found.values())
    assert "2.branch.0" in " ".join(found) or name in gated


def test_gates_of_an_lstm_are_no_activations():
    model = models.create("lstm", (3, 8, 8), 10, norm="recurrent-normprop", width=0.25)
    with pytest.raises(ConfigError, match="calls no activation"):
        G.preactivations(model, torch.randn(2, 3, 8, 8), kept)


def test_batch_norm_in_both_modes():
    model = norms.block("batch")(3, 4, 3)
    x = torch.randn(8, 3, 6, 6)
    for mode in (True, False):
        twin = copy.deepcopy(model).train(mode)
        expected = twin.norm(twin.linear(x)).detach().flatten(2)
        torch.testing.assert_close(G.preactivations(model.train(mode), x, kept)["activation"], expected)


@pytest.mark.parametrize("name", ["batch", "normprop", "kalman-batch", "cross-iteration"])
def test_the_network_stays_as_it_is(name):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5), models.create("nin", (3, 8, 8), 4, name, width=0.05))
    model.train()[2][0].eval()
    x = torch.randn(8, 3, 8, 8)
    model(x.clone()).sum().backward()
    state, random, image = copy.deepcopy(model.state_dict()), torch.get_rng_state(), x.clone()
    modes = [module.training for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    G.measure(Subject(name, model, x))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, image)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


# --- measure, describe


def test_cost_is_bounded_and_the_sample_is_spread():
    values = torch.arange(300.0).reshape(300, 1, 1) + torch.linspace(0, 0.9, 1000)
    found = G.gaussianity(values, limit=1000)
    assert found.count <= 1000
    assert found.units.mean.item() == pytest.approx(values.mean().item(), rel=0.01)
    assert G.gaussianity(torch.randn(5000, 2), limit=100).count == 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to(dtype)
    (found,) = G.measure(Subject("net", model, torch.randn(64, 4, dtype=dtype)))
    assert found.units.skew.dtype == torch.float64
    assert found.units.skew.isfinite().all()


def test_errors_are_one_line():
    with pytest.raises(ConfigError, match=r"^Linear calls no activation that is known \(celu.*\); give .*$"):
        G.measure(Subject("net", nn.Linear(3, 2), torch.randn(4, 3)))
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with pytest.raises(ConfigError, match=r"^gaussianity: net of shape \(1, 2, 1\).* at least 2 samples$"):
        G.measure(Subject("net", model, torch.randn(1, 3)))
    with pytest.raises(ConfigError, match="expected"):
        G.gaussianity(torch.randn(3))


def test_describe_names_the_least_gaussian_layer_of_every_network():
    near = G.gaussianity(torch.randn(4000, 8), "near")
    far = G.gaussianity(torch.randn(4000, 8).exp(), "far")
    one = G.describe({"net": [near, far]})
    assert f"of net: far (median |skew| {far.units.skew.abs().quantile(0.5):.2g}" in one.found
    assert f"by chance: net {100 * (near.within + far.within) / 2:.0f}%." in one.found
    two = G.describe({"a": [near], "b": [near, far]})
    assert "of a: near" in two.found
    assert ", of b: far" in two.found
    assert [line.name for line in two.figures[0].lines] == ["a", "b", ""]
    band = two.figures[1].lines[-1]
    assert band.high[0] == pytest.approx(2 * math.sqrt(24 / 4000))
    assert band.low[0] == -band.high[0]
    assert two.figures[2].lines[1].y == far.quantiles.tolist()
    json.dumps(two.numbers, allow_nan=False)


def test_describe_bears_dead_units_missing_layers_and_overflow():
    values = torch.randn(100, 3)
    values[:, 0] = 1.0
    dead = G.gaussianity(torch.ones(100, 2), "dead")
    some = G.gaussianity(values, "some")
    lost = G.gaussianity(torch.full((100, 2), math.inf), "lost")
    found = G.describe({"a": [some, dead, lost], "b": []})
    assert "of a: dead (median |skew| nan" in found.found
    assert some.within <= 2 / 3
    assert dead.within == 0
    json.dumps(found.numbers, allow_nan=False)
    assert G.describe({}).found == "No pre-activations were looked at."
