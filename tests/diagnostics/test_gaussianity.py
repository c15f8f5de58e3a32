import copy
import json
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from normprop import models
from normprop.diagnostics import gaussianity as G
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError

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
    assert f"least Gaussian are those of layer far (median |skew| {far.units.skew.abs().quantile(0.5):.2g}" in one.found
    assert one.found.startswith(f"net: {100 * (near.within + far.within) / 2:.0f}% of the units")
    two = G.describe({"a": [near], "b": [near, far]})
    a, b = two.found.splitlines()
    assert a.startswith("a: ")
    assert "of layer near" in a
    assert b.startswith("b: ")
    assert "of layer far" in b
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
    assert "of layer dead (median |skew| nan" in found.found
    assert some.within <= 2 / 3
    assert dead.within == 0
    json.dumps(found.numbers, allow_nan=False)
    assert G.describe({}).found == "No pre-activations were looked at."
