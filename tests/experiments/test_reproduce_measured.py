"""Reproductions that measure for themselves, at tiny protocols: they run, keep what they measured, and judge it."""

import pytest
import torch

from normprop import data
from normprop.data import Dataset, Split
from normprop.experiments.reproduce import (
    auto_lambda,
    autoencoder_sparsity,
    bjorck_divergence,
    bjorck_lr,
    cifar,
    meanfield_fisher,
    normprop_fig2,
    normprop_speed,
)
from normprop.experiments.reproduce.context import Context
from normprop.experiments.settings import Settings
from normprop.experiments.trial import COMPLETE, DIVERGED, TrialRecord, plain
from normprop.report.reproduction import figure, markdown
from normprop.training.config import TrainConfig


@pytest.fixture
def context(tmp_path):
    return Context("small", f"sqlite:///{tmp_path / 'study.db'}", accelerator="cpu", workers=1, seeds=1)


@pytest.fixture
def images(monkeypatch):
    """Small images in place of all data sets."""

    def load(name, data_dir=None, *, size=None):
        generator = torch.Generator().manual_seed(0)
        shape = (1, 12, 12) if name == "mnist" else (3, 16, 16)
        split = Split(
            torch.randint(256, (300, *shape), generator=generator, dtype=torch.uint8),
            torch.arange(300) % 10,
        )
        return Dataset(name, tuple("0123456789"), split, split[:40])

    monkeypatch.setattr(data, "load", load)


def tiny(context, **_):
    training = TrainConfig(epochs=2, momentum=0.9, accelerator="cpu")
    return Settings(data="cifar10", model="mlp", width=0.05, train=80, validation=20, test=20, training=training)


def check(module, context, monkeypatch):
    """The first run measures, the second finds everything."""
    found = module.run(context)
    assert found.agrees or found.contradicts
    assert all(len(row) == len(found.table.head) for row in found.table.rows)
    assert "<svg" in figure(found)
    assert found.title in markdown(found, "command", "picture.svg")
    original = Context.measure

    def only_kept(self, study, settings, combinations, run):
        def refuse(combination):
            raise AssertionError(f"{combination} was measured twice")

        return original(self, study, settings, combinations, refuse)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "measure", only_kept)
        assert plain(module.run(context).numbers) == plain(found.numbers)
    return found


def test_covariate_shift(context, images, monkeypatch):
    monkeypatch.setattr(cifar, "settings", tiny)
    monkeypatch.setattr(normprop_fig2, "_PROBE", 20)
    found = check(normprop_fig2, context, monkeypatch)
    assert {"normprop-paper", "batch", "normprop", "none"} == set(found.numbers)


def test_covariate_shift_is_judged_by_its_numbers():
    def layers(mean, drift):
        layer = {"layer": "1", "steps": (0, 1, 2), "mean": (mean,) * 3, "drift": (0.0, 0.0, drift)}
        return [layer | {"spread": (0.0,) * 3, "pace": (0.0,) * 2}]

    runs = {"normprop-paper": [layers(0.1, 1.0)], "batch": [layers(-0.4, 2.0)], "none": [layers(50.0, 1.0)]}
    claims = normprop_fig2._claims(runs)
    assert [agrees for agrees, _ in claims] == [True, True, True]
    assert "0.10 with normprop-paper and of 0.40" in claims[0][1]
    assert "diverged" in normprop_fig2._claims(runs | {"batch": []})[0][1]


def test_divergence(context, images, monkeypatch):
    monkeypatch.setattr(bjorck_lr, "settings", tiny)
    monkeypatch.setattr(bjorck_lr, "BATCH_SIZE", 16)
    monkeypatch.setattr(bjorck_divergence, "_STEPS", 5)
    monkeypatch.setattr(bjorck_divergence, "_BATCHES", 2)
    check(bjorck_divergence, context, monkeypatch)


def test_fisher(context, images, monkeypatch):
    for name, value in {"_WIDTH": 16, "_FEATURES": 8, "_SAMPLES": 16, "GAMMAS": (0.1, 1.0)}.items():
        monkeypatch.setattr(meanfield_fisher, name, value)
    monkeypatch.setattr(meanfield_fisher, "_STEPS", {"small": 10})
    found = check(meanfield_fisher, context, monkeypatch)
    assert "The largest stable rate is" in " ".join([*found.agrees, *found.contradicts])


def test_auto_lambda(context, images, monkeypatch):
    for name, value in {"_SIZES": {"small": (200, 5)}, "_HIDDEN": 4, "_RIDGES": (0.01, 0.1, 1.0)}.items():
        monkeypatch.setattr(auto_lambda, name, value)
    check(auto_lambda, context, monkeypatch)


def test_sparse_autoencoders(context, images, monkeypatch):
    tiny_scale = autoencoder_sparsity.Scale(60, 5, 1, (0.0, 1.0))
    monkeypatch.setattr(autoencoder_sparsity, "SCALES", {"small": tiny_scale})
    found = check(autoencoder_sparsity, context, monkeypatch)
    assert len(found.agrees) + len(found.contradicts) == 2 * len(autoencoder_sparsity.CASES)


@pytest.mark.parametrize(
    ("active", "shape"),
    [([0.9, 0.5, 0.1], "falls"), ([0.9, 0.899, 0.901], "flat"), ([0.5, 0.9, 0.2], "irregular")],
)
def test_shapes_of_curves(active, shape):
    points = [{"active": value, "low": value, "high": value, "dead": 0.0} for value in active]
    for expected in ("falls", "flat", "irregular"):
        case = autoencoder_sparsity.Case(1, "dae", "relu", True, expected, "so")
        assert autoencoder_sparsity._claim(case, "MNIST", points)[0] == (expected == shape)
    lost = [*points, {"active": None, "low": None, "high": None, "dead": None}]
    assert "1 coefficients diverged" in autoencoder_sparsity._claim(autoencoder_sparsity.CASES[0], "MNIST", lost)[1]


def test_speed(context, monkeypatch):
    monkeypatch.setattr(normprop_speed, "BATCH_SIZE", 2)
    monkeypatch.setattr(normprop_speed, "_SECONDS", {"small": 0.0})
    found = check(normprop_speed, context, monkeypatch)
    assert found.numbers["ratio to batch"]["batch"] == 1.0


def test_the_ladder_is_judged_by_its_numbers():
    def records(method, rate, errors):
        return [
            TrialRecord((method, 8, rate, seed), DIVERGED if error is None else COMPLETE, test_error=error)
            for seed, error in enumerate(errors)
        ]

    table = {
        ("none", 0.1): [0.5, 0.5],
        ("none", 1.0): [None, 0.5],
        ("batch", 0.1): [0.48, 0.48],
        ("batch", 1.0): [0.3, 0.3],
    }
    runs = {key: records(*key, errors) for key, errors in table.items()}
    assert bjorck_lr.largest_rate("none", runs) == 0.1
    assert bjorck_lr.largest_rate("batch", runs) == 1.0
    claims = bjorck_lr._claims(runs)
    assert [agrees for agrees, _ in claims] == [True, True]
    assert "gains +2.0 points" in claims[1][1]
    runs["batch", 0.1] = records("batch", 0.1, [0.3, 0.3])
    assert [agrees for agrees, _ in bjorck_lr._claims(runs)] == [False, False]
    runs["batch", 1.0] = records("batch", 1.0, [0.3, 0.89])  # a run that goes on at chance is lost
    assert bjorck_lr.largest_rate("batch", runs) == 0.1
    lost = {key: records(*key, [None]) for key in table}
    assert bjorck_lr._claims(lost)[0][1] == "A method diverged at every rate."
