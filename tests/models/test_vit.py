import copy
import math

import pytest
import torch

from normprop import models, norms
from normprop.errors import ConfigError
from normprop.models.vit import Attention, Patches, Position, TokenMean
from normprop.nn import NormPropLayer, Residual, output_moments
from normprop.norms.plain import PlainResidual
from normprop.training import parameter_groups
from normprop.training.statistics import watched

# What has no form for features without space: it must say so, under its own name.
SPATIAL_ONLY = ("instance", "proxy-instance")
METHODS = [name for name in norms.names() if name not in SPATIAL_ONLY]


def small(norm, **options):
    """One pair of branches on 4 x 4 images cut into four patches, and a batch for it."""
    torch.manual_seed(0)
    settings = {"depth": 1, "features": 8, "heads": 2, "patch_size": 2} | options
    return models.vit((3, 4, 4), 5, norm=norm, **settings), torch.randn(6, 3, 4, 4)


def only(network, kind):
    return next(module for module in network.modules() if isinstance(module, kind))


@pytest.mark.parametrize(("shape", "tokens", "patch"), [((1, 8, 8), 16, 2), ((3, 32, 32), 64, 4), ((3, 6, 6), 36, 1)])
def test_shapes_and_the_chosen_patch(shape, tokens, patch):
    network = models.create("vit", shape, 7, norm="layer", width=0.25)
    assert only(network, Patches).patch_size == patch
    assert only(network, Position).position.shape == (tokens, 16)
    assert network(torch.randn(3, *shape)).shape == (3, 7)
    assert network(torch.randn(0, *shape)).shape == (0, 7)


def test_patches_are_squares_in_reading_order():
    image = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    expected = [image[0, :, i : i + 2, j : j + 2].flatten() for i in (0, 2) for j in (0, 2, 4)]
    assert torch.equal(Patches(2)(image), torch.stack(expected))


def test_tokens_are_averaged_and_placed_within_their_own_sample():
    rows = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(TokenMean(3)(rows), torch.tensor([[2.0, 3.0], [8.0, 9.0]]))
    position = Position(3, 2)
    assert torch.equal(position(torch.zeros(6, 2)), position.position.repeat(2, 1))


def test_attention_is_the_textbooks():
    torch.manual_seed(0)
    samples, tokens, heads, width = 2, 5, 3, 4
    input = torch.randn(samples * tokens, 3 * heads * width, dtype=torch.float64)
    output = Attention(tokens, heads)(input)
    for sample in range(samples):
        rows = input[sample * tokens : (sample + 1) * tokens]
        query, key, value = rows.split(heads * width, dim=1)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights = torch.exp(query[:, part] @ key[:, part].T / math.sqrt(width))
            expected = weights / weights.sum(1, keepdim=True) @ value[:, part]
            torch.testing.assert_close(output[sample * tokens : (sample + 1) * tokens, part], expected)


@pytest.mark.parametrize("norm", ["layer", "normprop"])
def test_without_positions_the_order_of_patches_does_not_matter(norm):
    network, input = small(norm)
    network.double()
    input = input.double()
    swapped = torch.cat([input[..., 2:], input[..., :2]], dim=-1)
    assert not torch.allclose(network(swapped), network(input), rtol=1e-3)
    torch.nn.init.zeros_(only(network, Position).position)
    torch.testing.assert_close(network(swapped), network(input))


@pytest.mark.parametrize("norm", ["layer", "rms", "prms", "dynamic-tanh", "batch"])
def test_the_norm_acts_per_token_and_batch_norm_over_batch_and_tokens(norm):
    network, input = small(norm)
    first = next(module for module in network if isinstance(module, PlainResidual)).branch[0]
    rows = network[:3](input)
    changed = rows.clone()
    changed[5] += torch.randn(8)
    same = (first(changed) == first(rows)).all(1)
    assert not same[5]
    assert same[torch.arange(24) != 5].all() if norm != "batch" else not same.any()
    if norm == "batch":
        expected = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(first(rows), expected)


@pytest.mark.parametrize("norm", METHODS)
def test_every_method_for_features_builds_and_trains(norm):
    network, input = small(norm)
    logits = network(input)
    assert logits.shape == (6, 5)
    torch.nn.functional.cross_entropy(logits, torch.arange(6) % 5).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert any(p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("norm", SPATIAL_ONLY)
def test_spatial_methods_say_that_they_cannot(norm):
    with pytest.raises(ConfigError, match=f"norms.{norm}: .*linear layer"):
        small(norm)


@pytest.mark.parametrize("norm", ["none", "normprop", "layer", "rms", "prms", "dynamic-tanh", "weight", "batch"])
def test_a_batch_of_one_trains(norm):
    network, input = small(norm)
    assert network(input[:1]).shape == (1, 5)
    if norm != "batch":
        # Rounding differs with the number of rows in a matrix product.
        torch.testing.assert_close(network(input[:1]), network(input)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "normprop", "normprop-paper", "weight", "bounded-weight", "layer"])
def test_branches_start_small_and_the_signal_keeps_its_size(norm):
    torch.manual_seed(0)
    network = models.create("vit", (3, 32, 32), 10, norm=norm)
    with torch.no_grad():
        stream = network[:3](torch.randn(8, 3, 32, 32))
        assert stream.var() == pytest.approx(1.0, rel=0.15)
        for module in network[3:-3]:
            stream = module(stream)
            # At most e from sums of variance 1 + 1 / 8 each, at least 1 / e from attention taken for larger than it is.
            assert math.exp(-1) < stream.var() < math.e


def test_normprops_sums_know_the_size_of_their_branches():
    network = models.vit((3, 32, 32), 10, depth=2)
    sums = [module for module in network if isinstance(module, Residual)]
    assert len(sums) == 4
    for module in sums:
        moments = output_moments(module.branch)
        torch.testing.assert_close(moments.var, torch.full((64,), 0.25))
    assert not any(isinstance(module, torch.nn.Linear) and not isinstance(module, NormPropLayer) for module in network)


def test_normprop_sees_the_brightness_of_patches():
    torch.manual_seed(0)
    network = models.vit((1, 8, 8), 10)
    bright = network[:2](torch.ones(1, 1, 8, 8))
    # Filters of squared length 3 / 4 over 4 pixels, in random directions: E[(w . 1)^2] = 3 / 4; centred ones give 0.
    # Over 64 filters the standard error is about a tenth of that.
    assert bright.square().mean().item() == pytest.approx(0.75, rel=0.4)


def test_positions_do_not_decay():
    network, _ = small("layer")
    decayed, kept = parameter_groups(network, 0.1)
    names = {id(p): name for name, p in network.named_parameters()}
    assert "2.position" in [names[id(p)] for p in kept["params"]]
    assert len(decayed["params"]) == 6  # embedding, qkv, projection, the MLP's two, head
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])


@pytest.mark.parametrize("norm", ["none", "layer", "normprop"])
def test_every_linear_map_is_watched(norm):
    network, _ = small(norm)
    names = ["1", "3.branch.1", "3.branch.3", "4.branch.1", "4.branch.2", "7"]
    assert [name for name, _ in watched(network)] == names


@pytest.mark.parametrize("norm", ["layer", "normprop"])
def test_copies_and_compiled_networks_compute_the_same(norm):
    network, input = small(norm)
    expected = network(input)
    assert torch.equal(copy.deepcopy(network)(input), expected)
    torch.testing.assert_close(torch.compile(network, backend="aot_eager")(input), expected)


def test_sizes():
    network = models.vit((3, 32, 32), 10, norm="layer", width=0.3, heads=3, depth=2)
    assert network[1](torch.randn(64, 48)).shape == (64, 18)  # 64 * 0.3 = 19.2 to a multiple of 3
    assert sum(isinstance(module, Attention) for module in network.modules()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size must divide the image's height and width, 4 and 4, got 3"),
        ({"patch_size": 0}, "patch_size must divide"),
        ({"heads": 0}, "heads must be a whole number of at least 1, got 0"),
        ({"depth": 0}, "depth must be"),
        ({"norm": "bach"}, "no method 'bach'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        models.vit((3, 4, 4), 5, **options)
    with pytest.raises(ConfigError, match="use mlp"):
        models.create("vit", (64,), 10)
