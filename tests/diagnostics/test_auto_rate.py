import math

import pytest
import torch

from normprop.diagnostics.auto_rate import auto_rate, from_moments
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
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ConfigError) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
