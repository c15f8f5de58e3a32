"""Initial biases by depth: slopes against quadrature and against random networks, and what is left alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from normprop import models, recipes
from normprop.errors import ConfigError
from normprop.nn import Conv2d, Linear, Residual
from normprop.nn.initial import SLOPE, activations_in_sequence, init_by_depth_, offset, total_slope


def slope_by_quadrature(function, rho):
    """E[f'^2] / Var[f] of f(rho + Z) on a fine grid."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    x = (z + rho).requires_grad_()
    values = function(x)
    (derivative,) = torch.autograd.grad(values.sum(), x)
    values = values.detach()
    mean = (weight * values).sum()
    return float((weight * derivative.square()).sum() / (weight * (values - mean).square()).sum())


@pytest.mark.parametrize(
    ("name", "function"),
    [("relu", torch.relu), ("tanh", torch.tanh), ("gelu", F.gelu), ("silu", F.silu)],
)
def test_the_bias_is_the_smallest_with_the_slope(name, function):
    for wanted in (1.4, 1.25, 1.1, 1.02):
        rho, chi = offset(name, wanted)
        assert chi == pytest.approx(slope_by_quadrature(function, rho), rel=1e-4)
        if chi <= wanted and rho > 0:
            assert slope_by_quadrature(function, rho - 0.05) > wanted
        elif chi > wanted:
            assert min(slope_by_quadrature(function, r) for r in torch.linspace(0, 3, 61).tolist()) > wanted


def test_activations_with_parameters_and_none_get_no_bias():
    assert offset(None, 1.1) == (0.0, 1.0)
    rho, chi = offset(torch.nn.PReLU(2, init=0.5), 1.01)
    assert rho == 0.0
    assert chi == pytest.approx(slope_by_quadrature(lambda x: torch.where(x > 0, x, 0.5 * x), 0.0), rel=1e-4)


@pytest.mark.parametrize("activation", [torch.relu, torch.nn.ReLU(), F.relu])
def test_the_same_activation_in_another_form_gets_the_same_bias(activation):
    assert offset(activation, 1.2) == offset("relu", 1.2)


@pytest.mark.parametrize("depth", [4, 12, 40])
def test_nearby_inputs_of_a_wide_random_network_part_by_the_slope(depth):
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[Linear(400, 400, activation="relu").double() for _ in range(depth)])
    init_by_depth_(network)
    x, away = torch.randn(2, 16, 400, dtype=torch.float64)
    near = 1e-6
    with torch.no_grad():
        parted = (network(x + near * away) - network(x)).square().sum() / (near * away).square().sum()
    (bias,) = {round(layer.bias[0].item(), 6) for layer in network}
    predicted = slope_by_quadrature(torch.relu, bias) ** depth
    assert float(parted) == pytest.approx(predicted, rel=0.25)
    assert 0.7 * SLOPE < predicted <= SLOPE


def test_residual_sums_keep_mean_0_and_variance_1_and_share_the_slope():
    torch.manual_seed(0)
    network = models.create("resnet8", (3, 16, 16), 10, norm="normprop", width=4.0)
    init_by_depth_(network)
    blocks = [module for module in network.modules() if isinstance(module, Residual)]
    assert {round(block.branch[-1].gain[0].item(), 6) for block in blocks} == {round(3**-0.5, 6)}
    x = torch.randn(8, 3, 16, 16)
    for block, layer in enumerate(network[: 1 + len(blocks)]):
        with torch.no_grad():
            x = layer(x)
        assert abs(float(x.mean())) < 0.25, block
        assert 0.6 < float(x.var()) < 1.4, block
    assert total_slope(network, 1.0001) < total_slope(network, 9.0)


def test_what_it_leaves_alone():
    paper = Linear(4, 4, activation="relu", **recipes.PAPER)
    plain = Linear(4, 4, activation="relu", bias=False)
    scaled = Conv2d(4, 4, 3, padding=1, gain=0.5)
    block = Residual(torch.nn.Sequential(Conv2d(4, 4, 3, padding=1, activation="relu"), scaled), activation="relu")
    before = {name: value.clone() for name, value in paper.state_dict().items()}
    init_by_depth_(torch.nn.Sequential(paper, plain))
    init_by_depth_(block)
    assert all(torch.equal(value, before[name]) for name, value in paper.state_dict().items())
    assert plain.bias is None
    assert bool((scaled.gain == 0.5).all())
    assert scaled.bias[0].item() == pytest.approx(offset("relu", 4.0)[0] * 1.25**0.5)


def test_a_shallow_network_needs_no_bias():
    network = init_by_depth_(torch.nn.Sequential(*[Linear(8, 8, activation="relu") for _ in range(3)]))
    assert all(bool((layer.bias == 0).all()) for layer in network)


def test_one_line_for_a_slope_that_cannot_be():
    with pytest.raises(ConfigError, match="slope must be above 1, got 1"):
        init_by_depth_(torch.nn.Identity(), 1)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (models.mlp((3, 2, 2), 10, depth=5, hidden_features=4), 5),
        (models.nin(3, 10, width=0.125), 8),
        (models.resnet(14, 3, 10), 7),  # the stem and six sums
        (models.unet(3, 2, width=0.5, dims=2), 4),  # two at the top of the way down and of that up
        (models.mlp((3, 2, 2), 10, depth=5, norm="batch"), 0),
    ],
)
def test_activations_outside_of_branches_are_counted(network, expected):
    assert activations_in_sequence(network) == expected


def test_a_projection_on_the_skip_path_counts():
    branch = torch.nn.Sequential(Linear(4, 4, activation="relu"), Linear(4, 4))
    shortcut = Linear(4, 4, activation="tanh")
    assert activations_in_sequence(Residual(branch, shortcut, activation="relu", spatial_dims=0)) == 2
    assert activations_in_sequence(Residual(branch, activation=None, spatial_dims=0)) == 0
