"""People's own arrays: what is accepted is read as documented, all else gives one line."""

import numpy as np
import pytest
import torch

from normprop.data import load
from normprop.errors import DataError

RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 0, 1, 0, 1])


def tagged(shape, dtype=np.uint8):
    """Images whose first pixel or feature is the sample's number."""
    images = RNG.integers(0, 256, shape).astype(dtype)
    images.reshape(len(images), -1)[:, 0] = np.arange(len(images))
    return images


def save(path, **changes):
    """A valid file, with some arrays changed or (None) left out."""
    images = tagged((6, 5, 4))
    arrays = {"x_train": images, "y_train": LABELS, "x_test": images[:4], "y_test": LABELS[:4]} | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def both(images):
    return {"x_train": images, "x_test": images[:4]}


def first_values(split):
    return split.images.flatten(1)[:, 0].long()


@pytest.mark.parametrize(
    ("stored", "shape"),
    [
        ((6, 1, 28, 28), (1, 28, 28)),
        ((6, 3, 28, 28), (3, 28, 28)),
        ((6, 4, 28, 28), (4, 28, 28)),
        ((6, 28, 28, 1), (1, 28, 28)),
        ((6, 28, 20, 3), (3, 28, 20)),
        ((6, 28, 28, 4), (4, 28, 28)),
        ((6, 3, 28, 20), (3, 28, 20)),
        ((6, 12, 64, 64), (12, 64, 64)),
        ((6, 12, 64, 48), (12, 64, 48)),
        ((6, 128, 7, 7), (128, 7, 7)),
        ((6, 28, 20), (1, 28, 20)),
        ((6, 13), (13,)),
    ],
)
def test_shapes(stored, shape, tmp_path):
    images = tagged(stored)
    data = load(save(tmp_path / "own.npz", **both(images)))
    assert (data.name, data.shape, data.classes) == ("own", shape, ("0", "1"))
    assert data.train.images.dtype == torch.uint8
    moved = images.transpose(0, 3, 1, 2) if shape[0] == stored[-1] and len(stored) == 4 else images
    expected = moved.reshape(6, *shape)[first_values(data.train).numpy()]
    np.testing.assert_array_equal(data.train.images.numpy(), expected)
    assert sorted(first_values(data.train).tolist()) == list(range(6))
    assert sorted(first_values(data.test).tolist()) == list(range(4))


def test_every_image_keeps_its_label_and_classes_are_mixed(tmp_path):
    labels = np.repeat([-5, 7, 1000], 40)  # class by class, as people store them
    images = tagged((120, 3, 8, 8))
    data = load(save(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels))
    assert data.classes == ("-5", "7", "1000")
    np.testing.assert_array_equal([int(data.classes[i]) for i in data.train.labels], labels[first_values(data.train)])
    cut = data.split(train=30, validation=30, test=30)
    for split in (cut.train, cut.validation, cut.test):
        assert torch.bincount(split.labels).tolist() == [10, 10, 10]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_images_are_kept_as_float32(dtype, tmp_path):
    images = RNG.normal(size=(6, 13)).astype(dtype)
    data = load(save(tmp_path / "own.npz", **both(images)))
    assert data.train.images.dtype == torch.float32
    np.testing.assert_array_equal(np.sort(data.train.images.numpy(), 0), np.sort(images.astype(np.float32), 0))


@pytest.mark.parametrize(
    "labels", [LABELS.astype(np.uint8), LABELS.astype(bool), LABELS[:, None], np.array(list("cdcdcd"))]
)
def test_labels(labels, tmp_path):
    data = load(save(tmp_path / "own.npz", y_train=labels, y_test=labels[:4]))
    assert data.classes == tuple(str(value) for value in np.unique(labels))
    np.testing.assert_array_equal(data.train.labels.numpy(), LABELS[first_values(data.train)])


def test_other_key_names_and_own_validation_images(tmp_path):
    images = tagged((6, 28, 28, 3))
    arrays = {f"{part}_images": images for part in ("train", "val", "test")}
    arrays |= {f"{part}_labels": LABELS[:, None] for part in ("train", "val", "test")}
    np.savez_compressed(tmp_path / "own.npz", **arrays, info=np.arange(3))
    data = load(tmp_path / "own.npz")
    assert (data.shape, len(data.train), len(data.validation), len(data.test)) == ((3, 28, 28), 6, 6, 6)
    assert len(data.split().train) == 6


def test_the_order_is_always_the_same(tmp_path):
    path = save(tmp_path / "own.npz")
    torch.manual_seed(1)
    np.random.seed(1)
    first = load(path)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first.train.images, load(path).train.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_test": None},
            "it has x_train, y_test, y_train; expected x_train, y_train, x_test, y_test; or train_images",
        ),
        (dict.fromkeys(("x_train", "y_train", "x_test", "y_test")), "it has none"),
        (both(tagged((6, 3, 28, 3))), "x_train has shape (6, 3, 28, 3), the channel axis is unclear"),
        (both(tagged((6, 64, 64, 12))), "the channel axis is unclear"),
        (both(tagged((6, 3, 4, 4, 4))), "x_train has shape (6, 3, 4, 4, 4); expected (N, C, H, W)"),
        (both(np.arange(6, dtype=np.uint8)), "x_train has shape (6,)"),
        (both(tagged((6, 5, 4), np.int64)), "x_train is int64; expected uint8 (0..255) or floating point"),
        (both(np.full((6, 3), "a")), "x_train is <U1"),
        (both(np.full((6, 3), np.nan)), "x_train holds values that are not finite"),
        (both(np.full((6, 3), 1e300)), "x_train holds values that are not finite in float32"),
        ({"x_test": tagged((4, 5, 5))}, "test images are torch.uint8 (1, 5, 5); expected torch.uint8 (1, 5, 4)"),
        ({"x_test": tagged((4, 5, 4), np.float32)}, "test images are torch.float32"),
        ({"y_train": LABELS[:5]}, "6 images but 5 labels"),
        ({"y_train": LABELS.astype(float)}, "y_train is float64 (6,); expected integers or strings (N,)"),
        ({"y_train": np.eye(2)[LABELS].astype(int)}, "y_train is int64 (6, 2)"),
        ({"y_train": np.array(list("ababab"))}, "labels of different types"),
        ({"y_train": LABELS * 0, "y_test": LABELS[:4] * 0}, "1 class in the labels; expected at least 2"),
        ({"x_train": tagged((6, 5, 4))[:0], "y_train": LABELS[:0]}, "an empty array"),
        ({"x_train": np.array([{}] * 6)}, "cannot be read as npz"),
    ],
)
def test_other_arrays_give_one_line(changes, message, tmp_path):
    path = save(tmp_path / "own.npz", **changes)
    with pytest.raises(DataError) as caught:
        load(path)
    assert message in str(caught.value)
    assert "own" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: b"",
        lambda c: c[: len(c) // 2],
        lambda c: c[:200] + bytes([c[200] ^ 255]) + c[201:],
        lambda c: b"not a zip file, not a numpy file",
        None,
    ],
)
def test_damaged_files_give_one_line(damage, tmp_path):
    path = save(tmp_path / "own.npz")
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: cannot be read as npz (")
    assert "\n" not in str(caught.value)


def test_a_single_array_is_no_npz(tmp_path):
    path = tmp_path / "own.npz"
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(DataError, match="one single array"):
        load(path)
