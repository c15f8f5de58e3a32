import pytest
import torch
from torch import nn

from normprop.errors import ConfigError
from normprop.models.autoencoder import NONLINEARITIES, AutoEncoder


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_derivatives_are_those_of_the_function(name):
    function, slope, curvature = NONLINEARITIES[name]
    a = torch.cat([torch.linspace(-15, 15, 301), torch.tensor([-60.0, 60.0])]).double() + 0.013
    a.requires_grad_()
    (first,) = torch.autograd.grad(function(a).sum(), a, create_graph=True)
    torch.testing.assert_close(slope(a), first, rtol=1e-10, atol=1e-14)
    second = torch.zeros_like(a)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), a)
    torch.testing.assert_close(curvature(a), second, rtol=1e-7, atol=1e-14)
    assert slope(a).min() >= 0
    assert slope(a).max() <= 1


@pytest.mark.parametrize("decoder_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_a_linear_layer_and_its_transpose(decoder_bias, dtype):
    autoencoder = AutoEncoder(6, 4, "softplus", decoder_bias, drawn(), dtype=dtype)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.normal_(generator=drawn(1))
    x = torch.randn(5, 6, generator=drawn(2), dtype=dtype)
    h = nn.functional.softplus(x @ autoencoder.weight.T + autoencoder.bias)
    y = h @ autoencoder.weight + (autoencoder.decoder_bias if decoder_bias else 0)
    assert autoencoder(x).dtype == dtype
    torch.testing.assert_close(autoencoder(x), y)
    assert [name for name, _ in autoencoder.named_parameters()] == ["weight", "bias", "decoder_bias"][
        : 2 + decoder_bias
    ]


def test_the_weight_learns_from_both_of_its_uses():
    autoencoder = AutoEncoder(5, 3, "sigmoid", generator=drawn(), dtype=torch.float64)
    x = torch.randn(7, 5, generator=drawn(1), dtype=torch.float64)
    autoencoder(x).square().sum().backward()
    encoder = autoencoder.weight.detach().clone().requires_grad_()
    decoder = autoencoder.weight.detach().clone().requires_grad_()
    (torch.sigmoid(x @ encoder.T) @ decoder).square().sum().backward()
    torch.testing.assert_close(autoencoder.weight.grad, encoder.grad + decoder.grad)
    assert encoder.grad.abs().min() > 0
    assert decoder.grad.abs().min() > 0


def test_starts_as_glorot_with_biases_of_0():
    state = torch.get_rng_state()
    autoencoder = AutoEncoder(300, 500, decoder_bias=True, generator=drawn(3))
    bound = (6 / 800) ** 0.5
    weight = autoencoder.weight.detach()
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.999 * bound
    # 150,000 uniform numbers: standard errors of mean and variance are 0.0015 and 0.0023 of their scales.
    assert abs(weight.mean()) < 5 * bound / 3**0.5 / 150_000**0.5
    assert float(weight.var()) == pytest.approx(bound**2 / 3, rel=0.012)
    assert not autoencoder.bias.any()
    assert not autoencoder.decoder_bias.any()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(AutoEncoder(300, 500, generator=drawn(3)).weight, weight)
    assert not torch.equal(AutoEncoder(300, 500, generator=drawn(4)).weight, weight)


def test_normalises_rows_and_leaves_zero_rows():
    autoencoder = AutoEncoder(6, 3, generator=drawn(), dtype=torch.float64)
    with torch.no_grad():
        autoencoder.weight[1] = 0
    before = autoencoder.weight.detach().clone()
    autoencoder.normalize_weight_()
    lengths = before.norm(dim=1)
    torch.testing.assert_close(autoencoder.weight[[0, 2]], before[[0, 2]] / lengths[[0, 2], None])
    assert not autoencoder.weight[1].any()
    assert autoencoder.weight.requires_grad


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: AutoEncoder(4, 3, "tanh"), "AutoEncoder: no activation 'tanh'; choose one of identity, relu, sigm"),
        (lambda: AutoEncoder(0, 3), "AutoEncoder: features=0 and hidden=3; expected positive numbers"),
        (lambda: AutoEncoder(4, 3)(torch.ones(2, 5)), r"shape \(2, 5\); expected \(N, 4\); flatten samples first"),
        (lambda: AutoEncoder(4, 3)(torch.ones(2, 1, 2, 2)), r"shape \(2, 1, 2, 2\); expected \(N, 4\)"),
    ],
)
def test_errors(act, line):
    with pytest.raises(ConfigError, match=line) as error:
        act()
    assert "\n" not in str(error.value)


def test_says_what_it_is():
    printed = str(AutoEncoder(4, 3, "sigmoid"))
    assert printed == "AutoEncoder(features=4, hidden=3, activation='sigmoid', decoder_bias=False)"
