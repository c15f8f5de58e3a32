import random

import numpy as np
import pytest
import torch
from torch import nn

from normprop.data import Dataset
from normprop.errors import CheckpointError
from normprop.models import mlp
from normprop.training import TrainConfig, checkpoint
from normprop.training.loop import fit

CONFIG = TrainConfig(epochs=4, batch_size=8, lr=0.05, augment=("flip", "crop"), accelerator="cpu")


class NumpyNoise(nn.Module):
    """Noise from NumPy's and Python's generators, as people's own modules may draw."""

    def forward(self, x):
        return x + 0.01 * (np.random.standard_normal() + random.random()) if self.training else x


def network() -> nn.Module:
    return nn.Sequential(
        NumpyNoise(),
        nn.Dropout(0.1),
        mlp((1, 4, 4), 16, depth=1, hidden_features=16),
        nn.BatchNorm1d(16),
        nn.Linear(16, 3),
    )


class Stop:
    """Ends a run as Ctrl-C does, after an epoch or in the middle of the next."""

    def __init__(self, epoch):
        self.epoch = epoch

    def __call__(self, record):
        if record.epoch == self.epoch:
            raise KeyboardInterrupt


def assert_same(resumed, straight):
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(resumed.curve) == len(straight.curve)
    for one, other in zip(resumed.curve, straight.curve, strict=True):
        assert (one.epoch, one.step, one.lr, one.train_loss) == (other.epoch, other.step, other.lr, other.train_loss)
        assert (one.validation_error, one.test_error) == (other.validation_error, other.test_error)
        assert one.layers == other.layers
    assert resumed.steps == straight.steps


@pytest.mark.parametrize(
    "settings", [{}, {"schedule": "halving", "halve_every": 1}, {"optimizer": "muon", "decouple": True}]
)
def test_resumed_after_two_epochs_equals_four_straight(blobs, tmp_path, settings):
    config = TrainConfig(**{**vars(CONFIG), **settings})
    path = tmp_path / "last.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(network, blobs, config, callback=Stop(2), checkpoint=path)
    records = []
    resumed = fit(network, blobs, config, callback=records.append, checkpoint=path, resume=True)
    assert [record.epoch for record in records] == [3, 4]
    assert_same(resumed, fit(network, blobs, config))
    assert resumed.seconds == resumed.curve[-1].seconds > resumed.curve[2].seconds > 0


def test_killed_in_the_middle_of_an_epoch(blobs, tmp_path):
    path = tmp_path / "last.pt"
    calls = 0

    class Interrupts(nn.Module):
        def forward(self, x):
            nonlocal calls
            calls += self.training and torch.is_grad_enabled()
            if calls == 8 * 2 + 5:
                raise KeyboardInterrupt
            return x

    def interrupted():
        return nn.Sequential(*network(), Interrupts())

    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, blobs, CONFIG, checkpoint=path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(path)["epoch"] == 2
    assert_same(
        fit(interrupted, blobs, CONFIG, checkpoint=path, resume=True),
        fit(lambda: nn.Sequential(*network(), nn.Identity()), blobs, CONFIG),
    )


def test_a_finished_run_resumes_to_its_result(blobs, tmp_path):
    path = tmp_path / "last.pt"
    first = fit(network, blobs, CONFIG, checkpoint=path)
    records = []
    again = fit(network, blobs, CONFIG, callback=records.append, checkpoint=path, resume=True)
    assert records == []
    assert again.seconds == first.seconds
    assert_same(again, first)


def test_only_the_same_run_resumes(blobs, tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match=r"last\.pt: there is no such checkpoint"):
        fit(network, blobs, CONFIG, checkpoint=path, resume=True)
    fit(network, blobs, CONFIG, checkpoint=path)
    with pytest.raises(CheckpointError, match=r"last\.pt: belongs to another run: lr is 0\.05 there and 0\.1 here$"):
        fit(network, blobs, TrainConfig(**{**vars(CONFIG), "lr": 0.1}), checkpoint=path, resume=True)
    shorter = Dataset("blobs", blobs.classes, blobs.train[:50], blobs.test, blobs.validation)
    with pytest.raises(CheckpointError, match=r"last\.pt: belongs to another run: train is 60 there and 50 here"):
        fit(network, shorter, CONFIG, checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match=r"last\.pt: does not fit this network: "):
        fit(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), blobs, CONFIG, checkpoint=path, resume=True)


def test_a_checkpoint_that_lacks_something(blobs, tmp_path):
    path = tmp_path / "last.pt"
    fit(network, blobs, CONFIG, checkpoint=path)
    state = checkpoint.load(path)
    del state["optimizer"]
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match=r"last\.pt: does not fit this network: "):
        fit(network, blobs, CONFIG, checkpoint=path, resume=True)


def test_a_diverging_run_leaves_the_last_good_checkpoint(blobs, tmp_path):
    path = tmp_path / "last.pt"

    class Breaks(nn.Module):
        calls = 0

        def forward(self, x):
            Breaks.calls += self.training and torch.is_grad_enabled()
            return x * float("nan") if Breaks.calls > 16 else x

    result = fit(lambda: nn.Sequential(Breaks(), network()), blobs, CONFIG, checkpoint=path)
    assert result.status == "diverged"
    state = checkpoint.load(path)
    assert state["epoch"] == 2
    assert all(torch.isfinite(value).all() for value in state["model"].values())
