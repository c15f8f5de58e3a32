import copy
import json
import math

import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics import fisher as F
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.fisher_mean_field import random_network
from normprop.errors import ConfigError


def reference(batch_norm):
    """The network and the inputs of the reference run: three tanh layers of width 128, a scalar read-out."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(256, 128)
    weights = [draw(128, 128) / math.sqrt(128) for _ in range(3)] + [draw(1, 128) / math.sqrt(128)]
    net = random_network(128, 128, 3, "tanh", range(3) if batch_norm else ()).double()
    linear = [part for part in net if isinstance(part, nn.Linear)]
    with torch.no_grad():
        for layer, weight in zip(linear, weights, strict=True):
            layer.weight.copy_(weight)
    return net, x


def matrices(net, x):
    """F over the parameters and K over the outputs, by one backward pass for each output."""
    net = copy.deepcopy(net)
    parameters = [p for p in net.parameters() if p.requires_grad]
    output = net(x)
    rows = [
        torch.cat([grad.flatten() for grad in torch.autograd.grad(one, parameters, retain_graph=True)])
        for one in output.flatten()
    ]
    jacobian = torch.stack(rows)
    return jacobian.T @ jacobian / len(x), jacobian @ jacobian.T / len(x)


def test_the_reference_run_without_and_with_batch_norm():
    net, x = reference(batch_norm=False)
    assert F.fisher(net, x).largest == pytest.approx(3.43, abs=0.01)
    net, x = reference(batch_norm=True)
    sweep = F.gamma_sweep(net, x)
    expected = {0.1: 0.200, 0.25: 1.14, 0.5: 3.53, 1.0: 7.66, 2.0: 12.5}
    for gamma, value in expected.items():
        assert sweep[gamma].largest == pytest.approx(value, rel=0.005), gamma
    ratio = sweep[0.25].largest / sweep[0.1].largest
    assert ratio == pytest.approx(5.7, abs=0.05)  # on its way to 6.25
    small = F.gamma_sweep(net, x, (0.004, 0.01))
    assert small[0.01].largest / small[0.004].largest == pytest.approx(6.25, rel=0.005)


def test_other_seeds_rise_with_gamma_too():
    for seed in (1, 2):
        x = torch.randn(128, 64, generator=torch.Generator().manual_seed(100 + seed))
        values = [f.largest for f in F.gamma_sweep(random_network(64, 64, 3, "tanh", range(3), seed=seed), x).values()]
        assert values == sorted(values)
        assert values[0] < 0.05 * values[-1]


@pytest.mark.parametrize("training", [True, False])
def test_the_spectra_of_both_sides_and_the_iteration_agree(training):
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double().train(training)
    nn.init.normal_(net[1].weight)
    net[1].running_mean.normal_()
    x = torch.randn(6, 4, dtype=torch.float64)
    ours, theirs = matrices(net, x)
    a, b = torch.linalg.eigvalsh(ours).flip(0), torch.linalg.eigvalsh(theirs).flip(0)
    assert torch.allclose(a[:12], b, atol=1e-10)
    assert float(a[12:].abs().max()) < 1e-10
    found = F.fisher(net, x, tolerance=1e-10, probes=4000)
    assert found.largest == pytest.approx(float(b[0]), rel=1e-8)
    assert found.rank == 12
    spread = math.sqrt(2 * float((theirs - theirs.diagonal().diag()).square().sum()) / 4000)
    assert found.trace == pytest.approx(float(b.sum()), abs=4 * spread)
    assert found.rate == 2 / found.largest


def test_float32_and_several_positions():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1))
    x = torch.randn(3, 2, 4, 4)
    assert F.fisher(net, x).largest == pytest.approx(float(torch.linalg.eigvalsh(matrices(net, x)[1])[-1]), rel=2e-3)


def test_frozen_parameters_do_not_count():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    whole = F.fisher(net, x)
    net[0].requires_grad_(False)
    part = F.fisher(net, x)
    hidden = torch.cat([net[:2](x).detach(), torch.ones(5, 1)], 1)  # the read-out's features and its bias
    expected = torch.linalg.eigvalsh(hidden.T.double() @ hidden.double() / 5)[-1]
    assert part.largest == pytest.approx(float(expected), rel=2e-3)
    assert part.largest < whole.largest


def test_the_gain_of_a_last_batch_norm_scales_the_eigenvalue_by_its_square():
    net, x = random_network(8, 16, 2, "relu", [0, 2], weight_variance=2.0), torch.randn(24, 8)
    last = F.gains(net)[-1]
    sweep = F.gamma_sweep(net, x, (0.5, 1.0, 3.0), [last], tolerance=1e-6)
    assert sweep[0.5].largest == pytest.approx(0.25 * sweep[1.0].largest, rel=1e-4)
    assert sweep[3.0].largest == pytest.approx(9.0 * sweep[1.0].largest, rel=1e-4)
    first = F.gamma_sweep(net, x, (3.0,), F.gains(net)[:1], tolerance=1e-6)
    assert first[3.0].largest != pytest.approx(9.0 * sweep[1.0].largest, rel=0.05)


@pytest.mark.parametrize("norm", ["normprop", "batch", "kalman-batch", "layer"])
def test_measure_leaves_the_network_as_it_is(norm):
    net = models.mlp(6, 3, norm=norm, depth=2, hidden_features=12).train()
    first = next(net.parameters())
    first.grad = torch.ones_like(first)
    x = torch.randn(16, 6)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = F.measure(Subject("net", net, x), gammas=(0.5, 1.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert bool((first.grad == 1).all())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert found.sweep[1.0] == pytest.approx(found.fisher.largest, rel=0.03)
    if norm != "kalman-batch":  # whose later steps see a filter that has moved on
        assert found.stable_rate == pytest.approx(found.fisher.rate, rel=0.08)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.fisher(nn.Linear(2, 1).requires_grad_(False), torch.ones(2, 2)), "requires_grad_(True)"),
        (lambda: F.fisher(nn.Linear(2, 1), torch.ones(2, 3)), "does not take inputs of shape (2, 3)"),
        (lambda: F.fisher(nn.Linear(2, 1), torch.ones(2, 2, dtype=torch.long)), "floating point batch"),
        (lambda: F.gamma_sweep(nn.Linear(2, 1), torch.ones(2, 2), layers=["x"]), "'x' has no gain; there are none"),
    ],
)
def test_one_line_for_what_cannot_work(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def describe(**networks):
    diagnosis = F.describe(networks)
    json.dumps(diagnosis.numbers, allow_nan=False)
    return diagnosis


def test_describe_one_and_two_networks():
    batch = F.Sharpness(F.Fisher(8.0, 0.01, 20.0, 12), 0.26, {0.1: 0.2, 1.0: 8.0, 2.0: 12.0})
    plain = F.Sharpness(F.Fisher(4.0, 0.01, 20.0, 12), math.nan)
    one = describe(batch=batch)
    assert one.found == (
        "batch: the sharpness, lambda_max, is 8, so rates up to 0.25 should be stable; descent was stable up to 0.26. "
        "With all gains times 0.1 it is 0.2, times 2 it is 12."
    )
    sweep = one.figures[1].lines
    assert [(line.name, line.style) for line in sweep] == [("batch", "both"), ("batch, gamma^2", "theory")]
    assert sweep[1].y == pytest.approx([0.2, 20.0, 80.0])
    two = describe(batch=batch, plain=plain)
    first, second = two.found.splitlines()
    assert first == one.found
    assert second == (
        "plain: the sharpness, lambda_max, is 4, so rates up to 0.5 should be stable; no edge of stability was found."
    )
    assert two.numbers["plain"] == {
        "largest": 4.0,
        "error": 0.01,
        "trace": 20.0,
        "rank": 12,
        "rate": 0.5,
        "stable_rate": None,
        "sweep": {},
    }
    assert len(describe(plain=plain).figures) == 1


def test_what_does_not_move_or_is_not_finite():
    x = torch.randn(4, 2)
    still = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    still[0].bias.data.fill_(-1e3)  # dead
    found = F.measure(Subject("still", still, x))
    assert found.fisher.largest == 0.0
    assert describe(still=found).found.endswith("lambda_max, is 0: the outputs do not move with the parameters.")
    still[2].weight.data.fill_(math.nan)
    bad = F.measure(Subject("bad", still, x))
    assert describe(bad=bad).found == "bad: the sharpness, lambda_max, is not finite."
    assert describe(bad=bad).numbers["bad"]["rate"] is None
