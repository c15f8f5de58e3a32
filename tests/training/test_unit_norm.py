import copy

import pytest
import torch
from torch import nn

from normprop.nn import Conv2d, ConvTranspose2d, Linear, NormPropLayer
from normprop.training import constrain, unit_norm


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Conv2d(2, 4, 3, activation="relu"),
        nn.Conv2d(4, 4, 1),
        ConvTranspose2d(4, 3, 2, activation="relu"),
        nn.Flatten(),
        Linear(3 * 5 * 5, 6),
    )


def backward(model: nn.Module) -> None:
    torch.manual_seed(1)
    model(torch.randn(3, 2, 6, 6)).square().mean().backward()


def norms(layer: nn.Module) -> torch.Tensor:
    """Lengths of a layer's filters, worked out here: rows of (out, fan-in); transposed weights are (in, out, ...)."""
    weight = layer.weight.detach().double()
    return (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight).flatten(1).norm(dim=1)


def assert_constrained(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, NormPropLayer):
            torch.testing.assert_close(norms(layer), torch.ones_like(norms(layer)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.3, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, fused=True),
        lambda p: torch.optim.AdamW(p, lr=0.3, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.03),
    ],
)
def test_holds_after_every_step_of_any_optimiser(make):
    model = network()
    optimizer = make(model.parameters())
    assert norms(model[0]).sub(1).abs().max() > 0.01
    constrain(optimizer, model)
    assert_constrained(model)
    for _ in range(3):
        before = model[0].weight.detach().clone()
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        assert_constrained(model)
        assert not torch.equal(model[0].weight, before)


def test_equals_a_step_followed_by_a_projection_and_touches_nothing_else():
    """The reference applies textbook SGD with momentum, then divides NormProp filters by their length."""
    model = network()
    for layer in (model[0], model[2], model[4]):
        layer.orthogonal = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    constrain(optimizer, model)
    reference = copy.deepcopy(model)
    buffers = [torch.zeros_like(p) for p in reference.parameters()]
    for _ in range(4):
        backward(model)
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
        optimizer.zero_grad()

        backward(reference)
        with torch.no_grad():
            for parameter, buffer in zip(reference.parameters(), buffers, strict=True):
                buffer.mul_(0.9).add_(parameter.grad)
                parameter.sub_(0.1 * buffer)
            for layer in (reference[0], reference[2], reference[4]):
                layer.normalize_weight_()
        reference.zero_grad()
    for ours, theirs, buffer in zip(model.parameters(), reference.parameters(), buffers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], buffer, rtol=0, atol=1e-6)


def test_leaves_the_function_unchanged():
    model = network()
    x = torch.randn(2, 2, 6, 6)
    before = model(x)
    constrain(torch.optim.SGD(model.parameters(), lr=0.1), model)
    # Uncentred filters of a centred layer already act as centred ones, so only rounding may differ.
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_only_layers_whose_weight_the_optimiser_has():
    model = network()
    frozen = model[4].weight.detach().clone()
    plain = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(
        [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[2].weight, model[4].gain, model[1].bias]}], lr=0.2
    )
    constrain(optimizer, model)
    backward(model)
    optimizer.step()
    assert torch.equal(model[4].weight, frozen)
    assert torch.equal(model[1].weight, plain)
    for layer in (model[0], model[2]):
        torch.testing.assert_close(norms(layer), torch.ones_like(norms(layer)), rtol=0, atol=1e-6)


def test_a_weight_without_gradient_is_left_alone():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model)
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[4].weight.mul_(3)
    backward(model)
    model[0].weight.grad = None
    optimizer.step()
    torch.testing.assert_close(norms(model[0]), torch.full_like(norms(model[0]), 3), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms(model[4]), torch.ones_like(norms(model[4])), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_grad_scaler_changes_nothing(fused):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    constrain(optimizer, model)

    def step(broken: bool) -> None:
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = model(torch.randn(3, 2, 6, 6)).square().mean()
        scaler.scale(loss * float("inf") if broken else loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step(broken=False)  # fused SGD leaves its momentum uninitialised when the very first step is skipped
    with torch.no_grad():  # a trace that a projection would wipe out
        model[0].weight.mul_(2)
    before = [p.detach().clone() for p in model.parameters()]
    step(broken=True)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    step(broken=False)
    assert_constrained(model)


def test_a_layer_used_twice_is_rescaled_once(monkeypatch):
    calls = []
    normalize = unit_norm.normalize_rows_
    monkeypatch.setattr(
        unit_norm, "normalize_rows_", lambda rows, centers: (calls.extend(rows), normalize(rows, centers))[1]
    )
    first, second, tied = Linear(4, 4), Linear(4, 4), Linear(4, 4)
    tied.weight = second.weight
    model = nn.Sequential(first, first, second, tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model)
    assert len(calls) == 2
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert len(calls) == 4


def test_handle_ends_the_constraint():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    constrain(optimizer, model).remove()
    backward(model)
    optimizer.step()
    assert norms(model[0]).sub(1).abs().max() > 1e-3


def test_a_model_without_normprop_layers_is_left_as_it_is():
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constrain(optimizer, model)
    optimizer.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("wrapped", [False, True])
def test_works_with_an_optimiser_wrapped_by_fabric(wrapped):
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    fabric_model, fabric_optimizer = fabric.setup(model, optimizer)
    constrain(fabric_optimizer if wrapped else optimizer, model)
    fabric.backward(fabric_model(torch.randn(3, 2, 6, 6)).square().mean())
    before = model[0].weight.detach().clone()
    fabric_optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert_constrained(model)
