import math

import numpy as np
import pytest
import torch

from normprop import models, norms
from normprop.errors import ConfigError
from normprop.norms.kernel_shaping import ShapedActivation
from normprop.norms.tailored import leaky_correlation, tailored_transform
from tests.norms.test_kernel_shaping import SMOOTH, properties


def shaped(network):
    return [module for module in network.modules() if isinstance(module, ShapedActivation)]


def correlation_by_quadrature(c, slope):
    """E[f(u) f(v)] by Gauss-Legendre panels that end at the kinks of either factor."""
    nodes, weights = np.polynomial.legendre.leggauss(60)

    def panel(low, high):
        half = (high - low) / 2
        return low + half + half * nodes, half * weights

    def f(x):
        return math.sqrt(2 / (1 + slope**2)) * np.where(x > 0, x, slope * x)

    rest = math.sqrt(1 - c * c)
    total = 0.0
    for outer in (panel(-10, 0), panel(0, 10)):
        for u, weight in zip(*outer, strict=True):
            kink = min(max(-c * u / rest, -10), 10)
            for w, inner in (panel(-10, kink), panel(kink, 10)):
                gauss = np.exp(-(u * u + w * w) / 2) / (2 * math.pi)
                total += float((weight * inner * gauss * f(u) * f(c * u + rest * w)).sum())
    return total


@pytest.mark.parametrize("slope", [0.0, 0.2, 0.7, -1.0])
@pytest.mark.parametrize("c", [-0.8, 0.0, 0.3, 0.95])
def test_leaky_correlation_equals_quadrature_and_the_printed_form(slope, c):
    result = leaky_correlation(c, slope)
    assert result == pytest.approx(correlation_by_quadrature(c, slope), abs=1e-10)
    arc = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi
    assert result == pytest.approx(((1 - slope) ** 2 * arc + 2 * slope * c) / (1 + slope**2), abs=1e-14)


@pytest.mark.parametrize("depth", [2, 5, 12, 13, 20, 50, 100])
def test_slope_takes_the_network_to_its_correlation(depth):
    network = models.mlp(8, 3, norm="tailored", depth=depth, hidden_features=8)
    layers = shaped(network)
    slope = layers[0].activation.negative_slope
    c = 0.0
    for _ in layers:
        c = leaky_correlation(c, slope)
    assert len(layers) == depth
    if depth < 13:
        # ReLU stays below the goal: it is what is left
        assert slope == 0
        assert c < 0.9
    else:
        assert c == pytest.approx(0.9, abs=1e-12)
    assert layers[0].transform.out_scale == pytest.approx(math.sqrt(2 / (1 + slope**2)))


def test_residual_blocks_mix_correlations_by_the_shares_of_their_paths():
    network = models.resnet(56, norm="tailored", width=0.25)
    slope = shaped(network)[0].activation.negative_slope
    assert 0 < slope < 1
    c = leaky_correlation(0.0, slope)
    for _ in range(27):
        c = leaky_correlation(0.5 * c + 0.5 * leaky_correlation(c, slope), slope)
    assert c == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("layers", [1, 10, 100])
@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_meet_their_four_conditions(activation, layers):
    q, q_slope, _, slope, bend = properties(activation, tailored_transform(activation, 0.3 / layers))
    assert (q, q_slope, slope, bend) == pytest.approx((1, 1, 1, 0.3 / layers), abs=1e-8)


def test_finish_shares_the_curvature_among_the_layers():
    chain = shaped(models.mlp(8, 3, norm="tailored", depth=6, activation="tanh"))
    assert [properties("tanh", layer.transform)[4] for layer in chain] == pytest.approx([0.05] * 6, abs=1e-8)
    # The stem, then three blocks of half a layer in the branch and one after the sum.
    residual = shaped(models.resnet(8, norm="tailored", width=0.25, activation="tanh"))
    assert properties("tanh", residual[0].transform)[4] == pytest.approx(0.3 / 5.5, abs=1e-8)


def test_a_deep_network_follows_its_predicted_correlation_map():
    """50 layers of width 512; the correlation's fluctuation over networks is about 0.01 here."""
    torch.manual_seed(0)
    depth, width = 50, 512
    network = models.mlp(width, 10, norm="tailored", depth=depth, hidden_features=width)[:-1]
    slope = network[1].activation.activation.negative_slope
    basis = torch.linalg.qr(torch.randn(width, 128)).Q.T * width**0.5
    for start in (-0.5, 0.0, 0.6):
        predicted = start
        for _ in range(depth):
            predicted = leaky_correlation(predicted, slope)
        other = start * basis[:64] + math.sqrt(1 - start**2) * basis[64:]
        with torch.no_grad():
            one, two = network(basis[:64]), network(other)
        measured = torch.nn.functional.cosine_similarity(one, two).mean().item()
        assert measured == pytest.approx(predicted, abs=0.05)
        if start == 0:
            assert predicted == pytest.approx(0.9, abs=1e-9)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", torch.nn.PReLU(), torch.nn.LeakyReLU(0.3)])
def test_every_kind_of_relu_is_tailored_to_the_same(activation):
    layers = shaped(models.mlp(8, 3, norm="tailored", depth=20, hidden_features=8, activation=activation))
    assert [layer.activation.negative_slope for layer in layers] == pytest.approx([0.18138] * 20, abs=1e-5)
    assert len(norms.block("tailored", 0)(4, 4, activation=None)) == 1


@pytest.mark.parametrize("activation", ["selu", "hardtanh", "abs"])
def test_other_kinks_are_refused(activation):
    with pytest.raises(ConfigError, match="has a kink"):
        norms.block("tailored", 0)(4, 4, activation=activation)
