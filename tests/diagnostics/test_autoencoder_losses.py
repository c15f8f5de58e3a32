import math

import pytest
import torch
from torch.autograd.functional import hessian

from normprop.diagnostics.autoencoder_losses import (
    NOISY,
    OBJECTIVES,
    bias_gradient,
    contractive,
    denoising,
    denoising_expansion,
    first_order_denoising,
    marginalized_denoising,
    reconstruction,
    sparse,
)
from normprop.errors import ConfigError
from normprop.models.autoencoder import AutoEncoder


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def network(activation, features=6, hidden=4, seed=0, decoder_bias=False, dtype=torch.float64, scale=0.5):
    autoencoder = AutoEncoder(features, hidden, activation, decoder_bias, dtype=dtype).requires_grad_(False)
    generator = drawn(seed)
    for parameter in autoencoder.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return autoencoder.requires_grad_()


def samples(count=9, features=6, seed=1, dtype=torch.float64):
    return torch.randn(count, features, generator=drawn(seed), dtype=dtype)


def half_traces(autoencoder, batch):
    """Half the trace of the loss's Hessian in the corrupted input, mean over samples, by autograd."""
    total = 0.0
    for x in batch:
        total += hessian(lambda z, x=x: (autoencoder(z[None])[0] - x).square().sum(), x).trace() / 2
    return total / len(batch)


@pytest.mark.parametrize("decoder_bias", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "softplus"])
def test_the_expansion_is_half_the_trace_of_the_hessian(activation, decoder_bias):
    autoencoder, batch = network(activation, decoder_bias=decoder_bias, scale=1.0), samples()
    terms = denoising_expansion(autoencoder, batch)
    torch.testing.assert_close(sum(terms), half_traces(autoencoder, batch), rtol=1e-11, atol=0)
    a = autoencoder.preactivation(batch)
    slopes, weight = autoencoder.nonlinearity.slope(a), autoencoder.weight
    matrices = [torch.diag(slope) @ weight @ weight.T for slope in slopes]
    torch.testing.assert_close(terms.own + terms.cross, torch.stack([(m @ m).trace() for m in matrices]).mean())
    torch.testing.assert_close(terms.own, torch.stack([(m.diagonal() ** 2).sum() for m in matrices]).mean())
    assert (terms.residual == 0) == (activation in ("identity", "relu"))


def test_the_expansion_gives_the_known_numbers():
    generator = drawn(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    normal(300, 40), normal(40, 40), normal(25, 40), normal(40)  # other draws come first
    weight, x = normal(7, 12) * 0.3, normal(4000, 12)
    linear = AutoEncoder(12, 7, "identity", dtype=torch.float64).requires_grad_(False)
    linear.weight.copy_(weight)
    losses = torch.stack([(linear(x + 0.2 * normal(4000, 12)) - x).square().sum(1).mean() for _ in range(400)])
    predicted = reconstruction(linear, x) + 0.04 * sum(denoising_expansion(linear, x))
    assert float(predicted) == pytest.approx(9.83270418782318, rel=1e-12)
    assert float(losses.mean()) == pytest.approx(9.83388636771105, rel=1e-12)
    assert abs(losses.mean() - predicted) < 4 * losses.std() / 20
    autoencoder = AutoEncoder(12, 7, "softplus", dtype=torch.float64).requires_grad_(False)
    autoencoder.weight.copy_(weight)
    autoencoder.bias.copy_(normal(7) * 0.2)
    terms = denoising_expansion(autoencoder, normal(1, 12))
    assert [float(term) for term in terms] == pytest.approx(
        [3.638966381187217, 1.4974682214809736, 1.7645607268492363], rel=1e-12
    )
    assert float(sum(terms)) == pytest.approx(6.900995329517427, rel=1e-12)


@pytest.mark.parametrize("activation", ["sigmoid", "softplus"])
def test_denoising_is_the_expansion_for_little_noise(activation):
    autoencoder, batch = network(activation), samples(50)
    variance = 1e-4
    plain = reconstruction(autoencoder, batch)
    eps = math.sqrt(variance) * torch.randn(4000, *batch.shape, generator=drawn(5), dtype=batch.dtype)

    def losses(noise):
        return (autoencoder((batch + noise).flatten(0, 1)).view_as(noise) - batch).square().sum(2).mean(1)

    with torch.no_grad():
        # The mean of a draw and its opposite has no first-order term.
        growth = ((losses(eps) + losses(-eps)) / 2 - plain) / variance
        expected = sum(denoising_expansion(autoencoder, batch))
    error = growth.std() / math.sqrt(len(growth))
    assert error < 0.01 * expected
    assert abs(growth.mean() - expected) < 4 * error + 1e-3 * expected
    with torch.no_grad():
        draws = torch.stack([denoising(autoencoder, batch, variance, drawn(seed)) for seed in range(200)])
    assert abs(draws.mean() - plain - variance * expected) < 4 * draws.std() / math.sqrt(200)


def test_kinks_of_the_relu_add_to_what_noise_does():
    """One unit on N(0, I): noise moves samples across the kink, which adds ||W||^2 b p(a = 0) to the expansion."""
    autoencoder = AutoEncoder(3, 1, "relu", dtype=torch.float64).requires_grad_(False)
    autoencoder.weight.copy_(torch.tensor([[0.6, 0.0, 0.8]]))
    autoencoder.bias.fill_(0.7)
    x, eps = samples(1_000_000, 3), 0.05 * samples(1_000_000, 3, seed=2)
    losses = [(autoencoder(x + noise) - x).square().sum(1) for noise in (eps, -eps, torch.zeros_like(eps))]
    growth = ((losses[0] + losses[1]) / 2 - losses[2]) / 0.05**2
    kink = 0.7 * math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi)
    error = growth.std() / 1000
    without = sum(denoising_expansion(autoencoder, x))
    assert abs(growth.mean() - without - kink) < 4 * error + 0.01 * kink
    assert growth.mean() - without > 10 * error


@pytest.mark.parametrize("activation", ["identity", "relu", "sigmoid", "softplus"])
def test_first_order_is_the_loss_along_its_gradient(activation):
    autoencoder, batch = network(activation, decoder_bias=True), samples()
    noise = math.sqrt(0.3) * torch.randn(batch.shape, generator=drawn(7), dtype=batch.dtype)
    moved = batch.clone().requires_grad_()
    loss = (autoencoder(moved) - batch).square().sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, moved)
    expected = loss + (gradient * noise).sum()
    torch.testing.assert_close(first_order_denoising(autoencoder, batch, 0.3, drawn(7)), expected)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_first_order_adds_nothing_on_average(activation):
    autoencoder, batch = network(activation), samples()
    with torch.no_grad():
        losses = torch.stack([first_order_denoising(autoencoder, batch, 0.3, drawn(seed)) for seed in range(2000)])
        plain = reconstruction(autoencoder, batch)
    error = losses.std() / math.sqrt(2000)
    assert 0 < error < 0.05 * plain
    assert abs(losses.mean() - plain) < 4 * error


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus"])
def test_contractive_and_marginalised_penalties_by_brute_force(activation):
    autoencoder, batch = network(activation), samples()
    plain = reconstruction(autoencoder, batch)
    jacobians = torch.stack([torch.func.jacrev(lambda z: autoencoder.encode(z[None])[0])(x) for x in batch])
    lengths = autoencoder.weight.norm(dim=1)
    torch.testing.assert_close(
        contractive(autoencoder, batch, 0.3, None), plain + 0.3 * jacobians.square().sum((1, 2)).mean()
    )
    torch.testing.assert_close(
        marginalized_denoising(autoencoder, batch, 0.3, None),
        plain + 0.3 * (jacobians.square().sum(2) * lengths**2).sum(1).mean(),
    )
    torch.testing.assert_close(
        marginalized_denoising(autoencoder, batch, 0.3, None), plain + 0.3 * denoising_expansion(autoencoder, batch).own
    )
    assert lengths.min() > 0
    assert not torch.isclose(contractive(autoencoder, batch, 0.3), marginalized_denoising(autoencoder, batch, 0.3))


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus"])
def test_contractive_is_marginalised_at_unit_norm(activation):
    """Values and bias gradients agree; gradients of weights differ along the weights alone."""
    autoencoder, batch = network(activation), samples()
    autoencoder.normalize_weight_()
    losses = [objective(autoencoder, batch, 0.3, None) for objective in (contractive, marginalized_denoising)]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(loss, autoencoder.parameters()) for loss in losses]
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    difference = gradients[1][0] - gradients[0][0]
    along = (difference * autoencoder.weight).sum(1, keepdim=True) * autoencoder.weight
    torch.testing.assert_close(difference, along)
    assert along.norm() > 0.01


def test_with_relus_at_unit_norm_the_penalties_turn_no_weight():
    autoencoder, batch = network("relu"), samples()
    autoencoder.normalize_weight_()
    weight = autoencoder.weight
    plain, penalised = (
        torch.autograd.grad(objective(autoencoder, batch, 0.7, None), weight)[0]
        for objective in (reconstruction, marginalized_denoising)
    )
    tangent = penalised - (penalised * weight).sum(1, keepdim=True) * weight
    torch.testing.assert_close(tangent, plain - (plain * weight).sum(1, keepdim=True) * weight)


def test_sparse_is_the_divergence_from_0():
    autoencoder, batch = network("sigmoid"), samples()
    rho, mean = 1e-12, autoencoder.encode(batch).mean(0)
    divergence = rho * (rho / mean).log() + (1 - rho) * ((1 - rho) / (1 - mean)).log()
    expected = reconstruction(autoencoder, batch) + 0.3 * divergence.sum()
    torch.testing.assert_close(sparse(autoencoder, batch, 0.3), expected, rtol=1e-9, atol=0)


def test_sparse_stays_finite_where_codes_round_to_1():
    autoencoder = network("sigmoid", dtype=torch.float32).requires_grad_(False)
    autoencoder.bias.fill_(40.0)
    autoencoder.weight.zero_()
    batch = samples(dtype=torch.float32)
    assert (autoencoder.encode(batch) == 1).all()
    penalty = sparse(autoencoder, batch, 1.0) - reconstruction(autoencoder, batch)
    assert float(penalty) == pytest.approx(4 * 40, rel=1e-5)
    gradient = bias_gradient(autoencoder, batch, "sae", 1.0) - bias_gradient(autoencoder, batch, "ae")
    torch.testing.assert_close(gradient, torch.ones(4))


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus"])
def test_corollary_1(activation):
    """R = sum f(E h_j), f rising: dR/db_j = f'(E h_j) E s' >= 0."""
    autoencoder, batch = network(activation, scale=1.0), samples(200)
    h = autoencoder.encode(batch).mean(0)
    (gradient,) = torch.autograd.grad((h.square() + h.exp()).sum(), autoencoder.bias)
    a = autoencoder.preactivation(batch)
    torch.testing.assert_close(gradient, (2 * h + h.exp()) * autoencoder.nonlinearity.slope(a).mean(0))
    assert gradient.min() > 0
    if activation == "sigmoid":
        pull = bias_gradient(autoencoder, batch, "sae", 0.4) - bias_gradient(autoencoder, batch, "ae")
        torch.testing.assert_close(pull, 0.4 / (1 - h) * autoencoder.nonlinearity.slope(a).mean(0))
        assert pull.min() > 0


@pytest.mark.parametrize(("objective", "power"), [("cae", 2), ("mdae", 4)])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus"])
def test_corollary_2(activation, objective, power):
    """R = E sum s'^2 ||W_j||^p: dR/db_j = E[2 s' s''] ||W_j||^p, not negative where s is convex."""
    autoencoder, batch = network(activation, scale=1.0), samples(200)
    pull = bias_gradient(autoencoder, batch, objective, 0.4) - bias_gradient(autoencoder, batch, "ae")
    a = autoencoder.preactivation(batch)
    _, slope, curvature = autoencoder.nonlinearity
    expected = 0.4 * (2 * slope(a) * curvature(a)).mean(0) * autoencoder.weight.norm(dim=1) ** power
    torch.testing.assert_close(pull, expected, rtol=1e-9, atol=1e-12)
    if activation == "relu":
        assert not pull.any()
    if activation == "softplus":
        assert pull.min() > 0
    if activation == "sigmoid":  # convex below 0 alone
        signs = []
        for bias in (-8.0, 8.0):
            autoencoder.bias.detach().fill_(bias)
            signs.append(bias_gradient(autoencoder, batch, objective, 0.4) - bias_gradient(autoencoder, batch, "ae"))
        assert signs[0].min() > 0
        assert signs[1].max() < 0


@pytest.mark.parametrize("activation", ["relu", "softplus"])
@pytest.mark.parametrize(("q", "p"), [(1, 0), (1, 2), (3, 1)])
def test_corollary_2_for_other_powers(activation, q, p):
    autoencoder, batch = network(activation, scale=1.0), samples(200)
    _, slope, curvature = autoencoder.nonlinearity
    a, lengths = autoencoder.preactivation(batch), autoencoder.weight.norm(dim=1)
    penalty = (slope(a) ** q).mean(0) @ lengths**p + 0 * autoencoder.bias.sum()
    (gradient,) = torch.autograd.grad(penalty, autoencoder.bias)
    torch.testing.assert_close(gradient, (q * slope(a) ** (q - 1) * curvature(a)).mean(0) * lengths**p)
    assert gradient.min() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_coefficient_all_are_the_squared_error(name, dtype):
    autoencoder, batch = network("sigmoid", decoder_bias=True, dtype=dtype), samples(dtype=dtype)
    expected = sum((autoencoder(x[None])[0] - x).square().sum() for x in batch) / len(batch)
    loss = OBJECTIVES[name](autoencoder, batch, 0.0, drawn())
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected)
    larger = OBJECTIVES[name](autoencoder, batch, 0.5, drawn())
    assert (larger == loss) == (name == "ae")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_noise_comes_from_the_generator_alone(name):
    autoencoder, batch = network("sigmoid"), samples()
    state, kept = torch.get_rng_state(), batch.clone()
    losses = [OBJECTIVES[name](autoencoder, batch, 0.5, drawn(seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, kept)
    assert losses[0] == losses[1]
    assert (losses[0] != losses[2]) == (name in NOISY)


def test_bias_gradient_leaves_the_network_alone():
    autoencoder, batch = network("sigmoid"), samples()
    autoencoder.bias.grad = torch.full((4,), 7.0, dtype=torch.float64)
    autoencoder.weight.requires_grad_(False)
    kept = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    with torch.no_grad():
        gradient = bias_gradient(autoencoder, batch, "mdae", 0.5)
    step = 1e-6
    for unit in range(4):
        autoencoder.bias.detach()[unit] += step
        above = marginalized_denoising(autoencoder, batch, 0.5)
        autoencoder.bias.detach()[unit] -= 2 * step
        below = marginalized_denoising(autoencoder, batch, 0.5)
        autoencoder.bias.detach().copy_(kept["bias"])
        assert float(gradient[unit]) == pytest.approx(float((above - below).detach() / (2 * step)), rel=1e-6, abs=1e-8)
    assert all(torch.equal(value, kept[name]) for name, value in autoencoder.state_dict().items())
    assert torch.equal(autoencoder.bias.grad, torch.full((4,), 7.0, dtype=torch.float64))
    assert autoencoder.weight.grad is None
    assert [parameter.requires_grad for parameter in autoencoder.parameters()] == [False, True]
    assert not gradient.requires_grad


@pytest.mark.parametrize("coefficient", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "ae"])
def test_refuses_coefficients_that_cannot_work(name, coefficient):
    with pytest.raises(ConfigError, match=r"coefficient is .*; expected a finite number, 0 or more"):
        OBJECTIVES[name](network("sigmoid"), samples(), coefficient, None)


def test_other_errors():
    for activation in ("relu", "softplus", "identity"):
        with pytest.raises(ConfigError, match=f"activation is '{activation}', whose codes may pass 1; use 'sigmoid'"):
            sparse(network(activation), samples(), 0.1)
    with pytest.raises(ConfigError, match="no objective 'vae'; choose one of ae, dae, edae, mdae, cae, sae"):
        bias_gradient(network("relu"), samples(), "vae")
