"""Proposition 1 against matrices written out, the published numbers and sampled covariances."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from normprop import models
from normprop import nn as np_nn
from normprop.diagnostics.canonical_error import canonical_error, describe, measure, measured_error, welch_bound
from normprop.diagnostics.diagnosis import Subject
from normprop.errors import ConfigError
from normprop.report.plots import svg


def dense(weight, groups):
    """The matrix from all inputs to all outputs of one position."""
    out, rows = len(weight), weight.double().flatten(1)
    fan = rows.shape[1]
    matrix = torch.zeros(out, groups * fan, dtype=torch.float64)
    for unit in range(out):
        start = unit // (out // groups) * fan
        matrix[unit, start : start + fan] = rows[unit]
    return matrix


@pytest.mark.parametrize(
    ("shape", "groups"), [((7, 5), 1), ((8, 3, 2, 2), 2), ((6, 1, 3), 6), ((12, 2, 1, 1, 2), 3), ((1, 4), 1)]
)
def test_sides_of_the_proposition_written_out(shape, groups):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.linspace(0.1, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    found = canonical_error(weight, variance=2.5, groups=groups)
    matrix = dense(weight, groups)
    covariance = 2.5 * matrix @ matrix.T
    off = covariance - torch.diag(covariance.diagonal())
    assert found.error == pytest.approx(off.norm().item(), rel=1e-12, abs=1e-15)
    assert found.diagonal == pytest.approx(covariance.diagonal().norm().item(), rel=1e-12)

    length, out = matrix.norm(dim=1), shape[0]
    pairs = [(i, j) for i in range(out) for j in range(out) if i != j and i * groups // out == j * groups // out]
    cosines = [abs((matrix[i] @ matrix[j] / (length[i] * length[j])).item()) for i, j in pairs]
    lengths = math.sqrt(sum((length[i] * length[j]).item() ** 2 for i, j in pairs))
    assert found.coherence == pytest.approx(max(cosines, default=0.0), rel=1e-12)
    assert found.tight == pytest.approx(2.5 * max(cosines, default=0.0) * lengths, rel=1e-12)
    assert found.loose == pytest.approx(found.tight * math.sqrt(len(pairs)), rel=1e-12)
    assert found.error <= found.tight * (1 + 1e-12) <= max(found.loose, found.tight) * (1 + 1e-12)


def test_no_diagonal_is_closer():
    torch.manual_seed(1)
    weight = torch.randn(5, 4, dtype=torch.float64)
    covariance, best = 1.7 * weight @ weight.T, 1.7 * weight.square().sum(1)
    found = canonical_error(weight, 1.7)
    assert (covariance - torch.diag(best)).norm().item() == pytest.approx(found.error, rel=1e-12)
    for _ in range(50):
        other = best + 0.1 * torch.randn(5, dtype=torch.float64)
        assert (covariance - torch.diag(other)).norm().item() > found.error


def test_equiangular_frame_attains_the_bound():
    directions = torch.eye(9, dtype=torch.float64) - 1 / 9
    basis = torch.linalg.svd(directions)[0][:, :8]
    frame = torch.nn.functional.normalize(directions @ basis, dim=1)
    found = canonical_error(frame)
    assert found.error == pytest.approx(1.06066, abs=5e-6)
    assert found.tight == pytest.approx(found.error, rel=1e-12)
    assert found.coherence == pytest.approx(found.welch, rel=1e-12)
    # The same nine vectors in nine dimensions, known to lie in eight.
    assert canonical_error(directions).welch == 0
    assert canonical_error(directions, dimensions=8).welch == pytest.approx(1 / 8, rel=1e-12)


def test_published_random_rows_and_welch_bound():
    rows = np.random.default_rng(0).standard_normal((256, 512))
    found = canonical_error(torch.as_tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True)))
    assert (round(found.error, 2), round(found.tight, 2), round(found.loose)) == (11.28, 45.04, 11507)
    assert round(welch_bound(192, 75), 4) == 0.0904


def test_long_weights_are_taken_in_blocks():
    torch.manual_seed(2)
    weight = torch.randn(2100, 3)
    gram = weight.double() @ weight.double().T
    off = gram - torch.diag(gram.diagonal())
    assert canonical_error(weight).error == pytest.approx(off.norm().item(), rel=1e-12)


def test_silent_filters_and_single_filters():
    found = canonical_error(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]]))
    assert found.error == pytest.approx(math.sqrt(2) * 8)
    assert found.coherence == pytest.approx(0.8)
    alone = canonical_error(torch.randn(6, 1, 3, 3), groups=6)
    assert (alone.error, alone.tight, alone.loose, alone.coherence, alone.welch) == (0, 0, 0, 0, 0)
    broken = canonical_error(torch.tensor([[math.nan, 1.0], [1.0, 0.0]]))
    assert math.isnan(broken.error)
    assert math.isnan(broken.coherence)


def test_measured_error_approaches_the_assumed_on_white_inputs():
    torch.manual_seed(3)
    weight = torch.nn.functional.normalize(torch.randn(40, 30, dtype=torch.float64), dim=1)
    assumed = canonical_error(weight).error
    x = torch.randn(40_000, 30, dtype=torch.float64)
    # The square's noise is about 2 error sqrt(2 / N) from the signal and m / (N / 2) from the halves.
    assert measured_error(x @ weight.T) == pytest.approx(assumed, rel=0.03)


def test_measured_error_is_not_inflated_by_few_samples():
    torch.manual_seed(4)
    weight = torch.nn.functional.normalize(torch.randn(40, 8, dtype=torch.float64), dim=1)
    true = canonical_error(weight).error ** 2
    squares, naive = [], []
    for _ in range(400):
        u = torch.randn(16, 8, dtype=torch.float64) @ weight.T
        covariance = torch.cov(u.T)
        squares.append(measured_error(u) ** 2)
        naive.append((covariance - torch.diag(covariance.diagonal())).square().sum().item())
    standard_error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - true) < 4 * standard_error
    assert np.mean(naive) - true > 20 * standard_error
    assert math.isnan(measured_error(torch.randn(3, 5)))


def test_normprop_layers_have_unit_centred_filters():
    torch.manual_seed(5)
    net = nn.Sequential(
        np_nn.Conv2d(4, 6, 3, padding=1, groups=2, activation="relu", gain=0.7),
        np_nn.Conv2d(6, 5, 1, activation="tanh", center=False, moments="fixed"),
        nn.Flatten(),
        np_nn.Linear(5 * 16, 3),
    ).double()
    with torch.no_grad():
        net[0].gain.copy_(torch.linspace(0.2, 2, 6))
    found = measure(Subject("net", net, torch.randn(8, 4, 4, 4).double()))
    assert [layer.layer for layer in found] == ["0", "1", "3"]
    for layer, module, center in zip(found, (net[0], net[1], net[3]), (True, False, True), strict=True):
        rows = module.weight.detach().flatten(1)
        rows = rows - rows.mean(1, keepdim=True) if center else rows
        groups = getattr(module, "groups", 1)
        unit = torch.nn.functional.normalize(rows, dim=1)
        sigma = layer.assumed.diagonal / math.sqrt(len(unit))  # unit rows: sqrt(m) sigma^2
        expected = canonical_error(unit, sigma, groups, unit.shape[1] - center)
        assert layer.assumed.error == pytest.approx(expected.error, rel=1e-9)
        assert layer.assumed.coherence == pytest.approx(expected.coherence, rel=1e-9)
        assert layer.assumed.welch == expected.welch


def test_groups_cost_what_their_inputs_share():
    """Across groups the assumption sees nothing; equal inputs in both groups make their filters alike."""
    conv = np_nn.Conv1d(2, 2, 5, groups=2, center=False)
    with torch.no_grad():
        conv.weight.copy_(torch.ones(2, 1, 5))
    torch.manual_seed(6)
    shared = torch.randn(400, 1, 5).repeat(1, 2, 1)
    (layer,) = measure(Subject("conv", conv, shared))
    assert layer.assumed.error == 0
    assert layer.measured == pytest.approx(math.sqrt(2), rel=0.3)  # two units of variance 1 and correlation 1


def test_real_inputs_cost_more_than_white_ones():
    torch.manual_seed(7)
    layer = np_nn.Linear(32, 24, activation="relu")
    white = torch.randn(4000, 32)
    alike = white @ torch.randn(32, 3) @ torch.randn(3, 32) / 10 + 0.1 * white
    (on_white,), (on_alike,) = (measure(Subject("x", layer, x)) for x in (white, alike))
    assert on_white.measured == pytest.approx(on_white.assumed.error, rel=0.05)
    assert on_alike.measured > 1.5 * on_alike.assumed.error


@pytest.mark.parametrize("method", ["scaled-weight-standardized", "weight", "batch"])
def test_weights_are_those_that_a_method_applies(method):
    torch.manual_seed(8)
    net = models.create("mlp", (20,), 3, norm=method, width=0.1).double()
    found = measure(Subject(method, net, torch.randn(3000, 20).double()))
    raw = next(parameter for name, parameter in net.named_parameters() if name.endswith("linear.weight"))
    rows = raw.detach().double()
    if method == "scaled-weight-standardized":
        rows = rows - rows.mean(1, keepdim=True)
    assert found[0].assumed.coherence == pytest.approx(canonical_error(rows).coherence, rel=1e-6)
    assert found[0].measured == pytest.approx(found[0].assumed.error, rel=0.1)  # the input is white


def test_tokens_transposed_convolutions_and_repeated_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.up = nn.Linear(6, 4), nn.ConvTranspose1d(4, 4, 2, stride=2)
            self.own = nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            hidden = self.up(self.tokens(self.tokens(x)[..., [0, 1, 2, 3, 0, 1]]).mT).mT
            once = torch.nn.functional.linear(hidden, self.own)
            return torch.nn.functional.linear(once, self.own.T)

    found = measure(Subject("net", Net(), torch.randn(8, 3, 6)))
    assert [layer.layer for layer in found] == ["tokens", "Net", "Net#2"]
    assert [layer.assumed.filters for layer in found] == [4, 5, 4]
    assert all(math.isfinite(layer.measured) for layer in found)


def test_the_network_is_left_as_it_was():
    torch.manual_seed(9)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten())
    net.append(nn.Linear(16, 2))
    x = torch.randn(6, 2, 4, 4)
    before, random, kept = copy.deepcopy(net.state_dict()), torch.get_rng_state(), x.clone()
    measure(Subject("net", net, x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept)
    assert all(module.training and not module._forward_hooks and not module._forward_pre_hooks for module in net)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_errors_are_one_line():
    for call in (
        lambda: measure(Subject("net", nn.Linear(3, 2), torch.randn(4, 5))),
        lambda: measure(Subject("net", nn.ReLU(), torch.randn(4, 5))),
    ):
        with pytest.raises(ConfigError, match=r"^net: .*$") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="5 groups do not divide 6 filters"):
        canonical_error(torch.randn(6, 2), groups=5)
    with pytest.raises(ConfigError, match=r"got torch.float32 of shape \(6,\)"):
        canonical_error(torch.randn(6))
    with pytest.raises(ConfigError, match="must not be negative"):
        canonical_error(torch.randn(6, 2), variance=-1.0)


def test_description():
    torch.manual_seed(10)
    x = torch.randn(64, 20)
    nets = {name: models.create("mlp", (20,), 3, norm=name, width=0.1) for name in ("normprop", "none")}
    results = {name: measure(Subject(name, net, x)) for name, net in nets.items()}
    for some in ({"normprop": results["normprop"]}, results):
        diagnosis = describe(some)
        assert json.dumps(diagnosis.numbers, allow_nan=False)
        assert diagnosis.title.endswith("?")
        for name, layers in some.items():
            relative = sorted(layer.assumed.error / layer.assumed.diagonal for layer in layers)
            worst = max(layers, key=lambda layer: layer.assumed.coherence)
            words = f"{name}: relative to the variances, the covariances of units are {relative[2]:.2g} in the median"
            assert words in diagnosis.found
            assert f"layer {worst.layer} (cosine {worst.assumed.coherence:.2f})" in diagnosis.found
            assert {line.name for plot in diagnosis.figures for line in plot.lines} == set(some)
        assert svg(diagnosis.figures).startswith("<svg")


def test_description_of_what_cannot_be_measured():
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight[0, 0] = math.nan
    broken = measure(Subject("broken", net, torch.randn(8, 4)))
    single = measure(Subject("single", nn.Linear(4, 3), torch.randn(1, 4)))
    unbatched = measure(Subject("unbatched", nn.Conv1d(2, 3, 3), torch.randn(2, 9)))
    diagnosis = describe({"broken": broken, "single": single, "unbatched": unbatched})
    assert json.loads(json.dumps(diagnosis.numbers, allow_nan=False))["broken"][0]["error"] is None
    assert "for the real ones" not in diagnosis.found
    assert "single: relative to the variances" in diagnosis.found
    assert "broken: weights or inputs are not finite in any of 1 layers." in diagnosis.found
    assert "nan" not in diagnosis.found
    assert single[0].assumed.diagonal > 0
    assert svg(diagnosis.figures).startswith("<svg")
