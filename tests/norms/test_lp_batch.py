import math

import pytest
import torch
from torch.nn import functional as F

from normprop import norms
from normprop.errors import ConfigError
from normprop.norms.lp_batch import LpBatchNorm, deviation, lp_batch_norm

KINDS = ["l1", "linf", "topk"]
kinds = pytest.mark.parametrize("kind", KINDS)


def textbook(x, kind, k=10, eps=0.0):
    """Each channel on its own, from the formulas, with the sorted deviations."""
    columns = []
    for channel in range(x.shape[1]):
        values = x[:, channel].flatten()
        n = len(values)
        d = (values - values.sum() / n).abs().sort(descending=True).values
        top = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n)))
        spread = {
            "l1": math.sqrt(math.pi / 2) * d.sum() / n,
            "linf": top * d[0],
            "topk": top * d[:k].sum() / min(k, n),
        }[kind]
        columns.append((x[:, channel] - values.sum() / n) / (spread + eps))
    return torch.stack(columns, 1)


def batch_norm(x, kind, eps=0.0, k=10):
    """The functional form without gain, bias and history."""
    zero, one = torch.zeros(x.shape[1], dtype=x.dtype), torch.ones(x.shape[1], dtype=x.dtype)
    return lp_batch_norm(x, kind, one, zero, zero.clone(), one.clone(), training=True, k=k, eps=eps)


def data(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1


@kinds
@pytest.mark.parametrize("shape", [(16, 3), (6, 3, 5), (5, 3, 4, 4), (4, 2, 3, 3, 2), (4, 3)])
def test_formulas(kind, shape):
    """The last shape has fewer than k values: all of them count."""
    x = data(*shape)
    torch.testing.assert_close(batch_norm(x, kind, eps=1e-5), textbook(x, kind, eps=1e-5), rtol=1e-13, atol=1e-13)


@kinds
def test_layer_is_the_function_with_gain_bias_and_history(kind):
    layer = LpBatchNorm(3, kind, k=4, momentum=0.25, eps=0.01).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    mean, spread = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    per_channel = (1, 3, 1, 1)
    for seed in range(3):
        x = data(5, 3, 4, 4, seed=seed)
        unit = textbook(x, kind, k=4, eps=0.01)
        expected = unit * layer.weight.reshape(per_channel) + layer.bias.reshape(per_channel)
        torch.testing.assert_close(layer(x), expected)
        mean = 0.75 * mean + 0.25 * x.mean((0, 2, 3))
        # (x - mu) / unit is the spread plus eps at any element.
        spread = 0.75 * spread + 0.25 * (((x - x.mean((0, 2, 3), keepdim=True)) / unit)[0, :, 0, 0] - 0.01)
    assert layer.num_batches_tracked == 3
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_deviation, spread)
    layer.eval()
    x = data(1, 3, 1, 1, seed=9)
    unit = (x - mean.reshape(per_channel)) / (spread.reshape(per_channel) + 0.01)
    torch.testing.assert_close(layer(x), unit * layer.weight.reshape(per_channel) + layer.bias.reshape(per_channel))
    assert layer.num_batches_tracked == 3


@kinds
def test_untrained_layer_in_evaluation_passes_its_input_through(kind):
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(LpBatchNorm(3, kind).eval()(x), x, rtol=2e-5, atol=0)


def test_running_averages_approach_those_of_the_data():
    """After many batches evaluation is what training does on average: both have spread 1 on Gaussian data."""
    torch.manual_seed(0)
    for kind in KINDS:
        layer = LpBatchNorm(1, kind)
        for _ in range(100):
            trained = layer(2 + 3 * torch.randn(256, 1)).detach()
        evaluated = layer.eval()(2 + 3 * torch.randn(4096, 1)).detach()
        # The last batch's own spread varies by a few percent, that of the maximum by more.
        assert float(evaluated.std()) == pytest.approx(float(trained.std()), rel=0.2)
        assert float(evaluated.mean()) == pytest.approx(0, abs=0.1)


def test_l1_of_two_balanced_points_is_batch_norm_over_the_constant():
    x = torch.tensor([[-3.0], [3.0], [3.0], [-3.0]], dtype=torch.float64)
    expected = F.batch_norm(x, None, None, training=True, eps=1e-300) / math.sqrt(math.pi / 2)
    torch.testing.assert_close(batch_norm(x, "l1"), expected, rtol=1e-15, atol=0)


def test_l1_gives_gaussian_data_unit_variance():
    n = 100_000
    x = 5 + 3 * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Standard error of the ratio of std to mean deviation: sqrt((pi - 3) / 2 / n) = 0.27 / sqrt(n).
    assert float(batch_norm(x, "l1").std(correction=0)) == pytest.approx(1, abs=4 * 0.27 / math.sqrt(n))


@pytest.mark.parametrize("n", [64, 256, 1000])
def test_linf_of_gaussian_data_follows_the_expected_maximum(n):
    """E max |z| of n normals by quadrature of its survival function 1 - erf(t / sqrt 2)^n."""
    t = torch.linspace(0, 8, 80_001, dtype=torch.float64)
    mean = torch.trapezoid(1 - torch.erf(t / math.sqrt(2)) ** n, t)
    second = torch.trapezoid(2 * t * (1 - torch.erf(t / math.sqrt(2)) ** n), t)
    channels = 4000
    x = torch.randn(n, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constant = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n)))
    error = 4 * float((second - mean**2).sqrt()) * constant / math.sqrt(channels)
    assert float(deviation(x, "linf").mean()) == pytest.approx(float(constant * mean), abs=error)
    assert 1.3 < float(constant * mean) < 1.5


def test_topk_lies_between_linf_and_l1():
    x = data(7, 4, 3, 3)
    n = 63
    torch.testing.assert_close(batch_norm(x, "topk", k=1), batch_norm(x, "linf"))
    ratio = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n))) / math.sqrt(math.pi / 2)
    torch.testing.assert_close(batch_norm(x, "topk", k=n) * ratio, batch_norm(x, "l1"))
    spreads = torch.stack([deviation(x - x.mean((0, 2, 3), keepdim=True), "topk", k) for k in (1, 2, 10, 30, n, 99)])
    assert (spreads[1:5] < spreads[:4]).all()
    assert torch.equal(spreads[5], spreads[4])


@kinds
def test_scale_and_shift_of_the_input_do_not_matter(kind):
    x = data(6, 3, 5)
    moved = x * torch.tensor([0.01, 3.0, 1e4], dtype=torch.float64).reshape(3, 1) + 7
    torch.testing.assert_close(batch_norm(moved, kind), batch_norm(x, kind))
    torch.testing.assert_close(batch_norm(-x, kind), -batch_norm(x, kind))


@kinds
def test_scale_of_the_weights_before_it_does_not_matter(kind):
    torch.manual_seed(0)
    block = norms.block(f"batch-{kind}")(2, 4, 3, padding=1).double()
    block.norm.eps = 0.0
    x = data(3, 2, 6, 6)
    before = block(x)
    with torch.no_grad():
        block.linear.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0]).reshape(4, 1, 1, 1))
    torch.testing.assert_close(block(x), before)


@kinds
def test_gradient_is_that_of_finite_differences(kind):
    """Random data have no ties, so the maximum and the k largest are smooth here."""
    x = data(4, 2, 5).requires_grad_()
    parameters = [p.requires_grad_() for p in (data(2, seed=1), data(2, seed=2))]

    def function(x, weight, bias):
        history = torch.zeros(2, dtype=x.dtype), torch.ones(2, dtype=x.dtype)
        return lp_batch_norm(x, kind, weight, bias, *history, training=True, k=3)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


@kinds
def test_gradient_sums_to_zero_and_is_orthogonal_to_the_deviations(kind):
    x = data(5, 3, 4, 4).requires_grad_()
    (batch_norm(x, kind) * data(5, 3, 4, 4, seed=1)).sum().backward()
    centred = x.detach() - x.detach().mean((0, 2, 3), keepdim=True)
    size = x.grad.abs().sum((0, 2, 3))
    assert (size > 1).all()
    assert (x.grad.sum((0, 2, 3)).abs() < 1e-13 * size).all()
    assert ((x.grad * centred).sum((0, 2, 3)).abs() < 1e-12 * size).all()


def test_ties():
    """Four values share the maximum: linf gives each a quarter of its gradient, topk picks k; both are subgradients."""
    x = torch.tensor([[2.0], [-2.0], [2.0], [-2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    for kind, expected in (("linf", [0.25] * 4), ("topk", [0.5, 0.5, 0, 0])):
        (gradient,) = torch.autograd.grad(deviation(x, kind, k=2).sum(), x)
        ratio = (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(5)))
        found = (gradient.flatten() * x.sign().flatten() / ratio)[:4]
        torch.testing.assert_close(found.sort(descending=True).values, torch.tensor(expected, dtype=torch.float64))
        assert gradient[4] == 0


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_where_squares_overflow(kind, dtype):
    """Deviations of 2,000 have squares of 4e6, beyond fp16's 65,504."""
    torch.manual_seed(0)
    x = (2000 * torch.randn(64, 3, 8, 8)).to(dtype).requires_grad_()
    layer = LpBatchNorm(3, kind).to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    # Statistics are taken in float32, so only the rounding of input and output is left.
    expected = textbook(x.detach().double(), kind)
    torch.testing.assert_close(output.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    (output * torch.randn_like(output)).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.running_deviation).all()


@kinds
def test_half_precision_arithmetic_alone_is_enough(kind):
    """Every operation of the statistic rounded to fp16 and done in fp16: finite where the L2 one overflows."""
    torch.manual_seed(0)
    x = (300 * torch.randn(100_000, 1)).half()
    spread = deviation(x, kind)
    assert spread.dtype == torch.float16
    assert not torch.isfinite(x.square()).all()
    assert torch.isinf((x / 300).square().sum())
    exact = deviation(x.double(), kind)
    # Each of the terms is rounded to 11 bits, errors that average out; the result is rounded again.
    torch.testing.assert_close(spread.double(), exact, rtol=3 * torch.finfo(torch.float16).eps, atol=0)
    (gradient,) = torch.autograd.grad(deviation(x.requires_grad_(), kind).sum(), x)
    assert torch.isfinite(gradient).all()


@kinds
def test_constant_channels_give_the_bias_and_finite_gradients(kind):
    x = torch.full((4, 2, 3), 5.0, requires_grad=True)
    layer = LpBatchNorm(2, kind)
    output = layer(x)
    assert torch.equal(output, torch.zeros_like(output))
    (output * torch.randn(4, 2, 3)).sum().backward()
    assert torch.isfinite(x.grad).all()


@kinds
def test_errors(kind):
    layer = norms.create(f"batch-{kind}", 3)
    for size in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match=f"norms.batch-{kind}: expected more than 1 value per channel"):
            layer(torch.zeros(size))
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"expected \(N, 3, \*space\), got \(2, 4, 5\)"):
        layer(torch.zeros(2, 4, 5))
    assert layer.eval()(torch.zeros(1, 3)).shape == (1, 3)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="kind must be one of l1, linf, topk, got 'l2'"):
        LpBatchNorm(3, "l2")
    with pytest.raises(ConfigError, match="got k=0"):
        LpBatchNorm(3, "topk", k=0)
    with pytest.raises(ConfigError, match=r"momentum=1\.5"):
        LpBatchNorm(3, "l1", momentum=1.5)
