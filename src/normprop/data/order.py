"""A fixed order of samples in which every stretch holds the classes in their proportions."""

import numpy as np
from numpy.typing import NDArray


def mixed(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shuffle samples, always in the same way, and spread every class evenly over the whole length.

    Files that are stored class by class can then be cut anywhere: any part of them holds all classes.

    Args:
        labels: class numbers (N,), from 0.

    Returns:
        The order, a permutation of 0..N-1. Sample i of the n of its class stands at about (i + 1/2) / n of the length.

    Example:
        >>> labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
        >>> labels[mixed(labels)]
        array([0, 1, 0, 0, 1, 0, 0, 1, 0])
    """
    # RandomState, unlike newer generators, promises the same numbers in every version of numpy.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    number = labels[by_class]
    place = (np.arange(len(labels)) - (np.cumsum(counts) - counts)[number] + 0.5) / counts[number]
    return by_class[np.argsort(place, kind="stable")]
