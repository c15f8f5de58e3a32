"""CIFAR's formats, binary and python, with the published names and counts."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from normprop.data import cifar, load
from normprop.errors import DataError

RNG = np.random.default_rng(0)
# The published sets with few images per file.
SMALL10 = replace(cifar.CIFAR10, train={f"data_batch_{i}": 3 for i in range(1, 6)}, test={"test_batch": 2})
SMALL100 = replace(cifar.CIFAR100, train={"train": 5}, test={"test": 2})
SMALL = {"cifar10": SMALL10, "cifar100": SMALL100}
FOLDERS = {
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "binary"): "cifar-100-binary",
    ("cifar100", "python"): "cifar-100-python",
}


def contents(layout):
    """Random images and labels for every file."""
    return {
        name: (RNG.integers(0, 256, (count, 3072), dtype=np.uint8), RNG.integers(0, len(layout.classes), count))
        for name, count in {**layout.train, **layout.test}.items()
    }


@pytest.fixture
def write(python2_pickle):
    def write_version(folder, files, layout, version):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (pixels, labels) in files.items():
            labels = labels.astype(np.uint8)
            if version == "binary":
                # CIFAR-100 has the coarse label first.
                columns = [labels // 5, labels, pixels] if layout is SMALL100 else [labels, pixels]
                (folder / f"{name}.bin").write_bytes(np.column_stack(columns).tobytes())
            elif version == "python":
                (folder / name).write_bytes(python2_pickle(pixels, labels.tolist(), layout.label_key))
            else:
                key, protocol = (layout.label_key, 2) if version == "latin-1" else (layout.label_key.encode(), 4)
                data = "data" if version == "latin-1" else b"data"
                (folder / name).write_bytes(pickle.dumps({data: pixels, key: labels.tolist()}, protocol=protocol))

    return write_version


def check(data, files, layout):
    for split, names in ((data.train, layout.train), (data.test, layout.test)):
        pixels = np.concatenate([files[name][0] for name in names])
        # Red, green and blue planes, each row by row.
        np.testing.assert_array_equal(split.images.numpy(), pixels.reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(split.labels.numpy(), np.concatenate([files[name][1] for name in names]))
    assert (data.shape, data.classes, data.train.images.dtype) == ((3, 32, 32), layout.classes, torch.uint8)


@pytest.mark.parametrize("version", ["binary", "python", "latin-1", "bytes"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("own_folder", [True, False])
def test_reads(name, version, own_folder, write, tmp_path):
    layout = SMALL[name]
    files = contents(layout)
    folder = FOLDERS[name, "binary" if version == "binary" else "python"]
    write(tmp_path / folder, files, layout, version)
    check(cifar.load(layout, tmp_path if own_folder else tmp_path / folder), files, layout)


def test_class_names():
    assert cifar.CIFAR10.classes[:3] == ("airplane", "automobile", "bird")
    assert len(cifar.CIFAR10.classes) == 10
    # The fine classes are published in alphabetical order.
    assert list(cifar.CIFAR100.classes) == sorted(set(cifar.CIFAR100.classes))
    assert (len(cifar.CIFAR100.classes), cifar.CIFAR100.classes[99]) == (100, "worm")


def sparse(path, size):
    with path.open("wb") as file:
        file.truncate(size)


def test_published_sizes_are_read_by_name(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        sparse(folder / name, 30_730_000)
    data = load("cifar10", tmp_path)
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    sparse(folder / "data_batch_4.bin", 30_730_000 - 3073)
    with pytest.raises(
        DataError, match=r"data_batch_4.bin has 30,726,927 bytes; expected 30,730,000 \(10,000 images\)"
    ):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_nothing_there(name, tmp_path):
    with pytest.raises(DataError) as caught:
        load(name, tmp_path)
    line = str(caught.value)
    assert all(str(tmp_path / folder) in line for (set_name, _), folder in FOLDERS.items() if set_name == name)
    assert "test" in line
    assert line.endswith("published at www.cs.toronto.edu/~kriz/cifar.html")
    assert "\n" not in line


BATCH = "expected a dictionary of 'data', uint8 (3, 3072), and 'labels', 3 integers"
ZEROS = np.zeros((3, 3072), np.uint8)


def batch(data, labels):
    return pickle.dumps({"data": data, "labels": labels}, protocol=2)


@pytest.mark.parametrize(
    ("version", "damage", "message"),
    [
        ("binary", None, "is missing; expected a file of 3 images"),
        ("binary", lambda c: c[:-1], "has 9,218 bytes; expected 9,219 (3 images)"),
        ("binary", lambda c: c + c[:3073], "has 12,292 bytes; expected 9,219"),
        ("binary", lambda c: b"", "has 0 bytes"),
        ("binary", lambda c: b"\x0a" + c[1:], "has a label 10; expected labels 0..9"),
        ("python", None, "is missing; expected a file of 3 images"),
        ("python", lambda c: c[:-100], "is not a pickle of plain arrays"),
        ("python", lambda c: b"", "is not a pickle of plain arrays"),
        ("python", lambda c: pickle.dumps(print), "asks for 'builtins.print'"),
        ("python", lambda c: pickle.dumps([1, 2]), "is incomplete (list indices must be integers or slices, not str)"),
        ("python", lambda c: pickle.dumps({"data": 3}), f"is incomplete ('labels'); {BATCH}"),
        ("python", lambda c: batch(3, [1, 2, 3]), f"has pixels of type int; {BATCH}"),
        ("python", lambda c: batch(ZEROS.astype(float), [1, 2, 3]), "has pixels float64 (3, 3072)"),
        ("python", lambda c: batch(ZEROS[:2], [1, 2, 3]), "has pixels uint8 (2, 3072)"),
        ("python", lambda c: batch(ZEROS, [1, 2]), "has labels int64 (2,)"),
        ("python", lambda c: batch(ZEROS, [1.0, 2, 3]), "has labels float64 (3,)"),
        ("python", lambda c: batch(ZEROS, [[1], [2, 3], 3]), "is incomplete"),
        ("python", lambda c: batch(ZEROS, "abc"), "has labels <U3 ()"),
        ("python", lambda c: batch(ZEROS, [1, 2, 10]), "has a label 10; expected labels 0..9"),
        ("python", lambda c: batch(ZEROS, [1, 2, -1]), "has a label -1; expected labels 0..9"),
    ],
)
def test_damage_gives_one_line(version, damage, message, write, tmp_path):
    folder = tmp_path / FOLDERS["cifar10", version]
    write(folder, contents(SMALL10), SMALL10, version)
    path = folder / ("data_batch_2.bin" if version == "binary" else "data_batch_2")
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
    with pytest.raises(DataError) as caught:
        cifar.load(SMALL10, tmp_path)
    line = str(caught.value)
    assert line.startswith(f"cifar10: {path} ")
    assert message in line
    assert line.endswith("published at www.cs.toronto.edu/~kriz/cifar.html")
    assert "\n" not in line
