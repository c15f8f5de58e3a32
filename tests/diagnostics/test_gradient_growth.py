import copy
import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics import gradient_growth as G
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError
from normprop.experiments.ablations import changed
from normprop.moments import of
from normprop.nn.initial import SLOPE

RELU = math.pi / (math.pi - 1)


def chains(norm, activation, batch, *, seeds=1, width=500, depth=24, skip=4):
    """Rates of deep random networks."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        build = partial(models.mlp, width, 10, depth=depth, hidden_features=width, activation=activation)
        net = changed(build, norm)
        found.append(G.measure(Subject(norm, net, torch.randn(batch, width)), skip=skip))
    return found


def pooled(found):
    """Mean rate and its standard error, from the spread of the steps in each network."""
    rate = sum(growth.rate.value for growth in found) / len(found)
    return rate, math.sqrt(sum(growth.rate.error**2 for growth in found)) / len(found)


@pytest.mark.parametrize(("batch", "measured"), [(6, 1.336), (10, 1.146)])
def test_linear_batch_norm_at_small_batches(batch, measured):
    rate, error = pooled(chains("batch", None, batch, seeds=6))
    assert error < 0.01
    assert abs(rate - G.linear_batch_norm_rate(batch)) < 3 * error
    assert abs(rate - measured) < 3 * error + 0.004  # the reference has an error of its own


@pytest.mark.parametrize(
    ("activation", "batch", "measured", "seeds"),
    [("relu", 256, 1.468, 1), ("relu", 32, 1.52, 2), ("relu", 8, 1.79, 6), ("tanh", 256, 1.183, 1)],
)
def test_batch_norm_before_an_activation(activation, batch, measured, seeds):
    rate, error = pooled(chains("batch", activation, batch, seeds=seeds))
    assert error < 0.02
    assert abs(rate - measured) < 3 * error + 0.01
    limit = G.normprop_rate(activation)
    if batch == 256:
        assert abs(rate - limit) < 3 * error + 0.01  # a finite batch adds a little
    else:
        assert rate > limit + 3 * error


@pytest.mark.parametrize(("activation", "j2"), [("relu", 1.46694221), ("tanh", 1.17780723), ("gelu", 1.31884497)])
def test_normprop_at_gain_1_grows_by_j2(activation, j2):
    (found,) = chains("normprop+zero-bias", activation, 32, width=800)
    assert G.normprop_rate(activation) == pytest.approx(j2, abs=1e-7)
    assert found.predicted == pytest.approx(j2, rel=1e-5)
    assert abs(found.rate.value - j2) < 4 * found.rate.error + 0.005
    assert found.rate.error < 0.01


def test_normprop_started_by_depth_grows_by_its_share_of_the_slope():
    (found,) = chains("normprop", "relu", 32, width=800)
    assert 0.9 * SLOPE < found.predicted**24 <= SLOPE
    assert abs(found.rate.value - found.predicted) < 4 * found.rate.error + 0.005


def test_the_jacobian_factor_keeps_gradients():
    found = chains("normprop-paper", "relu", 32, seeds=3)
    rate, error = pooled(found)
    assert G.normprop_rate("relu", math.sqrt((math.pi - 1) / math.pi)) == pytest.approx(1.0, abs=1e-9)
    assert G.normprop_rate("relu", 1 / 1.21) == pytest.approx(1.00194, abs=1e-5)
    assert found[0].predicted == pytest.approx(1.0, abs=1e-6)
    assert abs(rate - 1.0) < 3 * error
    assert error < 0.01


def test_the_rate_of_an_odd_activation_follows_its_second_moment():
    # tanh at gain 0.9 settles below 1, where its slope is larger than at 1.
    rate = G.normprop_rate("tanh", 0.9)
    at_one = 0.9**2 * of("tanh", 0.0, 0.9).squared_derivative / of("tanh").var
    assert rate > at_one


def test_measure_against_gradients_by_hand():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)), nn.Linear(5, 3)).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    found = G.measure(Subject("net", net, x), probes=2)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(5, dtype=torch.float64)
    for _ in range(2):
        sent = torch.randn(7, 3, generator=generator).double()
        signals = [x]
        for block in net:
            signals.append(block(signals[-1].detach().requires_grad_()))
        for index in reversed(range(5)):
            expected[index] += sent.square().sum()
            if index:
                given = signals[index].detach().requires_grad_()
                (sent,) = torch.autograd.grad(net[index](given), given, sent)
    assert found.squares == pytest.approx((expected / 14).tolist(), rel=1e-10)
    assert found.layers == ("0", "1", "2", "3", "4")
    steps = [math.log(a / b) for a, b in zip(found.squares[:3], found.squares[1:4], strict=True)]
    assert found.rate == G.fit(found.squares[:4])  # skipping one at either end would leave one step
    assert math.log(found.rate.value) == pytest.approx(sum(steps) / 3)


def test_the_error_of_the_rate_is_that_of_a_random_walk():
    generator = torch.Generator().manual_seed(3)
    inside, errors, values = 0, [], []
    for _ in range(400):
        steps = 0.2 + 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
        rate = G.fit(torch.cat([torch.zeros(1), -steps.cumsum(0)]).exp().tolist())
        inside += abs(rate.value - math.exp(0.2)) < 2 * rate.error
        errors.append(rate.error)
        values.append(rate.value)
    assert 0.91 < inside / 400 < 0.98
    assert sum(errors) / 400 == pytest.approx(float(torch.tensor(values).std()), rel=0.1)


@pytest.mark.parametrize("squares", [[], [1.0], [1.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_no_rate_from_nothing(squares):
    rate = G.fit(squares)
    assert math.isnan(rate.value)
    assert math.isnan(rate.error)


def test_one_step_has_no_error():
    rate = G.fit([3.0, 1.0])
    assert rate.value == pytest.approx(3.0)
    assert math.isnan(rate.error)


@pytest.mark.parametrize("norm", ["normprop", "batch", "kalman-batch"])
def test_the_network_stays_as_it_is(norm):
    net = models.create("resnet8", (3, 8, 8), 4, norm=norm, width=0.25).train()
    net.requires_grad_(False)
    x = torch.randn(4, 3, 8, 8)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = G.measure(Subject("net", net, x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(square > 0 for square in found.squares)
    assert (found.predicted is None) == (norm != "normprop")


def test_a_layer_without_a_part_in_the_output_has_no_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            self.b(x)
            return self.a(x)

    found = G.measure(Subject("idle", Idle(), torch.ones(2, 2)))
    assert found.layers == ("b", "a")
    assert found.squares[0] == 0.0
    assert math.isnan(found.rate.value)
    assert G.describe({"idle": found}).found == "idle: no rate, the squared gradient is 0 at layer b."


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: G.linear_batch_norm_rate(3), "must be 4 or more, got 3"),
        (lambda: G.measure(Subject("a", nn.Linear(2, 2), torch.ones(2, 2)), probes=0), "probes must be positive"),
        (lambda: G.measure(Subject("a", nn.Tanh(), torch.ones(2, 2))), "a: no layer with a weight"),
        (lambda: G.measure(Subject("a", nn.Linear(3, 2), torch.ones(2, 2))), "does not take inputs of shape (2, 2)"),
    ],
)
def test_one_line_for_what_cannot_work(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def describe(**networks):
    diagnosis = G.describe(networks)
    json.dumps(diagnosis.numbers, allow_nan=False)
    return diagnosis


def test_describe_one_and_two_networks():
    a = G.Growth(("0", "1", "2"), (4.0, 2.0, 1.0), G.Rate(2.0, 0.01), 1.98)
    b = G.Growth(("0", "1"), (1.0, 1.0), G.Rate(1.0, math.nan))
    one = describe(a=a)
    assert one.found == (
        "a: on the way back the squared gradient is multiplied by 2.000 ± 0.010 per layer, where theory says 1.980."
    )
    two = describe(a=a, b=b)
    assert two.found == f"{one.found}\nb: on the way back the squared gradient is multiplied by 1.000 per layer."
    assert [line.name for line in two.figures[0].lines] == ["a", "b"]
    assert [(line.name, line.style) for line in two.figures[1].lines] == [
        ("a", "points"),
        ("b", "points"),
        ("theory", "theory"),
    ]
    assert two.figures[1].lines[0].low == [1.99]
    assert two.figures[1].lines[1].low is None
    assert two.numbers["b"]["error"] is None


def test_describe_what_is_not_finite():
    bad = G.Growth(("0", "1"), (math.inf, 1.0), G.Rate(math.nan, math.nan))
    short = G.Growth(("0",), (1.0,), G.Rate(math.nan, math.nan))
    found = describe(bad=bad, short=short).found
    assert found == "bad: no rate, the squared gradient is inf at layer 0.\nshort: no rate, there are too few layers."
