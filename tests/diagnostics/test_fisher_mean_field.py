import math

import pytest
import torch

from normprop.diagnostics.fisher import fisher
from normprop.diagnostics.fisher_mean_field import placements, predicted_largest, random_network
from normprop.errors import ConfigError


def test_batch_norm_at_the_end_takes_the_outlier_away_and_before_activations_it_stays():
    x = torch.randn(256, 64)
    few, many = placements(x[:32], 256, 3), placements(x, 256, 3)
    falls = {name: many[name].largest / few[name].largest for name in few}
    # An outlier belongs to what all samples share and stays as they become more; the rest is spread over them.
    assert falls["none"] > 0.8
    assert falls["middle"] > 0.8
    assert falls["last"] < 0.5
    assert falls["all"] < 0.5
    assert many["last"].largest < many["middle"].largest < 0.3 * many["none"].largest


def arc_cosine(samples, features, width, depth):
    """Outlier of He-initialised ReLU by the closed forms of its kernel, independent inputs being orthogonal."""

    def kernel(c):
        total, q = features * c, 1.0
        for _ in range(depth):
            angle = math.acos(c)
            total *= 2 * (math.pi - angle) / (2 * math.pi)
            c = (math.sin(angle) + (math.pi - angle) * math.cos(angle)) / math.pi
            total += width * q * c
        return total

    return kernel(0.0) + (kernel(1.0) - kernel(0.0)) / samples


def test_the_prediction_in_closed_form():
    # Without hidden layers the kernel is X X^T: the edge of Marchenko and Pastur, and of Tracy and Widom.
    assert predicted_largest("tanh", 10**8, 10**8, 8, 0) == pytest.approx(4.0, rel=1e-4)
    drawn = torch.randn(400, 64, 16, dtype=torch.float64)
    largest = torch.linalg.eigvalsh(drawn.mT @ drawn / 64)[:, -1]
    assert predicted_largest("tanh", 64, 16, 8, 0) == pytest.approx(float(largest.mean()), rel=0.01)
    # E[relu^2] at variance 2 is 1: the hidden features have mean square 1.
    predicted = predicted_largest("relu", 64, 32, 512, 3, weight_variance=2.0)
    assert predicted == pytest.approx(arc_cosine(64, 32, 512, 3), rel=1e-6)


@pytest.mark.parametrize(
    ("activation", "variance", "features", "depth"), [("relu", 2.0, 128, 2), ("tanh", 1.0, 32, 2), ("tanh", 2.0, 32, 3)]
)
def test_the_prediction_against_random_networks(activation, variance, features, depth):
    values = []
    for seed in range(6):
        net = random_network(features, 1024, depth, activation, weight_variance=variance, seed=seed)
        x = torch.randn(32, features, generator=torch.Generator().manual_seed(100 + seed))
        values.append(fisher(net, x, probes=1, tolerance=1e-2).largest)
    mean = sum(values) / 6
    error = float(torch.tensor(values).std()) / math.sqrt(6)
    predicted = predicted_largest(activation, 32, features, 1024, depth, weight_variance=variance)
    assert abs(mean - predicted) < 3 * error + 0.05 * predicted
    assert error < 0.06 * predicted


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: random_network(2, 2, 1, batch_norm=[2]), "numbers 0 to 1"),
        (lambda: predicted_largest("relu", 0, 1, 1, 1), "samples must be 1 or more, got 0"),
    ],
)
def test_one_line_for_what_cannot_work(call, words):
    with pytest.raises(ConfigError) as error:
        call()
    assert words in str(error.value)
    assert "\n" not in str(error.value)
