import copy
import json
import math

import pytest
import torch
from torch import nn

from normprop.diagnostics import equivalent_ridge as E
from normprop.diagnostics.auto_rate import auto_rate
from normprop.diagnostics.equivalent_ridge import EquivalentRidge, describe, equivalent_ridge, squared_error
from normprop.errors import ConfigError


@pytest.fixture(scope="module")
def linear():
    """A unit with and without batch norm on inputs of unlike scales, trained to convergence."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(256, 3, generator=generator) * torch.tensor([0.5, 1.0, 2.0])
    y = X @ torch.tensor([2.0, 1.0, -0.5]) + 0.5 * torch.randn(256, generator=generator)
    X, y = X - X.mean(0), y - y.mean()
    torch.manual_seed(0)
    normalized = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1, affine=False))
    plain = nn.Linear(3, 1)
    before = [copy.deepcopy(part.state_dict()) for part in (normalized, plain)]
    state = torch.get_rng_state()
    ridges = [10 ** (k / 4) for k in range(-5, 4)]
    found = equivalent_ridge(
        normalized, plain, X, y, [0.1, 0.5, 2.0], ridges, squared_error, steps=500, batch_size=256, lr=0.05
    )
    assert torch.equal(torch.get_rng_state(), state)
    return found, (normalized, plain), before, X, y


def test_ridge_of_a_linear_unit_is_the_variance_of_the_noise(linear):
    found, *_ = linear
    assert found.ridge == pytest.approx(found.noises, rel=0.15)
    assert max(found.distance) < 1e-3
    assert max(map(max, found.distances)) > 0.05  # the data tell the coefficients apart


def test_distances_are_those_of_the_closed_form(linear):
    found, _, _, X, y = linear
    covariance, cross = (X.T @ X / len(X)).double(), (X.T @ y / len(X)).double()
    eye = torch.eye(3, dtype=torch.float64)
    for noise, row in zip(found.noises, found.distances, strict=True):
        for ridge, distance in zip(found.ridges, row, strict=True):
            a, b = (torch.linalg.solve(covariance + s * eye, cross) for s in (noise, ridge))
            assert distance == pytest.approx(
                float(1 - torch.cosine_similarity(a, b, 0)), abs=6e-3
            )  # the noise is drawn


def test_networks_are_left_alone(linear):
    _, parts, before, *_ = linear
    for part, values in zip(parts, before, strict=True):
        assert part.training
        for name, value in part.state_dict().items():
            assert torch.equal(value, values[name]), name
        assert all(parameter.grad is None for parameter in part.parameters())


def test_multipliers_are_of_targets_of_unit_variance(linear):
    found, _, _, X, y = linear
    assert found.rates == pytest.approx([auto_rate(X, y / y.std(correction=0), s).rate for s in found.noises])
    # For classes: the mean over the classes of the multiple correlation less 1.
    labels = (y > 0).long() + (y > 1).long()
    indicators = [(labels == k).double() for k in range(3)]
    expected = [auto_rate(X, target / target.std(correction=0), 0.5).rate for target in indicators]
    assert E._rate(X, labels, 0.5) == pytest.approx(sum(expected) / 3)


def test_first_layer_of_a_perceptron_on_classes():
    X = torch.randn(128, 5)
    images, labels = X.reshape(-1, 1, 1, 5), (X.sum(1) > 0).long()
    normalized = nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    plain = nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    found = equivalent_ridge(normalized, plain, images, labels, [0.0, 1.0], [1e-3, 1e-1], steps=30, batch_size=50)
    assert len(found.distances) == 2
    assert all(0 < distance < 1 for row in found.distances for distance in row)
    # Deterministic, and the start is shared: after no more than a tiny step the two first layers are the same.
    again = equivalent_ridge(normalized, plain, images, labels, [0.0, 1.0], [1e-3, 1e-1], steps=30, batch_size=50)
    assert again == found
    started = equivalent_ridge(normalized, plain, images, labels, [0.0], [1e-3], steps=1, lr=1e-6)
    assert started.distance[0] < 1e-6


def test_least_is_exact_for_a_parabola_and_stays_on_the_grid_at_its_ends():
    ridges = [0.01, 0.1, 0.5, 3.0]
    vertex = 0.23
    parabola = [2.0 + (math.log(ridge / vertex)) ** 2 for ridge in ridges]
    assert E._least(ridges, parabola) == pytest.approx(vertex)
    assert E._least(ridges, [0.0, 1.0, 2.0, 3.0]) == 0.01
    assert E._least(ridges, [3.0, 2.0, 1.0, 0.0]) == 3.0
    assert E._least(ridges, [1.0, 1.0, 1.0, 1.0]) == 0.01
    assert math.isnan(E._least(ridges, [1.0, math.nan, 1.0, 1.0]))


def test_a_run_that_diverges_has_no_ridge():
    X = torch.randn(64, 3, dtype=torch.float64)
    y = X.sum(1)
    normalized = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1, affine=False)).double()
    found = equivalent_ridge(
        normalized, nn.Linear(3, 1).double(), X, y, [0.1], [0.1, 1.0], squared_error, steps=300, lr=1e3
    )
    assert math.isnan(found.ridge[0])
    document = describe({"unit": found})
    assert "nan" in document.found
    assert json.loads(json.dumps(document.numbers, allow_nan=False))["unit"]["equivalent ridge"] == [None]


def test_describe_two(linear):
    other = EquivalentRidge((1.0,), (0.1, 0.2, 0.4), ((0.3, 0.1, 0.2),), (0.25,), (-0.5,))
    document = describe({"unit": linear[0], "mlp": other})
    low, high = linear[0].ridge[0], linear[0].ridge[-1]
    first, second = document.found.splitlines()
    assert first.startswith("unit: noise of variance 0.1 to 2 on the inputs")
    assert f"as a weight decay of {low:.3g} to {high:.3g} does without" in first
    assert second.startswith("mlp: noise of variance 1 on the inputs")
    assert "as a weight decay of 0.25 does without" in second
    assert second.endswith("the multiplier is -0.5.")
    assert document.title.endswith("?")
    theory = document.figures[0].lines[-1]
    assert theory.style == "theory"
    assert list(theory.x) == list(theory.y) == [0.1, 0.5, 1.0, 2.0]
    assert [line.name for line in document.figures[2].lines] == ["unit", "mlp"]
    json.dumps(document.numbers, allow_nan=False)


def _unit(features=2):
    return nn.Linear(features, 1)


X2, Y2 = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]]), torch.tensor([1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: equivalent_ridge(_unit(), _unit(3), X2, Y2, [0.1], [0.1]), "differ in their norm alone"),
        (lambda: equivalent_ridge(nn.ReLU(), nn.ReLU(), X2, Y2, [0.1], [0.1]), "weights of shapes []"),
        (lambda: equivalent_ridge(_unit(), _unit(), X2, Y2[:2], [0.1], [0.1]), "y (2,); expected (samples, ...)"),
        (lambda: equivalent_ridge(_unit(), _unit(), X2, Y2, [-0.1], [0.1]), "noises [-0.1]"),
        (lambda: equivalent_ridge(_unit(), _unit(), X2, Y2, [0.1], [0.0]), "coefficients above 0"),
        (lambda: equivalent_ridge(_unit(), _unit(), X2, Y2, [], [0.1]), "at least one of each"),
        (lambda: equivalent_ridge(_unit(), _unit(), X2, Y2, [0.1], [0.1], steps=0), "0 steps"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
