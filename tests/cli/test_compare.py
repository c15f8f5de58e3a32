"""`normprop compare` from end to end."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from normprop.errors import ConfigError
from normprop.experiments.compare import Progress, train
from normprop.experiments.grid import Combination
from normprop.experiments.settings import Settings
from normprop.experiments.study import Study
from normprop.experiments.worker import run_trial
from normprop.training.config import TrainConfig

LARGER = ["compare", "--data", "digits", "--model", "mlp", "--width", "0.125", "--train", "1000", "--test", "50"]


def open_study(name, directory):
    return Study(f"sqlite:///{directory}/runs/{name}/study.db", name)


def wait_for_running(name, directory, process, count=1):
    """Wait until workers have trials in hand and have trained some of them, and return these."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if (directory / "runs" / name / "study.db").exists():
            try:
                running = open_study(name, directory).running()
            except Exception:  # the tables are just being made
                running = []
            if len(running) >= count and all(record.epochs for record in running):
                return running
        time.sleep(0.2)
    pytest.fail(f"no trial was started: {process.communicate()}")


def test_end_to_end_with_two_workers(normprop, here, directory, tiny):
    arguments = ["compare", *tiny, "--methods", "none,batch,normprop", "--batch-sizes", "1,16", "--lrs", "0.02,1e6"]
    arguments += ["--seeds", "0,1", "--workers", "2", "--step-time", "0.1"]
    result = normprop(*arguments)
    assert result.returncode == 0, result.err
    report = Path(result.out.splitlines()[-1])
    assert report.read_text().lower().startswith("<!doctype html>")
    assert report.parent == Path("runs/digits-mlp")
    assert "24/24 trials" in result.err

    document = json.loads((directory / "runs/digits-mlp/results.json").read_text())
    assert document["methods"] == ["none", "batch", "normprop"]
    assert document["batch_sizes"] == [1, 16]
    assert document["lrs"] == [0.02, 1e6]
    assert document["seeds"] == [0, 1]
    assert document["command"].startswith("normprop compare --data digits")
    assert document["settings"]["train"] == 64
    assert {"normprop", "torch", "numpy", "python"} <= set(document["versions"])
    assert len(document["trials"]) == 24

    rows = {(row["method"], row["batch_size"]): row for row in document["table"]}
    assert len(rows) == 6
    for trial in document["trials"]:
        if (trial["method"], trial["batch_size"]) == ("batch", 1):
            assert trial["status"] == "impossible"
            assert "more than 1 value per channel" in trial["reason"]
        elif trial["method"] == "none" and trial["lr"] == 1e6:
            assert trial["status"] == "diverged"
            assert trial["reason"]
            assert trial["curve"]
            assert trial["test_error"] is None
        elif trial["lr"] == 0.02:
            assert trial["status"] == "complete"
            assert [epoch["epoch"] for epoch in trial["curve"]] == [0, 1]
            assert trial["layers"]
            assert 0 <= trial["test_error"] <= 1
    assert "more than 1 value" in rows["batch", 1]["impossible"]
    assert rows["none", 16]["best_lr"] == 0.02
    assert rows["none", 16]["diverged_lrs"] == [1e6]
    assert rows["none", 16]["seeds"] == 2
    assert rows["none", 16]["step_time"] == 1.0
    assert rows["normprop", 1]["step_time"] > 0
    assert rows["batch", 1]["step_time"] is None

    # A second run has nothing left to train; a method more trains that method alone.
    before = {trial["method"]: trial["curve"] for trial in document["trials"] if trial["seed"] == 1}
    arguments[arguments.index("none,batch,normprop")] = "layer"
    again = here(*arguments, "--json")
    assert again.returncode == 0, again.err
    assert again.err == ""
    grown = json.loads(again.out)
    assert grown["methods"] == ["none", "batch", "normprop", "layer"]
    assert len(grown["trials"]) == 32
    assert (
        before.items() <= {trial["method"]: trial["curve"] for trial in grown["trials"] if trial["seed"] == 1}.items()
    )
    layer = [row for row in grown["table"] if row["method"] == "layer"]
    assert all(row["step_time"] is not None for row in layer)


def test_rates_are_tuned_on_some_seeds_and_a_method_that_cannot_build_is_one_row(here, directory, tiny):
    arguments = ["compare", *tiny, "--methods", "none,instance", "--batch-sizes", "16", "--lrs", "1e-6,0.03"]
    arguments += ["--seeds", "0,1,2", "--tuning-seeds", "1", "--workers", "1", "--step-time", "0", "--json"]
    document = json.loads(here(*arguments).out)
    ran = {(trial["lr"], trial["seed"]) for trial in document["trials"] if trial["method"] == "none"}
    assert ran == {(1e-6, 0), (0.03, 0), (0.03, 1), (0.03, 2)}
    none, instance = document["table"]
    assert (none["best_lr"], none["seeds"]) == (0.03, 3)
    assert instance["impossible"] == next(t["reason"] for t in document["trials"] if t["method"] == "instance")
    assert "norms.instance" in instance["impossible"]
    again = json.loads(here(*arguments).out)
    assert again["trials"] == document["trials"]


def test_a_better_rate_that_comes_later_is_trained_with_all_seeds(here, tiny):
    arguments = ["compare", *tiny, "--methods", "none", "--batch-sizes", "16", "--workers", "1", "--step-time", "0"]
    arguments += ["--seeds", "0,1,2", "--tuning-seeds", "1", "--json"]
    (row,) = json.loads(here(*arguments, "--lrs", "1e-6").out)["table"]
    assert (row["best_lr"], row["seeds"]) == (1e-6, 3)
    (row,) = json.loads(here(*arguments, "--lrs", "0.03").out)["table"]
    assert (row["best_lr"], row["seeds"]) == (0.03, 3)


def test_a_network_that_no_method_builds_and_an_unknown_method_are_errors(here, line, tiny):
    wrong = ["compare", "--data", "digits", "--model", "mlp", "--step-time", "0"]
    assert "there are all, none" in line(*wrong, "--methods", "bach")
    assert "instance norm" in line(*wrong, "--methods", "instance")


def test_a_worker_that_does_not_know_a_method_leaves_its_trial_alone(directory):
    settings = Settings(model="mlp")
    study = Study.create(f"sqlite:///{directory}/study.db", "s", {})
    study.enrol([Combination("of-a-newer-version", 8, 0.1, 0)])
    with pytest.raises(ConfigError, match="no method 'of-a-newer-version'"), study.claim("me") as turn:
        run_trial(turn, settings, settings.load())
    assert not study.trials()


def test_other_settings_are_refused(here, line, tiny):
    arguments = ["compare", *tiny, "--methods", "none", "--batch-sizes", "16", "--lrs", "0.02", "--seeds", "0"]
    quiet = here(*arguments, "--step-time", "0", "--quiet")
    assert quiet.returncode == 0
    assert quiet.err == ""
    assert "'digits-mlp' was made with epochs=1, not epochs=2" in line(*arguments, "--epochs", "2")
    assert "was made with train=64, not train=65" in line(*arguments, "--train", "65")
    assert "was made with augment=[], not augment=['flip']" in line(*arguments, "--augment", "flip")


def test_ctrl_c_puts_trials_back_and_says_how_to_resume(start, directory):
    arguments = [*LARGER, "--methods", "none", "--batch-sizes", "1", "--lrs", "0.001", "--seeds", "0,1"]
    process = start(*arguments, "--epochs", "200", "--workers", "2")
    running = wait_for_running("digits-mlp", directory, process, count=2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers alike
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    last = err.splitlines()[-1]
    assert last.endswith("Resume with: normprop " + " ".join([*arguments, "--epochs 200 --workers 2"]))
    assert "Traceback" not in err
    study = open_study("digits-mlp", directory)
    assert {record.combination for record in study.trials()} == {record.combination for record in running}
    assert {record.status for record in study.trials()} == {"waiting"}


def test_kill_ends_what_a_script_runs_in_the_background(start, directory):
    arguments = [*LARGER, "--methods", "none", "--batch-sizes", "1", "--lrs", "0.001", "--seeds", "0"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell without job control starts "command &"
    try:
        process = start(*arguments, "--epochs", "200", "--workers", "1")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for_running("digits-mlp", directory, process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Resume with: normprop " in err.splitlines()[-1]
    assert {record.status for record in open_study("digits-mlp", directory).trials()} == {"waiting"}


def test_killed_worker_costs_the_trial_in_progress_alone(start, here, directory):
    arguments = [*LARGER, "--methods", "none", "--batch-sizes", "1", "--lrs", "0.001", "--seeds", "0,1,2,3"]
    arguments += ["--epochs", "2", "--workers", "1", "--step-time", "0"]
    process = start(*arguments)
    wait_for_running("digits-mlp", directory, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    worker = next(pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "all workers were killed (signal 9)" in err.splitlines()[-1]
    left = open_study("digits-mlp", directory).unfinished()
    assert left >= 1
    result = here(*arguments)
    assert result.returncode == 0, result.err
    assert [record.status for record in open_study("digits-mlp", directory).trials()] == ["complete"] * 4


def test_trials_that_another_process_adds_at_the_very_end_are_trained_too(directory):
    training = TrainConfig(epochs=1, accelerator="cpu")
    settings = Settings(model="mlp", width=0.125, train=64, test=50, training=training)
    storage, first, second = (
        f"sqlite:///{directory}/study.db",
        *(Combination("none", 16, 0.02, seed) for seed in (0, 1)),
    )
    added = []

    def progress(_: Progress) -> None:
        study = Study(storage, "s")
        if not added and study.unfinished() == 0:
            added.append(study.enrol([second]))

    study = train(settings, [first], storage=storage, name="s", workers=1, progress=progress)
    assert added == [1]
    assert {record.combination: record.status for record in study.trials()} == dict.fromkeys(
        [first, second], "complete"
    )


def test_workers_end_with_their_parent(start, directory):
    process = start(
        *LARGER, "--methods", "none", "--batch-sizes", "1", "--lrs", "0.001", "--seeds", "0", "--epochs", "200"
    )
    (running,) = wait_for_running("digits-mlp", directory, process)
    process.kill()
    process.communicate()
    study = open_study("digits-mlp", directory)
    deadline = time.monotonic() + 30
    while study.running():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [record.combination for record in study.trials()] == [running.combination]
    assert study.trials()[0].status == "waiting"


def test_own_data_and_own_network(here, directory):
    generator = np.random.default_rng(0)
    labels = np.arange(120) % 3
    features = (generator.normal(size=(120, 6)) + 4 * np.eye(3, 6)[labels]).astype(np.float32)
    np.savez("own.npz", x_train=features[:90], y_train=labels[:90], x_test=features[90:], y_test=labels[90:])
    (directory / "mine.py").write_text(
        "from torch import nn\n"
        "from normprop import norms\n"
        "def factory(norm):\n"
        "    return nn.Sequential(norms.block(norm, dims=0)(6, 16), nn.Linear(16, 3))\n"
    )
    arguments = ["compare", "--data", "own.npz", "--model", "mine:factory", "--methods", "none,normprop"]
    arguments += ["--batch-sizes", "8", "--lrs", "0.05", "--seeds", "0", "--epochs", "5", "--step-time", "0"]
    result = here(*arguments, "--out", "results", "--study", "mine", "--workers", "1", "--json")
    assert result.returncode == 0, result.err
    document = json.loads(result.out)
    assert document["title"] == "mine:factory on own"
    assert [trial["status"] for trial in document["trials"]] == ["complete", "complete"]
    assert all(row["error_mean"] < 0.3 for row in document["table"])  # the classes lie far apart
    assert {path.name for path in (directory / "results").iterdir()} == {"study.db", "results.json", "report.html"}


def test_report_is_written_again_from_the_storage(here, line, directory, tiny):
    storage = f"sqlite:///{directory}/elsewhere.db"
    arguments = ["--methods", "none", "--batch-sizes", "16", "--lrs", "0.02", "--seeds", "0", "--step-time", "0"]
    first = here("compare", *tiny, *arguments, "--storage", storage, "--study", "s", "--json")
    assert first.returncode == 0, first.err
    (directory / "runs/s/results.json").unlink()
    (directory / "runs/s/report.html").unlink()
    again = here("report", "s", "--storage", storage, "--json")
    assert again.returncode == 0, again.err
    assert json.loads(again.out) == json.loads(first.out)
    assert (directory / "runs/s/report.html").exists()
    assert "no study 'other' in this storage: it holds s" in line("report", "other", "--storage", storage)
