"""The maps of random layers against published numbers, closed forms and quadrature, and networks against the maps."""

import copy
import json
import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from normprop import models, moments
from normprop import nn as np_nn
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.fixed_points import correlation_fixed_points, depth_scale, fixed_points
from normprop.diagnostics.mean_field import describe, measure, monte_carlo, theory
from normprop.diagnostics.mean_field_maps import (
    Layer,
    Signal,
    backward_growth,
    batch_norm_growth,
    correlation,
    correlation_slope,
    he,
    normprop,
    output_mean,
    plain,
    propagate,
    second_moment,
    second_moment_slope,
)
from normprop.errors import ConfigError
from normprop.report.plots import svg

PAPER_GAIN, EXACT_GAIN = 1 / 1.21, math.sqrt((math.pi - 1) / math.pi)
LIMIT = math.pi / (4 * (math.pi - 1))
CORRELATIONS = (-1.0, -0.9, -0.3, 0.0, 0.2, 0.5, 0.9, 0.999, 1.0)


def arc_cosine(c):
    return math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))


# -- sizes


def test_published_second_moments():
    q, sequence = 1.0, []
    for _ in range(20):
        q = second_moment(normprop("relu", PAPER_GAIN), q)
        sequence.append(round(q, 5))
    assert [sequence[layer - 1] for layer in (1, 2, 3, 5, 9, 20)] == [
        0.69708, 0.52098, 0.43185, 0.37665, 0.36731, 0.36714,
    ]  # fmt: skip
    for q in (0.2, 1.0, 1.8):
        growth = (math.sqrt(q) - 1) ** 2 / (math.pi - 1)
        assert second_moment(normprop("relu"), q) - q == pytest.approx(growth, abs=1e-14)


def test_published_output_of_one_layer():
    layer = normprop("relu", PAPER_GAIN)
    mean = output_mean(layer, 1.0)
    assert round(mean, 7) == -0.1185948
    assert round(math.sqrt(second_moment(layer, 1.0) - mean**2), 7) == 0.8264463


def test_published_fixed_points():
    (one,) = fixed_points(normprop("relu"))
    assert one.value == pytest.approx(1.0, abs=1e-9)
    assert one.stability == "semi-stable"
    assert one.slope == pytest.approx(1.0, abs=1e-12)
    (limit,) = fixed_points(normprop("relu", EXACT_GAIN))
    assert limit.value == pytest.approx(LIMIT, rel=1e-12)
    assert round(limit.value, 7) == 0.3667356
    assert EXACT_GAIN * math.sqrt(limit.value) == pytest.approx(0.5, rel=1e-12)
    (paper,) = fixed_points(normprop("relu", PAPER_GAIN))
    assert round(paper.value, 7) == 0.3671432
    assert paper.stability == limit.stability == "stable"


def test_slopes_are_derivatives_and_depth_scales_are_the_speed_of_approach():
    for layer in (normprop("relu", 0.7), normprop("tanh"), plain("tanh", 2.0), normprop("elu", 1.2, "live", True)):
        step = 1e-5
        difference = (second_moment(layer, 0.6 + step) - second_moment(layer, 0.6 - step)) / (2 * step)
        assert second_moment_slope(layer, 0.6) == pytest.approx(difference, rel=1e-6)
    layer = normprop("relu", PAPER_GAIN)
    (point,) = fixed_points(layer)
    near, far = point.value * 1.001, 0.0
    far = near
    for _ in range(5):
        far = second_moment(layer, far)
    approach = abs(far - point.value) / abs(near - point.value)
    assert approach == pytest.approx(math.exp(-5 / point.depth_scale), rel=5e-3)
    assert depth_scale(-0.5) == depth_scale(0.5) > 0 > depth_scale(1.5)
    assert (depth_scale(0.0), depth_scale(1.0)) == (0.0, math.inf)


def test_all_fixed_points_of_other_layers():
    assert [(point.stability, point.slope) for point in fixed_points(he("relu"))] == [("neutral", 1.0)]
    # Centred filters leave out the mean, and ReLU scales what is left: every size is kept, at any gain when live.
    assert fixed_points(normprop("relu", 1.3, "live", center=True))[0].stability == "neutral"
    (zero,) = fixed_points(plain("relu"))  # Glorot's variance: halved in each layer
    assert (zero.value, zero.stability) == (0.0, "stable")
    assert zero.slope == pytest.approx(0.5, rel=1e-6)
    (critical,) = fixed_points(plain("tanh"))
    assert (critical.value, critical.slope, critical.stability) == (0.0, 1.0, "stable")
    zero, other = fixed_points(plain("tanh", 2.0), low=1e-3, high=10)
    assert (zero.value, zero.stability, other.stability) == (0.0, "unstable", "stable")
    assert second_moment(plain("tanh", 2.0), other.value) == pytest.approx(other.value, rel=1e-11)
    assert zero.slope == pytest.approx(2.0, rel=1e-6)
    # With GELU the printed layer keeps 1, but deep networks leave it for a smaller size.
    small, one = fixed_points(normprop("gelu"), high=10)
    assert one.value == pytest.approx(1.0, abs=1e-9)
    assert (small.stability, one.stability) == ("stable", "unstable")
    q = 0.95
    for _ in range(200):
        q = second_moment(normprop("gelu"), q)
    assert q == pytest.approx(small.value, rel=1e-5)
    assert fixed_points(normprop("relu", 2.0)) == ()  # grows without end


def test_fixed_points_touched_at_any_place_are_found():
    """Live ReLU layers touch the diagonal at 1 for every gain; a scaled input moves the place off the grid."""
    layer = normprop("relu")
    moved = Layer("relu", layer.gain * 0.9, layer.shift, layer.scale * 0.9)  # input 0.9 h, output o / 0.9
    (point,) = fixed_points(moved)
    assert point.value == pytest.approx(1 / 0.81, rel=1e-6)
    assert point.stability == "semi-stable"


# -- likenesses


def test_published_correlations_at_gain_one():
    layer = normprop("relu")
    for c in CORRELATIONS:
        expected = (arc_cosine(c) - 1) / (math.pi - 1)
        assert correlation(layer, c) == pytest.approx(expected, abs=1e-11)
    assert round(correlation(layer, 0.5), 5) == 0.42642
    assert round(correlation(layer, 0.9), 5) == 0.86730
    assert round(correlation_slope(layer, 0.0), 7) == 0.7334711
    assert round(correlation_slope(layer, 1.0), 5) == 1.46694


def test_he_initialised_relu_and_its_equal():
    exact = normprop("relu", EXACT_GAIN)
    for c in CORRELATIONS:
        assert correlation(he("relu"), c, 0.7) == pytest.approx(arc_cosine(c) / math.pi, abs=1e-11)
        assert correlation(exact, c, LIMIT) == pytest.approx(arc_cosine(c) / math.pi, abs=1e-11)
    assert correlation_slope(he("relu"), 1.0) == pytest.approx(1.0, rel=1e-11)
    (point,) = correlation_fixed_points(exact, LIMIT)
    assert (point.value, point.stability) == (1.0, "stable")  # critical: they creep to 1
    assert abs(point.depth_scale) > 1e6


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.25, 0.5])
def test_leaky_relu_map(slope):
    layer = he(nn.LeakyReLU(slope))
    for c in CORRELATIONS:
        expected = ((1 - slope) ** 2 * arc_cosine(c) / math.pi + 2 * slope * c) / (1 + slope**2)
        assert correlation(layer, c) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "erf"])
@pytest.mark.parametrize("kind", ["fixed", "live", "centred", "plain"])
def test_maps_of_smooth_activations_in_two_dimensions(activation, kind):
    gain, q, c = 0.8, 1.3, 0.6
    layer = {
        "fixed": normprop(activation, gain),
        "live": normprop(activation, gain, "live"),
        "centred": normprop(activation, gain, "fixed", center=True),
        "plain": plain(activation, gain**2),
    }[kind]
    unit = moments.of(activation, 0.0, gain if kind == "live" else 1.0)
    shift, scale = (0.0, 1.0) if kind == "plain" else (unit.mean, unit.std)
    nodes, weights = np.polynomial.hermite_e.hermegauss(90)
    nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    function, std = moments.resolve(activation).function, gain * math.sqrt(q)
    left = ((function(std * nodes) - shift) / scale)[:, None]
    right = (function(std * (c * nodes[:, None] + 0.8 * nodes)) - shift) / scale
    mean = (weights @ left).item()
    product, square = (weights @ (left * right) @ weights).item(), (weights @ left.square()).item()
    assert output_mean(layer, q) == pytest.approx(mean, abs=1e-7)
    if kind == "centred":
        product, square = product - mean**2, square - mean**2
    assert second_moment(layer, q) == pytest.approx(square, rel=1e-7)
    assert correlation(layer, c, q) == pytest.approx(product / square, rel=1e-6)


@pytest.mark.parametrize(
    "layer", [normprop("relu", 0.8), normprop("elu", 1.1, "live", center=True), he("tanh"), normprop(nn.PReLU())]
)
def test_correlation_slope_is_the_derivative(layer):
    step = 1e-4
    difference = (correlation(layer, 0.4 + step, 0.7) - correlation(layer, 0.4 - step, 0.7)) / (2 * step)
    assert correlation_slope(layer, 0.4, 0.7) == pytest.approx(difference, rel=1e-5)


def test_all_kept_correlations():
    zero, one = correlation_fixed_points(normprop("relu"))
    assert (zero.stability, one.stability) == ("stable", "unstable")
    assert abs(zero.value) < 1e-10
    assert zero.slope == pytest.approx(0.7334711, abs=1e-7)
    (minus, zero, one) = correlation_fixed_points(plain("erf", 4.0), fixed_points(plain("erf", 4.0), high=10)[1].value)
    assert (minus.value, one.value) == (-1.0, 1.0)
    assert (minus.stability, zero.stability, one.stability) == ("unstable", "stable", "unstable")
    small, one = correlation_fixed_points(normprop("gelu"))
    assert correlation(normprop("gelu"), small.value) == pytest.approx(small.value, abs=1e-11)
    assert (small.stability, one.stability) == ("stable", "unstable") or small.value == 0


# -- gradients


def test_published_backward_growth():
    for gain, expected in ((1.0, 1.46694), (PAPER_GAIN, 1.00194), (EXACT_GAIN, 1.0)):
        layer = normprop("relu", gain)
        assert round(backward_growth(layer), 5) == expected
        assert backward_growth(layer, 0.3) == pytest.approx(backward_growth(layer), rel=1e-12)
    table = {
        nn.LeakyReLU(0.25): 1.20267041, nn.LeakyReLU(0.1): 1.34278335, nn.LeakyReLU(0.01): 1.45337076,
        "tanh": 1.17780723, "sigmoid": 1.03359239, "softplus": 1.08052805, "elu": 1.07901346, "selu": 1.07157499,
        "gelu": 1.31884497, "silu": 1.21208111, "softsign": 1.24401037, "erf": 1.22570000,
    }  # fmt: skip
    for activation, growth in table.items():
        assert backward_growth(normprop(activation)) == pytest.approx(growth, abs=5.1e-9)
    assert backward_growth(he("relu"), 5.0) == pytest.approx(1.0, rel=1e-12)
    # Live moments undo a gain on ReLU altogether.
    assert backward_growth(normprop("relu", 0.4, "live")) == pytest.approx(backward_growth(normprop()), rel=1e-12)


def test_expected_squared_jacobian():
    """E[J J^T] is pi / (pi - 1) I, although no single Jacobian has singular values near its root."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((256, 512))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    layer = np_nn.Linear(512, 256, activation="relu", center=False, moments="fixed").double()
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(rows))
    x = torch.as_tensor(rng.standard_normal((4000, 512)))
    active = (layer(x) > layer(torch.zeros(1, 512).double()).min()).double().detach()
    squares = active.T @ active / 4000 * torch.as_tensor(rows @ rows.T) / moments.of("relu").var
    diagonal = squares.diagonal().mean().item()
    assert diagonal == pytest.approx(math.pi / (math.pi - 1), rel=5e-3)
    assert round(diagonal, 4) == 1.4655
    off = (squares - torch.diag(squares.diagonal())).square().sum().item() / (256 * 255)
    assert round(math.sqrt(off), 3) == 0.032
    jacobian = torch.autograd.functional.jacobian(layer, x[0])
    values = torch.linalg.svdvals(jacobian)
    assert values.square().mean().item() == pytest.approx(1.4669, rel=0.15)


def batch_norm_growth_measured(activation, batch, depth, width, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential()
    for _ in range(depth):
        linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(linear.weight, std=width**-0.5)
        net.append(nn.Sequential(linear, nn.BatchNorm1d(width, eps=1e-12), activation()))
    found = measure(Subject("bn", net, torch.randn(batch, width)))
    assert all(math.isnan(value) for value in found.predicted.gradients)
    assert math.isnan(found.predicted_growth)
    inner = found.measured.gradients[1:]  # the input itself is no activation, so the first layer scales otherwise
    return (inner[0] / inner[-1]) ** (1 / (len(inner) - 1))


def test_growth_in_batch_norm_networks():
    for batch in (6, 10):  # networks of finite width scatter: judged by their spread
        growths = [batch_norm_growth_measured(nn.Identity, batch, 30, 400, seed) for seed in range(5)]
        error = statistics.stdev(growths) / math.sqrt(5)
        assert abs(statistics.mean(growths) - batch_norm_growth(batch)) < 4 * error
        assert error < 0.02
    # Many samples: Normalization Propagation's factor at gain 1.
    assert batch_norm_growth_measured(nn.ReLU, 256, 16, 400) == pytest.approx(1.468, rel=0.02)
    assert batch_norm_growth_measured(nn.Tanh, 256, 16, 400) == pytest.approx(1.183, rel=0.02)
    assert backward_growth(normprop("relu")) == pytest.approx(1.468, rel=0.01)
    with pytest.raises(ConfigError, match="below 4 samples, got 3"):
        batch_norm_growth(3)


# -- networks


def test_monte_carlo_of_the_paper():
    for gain, growth, last in ((1.0, 1.46685, 0.003), (PAPER_GAIN, 0.99915, 0.970)):
        found = monte_carlo("relu", gain, width=1000, depth=30, samples=60)
        assert found.covered
        assert found.growth == pytest.approx(growth, rel=0.01)
        assert found.predicted_growth == pytest.approx(backward_growth(normprop("relu", gain)), rel=1e-6)
        assert found.measured.correlations[-1] == pytest.approx(last, abs=0.03)
        if gain != 1:
            for measured, predicted in zip(found.measured.second_moments, found.predicted.second_moments, strict=True):
                assert measured == pytest.approx(predicted, rel=0.06)
            assert found.measured.means[1] == pytest.approx(found.predicted.means[1], abs=0.01)
            q = found.measured.second_moments[-1]
            assert gain * math.sqrt(q) == pytest.approx(0.5, abs=0.02)
        else:  # only semi-stable: any excess grows, and finite width has some
            q = found.measured.second_moments
            assert q[5] == pytest.approx(1.006, abs=0.1)
            assert 1.0 < q[20] < q[30] < 4


@pytest.mark.parametrize(
    ("activation", "gain", "kind", "center"),
    [
        ("tanh", 1.0, "fixed", False),
        ("relu", 0.7, "live", True),
        ("gelu", 0.8, "live", False),
        ("elu", 1.2, "fixed", True),
    ],
)
def test_one_layer_map_of_random_networks(activation, gain, kind, center):
    """Several small networks, so that the tolerance comes from their spread."""
    runs = [
        monte_carlo(activation, gain, 250, 3, moments=kind, center=center, samples=30, correlation=0.5, seed=seed)
        for seed in range(10)
    ]
    for field in ("second_moments", "correlations", "means", "gradients"):
        for layer in (1, 2, 3):
            entry = layer if field != "gradients" else layer - 1
            off = [getattr(run.measured, field)[entry] - getattr(run.predicted, field)[entry] for run in runs]
            error = statistics.stdev(off) / math.sqrt(len(off))
            level = abs(getattr(runs[0].predicted, field)[entry])
            assert abs(statistics.mean(off)) < 4.5 * error + 0.01 * level, (field, layer)
            assert error < 0.15 * max(level, 0.3)


def test_plain_networks_follow_their_map():
    torch.manual_seed(1)
    net = models.create("mlp", (400,), 400, norm="none", width=2.0)
    found = measure(Subject("none", net, torch.randn(50, 400)))
    assert found.covered
    assert found.predicted.second_moments[3] == pytest.approx(found.measured.second_moments[3], rel=0.15)
    assert found.predicted.correlations[4] == pytest.approx(found.measured.correlations[4], abs=0.05)
    assert found.predicted.gradients[0] == pytest.approx(found.measured.gradients[0], rel=0.15)


def test_signal_gradient_and_correlation_by_hand():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 5).double()
    found = measure(Subject("net", net, x), seed=7)
    hidden = torch.tanh(net[0](x)).detach()
    assert found.measured.second_moments[1] == pytest.approx(hidden.square().mean().item())
    assert abs(found.measured.means[1]) == pytest.approx(hidden.mean(1).square().mean().sqrt().item())
    cosines = torch.nn.functional.cosine_similarity(hidden[:, None], hidden[None], dim=-1)
    assert found.measured.correlations[1] == pytest.approx((cosines.sum() - 6).item() / 30)
    direction = torch.randn(6, 3, generator=torch.Generator().manual_seed(7)).double()
    assert found.measured.gradients[2] == pytest.approx(direction.square().sum().item() / 6)
    back = direction @ net[2].weight
    assert found.measured.gradients[1] == pytest.approx(back.square().sum().item() / 6)
    back = (back * (1 - hidden**2)) @ net[0].weight
    assert found.measured.gradients[0] == pytest.approx(back.square().sum().item() / 6)
    assert found.starts == (1,)  # between the layers stands an activation of its own
    assert not found.covered
    assert math.isnan(found.predicted.second_moments[0])


def test_predictions_start_again_after_a_pool_and_stop_in_residual_blocks():
    torch.manual_seed(3)
    x = torch.randn(8, 3, 16, 16)
    nin = measure(Subject("nin", models.create("nin", (3, 16, 16), 4, norm="normprop", width=0.1), x))
    assert nin.starts == (0, 2, 5)  # after the two pools
    assert math.isnan(nin.predicted_growth)
    resnet = measure(Subject("resnet", models.create("resnet8", (3, 16, 16), 4, norm="normprop", width=0.2), x))
    assert not resnet.covered
    branch = resnet.layers.index("1.branch.1")
    assert math.isnan(resnet.predicted.gradients[branch])
    assert all(math.isfinite(value) for value in resnet.measured.gradients)


def test_in_place_changes_between_layers_break_the_chain():
    torch.manual_seed(4)
    layers = [nn.Linear(8, 8), nn.ReLU(inplace=True), np_nn.Linear(8, 8, activation="relu")]
    found = measure(Subject("net", nn.Sequential(*layers), torch.randn(4, 8)))
    assert found.starts == (1,)
    layers[0] = np_nn.Linear(8, 8, activation="relu")  # needs its output again
    with pytest.raises(ConfigError, match=r"^net: the network has no gradients") as caught:
        measure(Subject("net", nn.Sequential(*layers), torch.randn(4, 8)))
    assert "\n" not in str(caught.value)


def test_theory_of_modules():
    layer = np_nn.Linear(8, 4, activation="relu", gain=1.0)
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([1.0, 1.0, 2.0, 2.0]))
    found = theory(layer)
    assert found.gain == pytest.approx(math.sqrt(2.5))
    assert (found.center, found.scale) == (True, pytest.approx(math.sqrt(2.5) * moments.of("relu").std))
    assert theory(np_nn.Linear(8, 4, activation=nn.PReLU())) is None
    plain_layer = nn.Sequential(nn.Conv1d(2, 3, 3), nn.GELU())
    lengths = plain_layer[0].weight.detach().flatten(1).norm(dim=1)
    assert theory(plain_layer).gain == pytest.approx(lengths.square().mean().sqrt().item())
    assert theory(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))) is None
    assert theory(nn.Sequential(nn.Linear(3, 3), nn.MaxPool1d(2))) is None
    with torch.no_grad():
        plain_layer[0].weight.zero_()
    assert theory(plain_layer) is None


def test_propagation_of_what_is_not_known():
    nothing = propagate(normprop(), Signal(math.nan))
    assert all(math.isnan(value) for value in (nothing.second_moment, nothing.mean, nothing.correlation))
    alone = propagate(normprop(), Signal(1.0, 0.0, math.nan))
    assert alone.second_moment == pytest.approx(1.0)
    assert math.isnan(alone.correlation)
    constant = propagate(normprop("relu", center=True), Signal(1.0, 1.0, 1.0))  # centred filters see nothing of it
    assert math.isnan(constant.second_moment)


def test_the_network_is_left_as_it_was():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten())
    net.append(np_nn.Linear(16, 2))
    x = torch.randn(6, 2, 4, 4)
    before, random, kept = copy.deepcopy(net.state_dict()), torch.get_rng_state(), x.clone()
    first = measure(Subject("net", net, x))
    monte_carlo(width=20, depth=1, samples=3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in net)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert measure(Subject("net", net, x)) == first  # also where it draws


def test_networks_without_gradients_and_with_frozen_parameters():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

        def forward(self, tokens):
            return {"logits": self.head(self.table(tokens).mean(1))}

    tokens = torch.randint(7, (4, 6))
    frozen = measure(Subject("tokens", Tokens().requires_grad_(False), tokens))
    assert math.isnan(frozen.growth)
    assert math.isfinite(frozen.measured.second_moments[0])
    assert math.isfinite(measure(Subject("tokens", Tokens(), tokens)).growth)
    with torch.no_grad():
        found = measure(Subject("plain", nn.Linear(3, 3).requires_grad_(False), torch.randn(2, 3)))
    assert math.isfinite(found.growth)


def test_errors_are_one_line():
    with pytest.raises(ConfigError, match=r"^net: the network does not take inputs of shape \(4, 5\)") as caught:
        measure(Subject("net", nn.Linear(3, 2), torch.randn(4, 5)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="net: the network calls no layer with a weight"):
        measure(Subject("net", nn.ReLU(), torch.randn(4, 5)))
    with pytest.raises(ConfigError, match="at least 1"):
        monte_carlo(depth=0)
    with pytest.raises(ConfigError, match="gain of a layer with relu must be above 0 and finite, got 0"):
        normprop("relu", 0.0)
    with pytest.raises(ConfigError, match="between -1 and 1"):
        correlation(normprop(), 1.5)


def test_description():
    runs = {"gain 1": monte_carlo("relu", 1.0, 100, 4, samples=10), "paper": monte_carlo("relu", PAPER_GAIN, 100, 4)}
    for some in ({"gain 1": runs["gain 1"]}, runs):
        diagnosis = describe(some)
        assert json.dumps(diagnosis.numbers, allow_nan=False)
        assert diagnosis.title.endswith("?")
        for name, run in some.items():
            assert (
                f"{name}: over 4 layers the mean square goes from {run.measured.second_moments[0]:.3g}"
                in diagnosis.found
            )
            assert f"multiplied by {run.growth:.3g} (theory {run.predicted_growth:.3g})" in diagnosis.found
        for plot in diagnosis.figures:
            assert [(line.name, line.style) for line in plot.lines] == [
                (name, style) for name in some for style in ("both", "theory")
            ]
        assert svg(diagnosis.figures).startswith("<svg")
    gradients = describe(runs).figures[2].lines
    assert all(line.y[-1] == pytest.approx(1.0) for line in gradients)


def test_description_of_what_cannot_be_measured():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    single = measure(Subject("single", net, torch.randn(1, 4)))
    with torch.no_grad():
        net[0].weight.fill_(math.inf)
    broken = measure(Subject("broken", net, torch.randn(3, 4)))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    silent = measure(Subject("silent", net, torch.randn(3, 4)))
    diagnosis = describe({"single": single, "broken": broken, "silent": silent})
    numbers = json.loads(json.dumps(diagnosis.numbers, allow_nan=False))
    assert numbers["broken"]["measured"]["second_moments"][1] is None
    assert "correlation" not in diagnosis.found.split("broken")[0]
    assert "broken: the signal is not finite from the output of layer 0 on." in diagnosis.found
    assert "nan" not in diagnosis.found
    assert svg(diagnosis.figures).startswith("<svg")
