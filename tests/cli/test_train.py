"""`normprop train`."""

import json
import os
import signal
import time

import pytest

from normprop.cli.app import run


def test_prints_a_line_per_epoch(capsys, tiny):
    assert run(["train", *tiny, "--method", "normprop", "--epochs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in lines] == ["epoch 0", "epoch 1", "epoch 2", "normprop"]


def test_json_is_json_alone(capsys, tiny):
    assert run(["train", *tiny, "--method", "batch", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.err == ""
    assert result["method"] == "batch"
    assert result["status"] == "complete"
    assert [record["epoch"] for record in result["curve"]] == [0, 1]


def test_quiet_prints_the_result_alone(capsys, tiny):
    assert run(["train", *tiny, "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_divergence_is_a_result(capsys, tiny):
    assert run(["train", *tiny, "--method", "none", "--lr", "1e6", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("none: diverged, ")


def test_checkpoint_resumes_to_the_same_result(capsys, tiny, directory, start):
    arguments = ["train", *tiny, "--train", "600", "--epochs", "12", "--batch-size", "1", "--lr", "0.001"]
    arguments += ["--method", "none"]
    process = start(*arguments, "--checkpoint", "last.pt")
    deadline = time.monotonic() + 100
    while not (directory / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("training ended before it could be stopped; give it more epochs")
    assert process.returncode == 130
    assert out.startswith("epoch 0")
    assert err.splitlines()[-1].endswith(
        "Resume with: normprop " + " ".join([*arguments, "--checkpoint last.pt --resume"])
    )
    assert "Traceback" not in err

    def curve(*more):
        assert run([*arguments, "--json", *more]) == 0
        records = json.loads(capsys.readouterr().out)["curve"]
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    assert curve("--checkpoint", "last.pt", "--resume") == curve()
