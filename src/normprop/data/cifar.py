"""CIFAR-10 and CIFAR-100 in the binary and in the python version that their authors publish."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from normprop.data import plain_pickle
from normprop.data.dataset import Dataset, Split
from normprop.data.published import Published
from normprop.errors import DataError

_PAGE = "www.cs.toronto.edu/~kriz/cifar.html"
_PIXELS = 3 * 32 * 32
_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_FINE_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class CifarSet:
    """A published CIFAR set.

    Args:
        source: its name, folders and page.
        classes: its class names.
        train: number of images in each training file, by file name without `.bin`.
        test: the same for the test files.
        label_bytes: label bytes before the pixels of an image in the binary version; the last one is used.
        label_key: the labels' key in the python version.
    """

    source: Published
    classes: tuple[str, ...]
    train: dict[str, int]
    test: dict[str, int]
    label_bytes: int
    label_key: str


CIFAR10 = CifarSet(
    Published("cifar10", ("cifar-10-batches-bin", "cifar-10-batches-py"), _PAGE),
    classes=tuple(_CLASSES.split()),
    train={f"data_batch_{number}": 10_000 for number in range(1, 6)},
    test={"test_batch": 10_000},
    label_bytes=1,
    label_key="labels",
)
CIFAR100 = CifarSet(
    Published("cifar100", ("cifar-100-binary", "cifar-100-python"), _PAGE),
    classes=tuple(_FINE_CLASSES.split()),
    train={"train": 50_000},
    test={"test": 10_000},
    label_bytes=2,
    label_key="fine_labels",
)


def load(layout: CifarSet, data_dir: Path) -> Dataset:
    """Read a CIFAR set: images uint8 (N, 3, 32, 32), in the published order; CIFAR-100 with its 100 fine labels.

    Args:
        layout: which set.
        data_dir: directory with the files or with one of the set's folders. Where both versions are, the binary one
            is read.

    Returns:
        The data set.

    Raises:
        DataError: if a file is missing or damaged. Nothing that a pickle asks for is executed.

    Source:
        Krizhevsky, Learning multiple layers of features from tiny images, 2009; formats as on the set's page.

    Example:
        >>> load(CIFAR10, Path("/nowhere"))
        Traceback (most recent call last):
        normprop.errors.DataError: cifar10: /nowhere/cifar-10-batches-bin or ... published at www.cs.toronto.edu/...
    """
    names = [*layout.train, *layout.test]
    binaries = [f"{name}.bin" for name in names]
    directory = layout.source.directory(data_dir, binaries + names)
    suffix = ".bin" if any((directory / name).is_file() for name in binaries) else ""
    return Dataset(
        layout.source.name,
        layout.classes,
        train=_read_split(layout, directory, layout.train, suffix),
        test=_read_split(layout, directory, layout.test, suffix),
    )


def _read_split(layout: CifarSet, directory: Path, files: dict[str, int], suffix: str) -> Split:
    """The images and labels of some files, one after the other."""
    read = _read_binary if suffix else _read_pickle
    total = sum(files.values())
    images, labels = torch.empty(total, 3, 32, 32, dtype=torch.uint8), torch.empty(total, dtype=torch.int64)
    pixels, numbers = images.view(total, _PIXELS).numpy(), labels.numpy()
    start = 0
    for name, count in files.items():
        path, part = directory / f"{name}{suffix}", slice(start, start + count)
        if not path.is_file():
            raise layout.source.error(path, "is missing", f"a file of {count:,} images")
        try:
            pixels[part], numbers[part] = read(layout, path, count)
        except OSError as error:
            raise layout.source.error(path, f"cannot be read ({error})", f"a file of {count:,} images") from error
        if len(wrong := numbers[part][(numbers[part] < 0) | (numbers[part] >= len(layout.classes))]):
            raise layout.source.error(path, f"has a label {wrong[0]}", f"labels 0..{len(layout.classes) - 1}")
        start += count
    return Split(images, labels)


def _read_binary(layout: CifarSet, path: Path, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Records of label bytes and pixel bytes (red, green and blue planes)."""
    record = layout.label_bytes + _PIXELS
    if (size := path.stat().st_size) != count * record:
        raise layout.source.error(path, f"has {size:,} bytes", f"{count * record:,} ({count:,} images)")
    records = np.fromfile(path, np.uint8).reshape(count, record)
    return records[:, layout.label_bytes :], records[:, layout.label_bytes - 1]


def _read_pickle(layout: CifarSet, path: Path, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A dictionary with the pixels as an array and the labels as a list."""
    expected = f"a dictionary of 'data', uint8 ({count}, {_PIXELS}), and {layout.label_key!r}, {count:,} integers"
    try:
        content = plain_pickle.loads(path.read_bytes())
        pixels, labels = content["data"], np.asarray(content[layout.label_key])
    except DataError as error:
        raise layout.source.error(path, f"is {error}", expected) from error
    except (KeyError, TypeError, ValueError) as error:
        raise layout.source.error(path, f"is incomplete ({error})", expected) from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (count, _PIXELS):
        raise layout.source.error(path, f"has pixels {_describe(pixels)}", expected)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise layout.source.error(path, f"has labels {_describe(labels)}", expected)
    return pixels, labels.astype(np.int64)


def _describe(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"
