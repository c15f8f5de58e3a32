"""The study: who runs which trial, and what happens to trials of workers that die."""

import multiprocessing
import os
import signal
import time
from collections import Counter

import optuna
import pytest
import sqlalchemy

from normprop.errors import ConfigError
from normprop.experiments import storage
from normprop.experiments.grid import Combination, Grid
from normprop.experiments.study import Study, names

SETTINGS = {"epochs": 1, "data": "digits"}
GRID = Grid(methods=["none", "normprop"], batch_sizes=[8], lrs=[0.1, 0.2], seeds=[0, 1])
OUTCOME = {"validation_error": 0.2, "test_error": 0.3, "train_loss": 1.0, "seconds": 1.0, "steps": 3}
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def study(url):
    study = Study.create(url, "s", SETTINGS)
    study.enrol(GRID.combinations())
    return study


def statuses(study):
    return Counter(record.status for record in study.trials())


def take_all(url, barrier, taken):
    study = Study(url, "s")
    barrier.wait()
    while (turn := study.claim(f"{os.getpid()}")) is not None:
        taken.put(turn.combination)
        turn.finish("complete", **OUTCOME)


def hold_one(url, lease, ready):
    study = Study(url, "s", lease=lease)
    with study.claim("held") as turn:
        turn.record({"epoch": 1, "layers": []})
        ready.put(turn.combination)
        time.sleep(600)


def test_enrolment_adds_only_what_is_missing(study):
    assert len(study.trials()) == 8
    assert study.enrol(GRID.combinations()) == 0
    larger = Grid(methods=["none", "normprop", "batch"], batch_sizes=[8], lrs=[0.1, 0.2], seeds=[0, 1])
    assert study.enrol(larger.combinations()) == 4
    assert len({record.combination for record in study.trials()}) == len(study.trials()) == 12


def test_trials_are_taken_seed_by_seed_also_those_added_later(study):
    study.enrol([Combination("batch", 8, 0.1, 0)])
    seeds = [study.claim("w").combination.seed for _ in range(9)]
    assert seeds == [0] * 5 + [1] * 4
    assert study.claim("w") is None


def test_no_trial_runs_twice_in_two_processes(url):
    study = Study.create(url, "s", SETTINGS)
    study.enrol(Grid(["a", "b"], [1, 2], [0.1, 0.2], list(range(8))).combinations())
    barrier, taken = SPAWN.Barrier(2), SPAWN.SimpleQueue()
    workers = [SPAWN.Process(target=take_all, args=(url, barrier, taken)) for _ in range(2)]
    for worker in workers:
        worker.start()
    combinations = [taken.get() for _ in range(64)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert taken.empty()
    assert len(set(combinations)) == 64
    assert statuses(study) == {"complete": 64}


def test_outcome_and_curve_are_stored(study, url):
    with study.claim("w") as turn:
        turn.record({"epoch": 0, "train_loss": None, "layers": [{"layer": "0", "mean": 0.0, "std": 1.0}]})
        turn.record({"epoch": 1, "train_loss": float("nan"), "layers": []})
        turn.finish("complete", reason=None, **OUTCOME)
    record = next(record for record in Study(url, "s").trials() if record.status == "complete")
    assert record.combination == Combination("none", 8, 0.1, 0)
    assert record.test_error == 0.3
    assert record.steps == 3
    assert [epoch["epoch"] for epoch in record.epochs] == [0, 1]
    assert record.epochs[0]["layers"] == [{"layer": "0", "mean": 0.0, "std": 1.0}]
    assert record.epochs[1]["train_loss"] is None


@pytest.mark.parametrize("status", ["diverged", "impossible"])
def test_diverged_and_impossible_trials_are_kept_with_reason_and_curve(study, status):
    with study.claim("w") as turn:
        turn.record({"epoch": 0, "layers": []})
        turn.finish(status, reason="loss was nan at step 31", seconds=1.0, steps=31)
    record = next(record for record in study.trials() if record.status == status)
    assert record.reason == "loss was nan at step 31"
    assert record.test_error is None
    assert len(record.epochs) == 1
    assert study.unfinished() == 7
    assert study.enrol(GRID.combinations()) == 0


def test_interrupted_trial_waits_again(study):
    turn = study.claim("w")
    turn.record({"epoch": 5, "layers": []})
    with pytest.raises(KeyboardInterrupt), turn:
        raise KeyboardInterrupt
    assert statuses(study) == {"waiting": 8}
    again = next(record for record in study.trials() if record.combination == turn.combination)
    assert again.epochs == []
    assert study.claim("w").combination.seed == turn.combination.seed


def test_failed_trial_is_neither_waiting_nor_lost(study):
    with pytest.raises(RuntimeError, match="bug"), study.claim("w"):
        raise RuntimeError("bug")
    assert study.unfinished() == 7
    assert study.enrol(GRID.combinations()) == 1


def test_trial_of_a_killed_worker_is_put_back_when_its_lease_ends(study, url):
    ready = SPAWN.SimpleQueue()
    worker = SPAWN.Process(target=hold_one, args=(url, 2, ready))
    worker.start()
    held = ready.get()
    impatient = Study(url, "s", lease=2)
    time.sleep(4)  # longer than the lease, but the worker gives signs of life
    others = [impatient.claim("w").combination for _ in range(7)]
    assert held not in others
    assert impatient.claim("w") is None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    deadline = time.monotonic() + 20
    while (turn := impatient.claim("w2")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert turn.combination == held


def test_result_of_a_worker_that_lost_its_trial_is_dropped(study):
    turn = study.claim("slow")
    study.release("slow")
    with turn:
        turn.finish("complete", **OUTCOME)
        pytest.fail("the trial belongs to somebody else")
    assert statuses(study) == {"waiting": 8}


def test_other_settings_are_refused_and_named(study, url):
    with pytest.raises(ConfigError, match=r"'s' was made with epochs=1, not epochs=2"):
        Study.create(url, "s", SETTINGS | {"epochs": 2})
    with pytest.raises(ConfigError, match=r"width=None, not width=2"):
        Study.create(url, "s", SETTINGS | {"width": 2})
    assert Study.create(url, "s", SETTINGS).unfinished() == 8


def test_a_study_from_before_a_setting_existed_has_its_default(url):
    Study.create(url, "older", {"epochs": 1})
    Study.create(url, "older", {"epochs": 1, "gain_rate": 1.0})
    with pytest.raises(ConfigError, match=r"'older' was made with gain_rate=1.0, not gain_rate=4.0"):
        Study.create(url, "older", {"epochs": 1, "gain_rate": 4.0})


def test_missing_study_and_unreachable_storage_are_one_line(study, url, tmp_path):
    with pytest.raises(ConfigError, match=r"no study 'other' in this storage: it holds s$"):
        Study(url, "other")
    assert names(url) == ["s"]
    for bad in ("nonsense", "nodialect://x", f"sqlite:///{tmp_path}/missing/study.db"):
        with pytest.raises(ConfigError, match="does not open") as caught:
            Study.create(bad, "s", SETTINGS)
        assert "\n" not in str(caught.value)


def test_a_combination_added_twice_counts_once(study, url):
    # Two shells that start the same comparison at the same moment may both add the trials that they find missing.
    study._add(Combination("none", 8, 0.1, 0))
    assert len(study.trials()) == 8
    taken = [study.claim("w").combination for _ in range(8)]
    assert len(set(taken)) == 8
    assert study.claim("w") is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"methods": []}, "methods is empty"),
        ({"lrs": [0.1, 0.1]}, "lrs names 0.1 more than once"),
        ({"lrs": [float("nan")]}, "lrs holds nan"),
        ({"batch_sizes": [0]}, "batch_sizes holds 0"),
        ({"seeds": [-1]}, "seeds holds -1"),
        ({"tuning_seeds": 0}, "tuning_seeds is 0: expected 1 to 1"),
        ({"tuning_seeds": 2}, "tuning_seeds is 2: expected 1 to 1"),
    ],
)
def test_grids_that_cannot_work(change, line):
    with pytest.raises(ConfigError, match=line):
        Grid(**{"methods": ["none"], "batch_sizes": [1], "lrs": [0.1], "seeds": [0]} | change)


@pytest.mark.parametrize("error", [sqlalchemy.exc.IntegrityError, sqlalchemy.exc.OperationalError])
def test_two_that_make_the_tables_at_once_both_get_in(error, tmp_path, monkeypatch):
    calls = []

    class Racing(optuna.storages.RDBStorage):
        def __init__(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                raise error("INSERT", {}, Exception("UNIQUE constraint failed: alembic_version.version_num"))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Racing)
    assert storage.connect(f"sqlite:///{tmp_path}/study.db", 30, lambda study, trial: None).get_all_studies() == []
    assert len(calls) == 2
