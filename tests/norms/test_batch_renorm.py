import pytest
import torch
import torch.nn.functional as F

from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.batch_renorm import BatchRenorm

SIZES = [(6, 4), (6, 4, 5), (6, 4, 3, 5), (3, 4, 2, 3, 2)]
STEPS = (10, 30, 20)


def made(step=0, **options):
    norm = BatchRenorm(4, **{"steps": STEPS} | options).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.num_batches_tracked.fill_(step)
    return norm


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("step", "limits"), [(9, {}), (100, {"r_max": 1.0, "d_max": 0.0})])
def test_is_batch_norm_in_the_first_steps_and_at_closed_limits(size, step, limits):
    torch.manual_seed(0)
    norm = made(step, **limits)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = (torch.randn(size).double() * 3 + 1).requires_grad_()
    outer = torch.randn(size).double()
    ours, theirs = norm(x), F.batch_norm(x, mean, var, norm.weight, norm.bias, True, 0.1)
    torch.testing.assert_close(ours, theirs)
    inputs = [x, norm.weight, norm.bias]
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer), strict=True
    ):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == step + 1


@pytest.mark.parametrize("size", SIZES)
def test_unclipped_the_output_is_that_of_evaluation_but_not_the_gradient(size):
    torch.manual_seed(0)
    norm = made(100, r_max=1e6, d_max=1e6)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = (torch.randn(size).double() * 3 + 1).requires_grad_()
    ours, theirs = norm(x), F.batch_norm(x, mean, var, norm.weight, norm.bias)
    torch.testing.assert_close(ours, theirs)
    outer = torch.randn(size).double()
    by_input, by_gain, by_bias = torch.autograd.grad(ours, [x, norm.weight, norm.bias], outer)
    other_input, other_gain, other_bias = torch.autograd.grad(theirs, [x, norm.weight, norm.bias], outer)
    torch.testing.assert_close(by_gain, other_gain)
    torch.testing.assert_close(by_bias, other_bias)
    assert (by_input - other_input).abs().max() > 1e-2
    # The batch's own mean is in the graph: no gradient along a shift of a channel.
    axes = (0, *range(2, x.ndim))
    torch.testing.assert_close(by_input.sum(axes), torch.zeros(4).double())


@pytest.mark.parametrize("size", SIZES)
def test_definition_with_both_clips_at_work(size):
    torch.manual_seed(0)
    norm = made(15)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([1.0, 100.0, 1e-3, 8.0]))
        norm.running_mean.copy_(torch.tensor([5.0, -3.0, 1.1, 1.0]))
    x = (torch.randn(size).double() * 3 + 1).requires_grad_()
    view = (-1, *[1] * (len(size) - 2))
    axes = (0, *range(2, x.ndim))
    # Step 15 of (10, 30, 20): a quarter of the way from 1 to 3, half of the way from 0 to 5.
    r_max, d_max = 1.5, 2.5
    mean, std = x.mean(axes), (x.var(axes, correction=0) + 1e-5).sqrt()
    old = (norm.running_var + 1e-5).sqrt()
    r, d = (std / old).detach(), ((mean - norm.running_mean) / old).detach()
    clipped = r.clip(1 / r_max, r_max), d.clip(-d_max, d_max)
    for before, after in zip((r, d), clipped, strict=True):
        assert 0 < (before != after).sum() < 4
    normalized = (x - mean.view(view)) / std.view(view) * clipped[0].view(view) + clipped[1].view(view)
    theirs = normalized * norm.weight.view(view) + norm.bias.view(view)
    ours = norm(x)
    torch.testing.assert_close(ours, theirs)
    outer = torch.randn(size).double()
    inputs = [x, norm.weight, norm.bias]
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_schedule():
    norm = made()
    table = {0: (1, 0), 10: (1, 0), 15: (1.5, 2.5), 20: (2, 5), 30: (3, 5), 1000: (3, 5)}
    for step, expected in table.items():
        norm.num_batches_tracked.fill_(step)
        assert [float(limit) for limit in norm.limits()] == pytest.approx(expected)


def test_the_schedule_goes_on_from_a_state_dict():
    torch.manual_seed(0)
    first, second = made(), made()
    for _ in range(17):
        first(torch.randn(6, 4).double())
    second.load_state_dict(first.state_dict())
    x = torch.randn(6, 4).double() * 5
    assert torch.equal(first(x), second(x))
    assert (first(x) - F.batch_norm(x, None, None, first.weight, first.bias, True)).abs().max() > 1e-3


def test_evaluation_is_batch_norms_and_moves_nothing():
    torch.manual_seed(0)
    norm = made(15).eval()
    reference = torch.nn.BatchNorm1d(4).double().eval()
    reference.load_state_dict(norm.state_dict())
    x = torch.randn(1, 4).double()
    torch.testing.assert_close(norm(x), reference(x))
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in reference.state_dict().items())


def test_errors():
    for step in (0, 15, 100):
        with pytest.raises(ValueError, match=r"norms.batch-renorm: expected more than 1 value per channel .*\(1, 4\)"):
            made(step)(torch.zeros(1, 4).double())
    with pytest.raises(ConfigError, match=r"r_max must be >= 1 and d_max >= 0, got 0\.5 and 5"):
        BatchRenorm(4, r_max=0.5)
    with pytest.raises(ConfigError, match=r"steps must be .* got \(10, 10, 20\)"):
        BatchRenorm(4, steps=(10, 10, 20))
    assert norms.create("batch-renorm", 4).steps == (500, 4000, 2500)
