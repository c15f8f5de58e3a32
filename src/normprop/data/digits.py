"""The handwritten digits that come inside scikit-learn: real data with no file to fetch."""

import numpy as np
import torch

from normprop.data.dataset import Dataset, Split
from normprop.data.order import mixed
from normprop.errors import requires

with requires("data"):
    from sklearn.datasets import load_digits

_TRAIN = 1437


def load() -> Dataset:
    """1,797 digits of 8x8 pixels: 1,437 for training and 360 for test.

    The stored pixels are counts 0..16; they become float32 count / 16, which is exact. The images are shuffled in a
    fixed way with all classes in equal proportion everywhere; the last 360 are the test images.

    Returns:
        The data set, images float32 (N, 1, 8, 8) in [0, 1].

    Source:
        Alpaydin, Kaynak, Optical recognition of handwritten digits, 1998 (the test part; scikit-learn's load_digits).

    Example:
        >>> digits = load()
        >>> digits.shape, digits.num_classes, len(digits.train), len(digits.test)
        ((1, 8, 8), 10, 1437, 360)
    """
    counts, labels = load_digits(return_X_y=True)
    order = mixed(labels.astype(np.int64))
    images = torch.from_numpy(counts[order].astype(np.float32)).div_(16).view(-1, 1, 8, 8)
    numbers = torch.from_numpy(labels[order].astype(np.int64))
    return Dataset(
        "digits",
        tuple("0123456789"),
        train=Split(images[:_TRAIN], numbers[:_TRAIN]),
        test=Split(images[_TRAIN:], numbers[_TRAIN:]),
    )
