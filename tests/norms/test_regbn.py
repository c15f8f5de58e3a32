import copy
import itertools

import pytest
import torch
from torch.nn.functional import layer_norm

from normprop import norms
from normprop.data import load
from normprop.data.confounder import planted
from normprop.errors import ConfigError
from normprop.norms.regbn import ChannelRegression, RegBN, Regression
from normprop.norms.ridge import penalty, ridge, solve_lambda


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def data(samples, f_features, g_features):
    return torch.randn(samples, f_features, dtype=torch.double), torch.randn(samples, g_features, dtype=torch.double)


def svd_ridge(g, f, lam):
    """The ridge solution by the singular value decomposition, as the public code writes it."""
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return vh.mT @ torch.diag(s / (s.square() + lam)) @ u.mT @ f


# Ridge regression


def test_without_penalty_the_residual_is_orthogonal_to_the_regressors():
    f, g = data(40, 5, 7)
    assert (g.mT @ (f - g @ ridge(g, f))).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(40, 5, 7), (6, 5, 9), (7, 3, 7)])
@pytest.mark.parametrize("lam", [0.3, 20.0])
def test_ridge_is_the_textbook_solution_for_tall_and_wide_regressors(shape, lam):
    f, g = data(*shape)
    textbook = torch.linalg.solve(g.mT @ g + lam * torch.eye(g.shape[1], dtype=g.dtype), g.mT @ f)
    torch.testing.assert_close(ridge(g, f, lam), textbook, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(svd_ridge(g, f, lam), textbook, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("samples", [30, 5])
def test_without_penalty_and_full_rank_it_is_the_solution_of_least_norm(samples):
    f, g = data(samples, 3, 4)
    g = torch.cat([g, g @ torch.randn(4, 3, dtype=g.dtype)], 1)
    # The gram's rounding errors are amplified by the squared condition number, here below 1e4.
    torch.testing.assert_close(ridge(g, f), torch.linalg.pinv(g) @ f, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(6, 2, 3), (3, 2, 5)])
def test_gradients_of_ridge(shape):
    f, g = data(*shape)
    lam = torch.tensor(0.7, dtype=torch.double, requires_grad=True)
    inputs = (g.requires_grad_(), f.requires_grad_(), lam)
    assert torch.autograd.gradcheck(ridge, inputs)
    assert torch.autograd.gradgradcheck(ridge, inputs)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_gradients_with_equal_singular_values_are_right_where_those_of_the_svd_are_not_finite(lam):
    g = torch.cat([2 * torch.eye(3, dtype=torch.double), torch.zeros(2, 3, dtype=torch.double)]).requires_grad_()
    f, _ = data(5, 2, 3)
    assert torch.autograd.gradcheck(lambda g: ridge(g, f, lam), g)
    # Something that depends on the singular vectors each for itself is lost there: that is what the solve avoids.
    grad = torch.autograd.grad(torch.linalg.svd(g, full_matrices=False)[2].mT[:, 0].sum(), g)[0]
    assert not grad.isfinite().all()


# Lambda


@pytest.mark.parametrize("rank", [2, 5, 64])
@pytest.mark.parametrize("s", [1e-3, 1.0, 1e4])
def test_lambda_for_equal_singular_values(rank, s):
    lam = solve_lambda(torch.full((rank,), s, dtype=torch.double))
    torch.testing.assert_close(lam.item(), s**2 * (rank**0.5 - 1), rtol=1e-12, atol=0)


def test_lambda_solves_its_equation_over_a_wide_range_of_singular_values():
    s = torch.logspace(-6, 6, 9, dtype=torch.double)
    lam = solve_lambda(s)
    assert (s.square() / (s.square() + lam)).square().sum().item() == pytest.approx(1, abs=1e-9)
    assert lam > 0


def test_lambda_of_the_code_is_that_of_its_objective():
    f, g = data(50, 4, 6)
    u, s, _ = torch.linalg.svd(g, full_matrices=False)
    lam = penalty(g, f)
    z = torch.diag(1 / (s.square() + lam)) @ torch.diag(s) @ u.mT @ g
    assert (z @ z.mT).sum().item() == pytest.approx(1, abs=1e-9)
    assert torch.equal(lam, penalty(g, 100 * f))


@pytest.mark.parametrize("shape", [(50, 4, 6), (5, 4, 9)])
def test_the_papers_constraint_gives_w_of_norm_one(shape):
    f, g = data(*shape)
    f = 10 * f
    lam = penalty(g, f, "paper")
    assert ridge(g, f, lam).norm().item() == pytest.approx(1, abs=1e-10)
    assert abs(penalty(g, f) - lam) > 0.1


def test_lambda_is_zero_where_there_is_no_root():
    f, g = data(20, 3, 4)
    for rank_one in (g[:, :1], g[:, :1] @ torch.randn(1, 5, dtype=g.dtype)):
        # The sum is 1 at lambda = 0 but for rounding, and falls by 2 lambda / s^2.
        assert penalty(rank_one, f) <= 1e-14 * rank_one.square().sum()
    small = f * 0.9 / ridge(g, f).norm()
    assert penalty(g, small, "paper") == 0
    assert penalty(g, small * 1.2, "paper") > 0
    for constraint in ("code", "paper", "none"):
        assert penalty(torch.zeros_like(g), f, constraint) == 0
    assert penalty(g, f, "none") == 0
    assert solve_lambda(torch.zeros(0)) == 0


# RegBN


def test_output_in_training_is_the_layer_norm_of_the_residual():
    f, g = data(30, 5, 4)
    for constraint in ("code", "paper", "none"):
        lam = penalty(g, f, constraint)
        residual = f - g @ svd_ridge(g, f, lam)
        plain = RegBN(5, 4, constraint, normalize_output=False).double()(f, g)
        torch.testing.assert_close(plain, (residual, g), rtol=1e-10, atol=1e-10)
        normal = RegBN(5, 4, constraint).double()(f, g)
        expected = layer_norm(residual, (5,)), layer_norm(g, (4,))
        torch.testing.assert_close(normal, expected, rtol=1e-9, atol=1e-9)


def test_maps_are_flattened_and_come_back_in_their_shape():
    f, g = torch.randn(20, 2, 3, 4), torch.randn(20, 5)
    flat, _ = RegBN(24, 5)(f.flatten(1), g)
    output, other = RegBN(24, 5)(f, g)
    assert other.shape == g.shape
    assert torch.equal(output, flat.reshape(f.shape))


def test_what_is_linear_in_g_is_removed_and_what_is_independent_stays():
    f, g = data(20_000, 3, 4)
    # W-hat of independent f has entries of standard error 1 / sqrt(20000) = 0.007 even without penalty.
    assert ridge(g, f).abs().max() < 5 * 20_000**-0.5
    linear = g @ torch.randn(4, 3, dtype=g.dtype)
    residual, _ = RegBN(3, 4, "none", normalize_output=False).double()(linear, g)
    assert residual.abs().max() < 1e-12


@pytest.mark.parametrize("constraint", ["code", "paper"])
def test_gradients_are_those_at_fixed_lambda(constraint):
    f, g = data(6, 3, 2)
    layer = RegBN(3, 2, constraint).double()
    lam = penalty(g, f, constraint)
    assert lam > 0

    def reference(f, g):
        residual = f - g @ torch.linalg.solve(g.mT @ g + lam * torch.eye(2, dtype=g.dtype), g.mT @ f)
        return layer_norm(residual, (3,)), layer_norm(g, (2,))

    inputs = f.requires_grad_(), g.requires_grad_()
    assert torch.autograd.gradcheck(reference, inputs)
    weights = torch.randn(6, 3, dtype=f.dtype), torch.randn(6, 2, dtype=f.dtype)
    gradients = [
        torch.autograd.grad([(w * out).sum() for w, out in zip(weights, function(*inputs), strict=True)], inputs)
        for function in (layer, reference)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_evaluation_uses_the_running_weight_alone():
    f, g = data(30, 3, 2)
    layer = RegBN(3, 2, normalize_output=False).double()
    layer(f, g)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    output, _ = layer(f, g)
    torch.testing.assert_close(output, f - g @ layer.regression.running_weight)
    assert torch.equal(layer(f[:1], g[:1])[0], output[:1])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_running_weight_takes_adams_steps_corrected_by_the_step():
    layer = Regression(3, 2).double()
    running, first, second = torch.zeros(2, 3, dtype=torch.double), 0.0, 0.0
    for step in range(1, 6):
        f, g = data(30, 3, 2)
        layer(f, g)
        weight = svd_ridge(g, f, penalty(g, f))
        error = (weight - running).abs().mean().item()
        first, second = 0.9 * first + 0.1 * error, 0.99 * second + 0.01 * error**2
        eta = 0.02 * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)) ** 0.5 + 1e-8)
        running = (1 - eta) * running + eta * weight
        torch.testing.assert_close(layer.running_weight, running, rtol=1e-10, atol=1e-12)
    assert layer.num_batches_tracked == 5


def test_running_weight_converges_for_a_repeated_batch():
    f, g = data(30, 3, 2)
    layer = Regression(3, 2).double()
    target = ridge(g, f, penalty(g, f))
    distances = []
    for step in range(1501):
        layer(f, g)
        if step % 500 == 0:
            distances.append((layer.running_weight - target).norm() / target.norm())
    # The steps shorten as the error does: in the long run it falls by about 0.9953 a step, 0.095 in 500.
    assert distances[0].item() == pytest.approx(0.98, rel=1e-6)
    assert distances[3] < 1e-3
    assert all(later < 0.2 * earlier for earlier, later in itertools.pairwise(distances))


def test_errors():
    layer = RegBN(3, 2)
    with pytest.raises(ValueError, match=r"more than 1 sample .* when training, got 1$"):
        layer(torch.randn(1, 3), torch.randn(1, 2))
    with pytest.raises(ValueError, match="3 features of f and 2 of g"):
        layer(torch.randn(4, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match="as many rows"):
        layer(torch.randn(4, 3), torch.randn(5, 2))
    assert layer.regression.num_batches_tracked == 0
    for arguments in [(3, 1), (1, 3), (0, 2), (3, 2, "both"), (3, 2, "code", True, 2.0)]:
        with pytest.raises(ConfigError):
            RegBN(*arguments)
    with pytest.raises(ConfigError, match="at least 2 channels, got 1"):
        norms.create("reg", 1)
    with pytest.raises(ConfigError, match="at least 4 channels, got 3"):
        norms.create("reg", 3, 0)
    with pytest.raises(ValueError, match="more than 1 sample"):
        norms.create("reg", 4, 0)(torch.randn(1, 4))


def test_inputs_that_are_not_finite_give_an_output_that_is_not_finite():
    f, g = torch.randn(5, 3), torch.randn(5, 2)
    assert not RegBN(3, 2)(f, g.index_fill(0, torch.tensor(0), float("nan")))[0].isfinite().any()
    assert not RegBN(3, 2)(f.index_fill(0, torch.tensor(0), float("inf")), g)[0].isfinite().any()


# One stream


@pytest.mark.parametrize(("dims", "channels"), [(0, 9), (1, 5), (2, 6), (3, 2)])
def test_channels_are_regressed_over_batch_and_positions(dims, channels):
    first = channels // 2
    layer = ChannelRegression(dims, channels).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    input = torch.randn(20, channels, *[4, 3, 2][:dims], dtype=torch.double)
    rows = input.movedim(1, -1).reshape(-1, channels)
    f, g = rows[:, :first], rows[:, first:]
    residual = f - g @ svd_ridge(g, f, penalty(g, f))
    parts = [part.reshape(20, *input.shape[2:], -1).movedim(-1, 1) for part in (residual, g)]
    normal = torch.cat([layer_norm(part, part.shape[1:]) for part in parts], 1).movedim(1, -1)
    expected = (normal * layer.weight + layer.bias).movedim(-1, 1)
    torch.testing.assert_close(layer(input), expected, rtol=1e-9, atol=1e-9)


def test_one_image_has_rows_enough_and_the_layer_commutes_with_shifts():
    layer = norms.create("reg", 6)
    image = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(layer(image).roll(2, -1), layer(image.roll(2, -1)))


# What it is for


@pytest.mark.parametrize(
    ("constraint", "readable", "share"), [("none", 0.05, 0.01), ("code", 0.65, 0.2), ("paper", 0.4, 0.1)]
)
def test_a_planted_confounder_is_removed_from_features_of_the_digits(constraint, readable, share):
    digits = load("digits")
    generator = torch.Generator().manual_seed(0)
    (train, z), (test, test_z) = (planted(part, 10, 0.0, 0.5, generator) for part in (digits.train, digits.test))
    mean = train.images.double().mean(0)

    def halves(split):
        """The mean of each row, in the left and in the right half, centred."""
        images = split.images.double() - mean
        return images[..., :4].mean(3).flatten(1), images[..., 4:].mean(3).flatten(1)

    def read(train, test):
        """Held-out R^2 of z by linear regression, and the share of the features' variance that z explains."""
        constant = torch.ones(len(train), 1, dtype=torch.double), torch.ones(len(test), 1, dtype=torch.double)
        weight = torch.linalg.lstsq(torch.cat([train, constant[0]], 1), z.double()).solution
        error = test_z.double() - torch.cat([test, constant[1]], 1) @ weight
        correlation = torch.corrcoef(torch.cat([test_z.double().unsqueeze(1), test], 1).mT)[0, 1:]
        variance = test.var(0)
        return 1 - error.square().mean() / test_z.var(), (correlation.square() * variance).sum() / variance.sum()

    layer = RegBN(8, 8, constraint, normalize_output=False, momentum=1.0).double()  # one step is the whole way
    layer(*halves(train))
    layer.eval()
    before = read(halves(train)[0], halves(test)[0])
    after = read(layer(*halves(train))[0], layer(*halves(test))[0])
    # Both halves show z, and it makes most of the variance: that is the case RegBN is made for.
    assert before[0] > 0.95
    assert before[1] > 0.5
    # Least squares removes it; the two constraints leave some of it, the public code's most.
    assert after[0] < readable
    assert after[1] < share * before[1]
