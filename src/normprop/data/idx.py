"""MNIST and the sets published in its format: idx files, plain or compressed with gzip."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from normprop.data.dataset import Dataset, Split
from normprop.data.published import Published


@dataclass(frozen=True)
class IdxSet:
    """A published set of idx files.

    Args:
        source: its name, folders and page.
        classes: its class names.
    """

    source: Published
    classes: tuple[str, ...]


MNIST = IdxSet(Published("mnist", ("mnist", "MNIST/raw"), "yann.lecun.com/exdb/mnist"), tuple("0123456789"))
FASHION_MNIST = IdxSet(
    Published("fashion-mnist", ("fashion-mnist", "FashionMNIST/raw"), "github.com/zalandoresearch/fashion-mnist"),
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load(layout: IdxSet, data_dir: Path) -> Dataset:
    """Read an idx set: images uint8 (N, 1, H, W), in the published order.

    Args:
        layout: which set.
        data_dir: directory with the files or with one of the set's folders.

    Returns:
        The data set.

    Raises:
        DataError: if a file is missing or damaged, or files do not fit together.

    Source:
        File format: LeCun, Cortes, Burges, The MNIST database of handwritten digits, "File formats".

    Example:
        >>> from normprop.data.idx import MNIST, load
        >>> load(MNIST, Path("/nowhere"))
        Traceback (most recent call last):
        normprop.errors.DataError: mnist: /nowhere/mnist or ... published at yann.lecun.com/exdb/mnist
    """
    stems = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    directory = layout.source.directory(data_dir, [f"{stem}-ubyte{suffix}" for stem in stems for suffix in ("", ".gz")])
    return Dataset(
        layout.source.name,
        layout.classes,
        train=_read_split(layout, directory, "train"),
        test=_read_split(layout, directory, "t10k"),
    )


def _read_split(layout: IdxSet, directory: Path, part: str) -> Split:
    """The images and labels of one part, checked against each other."""
    _, images = _read(layout.source, directory, f"{part}-images-idx3-ubyte", ndim=3)
    path, labels = _read(layout.source, directory, f"{part}-labels-idx1-ubyte", ndim=1)
    if len(images) != len(labels):
        raise layout.source.error(path, f"has {len(labels)} labels", f"{len(images)}, one per image")
    if len(labels) and labels.max() >= len(layout.classes):
        raise layout.source.error(path, f"has a label {labels.max()}", f"labels 0..{len(layout.classes) - 1}")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _read(source: Published, directory: Path, name: str, ndim: int) -> tuple[Path, NDArray[np.uint8]]:
    """An idx file of unsigned bytes: magic 0, 0, 8, ndim; then the sizes (big-endian uint32); then the values."""
    plain, compressed = directory / name, directory / f"{name}.gz"
    path = plain if plain.is_file() else compressed
    if not path.is_file():
        raise source.error(plain, "(or .gz) is missing", "an idx file")
    try:
        content = bytearray(gzip.decompress(path.read_bytes()) if path is compressed else path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise source.error(path, f"cannot be read ({error})", "a complete idx file") from error
    magic, header = bytes([0, 0, 8, ndim]), 4 + 4 * ndim
    if content[:4] != magic:
        raise source.error(path, f"starts with {content[:4].hex() or 'nothing'}", f"the idx magic number {magic.hex()}")
    if len(content) < header:
        raise source.error(path, f"has {len(content)} bytes", f"a header of {header}")
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    size = header + math.prod(shape)
    if len(content) != size:
        raise source.error(path, f"has {len(content):,} bytes", f"{size:,} for {'x'.join(map(str, shape))} values")
    return path, np.frombuffer(content, np.uint8, offset=header).reshape(shape)
