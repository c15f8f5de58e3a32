"""What weight decay does where batch norm follows."""

import dataclasses

import pytest
import torch

from normprop.experiments import norm_schedule
from normprop.experiments.norm_curves import ARMS
from normprop.experiments.reproduce import norm_matters_decay as module
from normprop.experiments.reproduce.context import Context
from normprop.report.reproduction import figure, markdown

TINY = dataclasses.replace(
    module.SMALL, data="digits", model="resnet8", width=0.25, train=60, test=50, epochs=2, batch_size=18, seeds=(0, 1)
)


@pytest.fixture(autouse=True, scope="module")
def _single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def errors(**means):
    named = {"decay": 10.0, "no decay": 14.0, "corrected rate": 10.2, "norm schedule": 9.8, "fixed rate": 18.0}
    named |= {name.replace("_", " "): value for name, value in means.items()}
    return {arm: {seed: value + 0.01 * seed * len(arm) for seed in range(3)} for arm, value in named.items()}


def test_a_gap_that_closes_agrees():
    claims = module._claims(errors())
    assert [agrees for agrees, _ in claims] == [True, True, True]
    assert claims[0][1] == "Without decay the error is +4.03 ± 0.03 points higher (the paper: higher)."
    assert "Correcting the rates leaves +0.29 ± 0.09 points to the error of decay, of +4.03" in claims[1][1]


def test_a_gap_that_stays_contradicts():
    assert [agrees for agrees, _ in module._claims(errors(corrected_rate=13.0, norm_schedule=15.0))] == [
        True,
        False,
        False,
    ]


def test_decay_that_does_nothing_shows_nothing():
    found = errors()
    found["no decay"] = {0: 5.0, 1: 10.0, 2: 16.0}
    claims = module._claims(found)
    assert [agrees for agrees, _ in claims] == [False, False, True]
    assert "no more than the noise over seeds" in claims[0][1]
    assert "this shows nothing" in claims[1][1]


def test_divergence_is_said():
    assert module._claims(errors() | {"fixed rate": {}}) == [(False, "An arm diverged with every seed: fixed rate.")]
    assert module._claims({arm: {} for arm in ARMS})[0][1].endswith(f"{', '.join(ARMS)}.")


def context(path, seeds=None):
    return Context("small", f"sqlite:///{path}/study.db", accelerator="cpu", seeds=seeds)


def test_a_tiny_protocol_runs_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL", TINY)
    first = module.run(context(tmp_path, seeds=1))
    assert [row[0] for row in first.table.rows] == list(ARMS)
    assert sum(len(rows) for found in first.numbers.values() for rows in found.values()) == 5 * 2
    steps = {arm: first.numbers[arm]["0"][-1]["effective_step"] for arm in ARMS}
    assert steps["norm schedule"] == pytest.approx(steps["decay"], rel=1e-5)
    assert steps["corrected rate"] == steps["decay"]
    assert figure(first).startswith("<svg")
    assert "not at hand" in markdown(first, "normprop reproduce", "x.svg")
    monkeypatch.setattr(norm_schedule, "train_arm", None)  # nothing can train
    assert module.run(context(tmp_path, seeds=1)) == first


def test_an_arm_that_lost_the_lengths_trains_decay_again(monkeypatch):
    trained = []
    train = norm_schedule.train_arm

    def noted(arm, *rest):
        trained.append(arm)
        return train(arm, *rest)

    monkeypatch.setattr(norm_schedule, "train_arm", noted)
    arm = {name: module.Combination(name, TINY.batch_size, TINY.lr, 0) for name in ARMS}
    together, alone = module._measure(TINY), module._measure(TINY)
    together(arm["decay"])
    curve = together(arm["corrected rate"])
    assert trained == ["decay", "corrected rate"]
    assert alone(arm["corrected rate"]) == curve
    assert trained == ["decay", "corrected rate"] * 2


def test_a_diverged_run_has_no_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL", dataclasses.replace(TINY, lr=1e30))
    found = module.run(context(tmp_path, seeds=1))
    assert found.contradicts == [f"An arm diverged with every seed: {', '.join(ARMS)}."]
    assert {row[2] for row in found.table.rows} == {"diverged"}
    assert figure(found).startswith("<svg")
