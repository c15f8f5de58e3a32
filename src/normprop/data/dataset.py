"""A labelled data set in memory: tensors for training, validation and test."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normprop.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images (or flat features) and their labels, on one device.

    Args:
        images: uint8 (N, C, H, W) with values 0..255, or float32 (N, C, H, W) or (N, F), kept as stored.
        labels: int64 class numbers: (N,), or (N, H, W) of every pixel of images.

    Raises:
        DataError: if types, shapes, lengths or devices do not fit together.

    Example:
        >>> split = Split(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5))
        >>> len(split), len(split[1:3])
        (5, 2)
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"images are {images.dtype}; expected torch.uint8 or torch.float32")
        if images.ndim not in (2, 4):
            raise DataError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W) or (N, F)")
        if labels.dtype != torch.int64 or labels.ndim not in (1, 3):
            raise DataError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected torch.int64 (N,) or (N, H, W)"
            )
        if len(images) != len(labels):
            raise DataError(f"{len(images)} images but {len(labels)} labels; expected as many of both")
        if labels.ndim == 3 and (images.ndim != 4 or images.shape[2:] != labels.shape[1:]):
            raise DataError(
                f"labels have shape {tuple(labels.shape)}, images {tuple(images.shape)}; expected a label for every "
                f"pixel of (N, C, H, W)"
            )
        if images.device != labels.device:
            raise DataError(f"images are on {images.device}, labels on {labels.device}; expected one device")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice | Tensor) -> "Split":
        return Split(self.images[part], self.labels[part])

    def to(self, device: torch.device | str) -> "Split":
        """The same split on another device.

        Args:
            device: where the tensors shall live.

        Returns:
            A split whose tensors are on `device` (the same tensors if they are there already).

        Example:
            >>> Split(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)).to("cpu").images.device
            device(type='cpu')
        """
        return Split(self.images.to(device), self.labels.to(device))


def _no_images() -> Split:
    return Split(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set: its classes and its training, test and validation images.

    Args:
        name: what reports call it.
        classes: the name of every class, in the order of the label numbers.
        train: training images.
        test: test images.
        validation: validation images; empty until `split` takes them from the training images, unless the data
            set comes with its own.

    Raises:
        DataError: if the splits differ in image shape or type, or a label is no class number.

    Example:
        >>> part = Split(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))
        >>> data = Dataset("tiny", ("cat", "dog"), train=part, test=part)
        >>> data.shape, data.num_classes
        ((3, 2, 2), 2)
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    validation: Split = field(default_factory=_no_images)

    def __post_init__(self) -> None:
        for part in ("train", "test", "validation"):
            split: Split = getattr(self, part)
            if len(split) == 0:
                continue
            if split.images.shape[1:] != self.train.images.shape[1:] or split.images.dtype != self.train.images.dtype:
                raise DataError(
                    f"{self.name}: {part} images are {split.images.dtype} {tuple(split.images.shape[1:])}; expected "
                    f"{self.train.images.dtype} {self.shape} as in training"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"{self.name}: {part} labels range over {low}..{high}; expected 0..{self.num_classes - 1}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) or (F,)."""
        return tuple(self.train.images.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set on another device.

        Args:
            device: where the tensors shall live.

        Returns:
            A data set whose tensors are on `device`.

        Example:
            >>> part = Split(torch.zeros(2, 4), torch.tensor([0, 1]))
            >>> Dataset("tiny", ("a", "b"), part, part).to("cpu").train.labels.device
            device(type='cpu')
        """
        return replace(
            self, train=self.train.to(device), test=self.test.to(device), validation=self.validation.to(device)
        )

    def split(self, train: int | None = None, validation: int | None = None, test: int | None = None) -> "Dataset":
        """Cut the data set to size and set validation images apart; the same arguments give the same images.

        Training takes the first `train` training images and validation the ones right after them. With `train=None`
        validation takes the last training images and training all the others. A data set that has its own validation
        images keeps them, and the first `validation` of them are used. No image is in two splits.

        Args:
            train: number of training images; None: all that validation leaves.
            validation: number of validation images; None: a tenth of the number of training images, and at least
                one per class where that many are left.
            test: number of test images, the first ones; None: all.

        Returns:
            The data set with its three splits (views, nothing is copied).

        Raises:
            ConfigError: if there are not that many images.

        Example:
            >>> part = Split(torch.arange(50.0).reshape(50, 1), torch.arange(50) % 2)
            >>> data = Dataset("tiny", ("a", "b"), part, part).split(train=30, validation=8, test=20)
            >>> len(data.train), len(data.validation), len(data.test)
            (30, 8, 20)
        """
        for part, asked in (("training", train), ("validation", validation), ("test", test)):
            if asked is not None and asked < (0 if part == "validation" else 1):
                raise ConfigError(f"{self.name}: {asked} {part} images asked for; expected a positive number")
        if len(self.validation):
            kept = len(self.train) if train is None else train
            self._require("training", kept, len(self.train))
            self._require("validation", validation or 0, len(self.validation))
            held_out = self.validation[: len(self.validation) if validation is None else validation]
        else:
            kept, count = self._sizes(train, validation)
            held_out = self.train[kept : kept + count]
        self._require("test", test or 0, len(self.test))
        return replace(self, train=self.train[:kept], validation=held_out, test=self.test[:test])

    def _sizes(self, train: int | None, validation: int | None) -> tuple[int, int]:
        """How many of the training images training and validation get."""
        total = len(self.train)
        if train is None:
            count = max(total // 10, min(self.num_classes, total // 2)) if validation is None else validation
            train = total - count
        else:
            self._require("training", train, total)
            count = max(train // 10, min(self.num_classes, total - train)) if validation is None else validation
        if train < 1 or train + count > total or (validation is None and count < 1):
            count = max(count, 1) if validation is None else count
            raise ConfigError(
                f"{self.name}: {max(train, 1)} training and {count} validation images asked for, but both come from "
                f"its {total} training images; ask for fewer"
            )
        return train, count

    def _require(self, part: str, asked: int, available: int) -> None:
        if asked > available:
            raise ConfigError(f"{self.name}: {asked} {part} images asked for, but it has {available}; ask for fewer")
