import copy

import pytest
import torch

from normprop import moments, norms
from normprop.errors import ConfigError

CLASSIC = ["none", "normprop", "normprop-paper", "batch", "group", "layer", "instance", "weight"]


def build(name, dims, **options):
    """A block from 4 to 8 channels and an input batch for it."""
    sizes = [6, 5, 4][:dims]
    arguments = (4, 8) if dims == 0 else (4, 8, 3)
    if dims:
        options = {"padding": 1} | options
    return norms.block(name, dims)(*arguments, **options), torch.randn(5, 4, *sizes)


def every(names):
    return pytest.mark.parametrize(("name", "dims"), [(n, d) for n in names for d in norms.info(n).dims])


@every(norms.names())
def test_positional_arguments_follow_the_blocks_own_order(name, dims):
    torch.manual_seed(0)
    positional = (4, 8, "tanh") if dims == 0 else (4, 8, 3, 2, 1, 2, "tanh")
    named = {"activation": "tanh"} if dims == 0 else {"stride": 2, "padding": 1, "groups": 2, "activation": "tanh"}
    torch.manual_seed(1)
    first = norms.block(name, dims)(*positional)
    torch.manual_seed(1)
    second, input = build(name, dims, **named)
    assert torch.equal(first(input), second(input))


@every(CLASSIC)
def test_without_activation_the_output_can_be_negative_and_relu_follows_the_norm(name, dims):
    torch.manual_seed(0)
    linear, input = build(name, dims, activation=None)
    assert (linear(input) < -1e-3).any()
    if not name.startswith("normprop"):
        block, _ = build(name, dims, activation="relu")
        block.load_state_dict(linear.state_dict())
        torch.testing.assert_close(block(input), linear(input).relu())


@pytest.mark.parametrize(("name", "axes"), [("batch", (0, 2, 3)), ("layer", (1, 2, 3)), ("instance", (2, 3))])
def test_statistics_are_taken_over_the_axes_of_the_paper(name, axes):
    torch.manual_seed(0)
    block, input = build(name, 2, activation=None)
    linear = block.linear(input).double()
    mean, var = linear.mean(axes, keepdim=True), linear.var(axes, correction=0, keepdim=True)
    torch.testing.assert_close(block(input).double(), (linear - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-4)


def test_group_norm_takes_32_groups_or_as_many_as_divide():
    assert norms.block("group")(3, 64, 3).norm.num_groups == 32
    assert norms.block("group")(3, 48, 3).norm.num_groups == 8
    assert norms.block("group")(3, 8, 1).norm.num_groups == 4
    assert norms.block("group")(3, 5, 1).norm.num_groups == 1


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("name", ["none", "weight"])
def test_plain_and_weight_norm_keep_the_second_moment_at_the_start(name, activation):
    torch.manual_seed(0)
    second = moments.of(activation).second
    block = norms.block(name, 0)(1000, 1000, activation=activation)
    input = torch.randn(500, 1000)
    # A linear map of this block sees inputs of second moment E[f^2] and must return pre-activations of variance 1.
    with torch.no_grad():
        output = block(input * second**0.5)
    assert output.square().mean() == pytest.approx(second, rel=0.03)


def test_weight_norm_equals_torchs():
    torch.manual_seed(0)
    block, input = build("weight", 2, activation=None)
    reference = torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(block.linear.linear), dim=0)
    with torch.no_grad():
        reference.parametrizations.weight.original0.copy_(block.linear.gain.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(block(input), reference(input))


def test_errors():
    with pytest.raises(ConfigError, match="no method 'bach'; there are none, normprop"):
        norms.block("bach")
    with pytest.raises(ConfigError, match="dims must be"):
        norms.block("batch", 4)
    with pytest.raises(ConfigError, match="linear layer has none"):
        norms.block("instance", 0)(3, 4)
    with pytest.raises(ConfigError, match="is taken"):
        norms.register("batch", norms.method("batch"))
