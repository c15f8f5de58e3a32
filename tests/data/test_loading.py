"""Names and paths, and where files are looked for."""

import subprocess
import sys

import numpy as np
import pytest

from normprop.data import load, names
from normprop.errors import DataError


def test_an_unknown_name_gives_one_line():
    with pytest.raises(DataError) as caught:
        load("cifr10")
    assert str(caught.value) == (
        "cifr10: no such data set; expected one of digits, mnist, fashion-mnist, cifar10, cifar100, svhn, svhn-extra, "
        "pasted, an .npz file, or a folder of images"
    )
    assert names() == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "svhn-extra", "pasted")


def test_data_directories(write_idx, tmp_path, monkeypatch):
    """The argument comes before the environment, and that before ./data."""

    def write(folder, label):
        for part, kind in (("train", 3), ("t10k", 3), ("train", 1), ("t10k", 1)):
            name = f"{part}-{'images' if kind == 3 else 'labels'}-idx{kind}-ubyte"
            write_idx(folder / name, np.full((1, 2, 2) if kind == 3 else 1, label, np.uint8))

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NORMPROP_DATA", raising=False)
    with pytest.raises(DataError, match="mnist: data/mnist or data/MNIST/raw or data holds none"):
        load("mnist")
    write(tmp_path / "data" / "mnist", 1)
    assert load("mnist").train.labels.tolist() == [1]
    write(tmp_path / "elsewhere", 2)
    monkeypatch.setenv("NORMPROP_DATA", str(tmp_path / "elsewhere"))
    assert load("mnist").train.labels.tolist() == [2]
    write(tmp_path / "given", 3)
    assert load("mnist", tmp_path / "given").train.labels.tolist() == [3]
    assert load("mnist", "given").train.labels.tolist() == [3]


def test_extras_are_imported_only_where_they_are_needed():
    code = "import normprop.data, sys; print([name for name in ('sklearn', 'PIL') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
