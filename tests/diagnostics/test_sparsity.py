import json
import math

import pytest
import torch
from torch import nn

from normprop.diagnostics.autoencoder_losses import bias_gradient
from normprop.diagnostics.diagnosis import Subject
from normprop.diagnostics.sparsity import (
    THRESHOLDS,
    activation_fraction,
    chebyshev_bound,
    describe,
    gradient_bound,
    lowest_active,
    measure,
)
from normprop.errors import ConfigError
from normprop.models.autoencoder import NONLINEARITIES, AutoEncoder


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def network(activation, features=8, hidden=12, seed=0, bias=0.0, dtype=torch.float64, scale=0.5):
    autoencoder = AutoEncoder(features, hidden, activation, dtype=dtype).requires_grad_(False)
    autoencoder.weight.copy_(scale * torch.randn(hidden, features, generator=drawn(seed), dtype=dtype))
    autoencoder.bias.copy_(bias + scale * torch.randn(hidden, generator=drawn(seed + 50), dtype=dtype))
    return autoencoder.requires_grad_()


def whitened(count=300, features=8, seed=1):
    """Samples with mean 0 and covariance I, but not Gaussian."""
    x = torch.rand(count, features, generator=drawn(seed), dtype=torch.float64) ** 3
    x -= x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / count)
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


@pytest.mark.parametrize("activation", THRESHOLDS)
def test_lemma_1_on_any_data(activation):
    largest = 0.0
    for seed in range(20):
        for scale in (0.1, 1.0, 3.0):
            autoencoder = network(activation, seed=seed, scale=scale)
            x = 3 * torch.randn(5, 8, generator=drawn(seed), dtype=torch.float64) + seed
            found = measure(Subject("x", autoencoder, x), "ae")
            residual = (autoencoder(x) - x).square().mean().sqrt()
            torch.testing.assert_close(
                found.bound, 2 * residual.detach() * 8**0.5 * autoencoder.weight.detach().norm(dim=1)
            )
            torch.testing.assert_close(found.reconstruction, bias_gradient(autoencoder, x, "ae"))
            assert (found.reconstruction.abs() <= found.bound * (1 + 1e-12)).all()
            largest = max(largest, float((found.reconstruction.abs() / found.bound).max()))
    assert largest > 0.05


def test_lemma_1_is_reached():
    """One feature, one unit, equal samples: every inequality of the proof is an equality."""
    autoencoder = AutoEncoder(1, 1, "relu", dtype=torch.float64).requires_grad_(False)
    autoencoder.weight.fill_(0.5)
    found = measure(Subject("x", autoencoder, torch.full((3, 1), 2.0, dtype=torch.float64)), "ae")
    torch.testing.assert_close(found.reconstruction, -found.bound)
    assert float(found.bound) == pytest.approx(2 * 1.5 * 0.5)
    assert float(gradient_bound(torch.tensor(0.5), 1.5, 4)) == pytest.approx(3.0)


def test_theorem_1_a_step_lowers_the_mean_where_its_condition_holds():
    autoencoder, x, rate = network("sigmoid", scale=0.3), whitened(), 0.01
    once = measure(Subject("x", autoencoder, x), "sae", 1.0)
    coefficient = float((once.bound / once.regulariser).median())
    found = measure(Subject("x", autoencoder, x), "sae", coefficient)
    assert 3 < found.sure.sum() < 9
    before = autoencoder.preactivation(x).mean(0)
    torch.testing.assert_close(before, autoencoder.bias)
    torch.testing.assert_close(
        autoencoder.preactivation(x).var(0, correction=0), autoencoder.weight.square().sum(1), rtol=1e-9, atol=0
    )
    gradient = bias_gradient(autoencoder, x, "sae", coefficient)
    torch.testing.assert_close(gradient, found.reconstruction + found.regulariser)
    with torch.no_grad():
        autoencoder.bias -= rate * gradient
        autoencoder.weight += torch.randn(12, 8, generator=drawn(9), dtype=torch.float64)  # the mean of x is 0
        after = autoencoder.preactivation(x).mean(0)
    torch.testing.assert_close(after, before.detach() - rate * (found.reconstruction + found.regulariser))
    assert (after < before)[found.sure].all()


@pytest.mark.parametrize("activation", THRESHOLDS)
def test_theorem_2_bounds_the_share_of_silent_samples(activation):
    autoencoder, x, seen = network(activation, bias=-6.0, scale=1.0), whitened(), 0
    found = measure(Subject("x", autoencoder, x), "ae")
    silent = (autoencoder.encode(x) <= THRESHOLDS[activation]).double().mean(0)
    assert (silent >= found.silent_bound - 1e-12).all()
    lowest = lowest_active(activation, THRESHOLDS[activation])
    lengths = autoencoder.weight.detach().norm(dim=1)
    by_length = chebyshev_bound(autoencoder.bias.detach(), lengths**2, lowest)
    torch.testing.assert_close(found.silent_bound, by_length, rtol=1e-9, atol=1e-12)
    for unit in range(12):
        distance = (lowest - float(autoencoder.bias[unit].detach())) / float(lengths[unit])
        assert float(found.distance[unit]) == pytest.approx(distance)
        assert float(found.silent_bound[unit]) == pytest.approx(max(0.0, 1 - 1 / distance**2) if distance > 0 else 0.0)
        seen += distance > 1
    assert seen >= 3
    lower = chebyshev_bound(autoencoder.bias.detach() - 1, lengths**2, lowest)
    assert (lower > by_length)[by_length > 0].all()


def test_chebyshev_where_it_says_nothing():
    mean = torch.tensor([0.0, 5.0, -0.5, -1.0, math.nan])
    bound = chebyshev_bound(mean, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), 0.0)
    assert bound[:4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert bound[4].isnan()


def test_activation_fraction_counts_samples_not_units():
    codes = torch.tensor([[0.1, 0.0, 5.0, math.nan], [0.0, 0.0, 5.0, 1.0], [0.2, 0.0, 0.1, 1.0]])
    share = activation_fraction(codes, 0.1)
    assert share[:3].tolist() == pytest.approx([1 / 3, 0.0, 2 / 3])  # a code at the threshold is not active
    assert share[3].isnan()


def test_a_unit_that_one_sample_activates_is_not_dead():
    autoencoder = AutoEncoder(1, 3, "relu").requires_grad_(False)
    autoencoder.weight.fill_(1.0)
    autoencoder.bias.copy_(torch.tensor([0.0, -49.0, -50.0]))
    found = measure(Subject("x", autoencoder, torch.arange(51.0)[:, None]), "ae")
    assert found.active.tolist() == pytest.approx([50 / 51, 1 / 51, 0.0])
    assert found.dead.tolist() == [False, False, True]


@pytest.mark.parametrize(("activation", "threshold"), [("relu", 0.3), ("sigmoid", 0.1), ("softplus", 0.1)])
def test_lowest_active_is_the_inverse(activation, threshold):
    lowest = torch.tensor(lowest_active(activation, threshold), dtype=torch.float64)
    assert float(NONLINEARITIES[activation].function(lowest)) == pytest.approx(threshold, rel=1e-12)


@pytest.mark.parametrize("objective", ["cae", "mdae", "dae", "edae"])
def test_pulls_of_relus(objective):
    """Penalties of slopes do not reach a ReLU's bias; noise does, and edae only by chance."""
    found = measure(Subject("x", network("relu"), whitened(400)), objective, 0.5, draws=30)
    if objective in ("cae", "mdae"):
        assert not found.regulariser.any()
        assert not found.regulariser_error.any()
        assert not found.pushed_down.any()
        return
    z = found.regulariser / found.regulariser_error
    if objective == "edae":
        assert z.abs().max() < 5
        assert z.square().mean() > 0.2
        assert found.pushed_down.sum() <= 2  # by chance one in forty; half of them were positive
    else:
        assert z.abs().max() > 20
        assert found.pushed_down.any()


def test_pulls_of_softplus_are_all_downward():
    found = measure(Subject("x", network("softplus"), whitened()), "mdae", 0.5)
    assert found.pushed_down.all()
    weak = measure(Subject("x", network("softplus"), whitened()), "mdae", 1e-6)
    assert weak.pushed_down.all()
    assert not weak.sure.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measuring_leaves_everything_as_it_was(dtype):
    autoencoder = network("sigmoid", dtype=dtype)
    autoencoder.weight.grad = torch.ones_like(autoencoder.weight)
    calls = []
    autoencoder.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = whitened(20).to(dtype).reshape(20, 2, 2, 2)
    kept = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    state, copy, hooks = torch.get_rng_state(), inputs.clone(), list(autoencoder._forward_pre_hooks)
    first, again = (measure(Subject("x", autoencoder, inputs)) for _ in range(2))
    assert torch.equal(first.regulariser, again.regulariser)
    assert first.active.dtype == dtype
    assert all(torch.equal(value, kept[name]) for name, value in autoencoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, copy)
    assert list(autoencoder._forward_pre_hooks) == hooks
    assert autoencoder.training
    assert torch.equal(autoencoder.weight.grad, torch.ones_like(autoencoder.weight))
    assert autoencoder.bias.grad is None
    assert autoencoder.weight.requires_grad


def test_says_what_it_found_of_one():
    autoencoder = AutoEncoder(2, 2, "relu").requires_grad_(False)
    autoencoder.weight.copy_(torch.eye(2))
    autoencoder.bias.copy_(torch.tensor([0.0, -9.0]))
    inputs = torch.tensor([[1.0, 1.0], [-1.0, 2.0], [2.0, -1.0], [-2.0, -2.0]])
    result = measure(Subject("small", autoencoder, inputs), "mdae", 0.25)
    diagnosis = describe({"small": result})
    assert diagnosis.title.endswith("?")
    assert diagnosis.found == (
        "Share of the samples that activate a unit, on average: 25 % in small (1 of 2 units dead). The regulariser "
        "lowers the bias of 0 of 2 units in small (mdae at 0.25)."
    )
    numbers = json.loads(json.dumps(diagnosis.numbers, allow_nan=False))["small"]
    assert numbers["activation_fraction"] == 0.25
    assert numbers["dead_share"] == 0.5
    # x - y: (0, 1), (-1, 2), (0, -1), (-2, -2); slopes 1 for unit 1 on samples 1 and 3.
    assert numbers["residual_std"] == pytest.approx((15 / 8) ** 0.5)
    assert numbers["expansion"] == pytest.approx({"own": 0.5, "cross": 0.0, "residual": 0.0})
    activity, gradients, silence = diagnosis.figures
    assert activity.lines[0].y == [0.5, 0.0]
    assert gradients.lines[0].y == [0.0, 0.0]
    assert [line.style for line in silence.lines] == ["points", "theory"]
    assert silence.lines[0].y == [1.0]


def test_says_what_it_found_of_several_and_of_broken_ones():
    x = whitened()
    results = {
        "a": measure(Subject("a", network("softplus"), x), "mdae", 0.5),
        "b": measure(Subject("b", network("sigmoid", bias=-20.0), x), "cae", 0.5),
    }
    broken = network("relu")
    broken.weight.detach()[3] = math.nan
    found = describe(results).found
    share = 100 * float(results["a"].active.mean())
    assert f"{share:.3g} % in a (0 of 12 units dead), 0 % in b (12 of 12 units dead)" in found
    assert "12 of 12 units in a (mdae at 0.5)" in found
    assert "Not finite" not in found
    sure = describe({"s": measure(Subject("s", network("sigmoid"), x), "sae", 1000.0)}).found
    assert "12 of 12 units in s (sae at 1000; in 12 of them whatever the reconstruction does)." in sure
    results["c"] = measure(Subject("c", broken, x), "dae", 0.5)
    diagnosis = describe(results)
    assert diagnosis.found == found + " Not finite: c."
    assert describe({"c": results["c"]}).found == "Not finite: c."
    numbers = json.loads(json.dumps(diagnosis.numbers, allow_nan=False))
    assert numbers["c"]["activation_fraction"] is None
    assert numbers["a"]["activation_fraction"] == pytest.approx(share / 100)
    assert [line.name for line in diagnosis.figures[0].lines] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: measure(Subject("n", nn.Linear(2, 2), torch.ones(2, 2))), "n is a Linear; expected an AutoEncoder of"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2), torch.ones(0, 2))), r"n: inputs are torch.float32 \(0, 2\)"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2), torch.ones(3, 2).double())), "inputs are torch.float64"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2), torch.ones(3, 5))), r"shape \(3, 5\); expected \(N, 2\)"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2), torch.ones(3, 2)), draws=1), "draws=1; expected at least 2"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2), torch.ones(3, 2)), "vae"), "no objective 'vae'; choose one"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2), torch.ones(3, 2)), "sae"), "activation is 'relu'"),
        (lambda: measure(Subject("n", AutoEncoder(2, 2, "identity"), torch.ones(3, 2))), "does not vanish as its inp"),
        (lambda: lowest_active("sigmoid", 1.0), "threshold 1.0 is no code of 'sigmoid'; use 0.1"),
        (lambda: lowest_active("relu", -0.1), "threshold -0.1 is no code of 'relu'; use 0.0"),
        (lambda: lowest_active("softplus", 0.0), "threshold 0.0 is no code of 'softplus'"),
        (lambda: describe({}), "no results to describe"),
    ],
)
def test_errors(act, line):
    with pytest.raises(ConfigError, match=line) as error:
        act()
    assert "\n" not in str(error.value)
