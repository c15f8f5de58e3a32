"""The embedded digits: exact values, every class everywhere, always the same."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from normprop.data import load


def rows(images):
    """Every image as a sortable row of its stored counts 0..16."""
    return sorted(map(tuple, (images.flatten(1) * 16).tolist()))


def test_every_stored_digit_is_there_once_with_its_label():
    digits = load("digits")
    stored, labels = load_digits(return_X_y=True)
    assert (digits.shape, digits.classes) == ((1, 8, 8), tuple("0123456789"))
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    images = torch.cat([digits.train.images, digits.test.images])
    numbers = torch.cat([digits.train.labels, digits.test.labels])
    for digit in range(10):
        assert rows(images[numbers == digit]) == sorted(map(tuple, stored[labels == digit].tolist()))
    assert (images.min(), images.max()) == (0.0, 1.0)


def test_every_part_has_all_classes_in_proportion():
    digits = load("digits")
    labels = torch.cat([digits.train.labels, digits.test.labels])
    share = torch.bincount(labels) / len(labels)
    for part in (digits.test.labels, *digits.train.labels.split(200)):
        assert (torch.bincount(part, minlength=10) - share * len(part)).abs().max() <= 2


def test_the_images_are_always_the_same():
    torch.manual_seed(0)
    np.random.seed(0)
    first = load("digits")
    torch.manual_seed(1)
    np.random.seed(1)
    second = load("digits")
    assert torch.equal(first.train.images, second.train.images)
    # Pinned, so that results stay comparable from one version to the next.
    assert first.train.labels[:10].tolist() == [3, 1, 5, 4, 6, 9, 7, 0, 2, 8]
    assert int((first.train.images[:10] * 16).sum()) == 3040
    assert int((first.test.images * 16).sum()) == 112920
