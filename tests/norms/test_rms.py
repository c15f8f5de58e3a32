import math

import pytest
import torch
import torch.nn.functional as F

from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.rms import RMSNorm, inverse_rms, partial_size


def textbook(a, count=None, eps=1e-5, outside=False):
    """RMS norm of each sample of (N, C, *space), by its definition, over the first ``count`` channels."""
    rows = []
    for sample in a:
        kept = sample if count is None else sample[:count]
        mean = sum(float(v) ** 2 for v in kept.flatten()) / kept.numel()
        rows.append(sample / (math.sqrt(mean) + eps if outside else math.sqrt(mean + eps)))
    return torch.stack(rows)


def randomise(layer):
    """Give gain and bias values that show where they are applied."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


@pytest.mark.parametrize("placement", ["inside", "outside"])
@pytest.mark.parametrize(("dims", "size"), [(0, ()), (1, (3,)), (2, (3, 2)), (3, (2, 3, 2))])
def test_equals_the_definition(dims, size, placement):
    torch.manual_seed(0)
    input = torch.randn(4, 6, *size, dtype=torch.float64) * 0.01  # small, so that epsilon counts
    for count in (None, 2):
        layer = randomise(RMSNorm(6, dims, partial_size=count, bias=True, eps=1e-3, eps_placement=placement))
        gain, bias = (p.reshape(-1, *[1] * dims) for p in (layer.weight, layer.bias))
        expected = textbook(input, count, 1e-3, placement == "outside") * gain + bias
        torch.testing.assert_close(layer(input), expected)


def test_features_are_the_last_axis_whatever_stands_before():
    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(RMSNorm(8, eps=1e-6)(tokens), F.rms_norm(tokens, (8,), eps=1e-6))


def test_without_the_mean_it_is_layer_norm():
    torch.manual_seed(0)
    features = torch.randn(4, 10, dtype=torch.float64) + 3
    centred = features - features.mean(1, keepdim=True)
    layer = RMSNorm(10).double()
    torch.testing.assert_close(layer(centred), F.layer_norm(features, (10,), eps=1e-5))
    assert (layer(features) - F.layer_norm(features, (10,))).abs().max() > 0.5
    maps = torch.randn(4, 6, 3, 3, dtype=torch.float64) + 3
    centred = maps - maps.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(RMSNorm(6, 2).double()(centred), norms.create("layer", 6).double()(maps))


def test_the_gradient_is_orthogonal_to_the_input():
    torch.manual_seed(0)
    layer = randomise(RMSNorm(12, eps=0.0))
    input = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 12, dtype=torch.float64)
    (grad,) = torch.autograd.grad(layer(input), input, upstream)
    torch.testing.assert_close((grad * input).sum(1), torch.zeros(3, dtype=torch.float64))
    rms = input.square().mean(1, keepdim=True).sqrt()
    u = upstream * layer.weight
    torch.testing.assert_close(grad, (u - input * (input * u).sum(1, keepdim=True) / (12 * rms**2)) / rms)


@pytest.mark.parametrize("name", ["rms", "prms"])
def test_invariances_are_those_of_the_paper(name):
    torch.manual_seed(0)
    weight, data = torch.randn(16, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    layer = norms.create(name, 16, 0).double()
    layer.eps = 0.0

    def same(new_weight, new_data):
        return torch.allclose(layer(data @ weight.T), layer(new_data @ new_weight.T), rtol=1e-9)

    rows, samples = torch.ones(16, 1, dtype=torch.float64), torch.ones(7, 1, dtype=torch.float64)
    rows[0], samples[0] = 3.0, 3.0
    assert same(3 * weight, data)  # the weight matrix scaled
    assert not same(weight + 1, data)  # the weight matrix shifted; layer norm is invariant
    assert not same(rows * weight, data)  # one weight vector scaled
    assert same(weight, 3 * data)  # the data scaled
    assert not same(weight, data + 1)  # the data shifted
    assert same(weight, samples * data)  # one sample scaled


def test_partial_statistic_sees_the_first_features_alone():
    torch.manual_seed(0)
    layer = RMSNorm(8, partial_size=2)
    input = torch.randn(3, 8)
    shuffled = torch.cat([input[:, :2], input[:, [7, 3, 2, 4, 6, 5]]], 1)
    assert torch.equal(layer(shuffled)[:, 2:], layer(input)[:, [7, 3, 2, 4, 6, 5]])
    changed = input.clone()
    changed[:, 1] *= 2
    assert (layer(changed)[:, 2:] - layer(input)[:, 2:]).abs().max() > 1e-2
    assert torch.equal(RMSNorm(8, partial_size=8)(input), RMSNorm(8)(input))


def test_partial_size():
    assert partial_size(100, 0.5) == 50
    assert partial_size(10, 0.19) == 1
    assert partial_size(10, 1.0) == 10
    assert [partial_size(count) for count in (1, 3, 24, 64, 192)] == [1, 3, 4, 4, 12]
    for count, p in [(10, 0.09), (10, 0.0), (10, 1.2), (10, -0.5)]:
        with pytest.raises(ConfigError, match="p must be from 1/10 to 1"):
            partial_size(count, p)
    for size in (0, 9, -1):
        with pytest.raises(ConfigError, match="partial size must be from 1"):
            RMSNorm(8, partial_size=size)
    with pytest.raises(ConfigError, match='"inside" or "outside"'):
        RMSNorm(8, eps_placement="none")


@pytest.mark.parametrize("placement", ["inside", "outside"])
@pytest.mark.parametrize("count", [None, 2])
def test_zeros_have_a_finite_output_and_gradient(placement, count):
    input = torch.zeros(2, 6, requires_grad=True)
    output = RMSNorm(6, partial_size=count, eps_placement=placement)(input)
    output.sum().backward()
    assert torch.equal(output, torch.zeros(2, 6))
    # The derivative at zero is 1 / sqrt(eps), or 1 / eps.
    expected = 1e-5**-0.5 if placement == "inside" else 1e5
    torch.testing.assert_close(input.grad, torch.full((2, 6), expected))


@pytest.mark.parametrize("placement", ["inside", "outside"])
def test_gradients(placement):
    torch.manual_seed(0)
    input = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    function = torch.autograd.gradcheck
    assert function(lambda x: inverse_rms(x, (1, 2), 0.1, placement), input)


def test_half_precision_squares_in_float32():
    layer = RMSNorm(4).to(torch.float16)
    output = layer(torch.full((1, 4), 1000.0, dtype=torch.float16))  # its square is no float16
    assert torch.equal(output, torch.ones(1, 4, dtype=torch.float16))


def test_the_drop_in_layer_has_no_bias_and_the_block_keeps_the_neurons():
    assert norms.create("rms", 8, 0).bias is None
    assert norms.create("prms", 64, 2).partial_size == 4
    block = norms.block("rms")(3, 8, 3)
    assert block.linear.bias is None
    assert block.norm.bias.shape == (8,)
