"""People's own arrays: one npz file with training and test images and labels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normprop.data.dataset import Dataset, Split
from normprop.data.order import mixed
from normprop.errors import DataError

# Keys of the training, test and (optional) validation images and labels.
_LAYOUTS = (
    (("x_train", "y_train"), ("x_test", "y_test"), ("x_val", "y_val")),
    (("train_images", "train_labels"), ("test_images", "test_labels"), ("val_images", "val_labels")),
)
_KEYS = "; or ".join(", ".join(key for pair in layout[:2] for key in pair) for layout in _LAYOUTS)
_CHANNELS = (1, 3, 4)


def load(path: Path) -> Dataset:
    """Read a data set from an npz file.

    Keys: x_train, y_train, x_test, y_test, optionally x_val, y_val; or train_images, train_labels, test_images,
    test_labels, optionally val_images, val_labels. Others are not read.

    Images: uint8 (0..255) or floating (finite; used as they are, as float32) of one of the shapes
    (N, C, H, W); (N, H, W, C) where the last axis is 1, 3 or 4 and the second is not; (N, H, W), which gets one
    channel; (N, F), flat features. Labels: integers or strings, (N,) or (N, 1); their sorted values become the
    classes 0..K-1, with the values as names. Samples are put in a fixed order with all classes everywhere.

    Args:
        path: the file.

    Returns:
        The data set, named after the file.

    Raises:
        DataError: if the file is missing or damaged, or an array is none of the above. Pickled objects are not read.

    Example:
        >>> import tempfile
        >>> x, y = np.zeros((6, 28, 28), np.uint8), np.array([3, 7, 3, 7, 3, 7])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder) / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        ...     data = load(Path(folder) / "mine.npz")
        >>> data.name, data.shape, data.classes
        ('mine', (1, 28, 28), ('3', '7'))
    """
    arrays = _read(path)
    splits = [(_images(path, x, arrays[x]), _labels(path, y, arrays[y])) for x, y in _pairs(path, set(arrays))]
    if len({labels.dtype.kind for _, labels in splits}) > 1:
        raise DataError(f"{path}: labels of different types; expected the same kind for training and test")
    values = np.unique(np.concatenate([labels for _, labels in splits]))
    if len(values) < 2:
        raise DataError(f"{path}: {len(values)} class in the labels; expected at least 2")
    train, test, *validation = [_split(path, images, np.searchsorted(values, labels)) for images, labels in splits]
    return Dataset(path.stem, tuple(map(str, values)), train, test, *validation)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of the file, by key."""
    wanted = {key for layout in _LAYOUTS for pair in layout for key in pair}
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one single array")
            return {key: archive[key] for key in archive.files if key in wanted}
    except Exception as error:  # damaged files raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as npz ({reason}); expected arrays {_KEYS}") from error


def _pairs(path: Path, keys: set[str]) -> list[tuple[str, str]]:
    """The keys of images and labels of training, test and perhaps validation."""
    for train, test, validation in _LAYOUTS:
        if keys.issuperset(train + test):
            return [train, test, validation] if keys.issuperset(validation) else [train, test]
    raise DataError(f"{path}: of the arrays looked for it has {', '.join(sorted(keys)) or 'none'}; expected {_KEYS}")


def _images(path: Path, key: str, array: NDArray[Any]) -> NDArray[Any]:
    """Images as uint8 or float32 in (N, C, H, W), or features in (N, F)."""
    if array.dtype != np.uint8:
        if array.dtype.kind != "f":
            raise DataError(f"{path}: {key} is {array.dtype}; expected uint8 (0..255) or floating point")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise DataError(f"{path}: {key} holds values that are not finite in float32; expected finite values")
    if array.ndim == 3:
        return array[:, np.newaxis]
    if array.ndim == 4:
        return _channels_first(path, key, array)
    if array.ndim == 2:
        return array
    raise DataError(f"{path}: {key} has shape {array.shape}; expected (N, C, H, W), (N, H, W, C), (N, H, W) or (N, F)")


def _channels_first(path: Path, key: str, array: NDArray[Any]) -> NDArray[Any]:
    """Find the channel axis, the second or the last, or say that it is unclear."""
    _, second, third, last = array.shape
    second_fits, last_fits = second in _CHANNELS, last in _CHANNELS
    if last_fits and not second_fits:
        return array.transpose(0, 3, 1, 2)
    # Other numbers of channels (feature maps, spectra) only where the last two axes look like an image.
    if (second_fits and last_fits) or not (second_fits or third == last or second < last):
        raise DataError(f"{path}: {key} has shape {array.shape}, the channel axis is unclear; expected (N, C, H, W)")
    return array


def _labels(path: Path, key: str, array: NDArray[Any]) -> NDArray[Any]:
    """Labels (N,) of integers or strings."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind not in "biuU" or array.ndim != 1:
        raise DataError(f"{path}: {key} is {array.dtype} {array.shape}; expected integers or strings (N,)")
    return array


def _split(path: Path, images: NDArray[Any], labels: NDArray[np.int64]) -> Split:
    """Images and labels in a fixed mixed order."""
    if len(images) != len(labels):
        raise DataError(f"{path}: {len(images)} images but {len(labels)} labels; expected as many of both")
    if not len(labels):
        raise DataError(f"{path}: an empty array; expected at least one image")
    order = mixed(labels)
    return Split(torch.from_numpy(np.ascontiguousarray(images[order])), torch.from_numpy(labels[order]))
