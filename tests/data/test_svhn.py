"""SVHN from MATLAB files written here by SciPy, at the published layout with fewer images."""

import numpy as np
import pytest
import torch
from scipy.io import savemat

from normprop import data
from normprop.data import svhn
from normprop.errors import DataError


@pytest.fixture
def directory(tmp_path, monkeypatch):
    counts = {"train_32x32.mat": 12, "test_32x32.mat": 5, "extra_32x32.mat": 7}
    monkeypatch.setattr(svhn, "_COUNTS", counts)
    (tmp_path / "svhn").mkdir()
    for seed, (name, count) in enumerate(counts.items()):
        write(tmp_path / "svhn" / name, count, seed)
    return tmp_path


def write(path, count, seed):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
    savemat(path, {"X": images, "y": labels}, do_compression=True)
    return images


def test_reads_images_and_labels_as_published(directory):
    images = write(directory / "svhn" / "train_32x32.mat", 12, 9)
    dataset = data.load("svhn", directory)
    assert dataset.shape == (3, 32, 32)
    assert dataset.train.images.dtype == torch.uint8
    assert dataset.train.images[3, 2, 5, 7] == images[5, 7, 2, 3]
    assert dataset.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert len(dataset.test) == 5


def test_extra_images_follow_the_training_images(directory):
    dataset = data.load("svhn-extra", directory)
    assert len(dataset.train) == 19
    assert torch.equal(dataset.train.images[:12], data.load("svhn", directory).train.images)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"no MATLAB file"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot be read"),
        (lambda path: write(path, 11, 0), "holds uint8"),
        (lambda path: savemat(path, {"X": np.zeros((32, 32, 3, 12), np.uint8)}), "cannot be read"),
        (
            lambda path: savemat(path, {"X": np.zeros((32, 32, 3, 12), np.uint8), "y": np.zeros((12, 1))}),
            "none of 1..10",
        ),
    ],
)
def test_what_is_damaged_is_said_in_one_line(directory, damage, words):
    path = directory / "svhn" / "train_32x32.mat"
    damage(path)
    with pytest.raises(DataError, match=words) as caught:
        data.load("svhn", directory)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_files_at_all(tmp_path):
    with pytest.raises(DataError, match="holds none of its files"):
        data.load("svhn-extra", tmp_path)
