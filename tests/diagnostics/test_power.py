import copy
import json
import math

import pytest
import torch
from torch import nn

from normprop import norms
from normprop.diagnostics import power as P
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError
from normprop.experiments.ablations import zero_bias


def chain(name, depth, width=16):
    build = norms.block(name)
    layers = [build(width if index else 3, width, 3, padding=1) for index in range(depth)]
    network = norms.finish(name, nn.Sequential(*layers)).train()
    if name == "normprop":
        zero_bias(network)  # a bias is a constant that was chosen, not one that depth brings about
    return network


def shares(name, depth, inputs=None):
    inputs = torch.randn(16, 3, 8, 8) if inputs is None else inputs
    return [layer.power.shares for layer in P.measure(Subject(name, chain(name, depth), inputs))]


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 3, 7), (5, 3), (2, 3, 2, 3, 4), (1, 2, 3)])
def test_parts_add_up_to_the_power(shape):
    y = torch.randn(shape, dtype=torch.float64) * 3 + 2
    found = P.power(y)
    total = found.constant + found.between + found.within + found.contrast
    expected = y.square().transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=0)
    assert sum(found.shares) == pytest.approx(1, abs=1e-12)


def test_parts_add_up_in_single_precision_far_from_zero():
    found = P.power(torch.randn(8, 4, 16, 16) + 1000)
    total = found.constant + found.between + found.within + found.contrast
    torch.testing.assert_close(total, found.total, rtol=1e-6, atol=0)
    assert found.within.tolist() == pytest.approx([1] * 4, rel=0.1)


def test_known_parts():
    """Sample n has mean m_n and deviation s_n in every channel, by a pattern of mean 0 and variance 1."""
    pattern = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    means, stds = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 1.0, 3.0])
    y = (means[:, None, None] + stds[:, None, None] * pattern)[:, None]
    found = P.power(y)
    assert found.constant.item() == pytest.approx(9)
    assert found.between.item() == pytest.approx((4 + 1 + 9) / 3)
    assert found.within.item() == pytest.approx(2.25)
    assert found.contrast.item() == pytest.approx((1 + 0.25 + 2.25) / 3)


def test_shares_weigh_channels_by_their_power():
    y = torch.stack([torch.full((4, 2), 3.0), torch.tensor([[-1.0, 1.0]]).expand(4, 2)], 1)
    assert P.power(y).shares == pytest.approx((0.9, 0.0, 0.1, 0.0))


def test_features_without_space_have_no_part_within():
    found = P.power(torch.randn(50, 3))
    assert not found.within.any()
    assert not found.contrast.any()


def test_instance_norm_makes_samples_alike():
    for constant, between, within, contrast in shares("instance", 6):
        assert (constant, between, contrast) == pytest.approx((0, 0, 0), abs=1e-6)
        assert within == pytest.approx(1)


def test_batch_norm_has_no_constant_part():
    found = shares("batch", 6)
    assert max(row[0] for row in found) < 1e-10
    assert min(row[1] + row[3] for row in found) > 1e-3


def test_layer_norm_collapses_with_depth_and_its_proxy_prevents_that():
    inputs = torch.randn(16, 3, 8, 8)
    layer = [row[0] for row in shares("layer", 24, inputs)]
    assert layer[0] < 0.01
    assert 0.3 < layer[3] < layer[23]
    assert max(row[0] for row in shares("proxy-layer", 24, inputs)) < 0.1
    assert max(row[0] for row in shares("normprop", 24, inputs)) < 0.1


def test_collapse_follows_the_correlation_map():
    """The constant part is the correlation of any two samples, which ReLU maps by the arc-cosine kernel towards 1."""
    width, depth = 256, 16
    build = norms.block("layer")
    model = nn.Sequential(*[build(width, width, 1) for _ in range(depth)])
    found = P.measure(Subject("layer", model, torch.randn(64, width, 3, 3)))
    correlation = 0.0
    for layer in found:
        assert layer.power.shares[0] == pytest.approx(correlation, abs=0.06)
        angle = math.acos(correlation)
        correlation = (math.sqrt(1 - correlation**2) + correlation * (math.pi - angle)) / math.pi
    assert found[-1].power.shares[0] > 0.8


def test_layer_norm_does_not_collapse_with_an_odd_activation():
    """What collapses channels is their mean after ReLU: with tanh, which is odd, none is left."""
    build = norms.block("layer")
    model = nn.Sequential(*[build(16 if i else 3, 16, 3, padding=1, activation="tanh") for i in range(12)])
    found = P.measure(Subject("tanh", model, torch.randn(16, 3, 8, 8)))
    assert max(layer.power.shares[0] for layer in found) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_network_stays_as_it_is(dtype):
    model = chain("batch", 2).to(dtype)
    state = copy.deepcopy(model.state_dict())
    P.measure(Subject("net", model, torch.randn(4, 3, 8, 8, dtype=dtype)))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_random_numbers_stay_as_they_are():
    model, inputs = nn.Sequential(nn.Dropout(), chain("batch", 2)), torch.randn(4, 3, 8, 8)
    random = torch.get_rng_state()
    P.measure(Subject("net", model, inputs))
    assert torch.equal(torch.get_rng_state(), random)


def test_errors_are_one_line():
    with pytest.raises(ConfigError, match=r"^power: activations of shape \(3,\); expected \(samples, .*$"):
        P.power(torch.ones(3))
    with pytest.raises(ConfigError, match=r"^power: net was given 1 samples; .*$"):
        P.measure(Subject("net", chain("batch", 1), torch.ones(1, 3, 8, 8)))
    with pytest.raises(ConfigError, match="calls no activation"):
        P.measure(Subject("net", nn.Linear(3, 2), torch.ones(4, 3)))


def test_describe():
    half = P.power(torch.tensor([[[0.0, 2.0]]]).expand(3, 1, 2))
    part = P.power(torch.tensor([[[0.0, 2.0]], [[3.0, 7.0]]]))
    one = P.describe({"layer": [P.LayerPower("0", half), P.LayerPower("1", part)]})
    assert one.found == (
        "layer: from the first layer to the last, the share of the power that is the same in all samples and positions "
        "goes from 0.5 to 0.58, and the share by which samples differ from 0 to 0.27."
    )
    two = P.describe({"layer": [P.LayerPower("0", half)], "batch": [P.LayerPower("0", part), P.LayerPower("1", half)]})
    first, second = two.found.splitlines()
    assert first.startswith("layer: ")
    assert "goes from 0.5 to 0.5," in first
    assert second.startswith("batch: ")
    assert "goes from 0.58 to 0.5," in second
    assert [line.name for line in two.figures[0].lines] == ["layer", "batch"]
    assert two.figures[0].lines[1].y == pytest.approx([9 / 15.5, 0.5])
    assert two.figures[1].lines[1].y == pytest.approx([4.25 / 15.5, 0])
    assert two.figures[2].lines[1].y == pytest.approx([2.25 / 15.5, 0.5])
    json.dumps(two.numbers, allow_nan=False)


def test_describe_bears_what_is_not_finite_or_missing():
    lost = P.LayerPower("0", P.power(torch.full((2, 3, 4), math.inf)))
    none = P.LayerPower("1", P.power(torch.zeros(2, 3, 4)))
    found = P.describe({"none": [lost, none], "empty": []})
    assert "goes from not finite to not finite," in found.found
    json.dumps(found.numbers, allow_nan=False)
    assert P.describe({}).found == "No pre-activations were looked at."
