import copy
import json
import math

import pytest
import torch
from torch import nn

from normprop import models
from normprop.diagnostics import jacobian as J
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError
from normprop.nn import Linear

RELU = math.pi / (math.pi - 1)
TABLE_A = {
    "relu": 1.46694221,
    "prelu": 1.20267041,
    "leaky_relu": 1.45337076,
    "tanh": 1.17780723,
    "sigmoid": 1.03359239,
    "softplus": 1.08052805,
    "elu": 1.07901346,
    "selu": 1.07157499,
    "gelu": 1.31884497,
    "silu": 1.21208111,
    "softsign": 1.24401037,
    torch.erf: 1.22570000,
}


def paper_layer(inputs, outputs, activation="relu"):
    layer = Linear(inputs, outputs, bias=False, activation=activation, center=False, moments="fixed")
    nn.init.normal_(layer.weight)
    return layer


def brute_force(function, x):
    """Jacobians of each sample, (N, outputs, inputs)."""
    rows = [torch.autograd.functional.jacobian(lambda one: function(one[None])[0], sample) for sample in x]
    return torch.stack([row.reshape(-1, x[0].numel()) for row in rows])


def test_a_normprop_layer_at_gain_1_has_the_mean_square_of_the_paper():
    x = torch.randn(1000, 512)
    found = J.jacobian(paper_layer(512, 256), x, exact=0, probes=96, steps=1)
    assert found.diagonal_mean == pytest.approx(RELU, abs=4 * found.diagonal_error)
    assert found.diagonal_error < 0.01
    assert found.diagonal_mean == pytest.approx(1.4655, abs=0.015)  # one draw of the reference
    assert found.off_diagonal_rms == pytest.approx(0.032, abs=0.001)


def test_orthonormal_rows_have_singular_values_0_or_1_over_c1_never_the_jacobian_factor():
    layer = paper_layer(64, 32)
    nn.init.orthogonal_(layer.weight)
    found = J.jacobian(layer, torch.randn(16, 64))
    assert found.exact
    scale = math.sqrt(2 / (1 - 1 / math.pi))
    high = found.values > 1e-6
    assert torch.allclose(found.values[high], torch.full_like(found.values[high], scale), atol=1e-5)
    assert 0.4 < float(high.double().mean()) < 0.6
    assert found.mean_square == pytest.approx(RELU, rel=0.1)


@pytest.mark.parametrize("activation", TABLE_A, ids=lambda activation: getattr(activation, "__name__", str(activation)))
def test_the_squared_jacobian_factor_of_table_a(activation):
    layer = paper_layer(256, 128, activation)
    assert J.predicted(layer) == pytest.approx(TABLE_A[activation], abs=2e-7)
    found = J.jacobian(layer, torch.randn(600, 256), exact=0, probes=64, steps=1)
    assert found.diagonal_mean == pytest.approx(TABLE_A[activation], abs=max(5 * found.diagonal_error, 2e-3))
    assert found.diagonal_error < 0.012


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (7, 5), (4, 1)])
def test_equality_with_the_dense_jacobian(inputs, outputs, dtype):
    net = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs), nn.ReLU(inplace=True)).to(dtype)
    x = torch.randn(3, inputs, dtype=dtype)
    found, matrices = J.jacobian(net, x), brute_force(net, x)
    values = torch.linalg.svdvals(matrices.double()).flatten().sort().values
    assert torch.allclose(found.values, values, atol=1e-5 if dtype == torch.float32 else 1e-12)
    mean = (matrices @ matrices.mT).mean(0).double()
    assert found.diagonal_mean == pytest.approx(float(mean.diagonal().mean()), rel=1e-5)
    rest = mean - mean.diagonal().diag()
    expected = math.sqrt(float(rest.square().sum()) / (outputs * (outputs - 1))) if outputs > 1 else 0.0
    assert found.off_diagonal_rms == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert found.mean_square == pytest.approx(float(values.square().mean()), rel=1e-5)
    assert (found.outputs, found.inputs, found.exact, found.coupled) == (outputs, inputs, True, False)


def test_batch_statistics_couple_the_samples_and_the_whole_batch_counts():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    dense = torch.autograd.functional.jacobian(copy.deepcopy(net), x).reshape(20, 15)
    found = J.jacobian(net, x)
    assert found.coupled
    assert (found.outputs, found.inputs) == (20, 15)
    assert torch.allclose(found.values, torch.linalg.svdvals(dense).flip(0), atol=1e-10)
    assert not J.jacobian(net.eval(), x).coupled


def test_all_rows_and_a_full_quadrature_are_the_exact_spectrum():
    net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    exact, estimate = J.jacobian(net, x), J.jacobian(net, x, exact=0, probes=100, steps=9)
    assert not estimate.exact
    assert estimate.diagonal_mean == pytest.approx(exact.diagonal_mean, rel=1e-12)
    assert estimate.off_diagonal_rms == pytest.approx(exact.off_diagonal_rms, rel=1e-10)
    assert estimate.diagonal_error == 0.0
    assert estimate.largest == pytest.approx(exact.largest, rel=1e-8)


def test_estimates_of_a_wide_network_against_the_dense_one():
    net = nn.Sequential(nn.Linear(300, 280), nn.ReLU(), nn.Linear(280, 270))
    x = torch.randn(4, 300)
    estimate = J.jacobian(net, x)
    values = torch.linalg.svdvals(brute_force(net, x).double())
    assert not estimate.exact
    assert estimate.largest <= values.max() * (1 + 1e-6)
    assert estimate.largest == pytest.approx(float(values.max()), rel=0.01)
    assert estimate.mean_square == pytest.approx(float(values.square().mean()), rel=0.1)
    assert float(estimate.weights.sum()) == pytest.approx(1.0)
    share = float((estimate.weights * estimate.values.square()).sum())  # the density has the same second moment
    assert share == pytest.approx(float(values.square().mean()), rel=0.15)
    level = float(values.median())
    below = float(estimate.weights[estimate.values < level].sum())
    assert below == pytest.approx(0.5, abs=0.08)


def test_two_layers_multiply():
    first, second = paper_layer(256, 256), paper_layer(256, 256)
    x = torch.randn(400, 256)
    one = J.jacobian(first, x, exact=0, probes=48, steps=1)
    both = J.jacobian(nn.Sequential(first, second), x, exact=0, probes=48, steps=1)
    assert both.diagonal_mean == pytest.approx(RELU**2, abs=5 * both.diagonal_error)
    next_one = J.jacobian(second, first(x).detach(), exact=0, probes=48, steps=1)
    assert both.diagonal_mean == pytest.approx(one.diagonal_mean * next_one.diagonal_mean, rel=0.05)


def test_gain_scales_the_prediction_and_live_moments_follow_the_gain():
    layer = Linear(8, 8, activation="relu", gain="jacobian", moments="fixed")
    assert J.predicted(layer) == pytest.approx(1.0, rel=1e-6)
    assert J.predicted(Linear(8, 8, activation="relu", gain=0.5)) == pytest.approx(RELU, rel=1e-6)  # live: undone
    assert J.predicted(Linear(8, 8, gain=0.5)) == pytest.approx(0.25)


class Residual(nn.Module):
    """Everything in place, with a skip."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.a(x).relu_()
        return self.b(h).add_(x).relu_()


def test_layers_inside_a_network_of_operations_in_place():
    net, x = Residual().double(), torch.randn(3, 6, dtype=torch.float64)
    found = J.measure(Subject("net", net, x))
    for name in ("a", "b"):
        weight = net.get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(weight)
        assert torch.allclose(found.layers[name].values, values.repeat(3).sort().values, atol=1e-10)
    values = torch.linalg.svdvals(brute_force(net, x)).flatten().sort().values
    assert torch.allclose(found.network.values, values, atol=1e-10)


@pytest.mark.parametrize("norm", ["normprop", "normprop-paper", "batch", "kalman-batch", "fixup", "layer"])
def test_measure_is_the_layer_alone_and_leaves_the_network_as_it_is(norm):
    net = models.mlp(8, 3, norm=norm, depth=3, hidden_features=16).train()
    net.requires_grad_(False)
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    x = torch.randn(8, 8)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = J.measure(Subject("net", net, x))
    assert torch.equal(torch.get_rng_state(), state)
    after = net.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert bool((next(net.parameters()).grad == 1).all())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert [*found.layers] == ["1", "2", "3", "4"]
    assert found.network.coupled == (norm in ("batch", "kalman-batch"))
    assert [*found.predicted] == (["1", "2", "3", "4"] if norm.startswith("normprop") else [])
    if not found.network.coupled:
        dense = brute_force(net, x)
        assert found.network.diagonal_mean == pytest.approx(float(dense.square().sum() / 8 / 3), rel=1e-4, abs=1e-9)


def test_attention_and_convolutions():
    for name, shape in (("vit", (3, 8, 8)), ("nin", (3, 16, 16))):
        net = models.create(name, shape, 5, norm="layer", width=0.1).eval()
        x = torch.randn(2, *shape)
        found = J.measure(Subject(name, net, x), samples=2, probes=4, steps=4)
        dense = brute_force(net, x)
        assert found.network.exact
        assert found.network.largest == pytest.approx(float(torch.linalg.svdvals(dense).max()), rel=1e-3)
        assert all(math.isfinite(layer.largest) and layer.largest > 0 for layer in found.layers.values())


def test_a_layer_that_is_called_twice_counts_by_its_first_call():
    layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    net = nn.Sequential(layer, layer, nn.Linear(3, 1))
    x = torch.randn(4, 3)
    found = J.measure(Subject("net", net, x))
    assert found.layers["0"].diagonal_mean == pytest.approx(J.jacobian(layer, x).diagonal_mean, rel=1e-5)


@pytest.mark.parametrize(
    ("function", "x", "words"),
    [
        (nn.Linear(3, 2), torch.ones(2, 3, dtype=torch.long), "floating point batch"),
        (nn.Linear(3, 2), torch.ones(0, 3), "at least one sample"),
        (nn.Linear(3, 2), torch.ones(2, 4), "Linear: the network does not take inputs of shape (2, 4)"),
        (nn.LSTM(3, 2), torch.ones(2, 4, 3), "LSTM returns tuple"),
        (lambda x: x.detach(), torch.ones(2, 3), "does not depend"),
        (lambda x: x.argmax(1), torch.ones(2, 3), "returns torch.int64"),
    ],
)
def test_one_line_for_what_cannot_work(function, x, words):
    with pytest.raises(ConfigError) as error:
        J.jacobian(function, x)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_must_be_positive():
    for setting in ("probes", "steps"):
        with pytest.raises(ConfigError, match=f"{setting} must be positive"):
            J.jacobian(nn.Linear(2, 2), torch.ones(1, 2), **{setting: 0})


def test_a_constant_function_has_a_jacobian_of_zeros():
    found = J.jacobian(lambda x: x * 0.0, torch.ones(2, 3))
    assert (found.diagonal_mean, found.largest, found.off_diagonal_rms) == (0.0, 0.0, 0.0)


def describe(**networks):
    diagnosis = J.describe(networks)
    json.dumps(diagnosis.numbers, allow_nan=False)
    return diagnosis


def test_describe_one_and_two_networks():
    double = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    for layer, scale in zip(double, (2.0, 0.5), strict=True):
        layer.weight.data.copy_(scale * torch.eye(3))
    plain = J.measure(Subject("plain", double, torch.randn(4, 3)))
    one = describe(plain=plain)
    assert one.found == (
        "plain: its 2 layers multiply the squared length of a gradient by 1 on average (0.25 to 4); the whole network "
        "by 1. The most that it stretches a small change by is 1."
    )
    assert one.title.endswith("?")
    paper = models.mlp(16, 3, norm="normprop", depth=2, hidden_features=32)
    two = describe(plain=plain, paper=J.measure(Subject("paper", paper, torch.randn(8, 16))))
    assert one.found == two.found.splitlines()[0]
    assert "paper: its 3 layers" in two.found
    assert "where theory says 1 to 1.47" in two.found
    assert [(line.name, line.style) for line in two.figures[0].lines] == [
        ("plain", "both"),
        ("paper", "both"),
        ("paper, theory", "theory"),
    ]
    assert two.figures[0].lines[0].y == [4.0, 0.25]
    assert two.figures[0].x_ticks is None
    assert one.figures[0].x_ticks == [(1, "0"), (2, "1")]
    assert two.numbers["paper"]["layers"]["1"]["predicted"] == pytest.approx(RELU)


def test_describe_what_is_not_finite_or_zero():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.data.fill_(math.nan)
    bad = describe(bad=J.measure(Subject("bad", net, torch.ones(2, 2))))
    assert bad.found == "bad: the derivatives are not finite, first at layer 0."
    assert bad.numbers["bad"]["network"]["largest"] is None
    fixup = models.mlp(4, 2, norm="fixup", depth=1, hidden_features=8)
    assert "the whole network by 0" in describe(fixup=J.measure(Subject("fixup", fixup, torch.ones(2, 4)))).found
