import pytest
import torch
import torch.nn.functional as F

from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.batch_group import BatchGroupNorm

SIZES = [(6, 8), (6, 8, 5), (6, 8, 4, 6), (3, 8, 2, 3, 2)]


def made(num_groups, channels=8):
    """A double layer with gain and bias away from 1 and 0, trained on nothing."""
    norm = BatchGroupNorm(channels, num_groups).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def compare(norm, reference, input):
    """Outputs and gradients (input, gain, bias) of a layer and of a function (input, gain, bias)."""
    ours, theirs = (input.clone().requires_grad_() for _ in range(2))
    gain, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    first, second = norm(ours), reference(theirs, gain, bias)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    outer = torch.randn_like(first)
    for mine, other in zip(
        torch.autograd.grad(first, [ours, norm.weight, norm.bias], outer),
        torch.autograd.grad(second, [theirs, gain, bias], outer),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_with_as_many_groups_as_channels_it_is_batch_norm(size):
    torch.manual_seed(0)
    norm = made(8)
    mean, var = torch.zeros(8).double(), torch.ones(8).double()
    for _ in range(3):
        input = torch.randn(size).double() * 3 + 2
        compare(norm, lambda x, g, b: F.batch_norm(x, mean, var, g, b, True, 0.1), input)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == 3
    norm.eval()
    compare(norm, lambda x, g, b: F.batch_norm(x, mean, var, g, b), input)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_one_sample_gives_group_norm(size, groups):
    torch.manual_seed(0)
    if len(size) == 2 and groups == 8:
        return  # one value per group: an error, below
    compare(made(groups), lambda x, g, b: F.group_norm(x, groups, g, b), torch.randn(1, *size[1:]).double() + 1)


@pytest.mark.parametrize(
    ("groups", "channels", "size"), [(1, 8, (4, 6)), (4, 8, (4, 6)), (12, 6, (2, 5)), (4, 6, (2, 3))]
)
def test_groups_are_consecutive_values_in_channel_major_order(groups, channels, size):
    """By definition, from an explicit loop; 12 groups of 6 channels are half maps, 4 are one and a half channels."""
    torch.manual_seed(0)

    def reference(input, gain, bias):
        flat = input.flatten(1)
        step = flat.shape[1] // groups
        parts = []
        for start in range(0, flat.shape[1], step):
            part = flat[:, start : start + step]
            mean = part.sum() / part.numel()
            var = (part - mean).square().sum() / part.numel()
            parts.append((part - mean) / (var + 1e-5).sqrt())
        return torch.cat(parts, 1).view_as(input) * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)

    norm = made(groups, channels)
    input = torch.randn(5, channels, *size).double() * 2 - 1
    compare(norm, reference, input)
    values = input.flatten(1).unflatten(1, (groups, -1)).transpose(0, 1).flatten(1)
    assert values.shape == (groups, input.numel() // groups)
    torch.testing.assert_close(norm.running_mean, 0.1 * values.mean(1))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.var(1))


def test_a_group_per_position_takes_statistics_over_the_batch_alone():
    torch.manual_seed(0)
    input = torch.randn(7, 4, 3, 2).double()
    output = made(24, 4)
    with torch.no_grad():
        output.weight.fill_(1)
        output.bias.fill_(0)
    std, mean = torch.std_mean(input, 0, correction=0)
    torch.testing.assert_close(output(input), (input - mean) / (std.square() + 1e-5).sqrt())


def test_evaluation_uses_the_running_averages_at_any_size_of_map():
    torch.manual_seed(0)
    norm = made(2)
    norm(torch.randn(6, 8, 4, 4).double() * 3 + 1)
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()
    input = torch.randn(2, 8, 5, 7).double()
    mean, var = (b.repeat_interleave(4).view(-1, 1, 1) for b in (norm.running_mean, norm.running_var))
    gain, bias = norm.weight.view(-1, 1, 1), norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(input), (input - mean) / (var + 1e-5).sqrt() * gain + bias)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in state.items())


def test_default_groups_are_those_of_group_norm():
    for channels in (3, 8, 48, 64, 320):
        assert norms.create("batch-group", channels).num_groups == norms.create("group", channels).num_groups


def test_errors():
    with pytest.raises(ConfigError, match="num_groups must be 1 or more, got 0"):
        BatchGroupNorm(8, 0)
    with pytest.raises(ConfigError, match=r"5 groups do not divide a sample of 72 values, input size \(2, 8, 3, 3\)"):
        BatchGroupNorm(8, 5)(torch.randn(2, 8, 3, 3))
    with pytest.raises(ValueError, match=r"batch-group: expected more than 1 value per group .* size \(1, 8\)"):
        BatchGroupNorm(8, 8)(torch.randn(1, 8))
    assert BatchGroupNorm(8, 8).eval()(torch.randn(1, 8)).shape == (1, 8)
