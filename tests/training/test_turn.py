import copy
import math

import pytest
import torch
from torch import nn

from normprop import recipes
from normprop.nn import Conv2d, ConvTranspose2d, Linear
from normprop.training import constrain
from normprop.training.turn import bound_turns_
from normprop.training.unit_norm import MAX_CHANGE

LAYERS = {
    "linear": lambda: Linear(5, 7),
    "convolution": lambda: Conv2d(4, 6, 3, groups=2),
    "channels last": lambda: Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
    "transposed": lambda: ConvTranspose2d(4, 6, 3),
    "transposed in groups": lambda: ConvTranspose2d(4, 6, 3, groups=2),
    "bfloat16": lambda: Linear(5, 7).bfloat16(),
}


def by_filter(layer: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """One row for each output channel, by indexing: transposed weights are (in, out / groups, *kernel)."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return values.double().flatten(1)
    fan = layer.in_channels // layer.groups
    rows = [
        values[group * fan : (group + 1) * fan, unit].flatten()
        for group in range(layer.groups)
        for unit in range(values.shape[1])
    ]
    return torch.stack(rows).double()


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_long_gradients_are_shortened_and_short_ones_left_alone(make):
    torch.manual_seed(0)
    layer = make()
    layer.weight.grad = torch.randn_like(layer.weight)
    before = by_filter(layer, layer.weight.grad.clone())
    lengths = before.norm(dim=1)
    limit = lengths.median().item()
    bound_turns_([layer], limit)
    after = by_filter(layer, layer.weight.grad)
    long = lengths > limit
    assert 0 < long.sum() < len(long)
    rounding = 2**-8 if layer.weight.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(after[~long], before[~long], rtol=rounding, atol=0)
    expected = before[long] * limit / lengths[long].unsqueeze(1)
    torch.testing.assert_close(after[long], expected, rtol=rounding, atol=0)
    assert layer.weight.grad.stride() == layer.weight.stride()


def test_a_gradient_of_zero_stays_and_a_missing_one_is_no_matter():
    layer, idle = Linear(3, 2), Linear(3, 2)
    layer.weight.grad = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    bound_turns_([layer, idle], 1.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]))
    assert idle.weight.grad is None
    bound_turns_([idle], 1.0)


def turned(model, optimizer, updates: int) -> list[float]:
    """Largest angle between a filter of the first layer before and after each update by the same gradients."""
    constrain(optimizer, model)
    torch.manual_seed(1)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    angles = []
    for _ in range(updates):
        before = model[0].weight.detach().clone()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            # As a network's gradients are: at right angles to filters of length 1.
            if parameter is model[0].weight:
                gradient = gradient - (gradient * before).sum(1, keepdim=True) * before
            parameter.grad = gradient.clone()
        optimizer.step()
        angles.append(torch.nn.functional.cosine_similarity(before, model[0].weight).min().acos().item())
    return angles


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_update_turns_a_filter_further(momentum):
    """The bound is reached where gradients stay as they are, and passed by no update, however high the rate."""
    torch.manual_seed(0)
    model = nn.Sequential(Linear(200, 3, center=False))  # no activation: nothing else turns them
    angles = turned(model, torch.optim.SGD(model.parameters(), lr=50.0, momentum=momentum), 5)
    assert max(angles) <= math.atan(MAX_CHANGE) * 1.01
    reached = 1 - momentum**2 if momentum else 1.0  # the second update's share of the sum of the series
    assert angles[1] == pytest.approx(math.atan(MAX_CHANGE * reached), rel=0.05)


def test_each_group_has_the_bound_of_its_own_rate():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(8, 4), Linear(4, 4))
    groups = [{"params": [model[0].weight], "lr": 10.0}, {"params": [model[1].weight], "lr": 1.0, "momentum": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    constrain(optimizer, model)
    for layer in model:
        layer.weight.grad = torch.full_like(layer.weight, 100.0)
    optimizer.step()
    for layer, limit in zip(model, (MAX_CHANGE / 10, MAX_CHANGE / 2), strict=True):
        torch.testing.assert_close(layer.weight.grad.norm(dim=1), torch.full((4,), limit))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_update_changes_a_gain_or_a_bias_further(momentum):
    torch.manual_seed(0)
    model = Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0, momentum=momentum)
    constrain(optimizer, model)
    for _ in range(40):
        before = [model.gain.detach().clone(), model.bias.detach().clone()]
        model.weight.grad = torch.zeros_like(model.weight)
        model.gain.grad, model.bias.grad = torch.tensor([[100.0, -100.0, 0.001], [0.0, 0.002, -100.0]]).unbind()
        optimizer.step()
        changes = [after - start for after, start in zip((model.gain, model.bias), before, strict=True)]
        assert max(change.abs().max().item() for change in changes) <= MAX_CHANGE * 1.001
    settled = 1 / (1 - momentum)  # of the series, but for 2 % after 40 terms
    expected = [[-MAX_CHANGE, MAX_CHANGE, -0.01 * settled], [0.0, -0.02 * settled, MAX_CHANGE]]
    torch.testing.assert_close(torch.stack(changes), torch.tensor(expected), rtol=0.03, atol=1e-6)


def test_the_paper_s_layers_other_optimisers_and_removed_constraints_keep_their_gradients():
    def after(layer, make, remove: bool = False) -> torch.Tensor:
        optimizer = make(layer.parameters())
        constraint = constrain(optimizer, layer)
        if remove:
            constraint.remove()
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
        optimizer.step()
        return torch.cat([layer.weight.grad, layer.gain.grad.unsqueeze(1), layer.bias.grad.unsqueeze(1)], 1)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    hundreds = torch.full((3, 6), 100.0)
    assert torch.equal(after(Linear(4, 3, **recipes.PAPER), sgd), hundreds)
    assert torch.equal(after(Linear(4, 3), torch.optim.AdamW), hundreds)
    assert torch.equal(after(Linear(4, 3), sgd, remove=True), hundreds)
    assert (after(Linear(4, 3), sgd) < 1.0).all()


@pytest.mark.parametrize("fused", [False, True])
def test_the_bound_holds_for_gradients_that_a_grad_scaler_has_scaled(fused):
    torch.manual_seed(0)
    plain = nn.Sequential(Linear(4, 6, activation="relu"), Linear(6, 2))
    scaled = copy.deepcopy(plain)
    x = torch.randn(8, 4)
    for model, factor in ((plain, None), (scaled, 64.0)):
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9, fused=fused)
        constrain(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor or 1.0, enabled=factor is not None)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale((model(x) - 3).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    for first, second in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
