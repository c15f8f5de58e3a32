import subprocess
import sys

import pytest
import torch
from torch import nn

from normprop.errors import ConfigError
from normprop.norms.batch_variants import FrozenBatchNorm, GhostBatchNorm, SyncBatchNorm

SIZES = [(12, 4), (12, 4, 5), (12, 4, 3, 5), (12, 4, 2, 3, 2)]
BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def perturbed(norm):
    """The layer in double, every parameter and running average away from its start."""
    norm = norm.double()
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def pair(norm, ndim):
    """A layer and torch's batch norm with the same state."""
    reference = BATCH[ndim](4).double()
    reference.load_state_dict(perturbed(norm).state_dict())
    return norm, reference


def assert_same_gradients(ours, theirs, x, norm, reference):
    outer = torch.randn_like(ours)
    first = torch.autograd.grad(ours, [x, *norm.parameters()], outer)
    second = torch.autograd.grad(theirs, [x, *reference.parameters()], outer)
    for mine, other in zip(first, second, strict=True):
        torch.testing.assert_close(mine, other)


def assert_same_state(norm, reference):
    assert norm.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)


@pytest.mark.parametrize("size", SIZES)
def test_frozen_is_a_batch_norm_in_evaluation_in_both_modes(size):
    torch.manual_seed(0)
    norm, reference = pair(FrozenBatchNorm(4), len(size))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    reference.eval()
    for training in (True, False):
        x = torch.randn(size).double().requires_grad_()
        ours, theirs = norm.train(training)(x), reference(x)
        torch.testing.assert_close(ours, theirs)
        assert_same_gradients(ours, theirs, x, norm, reference)
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in before.items())


def test_a_fresh_frozen_norm_is_a_gain_and_a_bias():
    norm = FrozenBatchNorm(2).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
    expected = torch.tensor([[2 * 5, 3 * 7]]).double() / (1 + 1e-5) ** 0.5 + torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(norm(torch.tensor([[5.0, 7.0]]).double()), expected)


# 12 samples in ghosts of 4, of 3 (divide evenly), 5 (two of 6), 8 and 100 (one of 12).
@pytest.mark.parametrize(("ghost_size", "parts"), [(4, [4] * 3), (3, [3] * 4), (5, [6, 6]), (8, [12]), (100, [12])])
@pytest.mark.parametrize("size", SIZES)
def test_ghosts_are_batches_that_come_one_after_the_other(size, ghost_size, parts):
    torch.manual_seed(0)
    norm, reference = pair(GhostBatchNorm(4, ghost_size), len(size))
    x = (torch.randn(size).double() * 3 + 1).requires_grad_()
    ours, theirs = norm(x), torch.cat([reference(part) for part in x.split(parts)])
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, x, norm, reference)
    assert_same_state(norm, reference)
    assert norm.num_batches_tracked == len(parts)
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x))
    assert_same_state(norm, reference)


def test_running_averages_of_ghosts_in_closed_form():
    """One step of Hoffer et al.'s update: (1 - m)^k old + sum of (1 - m)^(k - i) m mean_i."""
    norm = GhostBatchNorm(1, 2, momentum=0.25).double()
    norm(torch.tensor([[0.0], [2.0], [4.0], [6.0], [10.0], [14.0]]).double())
    means, variances = (1.0, 5.0, 12.0), (2.0, 2.0, 8.0)  # unbiased
    weights = [0.25 * 0.75**2, 0.25 * 0.75, 0.25]
    assert norm.running_mean.item() == pytest.approx(sum(w * m for w, m in zip(weights, means, strict=True)))
    expected = 0.75**3 + sum(w * v for w, v in zip(weights, variances, strict=True))
    assert norm.running_var.item() == pytest.approx(expected)


def test_ghost_errors():
    with pytest.raises(ConfigError, match="ghost_size must be 1 or more, got 0"):
        GhostBatchNorm(4, 0)
    with pytest.raises(ValueError, match=r"norms.ghost-batch: expected more than 1 value per channel .* \(1, 4\)"):
        GhostBatchNorm(4, 1)(torch.zeros(3, 4))
    assert GhostBatchNorm(4, 1)(torch.zeros(3, 4, 2)).shape == (3, 4, 2)


def test_torchs_conversion_to_synchronised_norms_leaves_the_others_alone():
    network = nn.Sequential(nn.BatchNorm1d(4), FrozenBatchNorm(4), GhostBatchNorm(4))
    converted = [type(module) for module in nn.SyncBatchNorm.convert_sync_batchnorm(network)]
    assert converted == [nn.SyncBatchNorm, FrozenBatchNorm, GhostBatchNorm]


@pytest.mark.parametrize("size", SIZES)
def test_sync_in_one_process_is_batch_norm(size):
    torch.manual_seed(0)
    norm, reference = pair(SyncBatchNorm(4), len(size))
    x = torch.randn(size).double().requires_grad_()
    ours, theirs = norm(x), reference(x)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, x, norm, reference)
    assert_same_state(norm, reference)
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm.train()(torch.zeros(1, 4).double())


WORKER = """
import sys
import torch
from normprop.norms.batch_variants import SyncBatchNorm

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
job = torch.load(f"{folder}/job.pt")
results = []
for shares, outers in zip(job["shares"], job["outers"], strict=True):
    norm = SyncBatchNorm(4).double()
    norm.load_state_dict(job["state"])
    x = shares[rank].requires_grad_()
    output = norm(x)
    grads = torch.autograd.grad(output, [x, norm.weight, norm.bias], outers[rank])
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    results.append((output.detach(), grads, state, norm.eval()(x).detach()))
try:
    SyncBatchNorm(4)(torch.zeros(1 - rank, 4))
except ValueError as error:
    results.append(str(error))
half = SyncBatchNorm(4).bfloat16()
results.append(half(job["shares"][0][rank].detach().bfloat16()).dtype)
torch.save(results, f"{folder}/{rank}.pt")
"""


def test_sync_over_two_processes_is_batch_norm_of_the_joint_batch(tmp_path):
    """Even shares, uneven ones, and a process without a sample; gain and bias have the gradient of their share."""
    torch.manual_seed(0)
    norm = perturbed(SyncBatchNorm(4))
    joint = torch.randn(9, 4, 3).double() * 3 + 100  # a mean that a difference of squares would feel
    outer = torch.randn(9, 4, 3).double()
    cuts = [5, 1, 9]
    job = {
        "state": norm.state_dict(),
        "shares": [[joint[:cut].clone(), joint[cut:].clone()] for cut in cuts],
        "outers": [[outer[:cut].clone(), outer[cut:].clone()] for cut in cuts],
    }
    torch.save(job, tmp_path / "job.pt")
    command = [sys.executable, "-c", WORKER]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for case in range(len(cuts)):
        reference = nn.BatchNorm1d(4).double()
        reference.load_state_dict(norm.state_dict())
        x = joint.clone().requires_grad_()
        expected = reference(x)
        by_x, *by_parameters = torch.autograd.grad(expected, [x, *reference.parameters()], outer)
        parts = [result[case] for result in results]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), expected)
        torch.testing.assert_close(torch.cat([part[1][0] for part in parts]), by_x)
        for index, gradient in enumerate(by_parameters, start=1):
            torch.testing.assert_close(parts[0][1][index] + parts[1][1][index], gradient)
        for part in parts:
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(part[2][name], value)
        torch.testing.assert_close(torch.cat([part[3] for part in parts]), reference.eval()(joint))
    for result in results:
        assert "norms.sync-batch: expected more than 1 value per channel when training" in result[-2]
        assert result[-1] == torch.bfloat16
