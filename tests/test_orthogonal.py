import pytest
import torch
from torch import Tensor

from normprop import norms, recipes
from normprop.nn import Conv2d, ConvTranspose2d, Linear, NormPropLayer
from normprop.orthogonal import orthogonalize_
from normprop.training import Muon, constrain, parameter_groups
from normprop.training.unit_norm import DEEP, EACH, EVERY, FAR


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def alike(count: int, fan_in: int, share: float) -> Tensor:
    """Unit rows that share a direction."""
    torch.manual_seed(0)
    common = unit(torch.randn(fan_in, dtype=torch.float64))
    return unit((1 - share) * unit(torch.randn(count, fan_in, dtype=torch.float64)) + share * common)


@pytest.mark.parametrize(("count", "fan_in"), [(6, 20), (20, 6), (8, 8)])
def test_a_step_moves_singular_values_by_the_formula_and_keeps_their_vectors(count, fan_in):
    before = alike(count, fan_in, 0.4)
    after = before.clone()
    orthogonalize_(after)
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    redundancy = max(1.0, count / fan_in)
    gram = before @ before.T if count <= fan_in else before.T @ before
    step = 1 / (1 + gram.abs().sum(1).max() / redundancy)
    moved = values * (1 + step - step * values**2 / redundancy)
    torch.testing.assert_close(after, left @ torch.diag(moved) @ right, rtol=1e-10, atol=1e-12)
    target = redundancy**0.5
    assert ((moved - target).abs() <= (values - target).abs() + 1e-12).sum() >= len(values) - 1


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("center", [False, True])
def test_filters_become_orthogonal_however_alike(share, center):
    rows = alike(16, 40, share)
    rows = unit(rows - rows.mean(1, keepdim=True)) if center else rows
    for _ in range(60):
        orthogonalize_(rows, center=center)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)
    if center:
        assert rows.mean(1).abs().max() < 1e-12


def test_more_filters_than_inputs_become_a_tight_frame():
    rows = alike(40, 10, 0.5)
    rows = unit(rows - rows.mean(1, keepdim=True))
    for _ in range(300):
        orthogonalize_(rows, center=True)
        rows = unit(rows - rows.mean(1, keepdim=True))  # as the constraint does
    uniform = torch.eye(10, dtype=torch.float64) - 0.1  # nothing along the mean, which centring takes away
    torch.testing.assert_close(rows.T @ rows, 40 / 9 * uniform, rtol=0, atol=1e-3)


def test_equal_and_zero_filters():
    rows = torch.ones(8, 4) / 2
    rows[0] = 0
    for _ in range(20):
        orthogonalize_(rows)
        assert torch.equal(rows[0], torch.zeros(4))
        rows[1:] = unit(rows[1:])
        torch.testing.assert_close(rows[1:], torch.ones(7, 4) / 2)  # nothing tells them apart, nothing flips them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filters_of_one_group_alone_share_inputs(dtype):
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    both = weight.to(dtype, copy=True)
    orthogonalize_(both, groups=2)
    for part in (slice(0, 3), slice(3, 6)):
        one = weight.to(dtype)[part].clone()
        orthogonalize_(one)
        torch.testing.assert_close(both[part], one)


def test_transposed_convolutions_have_their_filters_along_the_second_axis():
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 2, 2)  # (in, out / groups, *kernel), two groups
    moved = weight.clone()
    orthogonalize_(moved, groups=2, transposed=True)
    for part in (slice(0, 4), slice(4, 8)):
        rows = weight[part].transpose(0, 1).flatten(1).clone()
        orthogonalize_(rows)
        torch.testing.assert_close(moved[part].transpose(0, 1).flatten(1), rows)


def filters_of(layer: NormPropLayer) -> Tensor:
    weight = layer.weight.detach()
    return (weight.transpose(0, 1) if isinstance(layer, ConvTranspose2d) else weight).flatten(1)


def coherence(layer: NormPropLayer) -> float:
    rows = unit(filters_of(layer))
    return float((rows @ rows.T - torch.eye(len(rows))).abs().max())


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(2, 3, 7, 7)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("layer", [Conv2d, ConvTranspose2d])
def test_the_constraint_draws_filters_apart_every_few_steps(layer):
    torch.manual_seed(0)
    network = torch.nn.Sequential(layer(3, 8, 3, activation="relu"), layer(8, 4, 3, activation="relu", **recipes.PAPER))
    network.append(layer(4, 4, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4)
    constrain(optimizer, network)
    ours, papers, last = (coherence(part) for part in network)
    train(network, optimizer, EVERY - 1)
    assert coherence(network[0]) == pytest.approx(ours, abs=1e-3)
    train(network, optimizer, 1)
    assert coherence(network[0]) < 0.9 * ours
    train(network, optimizer, 20 * EVERY)
    assert coherence(network[0]) < 0.02
    assert coherence(network[1]) == pytest.approx(papers, abs=0.02)
    assert coherence(network[2]) == pytest.approx(last, abs=0.02)  # no activation
    torch.testing.assert_close(filters_of(network[0]).norm(dim=1), torch.ones(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "depth", "drawn"),
    [("sgd", 2, True), ("muon", DEEP, False), ("muon", DEEP + 1, True), ("adam", 2, False)],
)
def test_who_chooses_the_length_of_its_steps_needs_right_angles_in_deep_networks_alone(optimizer, depth, drawn):
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[Conv2d(3, 3, 3, padding=1, activation="relu") for _ in range(depth)])
    steps = {
        "sgd": lambda: torch.optim.SGD(network.parameters(), lr=1e-5),
        "muon": lambda: Muon(parameter_groups(network, 0.0, matrices=True), lr=1e-5),
        "adam": lambda: torch.optim.Adam(network.parameters(), lr=1e-5),
    }
    made = steps[optimizer]()
    constrain(made, network)
    before = coherence(network[0])
    train(network, made, 3 * EVERY)
    assert (coherence(network[0]) < 0.5 * before) == drawn
    assert drawn or coherence(network[0]) == pytest.approx(before, abs=0.01)


def test_a_saved_optimiser_goes_on_counting():
    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(Conv2d(3, 8, 3, activation="relu"))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        constrain(optimizer, network)
        return network, optimizer

    whole, optimizer = start()
    train(whole, optimizer, EVERY + 3)
    first, optimizer = start()
    train(first, optimizer, EVERY - 2)
    states, random = (first.state_dict(), optimizer.state_dict()), torch.get_rng_state()
    second, optimizer = start()
    second.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    torch.set_rng_state(random)
    train(second, optimizer, 5)
    torch.testing.assert_close(second[0].weight, whole[0].weight, rtol=0, atol=1e-6)


def test_who_asks_for_it():
    assert Linear(4, 3).orthogonal
    assert norms.block("normprop", dims=2)(3, 4, 3).orthogonal
    assert not norms.block("normprop-paper", dims=2)(3, 4, 3).orthogonal


def test_wide_layers_take_their_turn_more_rarely():
    torch.manual_seed(0)
    network = torch.nn.Sequential(Conv2d(3, 8, 3, activation="relu"), Conv2d(8, EACH + 1, 4, activation="relu"))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)
    constrain(optimizer, network)
    before = [coherence(part) for part in network]
    train(network, optimizer, EVERY)
    assert coherence(network[0]) < 0.9 * before[0]
    assert coherence(network[1]) == pytest.approx(before[1], abs=1e-3)
    train(network, optimizer, EVERY)
    assert coherence(network[1]) < 0.95 * before[1]


@pytest.mark.parametrize(("lr", "steps"), [(1e-6, 2), (FAR / EVERY, 2), (4 * FAR / EVERY, 8), (FAR, 16), (10.0, 16)])
def test_the_higher_the_rate_the_more_often(lr, steps, monkeypatch):
    taken = []
    monkeypatch.setattr(Conv2d, "orthogonalize_weight_", lambda layer: taken.append(layer))
    network = torch.nn.Sequential(Conv2d(3, 8, 3, activation="relu"))
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    constrain(optimizer, network)
    network[0].weight.grad = torch.zeros_like(network[0].weight)
    for _ in range(16):
        optimizer.step()
    assert len(taken) == steps
