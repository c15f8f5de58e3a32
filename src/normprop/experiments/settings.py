"""What all trials of a study share: data, network and training settings."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from normprop import data, models
from normprop.data import Dataset
from normprop.experiments.grid import Combination
from normprop.training.config import TrainConfig

# Fields of TrainConfig that differ between trials, and those that belong to a machine: neither identifies a study.
_PER_TRIAL = ("batch_size", "lr", "seed")
_PER_MACHINE = ("accelerator", "devices", "channels_last")


@dataclass(frozen=True)
class Settings:
    """Data, network and training settings shared by all trials of a study.

    Args:
        data: name of a data set, path of an npz file or path of a folder of images by class.
        data_dir: directory of the named data set's files.
        image_size: height and width to which the images of a folder are resized; None if they share one.
        model: name of a reference network, or "package.module:factory" called with `norm=`.
        width: factor on the reference network's channels.
        train: number of training images, None for all.
        validation: number of validation images, held out of the training images; None for a tenth.
        test: number of test images, None for all.
        training: every other setting; its batch size, lr and seed are replaced by each trial's.

    Example:
        >>> Settings(model="mlp", width=0.5).config(Combination("none", 8, 0.1, seed=3)).seed
        3
    """

    data: str = "digits"
    data_dir: Path | None = None
    image_size: int | None = None
    model: str = "nin"
    width: float = 1.0
    train: int | None = None
    validation: int | None = None
    test: int | None = None
    training: TrainConfig = field(default_factory=TrainConfig)

    def load(self) -> Dataset:
        """Read the data and split it.

        Returns:
            The data set with its validation split.

        Raises:
            DataError: if the data is missing, damaged or too small for the splits asked for.
        """
        size = None if self.image_size is None else (self.image_size, self.image_size)
        dataset = data.load(self.data, data_dir=self.data_dir, size=size)
        return dataset.split(train=self.train, validation=self.validation, test=self.test)

    def builder(self, dataset: Dataset, method: str) -> Callable[[], nn.Module]:
        """Return what builds the untrained network with one method; other processes can call it too.

        Args:
            dataset: gives the input shape and the number of classes.
            method: name of the normaliser.

        Returns:
            A picklable callable; it raises ConfigError if the model or the method is not known.
        """
        shape = tuple(dataset.shape)
        return functools.partial(models.create, self.model, shape, dataset.num_classes, norm=method, width=self.width)

    def config(self, combination: Combination) -> TrainConfig:
        """Return the training settings of one trial.

        Args:
            combination: the trial's batch size, lr and seed.

        Returns:
            The shared settings with the trial's own.
        """
        return dataclasses.replace(
            self.training, batch_size=combination.batch_size, lr=combination.lr, seed=combination.seed
        )

    def identity(self, dataset: Dataset) -> dict[str, Any]:
        """Return what two runs must share to belong to one study, as plain JSON values.

        The data is identified by its content, so the same files may lie elsewhere on another machine.

        Args:
            dataset: the loaded data with its splits.

        Returns:
            Names and values, flat.
        """
        splits = (dataset.train, dataset.validation, dataset.test)
        checksum = 0
        for tensor in (tensor for split in splits for tensor in (split.images, split.labels)):
            checksum = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), checksum)
        training = self.training.to_dict()
        for name in _PER_TRIAL + _PER_MACHINE:
            del training[name]
        return {
            "data": dataset.name,
            "model": self.model,
            "width": self.width,
            "train": len(dataset.train.labels),
            "validation": len(dataset.validation.labels),
            "test": len(dataset.test.labels),
            **training,
            "data_checksum": f"{checksum:08x}",
        }
