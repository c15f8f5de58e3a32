"""The mean-field maps against every number of the paper's theory, and against integrals in two dimensions."""

import math

import numpy as np
import pytest
import torch

from normprop.errors import ConfigError, MomentError
from normprop.moments import of, resolve
from normprop.moments.maps import backward_growth, correlation, correlation_slope, fixed_point, second_moment

C1, C2 = math.sqrt((1 - 1 / math.pi) / 2), 1 / math.sqrt(2 * math.pi)
EXACT_GAIN = math.sqrt((math.pi - 1) / math.pi)
PAPER_GAIN = 1 / 1.21
LIMIT = math.pi / (4 * (math.pi - 1))


@pytest.mark.parametrize("gain", [1.0, PAPER_GAIN, EXACT_GAIN, 0.3])
@pytest.mark.parametrize("q", [0.1, 1.0, 2.5])
def test_second_moment_of_relu_in_closed_form(q, gain):
    expected = gain**2 * q / (2 * C1**2) - 2 * C2**2 * gain * math.sqrt(q) / C1**2 + C2**2 / C1**2
    assert second_moment(q, "relu", gain) == pytest.approx(expected, rel=1e-13)


def test_second_moment_at_gain_one_is_semi_stable():
    for q in (0.2, 1.0, 1.8):
        assert second_moment(q) - q == pytest.approx((math.sqrt(q) - 1) ** 2 / (math.pi - 1), abs=1e-14)
    q = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(second_moment(q), q)[0].item() == pytest.approx(1.0, rel=1e-13)


def test_published_sequence():
    q, sequence = 1.0, {}
    for layer in range(1, 21):
        q = sequence[layer] = second_moment(q, "relu", PAPER_GAIN)
    assert [round(sequence[layer], 5) for layer in (1, 2, 3, 5, 9, 20)] == [
        0.69708,
        0.52098,
        0.43185,
        0.37665,
        0.36731,
        0.36714,
    ]


def test_fixed_points():
    assert fixed_point() == pytest.approx(1.0, abs=1e-12)
    assert fixed_point("relu", PAPER_GAIN) == pytest.approx(0.3671432, abs=5.1e-8)
    limit = fixed_point("relu", EXACT_GAIN)
    assert limit == pytest.approx(LIMIT, rel=1e-11)
    assert limit == pytest.approx(0.3667356, abs=5.1e-8)
    assert EXACT_GAIN * math.sqrt(limit) == pytest.approx(0.5, rel=1e-11)
    assert fixed_point("tanh", 0.5, start=3.0) < 1
    with pytest.raises(MomentError, match="does not settle"):
        fixed_point("relu", 2.0)


def test_output_after_one_layer_of_the_paper():
    moments = of("relu", 0.0, PAPER_GAIN)
    assert (moments.mean - C2) / C1 == pytest.approx(-0.1185948, abs=5.1e-8)
    assert moments.std / C1 == pytest.approx(0.8264463, abs=5.1e-8)


def arc_cosine(c):
    return math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))


def test_correlation_at_gain_one():
    for c in (-1.0, -0.4, 0.0, 0.3, 0.5, 0.9, 0.999, 1.0):
        expected = (arc_cosine(c) / (2 * math.pi) - 1 / (2 * math.pi)) / C1**2
        assert correlation(c) == pytest.approx(expected, abs=1e-12)
    assert correlation(0.0) == pytest.approx(0.0, abs=1e-14)
    assert correlation(1.0) == pytest.approx(1.0, abs=1e-14)
    assert round(correlation(0.5), 5) == 0.42642
    assert round(correlation(0.9), 5) == 0.86730
    assert correlation_slope(0.0) == pytest.approx(0.7334711, abs=5.1e-8)
    assert correlation_slope(1.0) == pytest.approx(math.pi / (math.pi - 1), rel=1e-13)
    assert round(correlation_slope(1.0), 5) == 1.46694


def test_correlation_at_the_exact_gain_is_that_of_he_initialisation():
    for c in (-1.0, -0.3, 0.0, 0.6, 0.97, 1.0):
        assert correlation(c, "relu", EXACT_GAIN, LIMIT) == pytest.approx(arc_cosine(c) / math.pi, abs=1e-12)
    assert correlation_slope(1.0, "relu", EXACT_GAIN, LIMIT) == pytest.approx(1.0, rel=1e-12)


def test_backward_growth():
    assert round(backward_growth("relu"), 5) == 1.46694
    assert round(backward_growth("relu", PAPER_GAIN), 5) == 1.00194
    assert backward_growth("relu", EXACT_GAIN) == pytest.approx(1.0, rel=1e-14)
    for name, published in {"tanh": 1.17780723, "sigmoid": 1.03359239, "gelu": 1.31884497, "elu": 1.07901346}.items():
        assert backward_growth(name) == pytest.approx(published, abs=5.1e-9)
    for name in ("tanh", "elu", "relu"):  # the same limit seen from both sides
        assert backward_growth(name, 0.9, 1.0) * 1.0 == pytest.approx(
            correlation_slope(1.0, name, 0.9) * second_moment(1.0, name, 0.9), rel=1e-9
        )


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "erf", "mish"])
@pytest.mark.parametrize(("c", "gain", "q"), [(0.5, 1.0, 1.0), (-0.7, 0.8, 0.6)])
def test_correlation_of_smooth_activations_in_two_dimensions(activation, c, gain, q):
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    function, unit, std = resolve(activation).function, of(activation), gain * math.sqrt(q)
    u = (function(std * nodes) - unit.mean)[:, None]
    v = function(std * (c * nodes[:, None] + math.sqrt(1 - c * c) * nodes)) - unit.mean
    expected = (weights @ (u * v) @ weights) / (weights @ u.square().flatten())
    assert correlation(c, activation, gain, q) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "hardtanh", torch.nn.PReLU(init=0.1)])
def test_slope_is_the_derivative_of_the_map(activation):
    step = 1e-4
    difference = (correlation(0.4 + step, activation) - correlation(0.4 - step, activation)) / (2 * step)
    assert correlation_slope(0.4, activation) == pytest.approx(difference, rel=1e-6)


def test_impossible_correlations_are_refused():
    for function in (correlation, correlation_slope):
        with pytest.raises(ConfigError, match="between -1 and 1"):
            function(1.5)
