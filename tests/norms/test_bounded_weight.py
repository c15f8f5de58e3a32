import copy
import math

import pytest
import torch
from torch.nn import functional as F

from normprop import moments, norms
from normprop.nn import Conv2d
from normprop.norms.bounded_weight import BoundedWeight, MeanOnlyBatchNorm
from normprop.norms.weight import WeightNorm
from normprop.training import parameter_groups

NAMES = ["bounded-weight", "bounded-weight-mean"]
names = pytest.mark.parametrize("name", NAMES)


def effective(layer):
    """The weight that the layer applies, read off its output: the identity goes in, W comes out."""
    size = layer.linear.in_features
    return layer(torch.eye(size)).T if layer.linear.bias is None else (layer(torch.eye(size)) - layer.linear.bias).T


def test_formula():
    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 4)
    v, bias = linear.weight.detach().double(), linear.bias.detach().double()
    rho = sum(math.sqrt(sum(float(a) ** 2 for a in row)) for row in v) / 4
    x = torch.randn(5, 7)
    expected = torch.stack([rho * (x.double() @ row) / row.norm() for row in v], 1) + bias
    torch.testing.assert_close(BoundedWeight(linear)(x).double(), expected, rtol=1e-5, atol=1e-6)


@names
def test_rows_keep_their_norm_through_training(name):
    torch.manual_seed(0)
    block = norms.block(name, 0)(6, 5, activation="tanh")
    rho = float(block.linear.rho)
    optimizer = torch.optim.SGD(parameter_groups(block, 0.1), lr=0.5, momentum=0.9)
    start = effective(block.linear)
    for _ in range(20):
        optimizer.zero_grad()
        x = torch.randn(16, 6)
        (block(x) - x[:, :5].sign()).square().sum(1).mean().backward()
        optimizer.step()
    # v has grown, its direction has turned, W's rows are as long as before.
    v = block.linear.linear.weight.detach().norm(dim=1)
    assert (v > 1.05 * rho).all()
    found = effective(block.linear).detach()
    torch.testing.assert_close(found.norm(dim=1), torch.full((5,), rho), rtol=1e-5, atol=0)
    assert (F.cosine_similarity(found, start, dim=1) < 0.99).all()
    assert float(block.linear.rho) == rho


def test_only_the_bias_may_decay_nowhere_and_the_last_layer_decays():
    for name in NAMES:
        network = torch.nn.Sequential(norms.block(name)(3, 4, 3), norms.head(name, 2)(4, 10, 1))
        decayed = [p for group in parameter_groups(network, 0.1) if group["weight_decay"] > 0 for p in group["params"]]
        assert [p.shape for p in decayed] == [(10, 4, 1, 1)]
        copied = parameter_groups(copy.deepcopy(network), 0.1)
        assert [len(group["params"]) for group in copied] == [1, 3]


def trained_alike(layer, reference, adjust=lambda: None, steps=5):
    """Outputs of two layers trained from the same start on the same data."""
    outputs = []
    for part in (layer, reference):
        torch.manual_seed(1)
        frozen = [p for n, p in part.named_parameters() if n not in ("gain", "gamma")]
        optimizer = torch.optim.SGD(frozen, lr=0.1, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            (part(torch.randn(4, 3, 6, 6)) - 1).square().mean().backward()
            optimizer.step()
        outputs.append(part(torch.randn(4, 3, 6, 6)))
    return outputs


def test_equals_weight_norm_with_a_frozen_gain():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3)
    bounded = BoundedWeight(copy.deepcopy(conv))
    reference = WeightNorm(conv, gain=float(bounded.rho))
    ours, theirs = trained_alike(bounded, reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_equals_a_normprop_convolution_with_a_fixed_gain():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3)
    bounded = BoundedWeight(copy.deepcopy(conv))
    rho = float(bounded.rho)
    reference = Conv2d(3, 4, 3, activation=None, center=False, moments="fixed", gain=rho)
    gain = next(n for n, p in reference.named_parameters() if n not in ("weight", "bias"))
    reference.get_parameter(gain).requires_grad_(False)
    with torch.no_grad():
        # NormProp's constructor has set v's length itself; the length of v steers the size of a step.
        reference.weight.copy_(conv.weight)
        reference.bias.copy_(conv.bias)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(bounded(x), reference(x), rtol=1e-5, atol=1e-5)
    ours, theirs = trained_alike(bounded, reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@names
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_second_moment_is_kept_at_the_start(name, activation):
    torch.manual_seed(0)
    second = float(moments.of(activation).second)
    block = norms.block(name, 0)(1000, 1000, activation=activation)
    with torch.no_grad():
        output = block(torch.randn(500, 1000) * second**0.5)
    assert float(output.square().mean()) == pytest.approx(second, rel=0.03)


def test_mean_only_batch_norm():
    torch.manual_seed(0)
    norm = MeanOnlyBatchNorm(3).double()
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 7
    mean = torch.stack([x[:, c].sum() / 100 for c in range(3)])
    bias = norm.bias.detach()
    torch.testing.assert_close(norm(x), x + (bias - mean).reshape(3, 1, 1))
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.eval()(x), x + (bias - 0.1 * mean).reshape(3, 1, 1))
    assert norm.num_batches_tracked == 1


def test_block_with_mean_only_batch_norm_centres_every_channel():
    torch.manual_seed(0)
    block = norms.block("bounded-weight-mean")(3, 4, 3, activation=None)
    output = block(torch.randn(8, 3, 6, 6) + 5)
    torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"norms\.bounded-weight-mean: expected more than 1 value per channel"):
        block(torch.zeros(1, 3, 3, 3))
    assert norms.block("bounded-weight")(3, 4, 3)(torch.zeros(1, 3, 3, 3)).shape == (1, 4, 1, 1)


def test_length_of_the_weights_does_not_matter_and_zero_filters_are_silent():
    torch.manual_seed(0)
    layer = BoundedWeight(torch.nn.Linear(6, 3, bias=False))
    x = torch.randn(2, 6)
    before = layer(x)
    with torch.no_grad():
        layer.linear.weight.mul_(torch.tensor([[0.1], [10.0], [0.0]]))
    after = layer(x)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    after.square().sum().backward()
    assert torch.equal(after[:, 2], torch.zeros(2))
    assert torch.isfinite(layer.linear.weight.grad).all()
