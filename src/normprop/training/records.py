"""What a training run reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class LayerRecord:
    """Mean and standard deviation of a layer's output over a fixed probe of validation images.

    Args:
        layer: dotted name of the module.
        mean: over samples, channels and positions.
        std: likewise.
    """

    layer: str
    mean: float
    std: float


@dataclass(frozen=True)
class EpochRecord:
    """State of a run after an epoch.

    Args:
        epoch: 1 for the first; 0 for the state before training.
        step: updates made so far.
        lr: learning rate of the last update (of the first, for epoch 0).
        train_loss: mean over the epoch's samples, each seen with the weights of its time; ``None`` for epoch 0.
        validation_error: fraction of validation labels that are missed, one for each sample, or for each pixel.
        test_error: likewise on the test split.
        seconds: training time so far, evaluation not included.
        layers: statistics of each layer's output.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float | None
    validation_error: float
    test_error: float
    seconds: float
    layers: list[LayerRecord] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EpochRecord":
        """Rebuild a record from :func:`dataclasses.asdict`.

        Example:
            >>> from dataclasses import asdict
            >>> record = EpochRecord(1, 10, 0.1, 2.0, 0.5, 0.5, 1.0, [LayerRecord("0", 0.0, 1.0)])
            >>> EpochRecord.from_dict(asdict(record)) == record
            True
        """
        return cls(**{**values, "layers": [LayerRecord(**layer) for layer in values["layers"]]})


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run.

    Args:
        model: the trained network with its input normalisation, on the CPU, in evaluation mode.
        curve: one record per epoch, from epoch 0 on.
        status: ``"complete"``, or ``"diverged"`` when training was stopped.
        reason: what was seen when the run diverged.
        seconds: training time, evaluation not included.
        steps: updates made.
    """

    model: nn.Module
    curve: list[EpochRecord]
    status: Literal["complete", "diverged"]
    reason: str | None
    seconds: float
    steps: int
