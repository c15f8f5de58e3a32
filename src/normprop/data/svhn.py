"""Street View House Numbers, cropped digits, in the MATLAB files that its authors publish."""

from pathlib import Path

import numpy as np
import torch

from normprop.data.dataset import Dataset, Split
from normprop.data.published import Published
from normprop.errors import requires

with requires("data"):
    from scipy.io import loadmat

_PAGE = "ufldl.stanford.edu/housenumbers"
_TRAIN, _TEST, _EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
_COUNTS = {_TRAIN: 73_257, _TEST: 26_032, _EXTRA: 531_131}
SVHN = Published("svhn", ("svhn", "SVHN"), _PAGE)
SVHN_EXTRA = Published("svhn-extra", ("svhn", "SVHN"), _PAGE)


def load(source: Published, data_dir: Path) -> Dataset:
    """Read the cropped digits: images uint8 (N, 3, 32, 32), in the published order, classes 0 to 9.

    Args:
        source: ``SVHN``, or ``SVHN_EXTRA`` for the training images followed by the extra ones.
        data_dir: directory with the files or with the folder ``svhn``.

    Returns:
        The data set.

    Raises:
        DataError: if a file is missing or damaged.

    Source:
        Netzer et al., Reading digits in natural images with unsupervised feature learning, 2011.

    Example:
        >>> load(SVHN, Path("/nowhere"))
        Traceback (most recent call last):
        normprop.errors.DataError: svhn: /nowhere/svhn or /nowhere/SVHN or /nowhere holds none of its files; ...
    """
    train = [_TRAIN, _EXTRA] if source is SVHN_EXTRA else [_TRAIN]
    directory = source.directory(data_dir, [*train, _TEST])
    parts = [_read(source, directory / name) for name in train]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Dataset(
        source.name,
        tuple("0123456789"),
        train=Split(images, labels),
        test=Split(*_read(source, directory / _TEST)),
    )


def _read(source: Published, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of a file; the digit 0 is published as label 10."""
    count = _COUNTS[path.name]
    expected = f"a MATLAB file of 'X', uint8 (32, 32, 3, {count}), and 'y', labels 1..10 of {count:,} images"
    if not path.is_file():
        raise source.error(path, "is missing", expected)
    try:
        content = loadmat(path)
        pixels, digits = content["X"], np.ravel(content["y"])
    except Exception as error:  # the reader has no error of its own for what is damaged
        raise source.error(path, f"cannot be read ({type(error).__name__}: {error})", expected) from error
    if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, count) or digits.shape != (count,):
        found = f"{pixels.dtype} {pixels.shape} and {digits.dtype} {digits.shape}"
        raise source.error(path, f"holds {found}", expected)
    if not np.isin(digits, range(1, 11)).all():
        raise source.error(path, "has labels that are none of 1..10", expected)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(digits.astype(np.int64) % 10)
