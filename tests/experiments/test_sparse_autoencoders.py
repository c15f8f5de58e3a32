import dataclasses
import json
import math

import pytest
import torch

from normprop.diagnostics.autoencoder_losses import OBJECTIVES
from normprop.errors import ConfigError
from normprop.experiments.sparse_autoencoders import (
    COEFFICIENTS,
    Epoch,
    Record,
    describe,
    fit,
    patches,
    standardised,
    sweep,
    train,
)
from normprop.models.autoencoder import AutoEncoder


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(count=600, features=16, seed=0, dtype=torch.float32):
    """Standardised mixtures of a few sparse causes, so that there is something to reconstruct."""
    causes = torch.rand(count, 6, generator=drawn(seed), dtype=dtype) ** 4
    noise = 0.1 * torch.randn(count, features, generator=drawn(seed + 2), dtype=dtype)
    return standardised(causes @ torch.randn(6, features, generator=drawn(seed + 1), dtype=dtype) + noise)


def activity(records):
    return [record.epochs[-1].activation_fraction for record in records]


def test_coefficients_are_the_papers():
    assert COEFFICIENTS == (0.0, 0.001, 0.01, 0.04, 0.09, 0.16, 0.25, 0.36, 0.49, 0.64, 0.81, 1.0)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_standardises_each_feature(offset):
    raw = torch.rand(50, 2, 3, generator=drawn(), dtype=torch.float64) * 7 + 3
    raw[:, 0, 1] = 5.0
    x = standardised(raw, offset)
    assert x.shape == (50, 6)
    assert x.mean(0).abs().max() < 1e-12
    std = raw.flatten(1).std(0, correction=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.where(std > 0, std / (std + offset), 0.0))
    assert not x[:, 1].any()


def test_patches_are_windows_of_the_images():
    images, rows, columns = torch.meshgrid(torch.arange(5), torch.arange(12), torch.arange(20), indexing="ij")
    images = torch.stack([images, rows, columns], 1)
    found = patches(images, 4000, generator=drawn())
    assert found.shape == (4000, 3, 8, 8)
    corner = found[:, :, :1, :1]
    offsets = torch.stack(torch.meshgrid(torch.tensor([0]), torch.arange(8), torch.arange(8), indexing="ij"), 0)[:, 0]
    assert torch.equal(found, corner + offsets)
    starts = corner.flatten(1).T
    assert [set(part.tolist()) for part in starts] == [set(range(5)), set(range(5)), set(range(13))]


def test_a_step_is_momentum_and_projection():
    x = samples(50, dtype=torch.float64)
    trained, by_hand = (AutoEncoder(16, 10, "sigmoid", generator=drawn(3), dtype=torch.float64) for _ in range(2))
    fit(trained, x, "sae", 0.4, unit_norm=True, epochs=3, lr=0.01)
    buffers = [torch.zeros_like(parameter) for parameter in by_hand.parameters()]
    with torch.no_grad():
        by_hand.weight /= by_hand.weight.norm(dim=1, keepdim=True)
    for _ in range(3):  # one batch is all the data, in another order
        gradients = torch.autograd.grad(OBJECTIVES["sae"](by_hand, x, 0.4, None), by_hand.parameters())
        with torch.no_grad():
            for parameter, buffer, gradient in zip(by_hand.parameters(), buffers, gradients, strict=True):
                buffer.mul_(0.9).add_(gradient)
                parameter -= 0.01 * buffer
            by_hand.weight /= by_hand.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trained.weight, by_hand.weight)
    torch.testing.assert_close(trained.bias, by_hand.bias)


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus"])
def test_measures_after_each_pass(activation, unit_norm):
    x = samples(130)
    autoencoder = AutoEncoder(16, 10, activation, generator=drawn(3))
    (row,) = fit(autoencoder, x, "dae", 0.1, unit_norm=unit_norm, epochs=1, lr=0.001, generator=drawn())
    with torch.no_grad():
        codes = autoencoder.encode(x)
        error = (autoencoder(x) - x).square().sum(1).mean()
    active = codes > (0.0 if activation == "relu" else 0.1)
    assert row.reconstruction == pytest.approx(float(error), rel=1e-5)
    assert row.activation_fraction == pytest.approx(float(active.float().mean()), abs=1e-6)
    assert row.dead_share == pytest.approx(float((~active).all(0).float().mean()), abs=1e-6)
    lengths = autoencoder.weight.detach().norm(dim=1)
    assert (abs(float(lengths.mean()) - 1) < 1e-5) == unit_norm


def test_dead_units_are_those_that_no_sample_activates():
    autoencoder = AutoEncoder(1, 4, "relu").requires_grad_(False)
    autoencoder.weight.fill_(1.0)
    autoencoder.bias.copy_(torch.tensor([0.5, -7999.5, -9000.0, -9999.0]))
    x = torch.arange(10_000.0)[:, None]
    (row,) = fit(autoencoder.requires_grad_(), x, "ae", 0.0, unit_norm=False, epochs=1, lr=1e-30)
    assert row.dead_share == 0.25
    assert row.activation_fraction == pytest.approx((10_000 + 2000 + 999) / 40_000, abs=1e-6)
    autoencoder.bias.detach()[3] = -9998.5  # the last sample alone
    (row,) = fit(autoencoder, x, "ae", 0.0, unit_norm=False, epochs=1, lr=1e-30)
    assert row.dead_share == 0.0


def test_the_loss_of_a_pass_weighs_all_samples_alike():
    x = samples(70)
    x[50:] *= 3
    autoencoder = AutoEncoder(16, 10, "relu", generator=drawn(3))
    (row,) = fit(autoencoder, x, "ae", 0.0, unit_norm=False, epochs=1, lr=1e-12)
    assert row.loss == pytest.approx(row.reconstruction, rel=1e-4)


def test_the_seed_says_it_all():
    x, state = samples(200), torch.get_rng_state()
    runs = [train("dae", "relu", 0.1, True, x, epochs=2, hidden=10, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].epochs == runs[1].epochs
    assert runs[0].epochs != runs[2].epochs
    assert runs[0].epochs[1].reconstruction < runs[0].epochs[0].reconstruction
    stored = json.loads(json.dumps(dataclasses.asdict(runs[0]), allow_nan=False))
    assert stored["epochs"][1] == dataclasses.asdict(runs[0].epochs[1])


@pytest.mark.parametrize("objective", ["cae", "mdae", "dae", "sae"])
def test_sigmoids_of_unit_norm_grow_sparser_with_the_coefficient(objective):
    active = activity(
        sweep(objective, "sigmoid", True, samples(), (0.0, 0.25, 1.0, 4.0), epochs=20, hidden=24, lr=0.02)
    )
    assert active == sorted(active, reverse=True)
    assert active[-1] < active[0] - 0.1


def test_relus_of_unit_norm_obey_noise_and_not_the_penalty():
    x = samples()
    flat, falling = (
        activity(sweep(name, "relu", True, x, (0.0, 0.25, 1.0), epochs=15, hidden=24, lr=0.002))
        for name in ("mdae", "dae")
    )
    assert max(flat) - min(flat) < 0.03
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0] - 0.15


def test_a_run_that_diverges_ends():
    record = train("dae", "relu", 0.1, False, samples(200), epochs=5, hidden=24, lr=10.0)
    assert record.diverged
    assert len(record.epochs) < 5
    assert all(math.isfinite(value) for row in record.epochs for value in dataclasses.astuple(row))


def record(coefficient, active, dead, diverged=False):
    epochs = () if active is None else (Epoch(9.0, 8.0, 0.9, 0.0), Epoch(5.0, 4.0, active, dead))
    return Record("dae", "relu", coefficient, True, 10, 0.1, 0, epochs, diverged, 1.0)


def test_says_what_it_found():
    falling = [record(1.0, 0.05, 0.4), record(0.0, 0.5, 0.0), record(0.25, 0.2, 0.0)]
    flat = [record(0.0, 0.51, 0.0), record(0.25, 0.52, 0.0), record(1.0, None, None, diverged=True)]
    diagnosis = describe({"dae": falling, "mdae": flat})
    assert diagnosis.found == (
        "Share of the samples that activate a unit: 50 % in dae at 0, 5 % at 1 (40 % of the units dead), falling at 2 "
        "of 2 steps; 51 % in mdae at 0, 52 % at 0.25 (0 % of the units dead), falling at 0 of 1 steps. "
        "Diverged: 1 of 3 in mdae."
    )
    assert describe({"dae": falling[:1]}).found == (
        "Share of the samples that activate a unit: 5 % in dae at 1 (40 % of the units dead)."
    )
    assert describe({"mdae": flat[2:]}).found == "Diverged: 1 of 1 in mdae."
    numbers = json.loads(json.dumps(diagnosis.numbers, allow_nan=False))
    assert [row["activation_fraction"] for row in numbers["dae"]] == [0.5, 0.2, 0.05]
    assert numbers["mdae"][2] == {"coefficient": 1.0, "diverged": True} | dict.fromkeys(
        ("loss", "reconstruction", "activation_fraction", "dead_share")
    )
    lines = diagnosis.figures[0].lines
    assert [(line.name, line.x, line.y) for line in lines] == [
        ("dae", [0.0, 0.25, 1.0], [0.5, 0.2, 0.05]),
        ("mdae", [0.0, 0.25], [0.51, 0.52]),
    ]


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda: train("vae", "relu", 0.1, True, samples(9)), "no objective 'vae'; choose one of ae, dae"),
        (lambda: train("dae", "tanh", 0.1, True, samples(9)), "no activation 'tanh'"),
        (lambda: train("dae", "identity", 0.1, True, samples(9)), "activation 'identity' never falls silent; use one"),
        (lambda: train("sae", "relu", 0.1, True, samples(9)), "activation is 'relu', whose codes may pass 1"),
        (lambda: train("dae", "relu", -1.0, True, samples(9)), "coefficient is -1.0; expected"),
        (
            lambda: train("dae", "relu", 0.1, True, torch.zeros(3, 1, 2, 2)),
            r"\(3, 1, 2, 2\); expected samples, \(N, n\), as standardised",
        ),
        (lambda: train("dae", "relu", 0.1, True, torch.zeros(0, 4)), r"data are torch.float32 \(0, 4\)"),
        (lambda: train("dae", "relu", 0.1, True, torch.zeros(3, 4, dtype=torch.uint8)), "data are torch.uint8"),
        (lambda: train("dae", "relu", 0.1, True, samples(9), epochs=0), "epochs=0, batch_size=50"),
        (lambda: train("dae", "relu", 0.1, True, samples(9), lr=math.nan), "lr=nan; expected positive"),
        (lambda: patches(torch.zeros(2, 3, 7, 9), 5), "expected .N, C, H, W., 8 pixels a side"),
        (lambda: describe({}), "no runs to describe"),
        (lambda: describe({"dae": []}), "no runs to describe"),
    ],
)
def test_errors(act, line):
    with pytest.raises(ConfigError, match=line) as error:
        act()
    assert "\n" not in str(error.value)
