"""Kalman norm against batch norm and group norm at statistics of two images."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from torch import nn

from normprop.experiments.reproduce import kalman_micro_batch as module
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.kalman_micro_batch import (
    ARMS,
    BATCH_2,
    BATCH_128,
    GROUP,
    KALMAN_2,
    KALMAN_128,
    SAMPLED_2,
    Difference,
)
from normprop.norms import registry
from normprop.report.reproduction import figure, markdown


def errors(**arms):
    values = {BATCH_2: 9.0, GROUP: 8.0, KALMAN_2: 7.0, SAMPLED_2: 7.0, BATCH_128: 6.0, KALMAN_128: 5.0}
    return {arm: {seed: value + 0.01 * seed * len(arm) for seed in range(3)} for arm, value in values.items()}


def claims(found):
    return [module._claim(pair, found) for pair in module._PAIRS]


def test_lower_errors_agree():
    found = claims(errors())
    assert all(agrees for agrees, _ in found)
    assert found[0][1] == (
        "Error of kalman on 2 images less that of batch on 2 images: -1.99 ± 0.01 points (the public code: about -1.0)."
    )


def test_higher_errors_contradict():
    found = errors()
    found[KALMAN_2] = {seed: 20.0 + seed / 10 for seed in range(3)}
    assert [agrees for agrees, _ in claims(found)] == [False, False, True, True, True]


def test_a_difference_within_the_noise_contradicts_and_says_so():
    found = errors()
    found[KALMAN_128] = {0: 1.0, 1: 6.0, 2: 10.0}
    agrees, text = claims(found)[-1]
    assert not agrees
    assert "no more than the noise over seeds" in text


def test_one_seed_shows_nothing():
    assert not Difference((5.0,)).clear
    assert str(Difference((5.0,))) == "+5.00 (one seed)"


def test_diverged_methods_contradict():
    assert claims({arm: {} for arm in ARMS}) == [
        (False, f"{ours} against {theirs}: one of the two diverged with every seed.") for ours, theirs in module._PAIRS
    ]


@pytest.fixture
def own_names(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.mark.usefixtures("own_names")
def test_networks_differ_in_their_statistics_alone():
    images = torch.randn(8, 3, 8, 8)
    networks = {arm: module.small(norm=arm) for arm in ARMS}
    assert all(network(images).shape == (8, 10) for network in networks.values())
    assert module.small(norm=GROUP)[0].norm.num_groups == 4
    parameters = {sum(p.numel() for p in network.parameters()) for network in networks.values()}
    assert len(parameters) == 1
    assert sum(isinstance(m, nn.Conv2d) for m in module.micro(norm=GROUP).modules()) == 31 + 2  # two projections


@pytest.mark.usefixtures("own_names")
def test_batch_norm_of_two_images_is_kalman_norm_without_prior():
    """Same outputs, and running averages that move alike."""
    torch.manual_seed(0)
    ghost = ARMS[BATCH_2].method.layer(2, 4)
    without = module.kalman.batch_method(prior_weight=0.0, micro_batch=2).block(2, 3, 4, 1).norm
    images = torch.randn(128, 4, 3, 3)
    torch.testing.assert_close(ghost(images), without(images)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ghost.running_var, without.running_var, rtol=0.02, atol=0.02)


def test_a_tiny_protocol_runs_and_resumes(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    arrays = {f"x_{part}": draw.random((60, 3, 8, 8), dtype=np.float32) for part in ("train", "test")}
    np.savez(tmp_path / "random.npz", **arrays, y_train=np.arange(60) % 10, y_test=np.arange(60) % 10)
    settings = module._settings

    def tiny(context, factory):
        found = settings(context, factory)
        training = dataclasses.replace(found.training, epochs=1)
        data = str(tmp_path / "random.npz")
        return dataclasses.replace(found, data=data, training=training, train=None, validation=None, test=None)

    monkeypatch.setattr(module, "_settings", tiny)
    context = Context("small", f"sqlite:///{tmp_path}/study.db", accelerator="cpu", workers=1, seeds=1)
    first = module.run(context)
    assert len(first.table.rows) == len(ARMS)
    assert len(first.agrees) + len(first.contradicts) == len(module._PAIRS)
    assert figure(first).startswith("<svg")
    assert "public code" in markdown(first, "normprop reproduce", "x.svg")
    # The package's name "compare" is the function; without this no worker can start.
    monkeypatch.setattr(importlib.import_module("normprop.experiments.compare"), "process", None)
    assert module.run(context) == first
