import math

import pytest
import torch
import torch.nn.functional as F

from normprop import models, moments, nn, norms
from normprop.errors import ConfigError
from normprop.norms.scaled_weight_standardization import NormFreeResidual, ScaledActivation, block

NAME = "scaled-weight-standardized"


def test_block_equals_the_textbook_form():
    torch.manual_seed(0)
    layer = norms.block(NAME)(4, 8, 3, padding=1).double()
    with torch.no_grad():
        layer.linear.gain.uniform_(0.5, 2.0)
        layer.linear.linear.bias.normal_()
    input = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = layer.linear.linear.weight
    mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), correction=0, keepdim=True)
    scaled = layer.linear.gain.reshape(-1, 1, 1, 1) * (weight - mean) / (math.sqrt(36) * std)
    expected = math.sqrt(2 / (1 - 1 / math.pi)) * F.conv2d(input, scaled, layer.linear.linear.bias, padding=1).relu()
    torch.testing.assert_close(layer(input), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu", "elu", "sigmoid", "softplus", "selu"])
def test_activations_have_exactly_unit_variance(activation):
    """Trapezoids of width 5e-4, with a node at the kinks: an error of the square of that."""
    z = torch.linspace(-9, 9, 36001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    value = ScaledActivation(activation)(z)
    mean = (value * density).sum()
    assert ((value - mean).square() * density).sum().item() == pytest.approx(1.0, abs=1e-6)


def test_chain_equals_normprop_with_centred_filters_and_fixed_moments():
    """Without padding: filters of mean 0 do not see the mean c2 / c1 that NormProp takes away."""
    torch.manual_seed(0)
    ours, theirs = [], []
    for inputs in (3, 8, 8):
        ours.append(norms.block(NAME)(inputs, 8, 3).double())
        theirs.append(nn.Conv2d(inputs, 8, 3, activation="relu", center=True, moments="fixed").double())
        with torch.no_grad():
            theirs[-1].weight.copy_(ours[-1].linear.linear.weight)
            theirs[-1].gain.copy_(ours[-1].linear.gain.uniform_(0.5, 1.5))
            theirs[-1].bias.copy_(ours[-1].linear.linear.bias.normal_())
    input = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    relu = moments.of("relu")
    expected = torch.nn.Sequential(*theirs)(input) + relu.mean / relu.std
    torch.testing.assert_close(torch.nn.Sequential(*ours)(input), expected, rtol=1e-12, atol=1e-12)


def test_residual_block_is_the_papers():
    torch.manual_seed(0)
    branch = block(0, 4, 4, activation=None)
    residual = NormFreeResidual(branch, activation="tanh", alpha=0.3).double()
    residual.variance = 2.0
    input = torch.randn(3, 4, dtype=torch.float64)
    gain = float(moments.of("tanh").std) ** -1
    expected = input + 0.3 * branch(gain * torch.tanh(input / math.sqrt(2.0)))
    torch.testing.assert_close(residual(input), expected, rtol=1e-12, atol=1e-12)
    projection = block(0, 4, 4, activation=None).double()
    residual.shortcut = projection
    activated = gain * torch.tanh(input / math.sqrt(2.0))
    torch.testing.assert_close(residual(input), projection(activated) + 0.3 * branch(activated), rtol=1e-12, atol=1e-12)


def test_finish_tracks_the_variance_through_the_stages():
    network = models.resnet(20, norm=NAME, width=0.25)
    blocks = [module for module in network.modules() if isinstance(module, NormFreeResidual)]
    # Stage 1 has no projection; those of stages 2 and 3 see the sum of the stage before and start again from 1.
    assert [b.variance for b in blocks] == pytest.approx([1, 1.04, 1.08, 1.12, 1.04, 1.08, 1.12, 1.04, 1.08])
    assert [b.output_variance for b in blocks][3:6] == pytest.approx([1.04, 1.08, 1.12])
    assert [b.last for b in blocks] == [False] * 8 + [True]
    assert isinstance(network[0].activation, torch.nn.Identity)
    before = [b.variance for b in blocks]
    norms.finish(NAME, network)
    assert [b.variance for b in blocks] == before


def test_finish_sees_through_nested_stages():
    def residual():
        return NormFreeResidual(block(0, 4, 4, activation=None), spatial_dims=0)

    first, second, third = residual(), residual(), residual()
    stages = torch.nn.Sequential(torch.nn.Sequential(first, second), torch.nn.Sequential(third))
    stem = block(0, 4, 4)
    norms.finish(NAME, torch.nn.Sequential(stem, stages, torch.nn.Identity()))
    assert [b.last for b in (first, second, third)] == [False, False, True]
    assert third.variance == pytest.approx(1.08)
    assert isinstance(stem.activation, torch.nn.Identity)


def test_expected_variance_is_the_measured_one():
    """Width 1024, 256 samples: 2^18 values, but filters that are shared by all samples leave about 2 % of error."""
    torch.manual_seed(0)
    width = 1024
    residuals = [
        NormFreeResidual(torch.nn.Sequential(block(0, width, width), block(0, width, width, activation=None)))
        for _ in range(6)
    ]
    network = torch.nn.Sequential(block(0, width, width), *residuals)
    norms.finish(NAME, network)
    with torch.no_grad():
        value = network[0](torch.randn(256, width))
        for residual in residuals[:-1]:
            value = residual(value)
            assert value.var().item() == pytest.approx(residual.output_variance, rel=0.05)
        assert residuals[-1](value).var().item() == pytest.approx(1.0, rel=0.05)


def test_a_filter_of_one_weight_is_refused():
    with pytest.raises(ConfigError, match=r"norms.scaled-weight-standardized: .* single weight"):
        norms.block(NAME)(4, 4, 1, groups=4)
