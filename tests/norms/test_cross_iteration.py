import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.cross_iteration import CrossIterationBlock, CrossIterationNorm, Past, compensate, slopes

# Torch itself warns that an even kernel under "same" padding costs a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

MAPS = [
    (nn.Linear(6, 4, bias=False), (7, 6)),
    (nn.Conv1d(6, 4, 3, padding=1, groups=2, bias=False), (5, 6, 8)),
    (nn.Conv2d(6, 4, (3, 2), stride=(2, 3), padding=(0, 1), bias=False), (4, 6, 8, 7)),
    (nn.Conv2d(6, 4, 4, padding="same", groups=2, bias=False), (3, 6, 5, 6)),
    (nn.Conv2d(6, 4, 3, padding="valid", dilation=2, bias=False), (3, 6, 6, 6)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4, bias=False), (3, 4, 5, 5)),
    (nn.Conv3d(6, 4, 2, stride=2, bias=False), (3, 6, 4, 5, 4)),
]
maps = pytest.mark.parametrize(("linear", "size"), MAPS, ids=[repr(linear) for linear, _ in MAPS])


def moments(output):
    """Mean and mean square per channel."""
    axes = (0, *range(2, output.ndim))
    return output.mean(axes), output.square().mean(axes)


def fresh(linear, size, **options):
    """The map in double with new weights, a norm for it and a function that draws inputs."""
    torch.manual_seed(0)
    linear = linear.double()
    linear.reset_parameters()
    norm = CrossIterationNorm(linear, **{"burn_in": 0} | options).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return linear, norm, lambda: torch.randn(size).double() + 0.5


def change(linear, size=0.05):
    with torch.no_grad():
        linear.weight.add_(torch.randn_like(linear.weight), alpha=size)


def taken(linear, input):
    """What the norm keeps of a batch."""
    output = linear(input).detach()
    mean, square = moments(output)
    centered = output - mean.view(-1, *[1] * (output.ndim - 2))
    parts = (linear.weight.detach().flatten(1), mean, square - mean.square(), *slopes(linear, input, centered))
    return Past(*(part[None].clone() for part in parts))


@maps
def test_derivatives_are_those_of_autograd(linear, size):
    linear, _, draw = fresh(linear, size)
    input = draw()
    past = taken(linear, input)
    mean, square = moments(linear(input))
    var = square - mean.square()
    groups = getattr(linear, "groups", 1)
    for channel in range(4):
        (by_mean,) = torch.autograd.grad(mean[channel], linear.weight, retain_graph=True)
        (by_var,) = torch.autograd.grad(var[channel], linear.weight, retain_graph=True)
        expected = torch.zeros_like(by_mean).flatten(1)
        expected[channel] = past.mean_slope[0, channel * groups // 4]
        torch.testing.assert_close(by_mean.flatten(1), expected)
        expected = torch.zeros_like(expected)
        expected[channel] = past.var_slope[0, channel]
        torch.testing.assert_close(by_var.flatten(1), expected)


@maps
def test_for_a_fixed_input_the_mean_is_exact_and_the_mean_square_short_by_the_change(linear, size):
    linear, _, draw = fresh(linear, size)
    input = draw()
    past = taken(linear, input)
    before = linear(input)
    change(linear, 0.3)
    mean, var = compensate(past, linear.weight.detach().flatten(1))
    true_mean, true_square = moments(linear(input))
    torch.testing.assert_close(mean[0], true_mean)
    _, error = moments(linear(input) - before)
    assert error.min() > 1e-3
    torch.testing.assert_close(var[0] + mean[0].square(), true_square - error)


@maps
def test_with_constant_weights_it_is_batch_norm_of_the_windows_union(linear, size):
    linear, norm, draw = fresh(linear, size, window=3)
    inputs = [draw() * scale for scale in (1, 2, 3, 4, 5)]
    for step, input in enumerate(inputs):
        input.requires_grad_()
        output = linear(input)
        ours = norm(output, input, linear)
        union = torch.cat([*(linear(old).detach() for old in inputs[max(0, step - 2) : step]), output])
        theirs = F.batch_norm(union, None, None, norm.weight, norm.bias, True)[-len(input) :]
        torch.testing.assert_close(ours, theirs)
        outer = torch.randn_like(ours)
        leaves = [input, linear.weight, norm.weight, norm.bias]
        first = torch.autograd.grad(ours, leaves, outer, retain_graph=True)
        for mine, other in zip(first, torch.autograd.grad(theirs, leaves, outer), strict=True):
            torch.testing.assert_close(mine, other)


@maps
@pytest.mark.parametrize("options", [{"window": 1}, {"burn_in": 5}])
def test_with_a_window_of_one_or_during_burn_in_it_is_batch_norm(linear, size, options):
    linear, norm, draw = fresh(linear, size, **options)
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    for _ in range(5):
        change(linear)
        input = draw()
        output = linear(input)
        ours = norm(output, input, linear)
        theirs = F.batch_norm(output, mean, var, norm.weight, norm.bias, True, 0.1)
        torch.testing.assert_close(ours, theirs)
        outer = torch.randn_like(ours)
        leaves = [linear.weight, norm.weight, norm.bias]
        first = torch.autograd.grad(ours, leaves, outer, retain_graph=True)
        for mine, other in zip(first, torch.autograd.grad(theirs, leaves, outer), strict=True):
            torch.testing.assert_close(mine, other)
    # The sixth step is the first one that uses the window; the running averages never do.
    input = draw()
    output = linear(input)
    difference = norm(output, input, linear) - F.batch_norm(output, mean, var, norm.weight, norm.bias, True, 0.1)
    assert (difference.abs().max() > 1e-3) == ("burn_in" in options)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == 6
    norm.eval()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    torch.testing.assert_close(norm(output, input, linear), F.batch_norm(output, mean, var, norm.weight, norm.bias))
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in state.items())


def textbook(linear, history, norm, output, negative):
    """The paper's formulas, in mean and mean square, with autograd's derivatives kept in ``history``."""
    means, squares = ([part] for part in moments(output))
    for weight, mean, square, by_mean, by_square in history:
        delta = (linear.weight - weight).detach()
        means.append(mean + (by_mean * delta).flatten(1).sum(1))
        squares.append(square + (by_square * delta).flatten(1).sum(1))
    means, squares = torch.stack(means), torch.stack(squares)
    kept = squares >= means.square()
    if negative == "zero":
        squares, kept = torch.maximum(squares, means.square()), torch.ones_like(kept)
    count = kept.sum(0)
    mean, square = (means * kept).sum(0) / count, (squares * kept).sum(0) / count
    view = (-1, *[1] * (output.ndim - 2))
    std = (square - mean.square() + 1e-5).sqrt()
    normalized = (output - mean.view(view)) / std.view(view)
    return normalized * norm.weight.view(view) + norm.bias.view(view), int((~kept).sum())


@pytest.mark.parametrize("negative", ["drop", "zero"])
@pytest.mark.parametrize(("linear", "size"), [MAPS[0], MAPS[2]])
def test_textbook_over_many_steps_with_changing_weights(linear, size, negative):
    linear, norm, draw = fresh(linear, size, window=4, negative_variance=negative)
    history, dropped = [], 0
    for step in range(12):
        change(linear, 0.1 if step != 6 else 2.0)  # one jump that first order cannot follow
        input = draw()
        output = linear(input)
        expected, count = textbook(linear, history[-3:], norm, output, negative)
        dropped += count
        ours = norm(output, input, linear)
        torch.testing.assert_close(ours, expected)
        outer = torch.randn_like(ours)
        leaves = [linear.weight, norm.weight, norm.bias]
        first = torch.autograd.grad(ours, leaves, outer, retain_graph=True)
        for mine, other in zip(first, torch.autograd.grad(expected, leaves, outer, retain_graph=True), strict=True):
            torch.testing.assert_close(mine, other)
        mean, square = moments(output)
        # A channel's statistics involve its own filter alone, so one gradient of the sum holds all of them.
        slopes_now = [torch.autograd.grad(part.sum(), linear.weight, retain_graph=True)[0] for part in (mean, square)]
        history.append((linear.weight.detach().clone(), mean.detach(), square.detach(), *slopes_now))
    assert (dropped > 0) == (negative == "drop")


def test_the_window_goes_on_from_a_state_dict():
    linear, norm, draw = fresh(*MAPS[3])
    for _ in range(5):
        change(linear)
        input = draw()
        norm(linear(input), input, linear)
    copy = CrossIterationNorm(linear, burn_in=0).double()
    copy.load_state_dict(norm.state_dict())
    change(linear)
    output = linear(input)
    ours = norm(output, input, linear)
    assert torch.equal(copy(output, input, linear), ours)
    norm.reset_running_stats()  # the window is forgotten with the running averages
    expected = F.batch_norm(output, None, None, norm.weight, norm.bias, True)
    torch.testing.assert_close(norm(output, input, linear), expected)
    assert (ours - expected).abs().max() > 1e-3


def test_the_block_trains_through_burn_in_and_window():
    torch.manual_seed(0)
    linear = nn.Conv2d(3, 6, 3, bias=False)
    block = CrossIterationBlock(linear, CrossIterationNorm(linear, burn_in=3), "tanh")
    optimizer = torch.optim.Adam(block.parameters(), 0.01)
    input, target = torch.randn(4, 3, 6, 6), torch.rand(4, 6, 4, 4) - 0.5
    losses = []
    for _ in range(30):
        loss = (block(input) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_defaults_and_errors():
    block = norms.block("cross-iteration", 1)(6, 4, 3, groups=2, activation=None)
    assert (block.norm.window, block.norm.burn_in) == (4, 500)
    assert block.linear.bias is None
    linear = nn.Linear(3, 4, bias=False)
    with pytest.raises(ConfigError, match="window must be >= 1 and burn_in >= 0, got 0 and 500"):
        CrossIterationNorm(linear, window=0)
    with pytest.raises(ConfigError, match="negative_variance must be 'drop' or 'zero', got 'keep'"):
        CrossIterationNorm(linear, negative_variance="keep")
    with pytest.raises(ValueError, match=r"norms.cross-iteration: expected more than 1 value per channel .* \(1, 4\)"):
        norms.block("cross-iteration", 0)(3, 4)(torch.zeros(1, 3))
    with pytest.raises(ConfigError, match="no drop-in layer"):
        norms.create("cross-iteration", 4)
