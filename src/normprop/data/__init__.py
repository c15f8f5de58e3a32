"""Data sets as tensors: readers of published formats and of people's own files. Nothing is downloaded.

`load` gives a `Dataset` of `Split`s, `Dataset.split` sets validation images apart, `batches` and `augment` feed a
network.
"""

from normprop.data.batches import augment, batches
from normprop.data.dataset import Dataset, Split
from normprop.data.loading import load, names

__all__ = ["Dataset", "Split", "augment", "batches", "load", "names"]
