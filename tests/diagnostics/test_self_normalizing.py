"""Networks against the moment map."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.self_normalizing import describe, measure
from normprop.errors import ConfigError
from normprop.report.plots import svg


def test_deep_networks_stay_at_the_fixed_point():
    torch.manual_seed(0)
    net = nn.Sequential()
    for _ in range(100):
        linear = nn.Linear(512, 512)
        nn.init.normal_(linear.weight, std=512**-0.5)
        nn.init.zeros_(linear.bias)
        net.append(nn.Sequential(linear, nn.SELU()))
    found = measure(Subject("snn", net, torch.randn(64, 512)))
    assert found.self_normalizing == 100
    assert max(abs(mean) for mean in found.means) < 0.1
    assert 0.8 < min(found.variances) < max(found.variances) < 1.5
    assert found.predicted_variances[100] == pytest.approx(found.variances[100], rel=0.1)


def test_trajectories_are_those_of_the_map():
    """Inputs off the fixed point, long weights and biases: the map follows all of them."""
    torch.manual_seed(1)
    net = nn.Sequential()
    for activation in (nn.SELU(), nn.ReLU(inplace=True), nn.Tanh(), None):
        linear = nn.Linear(600, 600)
        nn.init.normal_(linear.weight, mean=0.002, std=1.3 * 600**-0.5)
        nn.init.normal_(linear.bias, std=0.3)
        net.append(nn.Sequential(linear, activation) if activation else linear)
    found = measure(Subject("net", net, 0.4 + 1.5 * torch.randn(200, 600)))
    assert found.predicted_means[0] == found.means[0]
    for layer in range(1, 5):
        assert found.predicted_means[layer] == pytest.approx(found.means[layer], abs=0.08)
        assert found.predicted_variances[layer] == pytest.approx(found.variances[layer], rel=0.08)


def test_where_the_map_does_not_apply():
    torch.manual_seed(2)
    x = torch.randn(8, 3, 16, 16)
    found = measure(Subject("batch", models.create("nin", (3, 16, 16), 4, norm="batch", width=0.1), x))
    assert all(math.isnan(value) for value in found.predicted_means[:-2])
    assert all(math.isfinite(value) for value in found.means)
    # A pool: the chain ends and starts again from what was measured.
    selu = measure(Subject("selu", models.create("nin", (3, 16, 16), 4, norm="selu", width=0.1), x))
    assert selu.predicted_variances[2] == selu.variances[2]
    assert selu.predicted_variances[3] != selu.variances[3]


def test_the_network_is_left_as_it_was():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SELU(inplace=True), nn.Dropout(0.5), nn.Flatten())
    net.append(nn.Linear(16, 2))
    x = torch.randn(6, 2, 4, 4)
    before, random, kept = copy.deepcopy(net.state_dict()), torch.get_rng_state(), x.clone()
    describe({"net": measure(Subject("net", net, x))})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in net)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_errors_are_one_line():
    with pytest.raises(ConfigError, match=r"^net: the network does not take inputs of shape \(4, 5\)") as caught:
        measure(Subject("net", nn.Linear(3, 2), torch.randn(4, 5)))
    assert "\n" not in str(caught.value)


def test_description():
    torch.manual_seed(4)
    x = torch.randn(64, 40)
    names = ("selu", "none")
    results = {name: measure(Subject(name, models.create("mlp", (40,), 5, norm=name, width=0.5), x)) for name in names}
    for some in ({"selu": results["selu"]}, results):
        diagnosis = describe(some)
        numbers = json.loads(json.dumps(diagnosis.numbers, allow_nan=False))
        assert round(numbers["map"]["spectral_norm"], 7) == 0.7876734
        assert numbers["map"]["theorem 2"]["holds"]
        for name, result in some.items():
            inside = sum(
                abs(mean) <= 0.1 and 0.8 <= var <= 1.5
                for mean, var in zip(result.means[1:], result.variances[1:], strict=True)
            )
            assert f"{name}: {inside} of 5 layers put out" in diagnosis.found
            assert (
                f"variances from {min(result.variances[1:]):.3g} to {max(result.variances[1:]):.3g}" in diagnosis.found
            )
            ratio = max(max(a / b, b / a) for a, b in zip(result.variances, result.predicted_variances, strict=True))
            assert f"which theory predicts to within a factor of {ratio:.3g}." in diagnosis.found
        assert svg(diagnosis.figures).startswith("<svg")
    assert [(line.name, line.style) for line in describe(results).figures[1].lines] == [
        (name, style) for name in names for style in ("both", "theory")
    ]


def test_description_of_what_is_not_finite():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    single = measure(Subject("single", net, torch.randn(1, 4)))
    with torch.no_grad():
        net[0].weight.fill_(math.inf)
    broken = measure(Subject("broken", net, torch.randn(3, 4)))
    diagnosis = describe({"single": single, "broken": broken})
    assert json.dumps(diagnosis.numbers, allow_nan=False)
    assert "broken: means and variances are not finite in any of 2 layers." in diagnosis.found
    assert "nan" not in diagnosis.found
    assert svg(diagnosis.figures).startswith("<svg")
