"""MNIST's format: every published spelling is read, every damage gives one line that names the file."""

import gzip

import numpy as np
import pytest
import torch

from normprop.data import load
from normprop.errors import DataError

RNG = np.random.default_rng(0)
TRAIN_IMAGES, TRAIN_LABELS = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8), np.array([0, 9, 3, 3, 1], np.uint8)
TEST_IMAGES, TEST_LABELS = RNG.integers(0, 256, (2, 4, 3), dtype=np.uint8), np.array([7, 2], np.uint8)
PAGES = {"mnist": "yann.lecun.com/exdb/mnist", "fashion-mnist": "github.com/zalandoresearch/fashion-mnist"}


@pytest.fixture
def write(write_idx):
    def write_all(folder, suffix=""):
        for name, array in {
            "train-images-idx3-ubyte": TRAIN_IMAGES,
            "train-labels-idx1-ubyte": TRAIN_LABELS,
            "t10k-images-idx3-ubyte": TEST_IMAGES,
            "t10k-labels-idx1-ubyte": TEST_LABELS,
        }.items():
            write_idx(folder / (name + suffix), array)

    return write_all


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "."),
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_reads(name, folder, suffix, write, tmp_path):
    write(tmp_path / folder, suffix)
    data = load(name, tmp_path)
    assert (data.name, data.shape, data.num_classes) == (name, (1, 4, 3), 10)
    assert data.train.images.dtype == torch.uint8
    np.testing.assert_array_equal(data.train.images[:, 0].numpy(), TRAIN_IMAGES)
    np.testing.assert_array_equal(data.train.labels.numpy(), TRAIN_LABELS)
    np.testing.assert_array_equal(data.test.images[:, 0].numpy(), TEST_IMAGES)
    np.testing.assert_array_equal(data.test.labels.numpy(), TEST_LABELS)
    data.train.images[0] = 0  # tensors of one's own, not a read-only view of the file


def test_each_set_is_taken_from_its_own_folder(write, write_idx, tmp_path):
    write(tmp_path / "mnist")
    write(tmp_path / "fashion-mnist", ".gz")
    write_idx(tmp_path / "fashion-mnist/train-labels-idx1-ubyte.gz", TRAIN_LABELS[::-1].copy())
    assert load("mnist", tmp_path).train.labels.tolist() == TRAIN_LABELS.tolist()
    assert load("fashion-mnist", tmp_path).train.labels.tolist() == TRAIN_LABELS[::-1].tolist()
    assert load("fashion-mnist", tmp_path).classes[0] == "T-shirt/top"


@pytest.mark.parametrize("name", PAGES)
def test_nothing_there(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path / "absent")
    line = str(caught.value)
    assert str(tmp_path / "absent" / name) in line
    assert "train-images-idx3-ubyte" in line
    assert line.endswith(f"published at {PAGES[name]}")
    assert "\n" not in line


def damaged_gzip(content):
    """Compressed, with a wrong checksum of the content."""
    compressed = bytearray(gzip.compress(content))
    compressed[-8] ^= 1
    return bytes(compressed)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, None, "is missing; expected an idx file"),
        (LABELS, None, "is missing"),
        (IMAGES, lambda c: b"", "starts with nothing; expected the idx magic number 00000803"),
        (IMAGES, lambda c: b"\0\0\x0d\x03" + c[4:], "starts with 00000d03; expected the idx magic number 00000803"),
        (IMAGES, lambda c: gzip.compress(c), "starts with 1f8b"),
        (LABELS, lambda c: b"\0\0\x08\x03" + c[4:], "starts with 00000803; expected the idx magic number 00000801"),
        (IMAGES, lambda c: c[:10], "has 10 bytes; expected a header of 16"),
        (IMAGES, lambda c: c[:-1], "has 75 bytes; expected 76 for 5x4x3 values"),
        (IMAGES, lambda c: c + b"\0", "has 77 bytes; expected 76"),
        (
            IMAGES,
            lambda c: c[:4] + b"\xff" * 12 + c[16:],
            "has 76 bytes; expected 79,228,162,458,924,105,385,300,197,391",
        ),
        (LABELS, lambda c: c[:7] + b"\x01" + c[8:9], "has 1 labels; expected 2, one per image"),
        (LABELS, lambda c: c[:8] + b"\x0a\x02", "has a label 10; expected labels 0..9"),
        (IMAGES + ".gz", lambda c: gzip.compress(c)[:-9], "cannot be read"),
        (IMAGES + ".gz", damaged_gzip, "cannot be read (CRC check failed"),
        (IMAGES + ".gz", lambda c: c, "cannot be read (Not a gzipped file"),
        (IMAGES + ".gz", lambda c: gzip.compress(c)[:12] + b"\xff\xff\xff" + gzip.compress(c)[15:], "cannot be read"),
        (IMAGES + ".gz", lambda c: gzip.compress(c[:-1]), "has 75 bytes; expected 76"),
    ],
)
def test_damage_gives_one_line(name, damage, message, write, tmp_path):
    write(tmp_path / "mnist")
    path = tmp_path / "mnist" / name
    plain = path.with_suffix("")
    content = plain.read_bytes()
    plain.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(DataError) as caught:
        load("mnist", tmp_path)
    line = str(caught.value)
    assert line.startswith(f"mnist: {path} ")
    assert message in line
    assert line.endswith("published at yann.lecun.com/exdb/mnist")
    assert "\n" not in line
