"""Training losses of deep networks with SELU and batch norm."""

import dataclasses
import importlib

import numpy as np
import pytest

from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import selu_depth as module
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.selu_depth import DEPTHS, METHODS
from normprop.experiments.trial import COMPLETE, TrialRecord
from normprop.report.reproduction import figure, markdown


def curves(**last):
    """Three seeds each; losses that fall from 2 to what is given for a method."""
    return {
        (method, depth): {seed: [2.0, value + 0.01 * seed, value] for seed in range(3)}
        for depth in DEPTHS
        for method, value in last.items()
    }


def test_a_lower_and_steadier_loss_agrees():
    found = curves(selu=0.1, batch=0.5)
    for depth in DEPTHS:
        found["batch", depth] = {seed: [2.0, 0.4, 0.5 + 0.01 * seed] for seed in range(3)}
    assert module._lower("MNIST", found) == (
        True,
        "MNIST: the last training loss of selu is below batch norm's by more than noise at 3 of 3 depths: "
        + ", ".join(f"0.100 ± 0.000 against 0.510 ± 0.010 at {depth} layers" for depth in DEPTHS)
        + " (the paper: SELU learns faster at all).",
    )
    agrees, text = module._steadier("MNIST", found)
    assert agrees
    assert "0.0000 ± 0.0000 on average with selu and by 0.0550 ± 0.0050 with batch" in text


def test_a_higher_loss_contradicts():
    found = curves(selu=0.5, batch=0.1)
    assert not module._lower("MNIST", found)[0]
    agrees, text = module._steadier("MNIST", found)
    assert not agrees
    assert "no difference beyond the noise" in text


def test_divergence_is_said():
    nothing = {cell: {} for cell in curves(selu=0.1, batch=0.1)}
    agrees, text = module._lower("MNIST", nothing)
    assert not agrees
    assert "at 0 of 3 depths: diverged against diverged at 8 layers" in text
    assert not module._steadier("MNIST", nothing)[0]
    assert module._lower("MNIST", nothing | {c: f for c, f in curves(selu=0.1).items() if c[0] == "selu"})[0]


def test_own_rates_are_told():
    def record(method, depth):
        epochs = [{"epoch": 1, "train_loss": 0.1 if method == "selu" else 0.5}]
        return TrialRecord(Combination(f"{method}, {depth} layers", 8, 0.1, 0), COMPLETE, epochs=epochs)

    tuned = {(method, depth): [record(method, depth)] for depth in DEPTHS for method in METHODS}
    assert module._at_best(tuned["selu", 8]) == "0.100 (0.1)"
    assert module._at_best([]) == "every rate diverged"
    text = module._own_rates("MNIST", tuned)
    assert text.startswith("MNIST, each with its own best rate: the last training loss of selu is below")
    assert "0 of 3 depths" in text  # of one seed nothing is known to be more than noise


@pytest.mark.parametrize("method", METHODS)
def test_depth_comes_with_the_name(method):
    network = module.mnist_small(norm=f"{method}, 16 layers")
    assert len(network) == 1 + 16 + 1


def test_a_tiny_protocol_runs_and_resumes(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for data, shape in (("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))):
        arrays = {f"x_{part}": draw.random((40, *shape), dtype=np.float32) for part in ("train", "test")}
        np.savez(tmp_path / f"{data}.npz", **arrays, y_train=np.arange(40) % 10, y_test=np.arange(40) % 10)
    settings = module._settings

    def tiny(context, data):
        found = settings(context, data)
        training = dataclasses.replace(found.training, epochs=2)
        path = str(tmp_path / f"{data}.npz")
        return dataclasses.replace(found, data=path, training=training, train=None, validation=None, test=None)

    monkeypatch.setattr(module, "_settings", tiny)
    monkeypatch.setattr(module, "DEPTHS", (1, 2))
    monkeypatch.setitem(module.RATES, "small", (0.01,))
    context = Context("small", f"sqlite:///{tmp_path}/study.db", accelerator="cpu", workers=1, seeds=1)
    first = module.run(context)
    assert [row[:2] for row in first.table.rows] == [(d, n) for d in ("MNIST", "CIFAR-10") for n in ("1", "2")]
    assert len(first.agrees) + len(first.contradicts) == 4
    assert figure(first).startswith("<svg")
    assert "1e-5" in markdown(first, "normprop reproduce", "x.svg")
    # The package's name "compare" is the function; without this no worker can start.
    monkeypatch.setattr(importlib.import_module("normprop.experiments.compare"), "process", None)
    assert module.run(context) == first
