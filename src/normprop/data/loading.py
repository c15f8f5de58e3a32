"""Find the reader for a data set's name or path."""

import os
from pathlib import Path

from normprop.data import cifar, idx, npz, pasted
from normprop.data.dataset import Dataset
from normprop.errors import ConfigError, DataError

_IDX = {layout.source.name: layout for layout in (idx.MNIST, idx.FASHION_MNIST)}
_SVHN = ("svhn", "svhn-extra")
_CIFAR = {layout.source.name: layout for layout in (cifar.CIFAR10, cifar.CIFAR100)}


def names() -> tuple[str, ...]:
    """The names that `load` knows.

    Returns:
        The names.

    Example:
        >>> names()
        ('digits', 'mnist', 'fashion-mnist', 'cifar10', 'cifar100', 'svhn', 'svhn-extra', 'pasted')
    """
    return ("digits", *_IDX, *_CIFAR, *_SVHN, pasted.NAME)


def load(
    name_or_path: str | Path, data_dir: str | Path | None = None, *, size: tuple[int, int] | None = None
) -> Dataset:
    """Read a data set by name, or people's own from a file or folder.

    Own data is an npz file (see `normprop.data.npz.load`) or a folder of images (see `normprop.data.folder.load`).

    Args:
        name_or_path: one of `names()`, or a path. A path that is spelt like a name needs a slash: `./mnist`.
        data_dir: directory with the published files, or with the folders in which they are published; None: the
            environment variable NORMPROP_DATA, else `data` in the current directory. Files that lie in `data_dir`
            itself are taken for the set that was asked for.
        size: height and width to resize the images of a folder to; None: they share one.

    Returns:
        The data set, on the CPU, with an empty validation split unless the files bring one.

    Raises:
        DataError: if files are missing or damaged.
        ConfigError: if `size` is given for anything but a folder.

    Example:
        >>> load("digits").shape
        (1, 8, 8)
    """
    name, path = str(name_or_path), Path(name_or_path)
    if size is not None and (name in names() or not path.is_dir()):
        raise ConfigError(f"{name}: size is given, but only the images of a folder are resized; leave it out")
    directory = Path(data_dir if data_dir is not None else os.environ.get("NORMPROP_DATA") or "data")
    if name in _IDX:
        return idx.load(_IDX[name], directory)
    if name in _CIFAR:
        return cifar.load(_CIFAR[name], directory)
    if name in _SVHN:
        from normprop.data import svhn  # needs an extra

        return svhn.load(svhn.SVHN_EXTRA if name == "svhn-extra" else svhn.SVHN, directory)
    if name == pasted.NAME:
        return pasted.load(directory)
    if name == "digits":
        from normprop.data import digits  # needs an extra

        return digits.load()
    if path.is_dir():
        from normprop.data import folder  # needs an extra

        return folder.load(path, size)
    if path.suffix == ".npz":
        return npz.load(path)
    raise DataError(
        f"{name}: no such data set; expected one of {', '.join(names())}, an .npz file, or a folder of images"
    )
