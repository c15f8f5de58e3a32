"""Methods that are special cases of each other, across modules; the pairs within one paper are in its own test."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from normprop import moments, nn, norms
from normprop.moments.maps import backward_growth


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def whitened(samples, features):
    """A batch whose sample covariance is exactly the identity and whose mean is exactly zero."""
    batch = torch.randn(samples, features, dtype=torch.float64)
    batch = batch - batch.mean(0)
    return math.sqrt(samples) * torch.linalg.qr(batch).Q


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_normprop_on_a_whitened_batch_is_batch_norm(activation):
    input = whitened(60, 7)
    layer = nn.Linear(7, 5, activation=activation, center=False, moments="fixed", gain=1.0, dtype=torch.float64)
    rule = moments.of(activation)
    # Batch norm of the same map, whatever the length of its filters, then the activation's own normalisation.
    normalised = F.batch_norm(F.linear(input, 3 * layer.weight), None, None, training=True, eps=1e-30)
    expected = (moments.resolve(activation).function(normalised) - rule.mean) / rule.std
    torch.testing.assert_close(layer(input), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["normprop", "normprop-paper"])
def test_normprop_is_weight_norm_and_a_fixed_affine_map(name):
    block, plain = norms.block(name)(3, 4, 3).double(), norms.block("weight")(3, 4, 3).double()
    filters = block.weight.detach()
    if name == "normprop":
        filters = filters - filters.mean((1, 2, 3), keepdim=True)
    with torch.no_grad():
        plain.linear.linear.weight.copy_(filters)
        plain.linear.gain.copy_(block.gain)
    input = torch.randn(2, 3, 6, 6).double()
    # The live layer's constants are those of N(0, gain^2), which is N(0, 1) at its start; the printed one's always are.
    relu = moments.of("relu")
    torch.testing.assert_close(block(input), (plain(input) - relu.mean) / relu.std, rtol=1e-12, atol=1e-12)


def test_scaled_weight_standardisation_proxy_norm_and_normprop_agree_on_one_layer():
    block = norms.block("scaled-weight-standardized")(3, 4, 3).double()
    layer = nn.Conv2d(3, 4, 3, activation="relu", center=True, moments="fixed", dtype=torch.float64)
    layer.load_state_dict({"weight": block.linear.linear.weight, "gain": torch.ones(4), "bias": torch.zeros(4)})
    input = torch.randn(2, 3, 6, 6).double()
    relu = moments.of("relu")
    torch.testing.assert_close(block(input) - relu.mean / relu.std, layer(input), rtol=1e-12, atol=1e-12)


def test_drop_in_layers_of_the_batch_family_agree_where_their_papers_say():
    input = torch.randn(16, 8, 5, 5).double() * 3 + 1
    expected = F.batch_norm(input, None, None, training=True, eps=1e-5)
    for name in ("batch", "sync-batch", "ghost-batch", "batch-renorm"):
        torch.testing.assert_close(norms.create(name, 8).double()(input), expected)
    gated = norms.create("instance-enhancement", 8).double()
    torch.testing.assert_close(
        gated(input), expected * torch.sigmoid(torch.tensor(-1.0)).double(), rtol=1e-6, atol=1e-6
    )
    # One sample: group norm with the same groups.
    torch.testing.assert_close(
        norms.create("batch-group", 8).double()(input[:1]), norms.create("group", 8).double()(input[:1])
    )
    # Centred per sample, the root mean square is the standard deviation.
    centred = input - input.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(norms.create("rms", 8).double()(centred), norms.create("layer", 8).double()(input))


def test_gradients_of_a_wide_batch_norm_network_grow_as_normprop_predicts():
    width, samples, depth = 1024, 1024, 6
    layers = [norms.block("batch", 0)(width, width) for _ in range(depth)]
    values = [torch.randn(samples, width, requires_grad=True)]
    for layer in layers:
        values.append(layer(values[-1]))
        values[-1].retain_grad()
    values[-1].backward(torch.randn(samples, width))
    norms_squared = [float(value.grad.square().sum()) for value in values]
    rates = [before / after for before, after in itertools.pairwise(norms_squared[1:])]
    # He's weights have variance 2 / width and batch norm divides by the deviation c1 sqrt(2) of a ReLU's output, so
    # each layer multiplies by E[f'^2] / c1^2. The first layer sees no ReLU and is left out. Width and batch of 1,024
    # leave a few percent: batch norm's projections take 2 of 1,024 directions, fluctuations go as 1 / sqrt(1,024).
    assert backward_growth("relu") == pytest.approx(math.pi / (math.pi - 1))
    assert math.prod(rates) ** (1 / len(rates)) == pytest.approx(backward_growth("relu"), rel=0.03)
