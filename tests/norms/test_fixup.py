import math

import pytest
import torch

from normprop import models, norms
from normprop.errors import ConfigError
from normprop.norms.fixup import FixupResidual, ScalarBias, block


def residuals(network):
    return [module for module in network.modules() if isinstance(module, FixupResidual)]


@pytest.mark.parametrize("depth", [8, 20])
def test_network_is_zero_and_blocks_are_their_shortcut_at_the_start(depth):
    torch.manual_seed(0)
    network = models.resnet(depth, norm="fixup", width=0.5)
    input = torch.randn(2, 3, 16, 16)
    assert torch.equal(network(input), torch.zeros(2, 10))
    for residual in residuals(network):
        value = torch.randn(2, residual.branch[0].linear.in_channels, 8, 8)
        skip = value if residual.shortcut is None else residual.shortcut(value)
        assert torch.equal(residual(value), skip.relu())


@pytest.mark.parametrize("maps", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_branches_start_with_the_papers_deviation(maps, blocks):
    """Deviation of 64 * 64 * 9 weights: standard error 0.4 %."""
    torch.manual_seed(0)
    inner = [block(2, 64, 64, 3, padding=1) for _ in range(maps - 1)]
    network = torch.nn.Sequential(
        *[FixupResidual(torch.nn.Sequential(*inner, block(2, 64, 64, 3, padding=1, activation=None)))],
        *[FixupResidual(block(2, 64, 64, 1, activation=None)) for _ in range(blocks - 1)],
    )
    norms.finish("fixup", network)
    norms.finish("fixup", network)  # a second time changes nothing
    for part in inner:
        expected = math.sqrt(2 / (9 * 64)) * blocks ** (-1 / (2 * maps - 2))
        assert part.linear.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not network[0].branch[-1].linear.weight.any()


def test_fan_out_counts_the_outputs():
    torch.manual_seed(0)
    shortcut = block(2, 32, 256, 1, activation=None)
    branch = torch.nn.Sequential(block(2, 32, 128, 3, padding=1), block(2, 128, 256, 3, padding=1, activation=None))
    FixupResidual(branch, shortcut)
    assert branch[0].linear.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    # 8192 weights: standard error 0.8 %
    assert shortcut.linear.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.04)


def test_scalars_are_where_the_paper_has_them():
    torch.manual_seed(0)
    branch = torch.nn.Sequential(block(0, 4, 4, activation="tanh"), block(0, 4, 4, activation=None))
    residual = FixupResidual(branch, activation="tanh", spatial_dims=0).double()
    with torch.no_grad():
        for parameter in residual.parameters():
            parameter.normal_()
    a, b, c = branch[0].input_bias.bias, branch[0].output_bias.bias, branch[1].input_bias.bias
    first, second = branch[0].linear.weight, branch[1].linear.weight
    x = torch.randn(3, 4, dtype=torch.float64)
    hidden = torch.tanh((x + a) @ first.T + b)
    expected = torch.tanh(x + residual.scale * ((hidden + c) @ second.T) + residual.bias)
    torch.testing.assert_close(residual(x), expected)
    assert {name.rpartition(".")[0] for name, p in residual.named_parameters() if p.numel() == 1} == {
        "", "branch.0.input_bias", "branch.0.output_bias", "branch.1.input_bias",
    }  # fmt: skip


def change(blocks, rescale):
    """How far one SGD step on the weights moves the function, the classifier being random instead of 0."""
    torch.manual_seed(0)
    width = 64
    layers = [
        FixupResidual(torch.nn.Sequential(block(0, width, width), block(0, width, width, activation=None)))
        for _ in range(blocks)
    ]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(width, 1, bias=False)).double()
    if rescale:
        norms.finish("fixup", network)
    input = torch.randn(16, width, dtype=torch.float64)
    before = network(input)
    before.mean().backward()
    with torch.no_grad():
        for parameter in network[:-1].parameters():
            if parameter.ndim == 2:
                parameter -= 1e-3 * parameter.grad
        return (network(input) - before).abs().mean().item()


def test_the_first_step_moves_the_function_independently_of_depth():
    """Linear in depth without the factor L^(-1/2): sixteen times over 4 to 64 blocks."""
    assert change(64, rescale=True) == pytest.approx(change(4, rescale=True), rel=0.5)
    assert change(64, rescale=False) > 8 * change(4, rescale=False)


def test_a_plain_network_gets_past_its_zero_classifier():
    torch.manual_seed(0)
    network = models.mlp(8, 3, norm="fixup", depth=2, hidden_features=16)
    input, target = torch.randn(32, 8), torch.arange(32) % 3
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    first = network[1].linear.weight
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(input), target).backward()
        gradients.append(first.grad.abs().max().item())
        optimizer.step()
    assert gradients[0] == 0
    assert gradients[1] > 0
    assert isinstance(network[-1].input_bias, ScalarBias)


def test_a_branch_without_linear_map_is_refused():
    with pytest.raises(ConfigError, match="needs a linear map"):
        FixupResidual(torch.nn.Identity())
