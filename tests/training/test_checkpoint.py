import os
from pathlib import Path

import pytest
import torch

from normprop.errors import CheckpointError
from normprop.training import checkpoint

STATE = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}, "step": 3, "curve": [{"loss": None}], "random": (1, 2)}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "runs" / "last.pt"
    checkpoint.save(path, STATE)
    return path


def test_round_trip(path):
    state = checkpoint.load(path)
    assert torch.equal(state.pop("model")["weight"], STATE["model"]["weight"])
    assert state == {name: value for name, value in STATE.items() if name != "model"}
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(path, monkeypatch, failure):
    def broken(state, file):
        file.write(b"half a checkpoint")
        raise failure

    monkeypatch.setattr(torch, "save", broken)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        checkpoint.save(path, {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/last\.pt: the checkpoint cannot be written: "):
        checkpoint.save(tmp_path / "file" / "last.pt", STATE)


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt: there is no such checkpoint"):
        checkpoint.load(tmp_path / "last.pt")


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match=r"last\.pt: not a checkpoint, or a damaged one"):
        checkpoint.load(path)


def test_foreign(path):
    path.write_text("epoch,loss\n1,2.3\n")
    with pytest.raises(CheckpointError, match=r"last\.pt: not a checkpoint, or a damaged one"):
        checkpoint.load(path)
    for content in ({"weight": torch.ones(2)}, torch.ones(2), [1, 2]):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"last\.pt: not a checkpoint of a training run"):
            checkpoint.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path.parent)


def test_another_version(path):
    torch.save({"format": "normprop checkpoint", "version": 99}, path)
    with pytest.raises(CheckpointError, match=r"last\.pt: checkpoint version 99, expected 1"):
        checkpoint.load(path)


def test_code_in_a_file_is_not_run(path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "exploded"),)

    torch.save({"format": "normprop checkpoint", "version": 1, "model": Bomb()}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_another_run():
    checkpoint.require_same_run(Path("a.pt"), {"lr": 0.1, "seed": 1}, {"seed": 1, "lr": 0.1})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_same_run(Path("a.pt"), {"lr": 0.1, "seed": 1, "old": 2}, {"seed": 1, "lr": 0.2})
    assert (
        str(caught.value) == "a.pt: belongs to another run: lr is 0.1 there and 0.2 here; old is 2 there and None here"
    )
