import copy
import math
import pickle

import numpy as np
import pytest
import torch

from normprop import models, moments, norms
from normprop.errors import ConfigError
from normprop.norms.kernel_shaping import (
    NormalizedResidual,
    ShapedActivation,
    delta_orthogonal_,
    kernel_transform,
    through,
)

# Trapezoids over an analytic function times a Gaussian are exact to rounding.
Z = np.linspace(-12, 12, 4001)
DENSITY = np.exp(-Z * Z / 2) / math.sqrt(2 * math.pi) * (Z[1] - Z[0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# f, f', f''
SMOOTH = {
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2, lambda x: -2 * np.tanh(x) * (1 - np.tanh(x) ** 2)),
    "softplus": (lambda x: np.log1p(np.exp(x)), sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "silu": (
        lambda x: x * sigmoid(x),
        lambda x: sigmoid(x) * (1 + x * sigmoid(-x)),
        lambda x: sigmoid(x) * sigmoid(-x) * (2 + x * (1 - 2 * sigmoid(x))),
    ),
}


def properties(activation, transform):
    """Q(1), Q'(1), C(0), C'(1) and C''(1) of a transformed activation, from their definitions."""
    a, b, scale, shift = transform
    f, first, second = SMOOTH[activation]

    def expectation(values):
        return float((values * DENSITY).sum())

    def q(of):
        return expectation((scale * (f(a * math.sqrt(of) * Z + b) + shift)) ** 2)

    h = 1e-3  # fourth-order differences: an error of h^4
    q_slope = (8 * (q(1 + h) - q(1 - h)) - (q(1 + 2 * h) - q(1 - 2 * h))) / (12 * h)
    c_0 = expectation(scale * (f(a * Z + b) + shift)) ** 2
    u = a * Z + b
    slope, bend = expectation((scale * a * first(u)) ** 2), expectation((scale * a * a * second(u)) ** 2)
    return q(1.0), q_slope, c_0, slope, bend


@pytest.mark.parametrize("layers", [3, 10, 100])
@pytest.mark.parametrize("activation", SMOOTH)
def test_transforms_meet_their_four_conditions(activation, layers):
    target = 1.5 ** (1 / layers)
    q, q_slope, c_0, slope, _ = properties(activation, kernel_transform(activation, target))
    assert (q, q_slope, c_0, slope) == pytest.approx((1, 1, 0, target), abs=1e-8)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_relu_becomes_the_activation_of_normprop(activation):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    unit = moments.of(activation)
    expected = (moments.resolve(activation).function(x) - unit.mean) / unit.std
    shaped = norms.block("kernel-shaped", 0)(4, 4, activation=activation).activation
    torch.testing.assert_close(shaped(x), expected)
    if activation == "relu":
        # C'(1) is E[f'^2]
        assert shaped.transform.out_scale**2 / 2 == pytest.approx(math.pi / (math.pi - 1))


def test_finish_gives_the_whole_network_the_slope():
    network = models.mlp(8, 3, norm="kernel-shaped", depth=7, activation="tanh")
    layers = [module for module in network.modules() if isinstance(module, ShapedActivation)]
    assert len(layers) == 7
    slopes = [properties("tanh", layer.transform)[3] for layer in layers]
    assert math.prod(slopes) == pytest.approx(1.5, abs=1e-7)


def test_residual_networks_mix_slopes_by_the_shares_of_their_paths():
    network = models.resnet(8, norm="kernel-shaped", width=0.25, activation="tanh")
    layers = [module for module in network.modules() if isinstance(module, ShapedActivation)]
    s = properties("tanh", layers[0].transform)[3]
    # The stem, then three blocks: half a skip path, half a branch with one activation, and one after the sum.
    assert s * ((1 + s) / 2 * s) ** 3 == pytest.approx(1.5, abs=1e-7)
    assert len({layer.transform for layer in layers}) == 1


def test_shared_modules_count_at_every_place():
    layer = norms.block("kernel-shaped", 0)(4, 4, activation="tanh")
    assert through(torch.nn.Sequential(layer, layer, layer), 0.0, lambda count: count + 1) == 3


def test_constants_survive_copies_and_stay_what_they_are_in_half_precision():
    torch.manual_seed(0)
    network = models.mlp(8, 3, norm="kernel-shaped", depth=50, hidden_features=32, activation="tanh")
    transform = network[1].activation.transform
    for copied in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network.bfloat16()):
        assert copied[1].activation.transform == transform
    x = torch.randn(1000)
    exact, half = network[1].activation(x.double()), network[1].activation(x.bfloat16())
    # Differences of nearly equal numbers in bfloat16 would lose all; what is left is the rounding of input and output.
    assert (half.double() - exact).abs().max() < 0.02 * x.abs().max()


@pytest.mark.parametrize(("dims", "groups"), [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_delta_orthogonal_maps_keep_the_mean_square(dims, groups):
    torch.manual_seed(0)
    if dims == 0:
        layer, size = norms.head("kernel-shaped")(6, 10, bias=False), ()
    else:
        layer = norms.head("kernel-shaped", dims)(6, 10, 3, padding=1, groups=groups, bias=False)
        size = (5, 4, 3)[:dims]
    input = torch.randn(2, 6, *size)
    output = layer(input)
    # at every position: a map without reach
    torch.testing.assert_close(
        output.square().mean(1), input.reshape(2, 6, *size).square().mean(1), rtol=1e-4, atol=1e-5
    )


def test_fewer_outputs_than_inputs_are_a_projection():
    torch.manual_seed(0)
    weight = delta_orthogonal_(torch.empty(4, 9, 3, 3))
    centre = weight[:, :, 1, 1]
    torch.testing.assert_close(centre @ centre.T, torch.eye(4), rtol=0, atol=1e-5)
    assert weight.count_nonzero() == 36


def test_residual_sum_is_normalised():
    torch.manual_seed(0)
    branch = norms.block("kernel-shaped", 0)(4, 4, activation=None)
    residual = NormalizedResidual(lambda activation: None, branch, activation=None, share=0.36)
    x = torch.randn(3, 4)
    torch.testing.assert_close(residual(x), 0.6 * x + 0.8 * branch(x))


def test_a_deep_network_follows_its_predicted_correlation_map():
    """50 tanh layers of width 512: the pairs' mean deviates by a few hundredths, as 50 / 512 has it."""
    torch.manual_seed(0)
    depth, width = 50, 512
    network = models.mlp(width, 10, norm="kernel-shaped", depth=depth, hidden_features=width, activation="tanh")[:-1]
    a, b, scale, shift = network[1].activation.transform
    f = np.tanh

    def correlation(c):
        v = c * Z[::20, None] + math.sqrt(1 - c * c) * Z[None, ::20]
        values = (f(a * Z[::20, None] + b) + shift) * (f(a * v + b) + shift) * scale**2
        return float((values * np.outer(DENSITY[::20], DENSITY[::20])).sum() * 400)

    basis = torch.linalg.qr(torch.randn(width, 128)).Q.T * width**0.5
    for start in (0.0, 0.6):
        predicted = start
        for _ in range(depth):
            predicted = correlation(predicted)
        other = start * basis[:64] + math.sqrt(1 - start**2) * basis[64:]
        with torch.no_grad():
            one, two = network(basis[:64]), network(other)
        assert one.square().mean().item() == pytest.approx(1.0, abs=0.1)
        measured = torch.nn.functional.cosine_similarity(one, two).mean().item()
        assert measured == pytest.approx(predicted, abs=0.06)


def test_what_cannot_be_shaped_is_refused():
    with pytest.raises(ConfigError, match="prelu learns its shape"):
        norms.block("kernel-shaped", 0)(4, 4, activation=torch.nn.PReLU())
    with pytest.raises(ConfigError, match=r"give softplus slope 1\.5"):
        kernel_transform("softplus", 1.5)
