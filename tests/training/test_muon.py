"""Muon against the exact orthogonal factor, torch's own Muon, and SGD; with layouts, groups and the constraint."""

import io

import pytest
import torch
from torch import nn

from normprop import models
from normprop.errors import ConfigError
from normprop.fused import filters
from normprop.nn import Conv2d, ConvTranspose2d, Linear
from normprop.training import Muon, constrain, momentum_at, parameter_groups
from normprop.training.muon import orthogonal_factor
from normprop.training.unit_norm import DEEP


def _step(model: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> Muon:
    """One step with gradients that are drawn."""
    optimizer = Muon(parameter_groups(model, weight_decay, matrices=True), lr=lr, momentum=momentum)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7), (3, 4, 9), (1, 6)])
def test_factor_keeps_singular_vectors_and_brings_values_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonal_factor(matrices) @ vt.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(inner, torch.diag_embed(values), atol=1e-10)
    assert values.min() > 0.6
    assert values.max() < 1.2


def test_factor_of_zero_is_zero():
    assert orthogonal_factor(torch.zeros(3, 4)).abs().max() == 0


def test_linear_layers_move_as_by_torch_muon():
    # torch rounds the iteration to bfloat16, 8 bits; five steps of it differ by about 1 %.
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(6, 9, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = Muon(parameter_groups(ours, 0.1, matrices=True), lr=0.1, momentum=0.9)
    reference = torch.optim.Muon(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        ours.weight.grad = torch.randn(9, 6)
        theirs.weight.grad = ours.weight.grad.clone()
        mine.step()
        reference.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=0.02)


def test_what_is_no_matrix_moves_as_by_sgd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(3))
    twin = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(3))
    twin.load_state_dict(model.state_dict())
    mine = Muon(parameter_groups(model, 0.1, matrices=True), lr=0.1)
    sgd = torch.optim.SGD(parameter_groups(twin, 0.1), lr=0.1, momentum=0.9)
    for _ in range(3):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        mine.step()
        sgd.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(parameter, other) == (name != "0.weight"), name


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9875])
def test_momentum_changes_the_memory_of_what_is_no_matrix_and_not_its_speed(momentum):
    torch.manual_seed(0)
    layer = Linear(4, 3)
    optimizer = Muon(parameter_groups(layer, 0.0, matrices=True), lr=0.01, momentum=momentum)
    before, gradient = layer.bias.detach().clone(), torch.randn(3)
    for step in range(2000):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if step == 0:
            layer.bias.grad = gradient
        optimizer.step()
    assert torch.allclose(layer.bias, before - 0.1 * gradient, atol=1e-6)


def test_momentum_at_small_batch_sizes_remembers_80_samples():
    assert [size / (1 - momentum_at(size)) for size in (1, 2, 4, 8)] == pytest.approx([80] * 4)
    assert momentum_at(9) == momentum_at(1024) == 0.9


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 9, 3),
        nn.Conv2d(6, 9, 3, groups=3),
        nn.ConvTranspose2d(6, 9, 2),
        nn.ConvTranspose2d(6, 9, 2, groups=3),
        Conv2d(6, 9, 3),
        ConvTranspose2d(6, 9, 2),
    ],
    ids=str,
)
def test_each_group_of_filters_moves_along_its_own_factor(layer):
    torch.manual_seed(0)
    before = layer.weight.detach().clone()
    _step(layer, lr=0.1)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    moved, gradient = (
        filters(value, layer.groups, transposed).transpose(1, 2).reshape(layer.groups, 9 // layer.groups, -1)
        for value in ((before - layer.weight).detach() / 0.1, layer.weight.grad)
    )
    expected = orthogonal_factor(gradient) * max(1.0, gradient.shape[1] / gradient.shape[2]) ** 0.5
    assert torch.allclose(moved, expected, atol=1e-5)


def test_filters_turn_by_the_rate_whatever_the_gradient():
    torch.manual_seed(0)
    layer = Linear(64, 16)
    optimizer = Muon(parameter_groups(layer, 0.0, matrices=True), lr=0.05)
    constrain(optimizer, layer)
    for size in (1e-3, 1e3):
        before = layer.weight.detach().clone()
        optimizer.state.clear()
        layer.weight.grad = size * torch.randn(16, 64)
        layer.gain.grad = layer.bias.grad = torch.zeros(16)
        optimizer.step()
        angle = (before * layer.weight.detach()).sum(1).clamp(max=1).acos()
        assert angle.min() > 0.02
        assert angle.max() < 0.06
        assert torch.allclose(layer.weight.norm(dim=1), torch.ones(16))


def test_constraint_draws_filters_of_a_deep_network_apart_between_steps():
    torch.manual_seed(0)
    network = nn.Sequential(*[Linear(8, 4, activation="relu") for _ in range(DEEP + 1)])
    optimizer = Muon(parameter_groups(network, 0.0, matrices=True), lr=1e-9)
    constrain(optimizer, network)
    for _ in range(200):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for layer in network:
        assert torch.allclose(layer.weight @ layer.weight.T, torch.eye(4), atol=1e-3)


def test_closure_and_saved_state_go_on_where_they_were():
    torch.manual_seed(0)
    model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    first = _step(model, lr=0.1)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = Muon(parameter_groups(twin, 0.0, matrices=True), lr=0.5)
    twin.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    input = torch.randn(5, 4)
    for net, optimizer in ((model, first), (twin, second)):

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(input).square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    assert torch.equal(model.weight, twin.weight)


def test_parameters_without_gradient_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = model[1].weight.detach().clone()
    optimizer = Muon(parameter_groups(model, 0.1, matrices=True), lr=0.1)
    model[0](torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before)


def test_weights_of_networks_are_matrices_and_nothing_else():
    network = models.vit((1, 8, 8), 4, norm="layer", depth=1, features=8, heads=2, patch_size=4)
    groups = parameter_groups(network, 0.1, matrices=True)
    matrices = {id(weight) for group in groups if group.get("matrices") for weight in group["params"]}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in matrices}
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert names == linear
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("settings", "line"),
    [({"lr": -1.0}, "lr must be"), ({"momentum": 1.0}, "momentum must be"), ({"weight_decay": -1.0}, "weight_decay")],
)
def test_wrong_settings_are_refused(settings, line):
    with pytest.raises(ConfigError, match=f"Muon: {line}"):
        Muon(parameter_groups(nn.Linear(2, 2), 0.0, matrices=True), **settings)


def test_parameters_that_nobody_sorted_are_refused():
    with pytest.raises(ConfigError, match="matrices=True"):
        Muon(nn.Linear(2, 2).parameters())
