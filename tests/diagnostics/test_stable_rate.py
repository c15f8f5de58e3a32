import math

import pytest
import torch
from torch import nn

from normprop.diagnostics.fisher import fisher
from normprop.diagnostics.fisher_mean_field import random_network
from normprop.diagnostics.stable_rate import converges, stable_rate
from normprop.errors import ConfigError


def test_descent_breaks_just_above_two_over_the_largest_eigenvalue():
    x = torch.randn(40, 6, dtype=torch.float64)
    quadratic = nn.Linear(6, 1, bias=False).double()
    edge = 2 / float(torch.linalg.eigvalsh(x.T @ x / 40)[-1])
    real = random_network(6, 24, 2, "tanh", range(2)).double()  # through batch statistics
    for net, rate in ((quadratic, edge), (real, fisher(real, x, tolerance=1e-6).rate)):
        for factor, stable in ((0.5, True), (0.97, True), (1.03, False), (1.5, False), (10.0, False), (1e3, False)):
            assert converges(net, x, factor * rate, steps=200) is stable, factor


def test_the_measured_rate_is_found_from_either_side():
    net, x = random_network(16, 32, 2, "relu", weight_variance=2.0), torch.randn(32, 16)
    edge = fisher(net, x).rate
    for start in (0.2, 1.0, 5.0):
        assert stable_rate(net, x, start * edge) == pytest.approx(edge, rel=0.06), start


def test_dropout_is_the_same_function_at_each_step():
    net = nn.Sequential(nn.Linear(6, 30), nn.Dropout(0.5), nn.Linear(30, 1)).train()
    x = torch.randn(12, 6)
    edge = fisher(net, x).rate
    assert converges(net, x, 0.9 * edge)
    assert not converges(net, x, 1.1 * edge)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: converges(nn.Linear(2, 1), torch.ones(2, 2), 0.0), "rate must be positive"),
        (lambda: stable_rate(nn.Linear(2, 1), torch.ones(2, 2), math.nan), "must be a positive number"),
    ],
)
def test_one_line_for_what_cannot_work(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
