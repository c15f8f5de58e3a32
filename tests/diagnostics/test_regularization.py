import copy
import json
import math

import pytest
import torch
from torch import nn

from normprop.diagnostics import regularization
from normprop.diagnostics.regularization import (
    EquivalentRidge,
    auto_rate,
    describe,
    equivalent_ridge,
    from_moments,
    squared_error,
)
from normprop.errors import ConfigError

# A random problem of five inputs: covariance A A^T + 0.1 I and covariances with the target.
A = [
    [-0.5917551021659897, -0.34672921985586935, -0.343960176145686, -1.173609796080811, -1.1438246855619152],
    [1.6875986412635315, -0.4593179391461374, 0.8132751151318661, 1.0688869975607314, 0.13964792484577387],
    [0.46633004805046924, 0.6675302485614406, 0.35841856016974166, 0.7688083857008332, -0.5204564003655832],
    [0.02556884385799574, -1.560047567465385, 1.1058418358862072, 1.8571621809383951, -0.7650775204249911],
    [-1.54172728582762, -1.3116244118435971, -2.972480975469531, -0.7166583469577112, -0.624386087551377],
]
CROSS = [1.2677414438765546, 0.23304157629145553, -0.02730926279282446, -0.5251388009111625, -0.07510929126047713]


@pytest.fixture(autouse=True, scope="module")
def _single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def moments():
    a = torch.tensor(A, dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(5, dtype=torch.float64), torch.tensor(CROSS, dtype=torch.float64)


def problem(samples=200, features=4, seed=0, error=0.5):
    """Correlated inputs away from 0 and a linear target with error, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    X = torch.randn(samples, features, **draw) @ (torch.eye(features) + 0.4 * torch.randn(features, features)).double()
    y = X @ torch.randn(features, **draw) + error * torch.randn(samples, **draw) + 3.0
    return X + 2.0, y


def best_constrained(covariance, cross, starts=4):
    """Minimise w.Sw/2 - c.w over w.Sw = 1 by descent on a direction, without any formula for the multiplier."""
    best = None
    for seed in range(starts):
        u = torch.randn(len(cross), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        u.requires_grad_(True)
        descent = torch.optim.LBFGS(
            [u], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def closure(u=u, descent=descent):
            descent.zero_grad()
            value = -(cross @ u) / (u @ covariance @ u).sqrt()
            value.backward()
            return value

        descent.step(closure)
        w = (u / (u @ covariance @ u).sqrt()).detach()
        value = float(0.5 * w @ covariance @ w - cross @ w)
        if best is None or value < best[0]:
            best = value, w
    return best[1]


@pytest.mark.parametrize(("noise", "rate"), [(0.0, 0.09506720158), (0.5, -0.06330350752), (2.0, -0.29517629867)])
def test_random_problem(noise, rate):
    found = from_moments(*moments(), noise)
    assert found.rate == pytest.approx(rate, abs=1e-9)
    assert found.gain == pytest.approx(1 + rate, abs=1e-9)
    assert found.ridge == pytest.approx((1 + rate) * noise, abs=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_against_brute_force_minimisation(noise):
    covariance, cross = moments()
    noisy = covariance + noise * torch.eye(5, dtype=torch.float64)
    w = best_constrained(noisy, cross)
    found = from_moments(covariance, cross, noise)
    torch.testing.assert_close(found.weight, w, rtol=1e-5, atol=1e-6)
    # The multiplier from the stationarity of the Lagrangian at the minimiser: (1 + rate) S w = c.
    torch.testing.assert_close(cross / (noisy @ w), torch.full_like(cross, 1 + found.rate), rtol=2e-4, atol=0.0)
    assert float(found.weight @ noisy @ found.weight) == pytest.approx(1.0, abs=1e-12)


def test_multiplier_is_multiple_correlation_times_deviation_less_one():
    X, y = problem()
    design = torch.cat([X, torch.ones(len(X), 1, dtype=torch.float64)], 1)
    residual = y - design @ torch.linalg.lstsq(design, y.unsqueeze(1)).solution.squeeze(1)
    correlation = (1 - residual.var() / y.var()).sqrt()
    assert auto_rate(X, y).rate == pytest.approx(float(correlation * y.std(correction=0)) - 1, rel=1e-9)


def test_sign_changes_where_correlation_times_deviation_is_one():
    X, y = problem()
    unit = y / auto_rate(X, y).gain
    assert auto_rate(X, unit).rate == pytest.approx(0.0, abs=1e-12)
    assert auto_rate(X, 1.01 * unit).rate == pytest.approx(0.01)
    assert auto_rate(X, 0.99 * unit).rate == pytest.approx(-0.01)
    # Where the constraint does not bind the unit is ordinary least squares.
    ordinary = torch.linalg.lstsq(X - X.mean(0), (unit - unit.mean()).unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(auto_rate(X, unit).weight, ordinary)


def test_multiplier_falls_with_noise():
    X, y = problem()
    rates = [auto_rate(X, y, noise).rate for noise in (0.0, 0.1, 1.0, 10.0, 1e6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(-1.0, abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_noisy_unit_with_gain_is_ridge_regression(noise):
    """Against least squares on rows sqrt(n s^2) I appended to the data, another way to write ridge regression."""
    X, y = problem()
    centred, target = X - X.mean(0), y - y.mean()
    rows = math.sqrt(len(X) * noise) * torch.eye(4, dtype=torch.float64)
    extended = torch.cat([target, torch.zeros(4, dtype=torch.float64)])
    ridge = torch.linalg.lstsq(torch.cat([centred, rows]), extended.unsqueeze(1)).solution.squeeze(1)
    found = auto_rate(X, y, noise)
    torch.testing.assert_close(found.gain * found.weight, ridge)
    # The least squared error over scales of the noisy unit is at its gain.
    noisy = centred.T @ centred / len(X) + noise * torch.eye(4, dtype=torch.float64)
    cross = centred.T @ target / len(X)

    def error(gain):
        return float(gain**2 * found.weight @ noisy @ found.weight / 2 - gain * cross @ found.weight)

    assert error(found.gain) < min(error(found.gain * 1.001), error(found.gain * 0.999))


def test_noise_in_the_data_is_noise_in_the_formula():
    X, y = problem(samples=200)
    noise, copies = 0.7, 2000
    draws = math.sqrt(noise) * torch.randn(copies * len(X), 4, generator=torch.Generator().manual_seed(1)).double()
    sampled = auto_rate(X.repeat(copies, 1) + draws, y.repeat(copies)).rate
    # 4e5 draws leave covariances uncertain by some 1e-3 of themselves.
    assert sampled == pytest.approx(auto_rate(X, y, noise).rate, abs=5e-3)
    assert abs(auto_rate(X, y).rate - auto_rate(X, y, noise).rate) > 0.05


def test_constant_inputs_and_single_precision():
    X, y = problem()
    padded = torch.cat([X, torch.ones(len(X), 2, dtype=torch.float64)], 1)
    assert auto_rate(padded, y).rate == pytest.approx(auto_rate(X, y).rate)
    assert auto_rate(padded, y).weight[4:].tolist() == pytest.approx([0.0, 0.0])
    assert auto_rate(X.float(), y.float()).rate == pytest.approx(auto_rate(X, y).rate, rel=1e-5)


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
    return found, (normalized, plain), before, state, X, y


def test_ridge_of_a_linear_unit_is_the_variance_of_the_noise(linear):
    found, *_ = linear
    assert found.ridge == pytest.approx(found.noises, rel=0.15)
    assert max(found.distance) < 1e-3
    assert max(map(max, found.distances)) > 0.05  # the data tell the coefficients apart


def test_distances_are_those_of_the_closed_form(linear):
    found, _, _, _, X, y = linear
    covariance, cross = (X.T @ X / len(X)).double(), (X.T @ y / len(X)).double()
    eye = torch.eye(3, dtype=torch.float64)
    for noise, row in zip(found.noises, found.distances, strict=True):
        for ridge, distance in zip(found.ridges, row, strict=True):
            a, b = (torch.linalg.solve(covariance + s * eye, cross) for s in (noise, ridge))
            assert distance == pytest.approx(
                float(1 - torch.cosine_similarity(a, b, 0)), abs=6e-3
            )  # the noise is drawn


def test_networks_and_random_state_are_left_alone(linear):
    _, parts, before, state, *_ = linear
    for part, values in zip(parts, before, strict=True):
        assert part.training
        for name, value in part.state_dict().items():
            assert torch.equal(value, values[name]), name
        assert all(parameter.grad is None for parameter in part.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_multipliers_are_of_targets_of_unit_variance(linear):
    found, _, _, _, X, y = linear
    assert found.rates == pytest.approx([auto_rate(X, y / y.std(correction=0), s).rate for s in found.noises])
    # For classes: the mean over the classes of the multiple correlation less 1.
    labels = (y > 0).long() + (y > 1).long()
    indicators = [(labels == k).double() for k in range(3)]
    expected = [auto_rate(X, target / target.std(correction=0), 0.5).rate for target in indicators]
    assert regularization._rate(X, labels, 0.5) == pytest.approx(sum(expected) / 3)


def test_first_layer_of_a_perceptron_on_classes():
    X, y = problem(samples=128, features=5)
    images, labels = X.float().reshape(-1, 1, 1, 5), (y > y.median()).long()
    torch.manual_seed(0)
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
    assert regularization._least(ridges, parabola) == pytest.approx(vertex)
    assert regularization._least(ridges, [0.0, 1.0, 2.0, 3.0]) == 0.01
    assert regularization._least(ridges, [3.0, 2.0, 1.0, 0.0]) == 3.0
    assert regularization._least(ridges, [1.0, 1.0, 1.0, 1.0]) == 0.01
    assert math.isnan(regularization._least(ridges, [1.0, math.nan, 1.0, 1.0]))


def test_a_run_that_diverges_has_no_ridge():
    X, y = problem(samples=64, features=3)
    torch.manual_seed(0)
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
    assert (
        f"variance 0.1 to 2 on the inputs of unit turns its first weights as a ridge coefficient of {low:.3g} to "
        in (document.found)
    )
    assert f"{high:.3g} does without" in document.found
    assert (
        "variance 1 on the inputs of mlp turns its first weights as a ridge coefficient of 0.25 does" in document.found
    )
    assert "the multiplier of a linear unit is -0.5." in document.found
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
        (lambda: auto_rate(X2, Y2[:2]), "expected (samples, features) and (samples,)"),
        (lambda: auto_rate(X2[0], Y2), "expected (samples, features) and (samples,)"),
        (lambda: auto_rate(X2, Y2, noise=-1.0), "noise -1.0; expected a variance"),
        (lambda: auto_rate(X2, Y2, noise=math.nan), "noise nan; expected a variance"),
        (lambda: auto_rate(X2, Y2 * math.inf), "not finite"),
        (lambda: auto_rate(X2, torch.ones(3)), "uncorrelated with the inputs"),
        (lambda: from_moments(torch.eye(3), torch.ones(2)), "covariance of shape (3, 3); expected (2, 2)"),
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
