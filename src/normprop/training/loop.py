"""The training loop: build, train, evaluate after each epoch, keep a checkpoint."""

import logging
import warnings
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normprop.data import Dataset
from normprop.errors import CheckpointError, ConfigError, requires
from normprop.training import checkpoint as checkpoints
from normprop.training import launch, random_state
from normprop.training.config import TrainConfig
from normprop.training.records import EpochRecord, TrainResult
from normprop.training.run import Run, assemble

with requires("train"):
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.utilities.exceptions import MisconfigurationException

_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}

Callback = Callable[[EpochRecord], None]


def fit(
    build: Callable[[], nn.Module],
    dataset: Dataset,
    config: TrainConfig,
    *,
    callback: Callback | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train a network with SGD on cross entropy and evaluate it before training and after each epoch.

    The same arguments give the same result, bit for bit on a CPU; the caller's random numbers are not disturbed. Each
    epoch takes all training images in an order that depends on the seed alone, in batches of ``batch_size``, the last
    one smaller; a last batch of a single sample joins the one before it. With several ``devices`` fresh processes share
    each batch and average their gradients, which gives the gradients of the whole batch (statistics of batch norm stay
    each process's own); ``build`` must then be a function that can be pickled, and the calling script be guarded by
    ``if __name__ == "__main__":``.

    Training stops with status ``"diverged"`` when a loss is not finite, when the mean of the last 50 losses (of an
    epoch's, if that has fewer) rises above 10 ln(classes) after the warm-up, or when an output is not finite.

    Args:
        build: makes the network, from (B, C, H, W) or (B, F) to (B, classes); called after seeding.
        dataset: with training, validation and test images.
        config: the settings.
        callback: called with each record as it comes, epoch 0 first, in this process; whatever it raises ends the run.
        checkpoint: file that holds the state after the last whole epoch; overwritten unless ``resume``.
        resume: continue from ``checkpoint``; gives what the uninterrupted run would have given.

    Returns:
        The model, the curve and how it ended.

    Raises:
        ConfigError: if the settings do not fit the data or the machine.
        CheckpointError: if the checkpoint is missing, damaged or of another run.
        ValueError: before any training, the network's own when it cannot train on so few samples
            (batch norm with one value per channel).

    Source:
        Arpit et al. 2016, section 5, for the protocol.

    Example:
        >>> import torch
        >>> from normprop.data import Dataset, Split
        >>> part = Split(torch.randn(40, 4), torch.arange(40) % 2)
        >>> data = Dataset("tiny", ("a", "b"), part, part).split()
        >>> result = fit(lambda: nn.Linear(4, 2), data, TrainConfig(epochs=1, batch_size=8, accelerator="cpu"))
        >>> result.status, result.steps, [record.epoch for record in result.curve]
        ('complete', 5, [0, 1])
    """
    for part in ("train", "validation", "test"):
        if len(getattr(dataset, part)) == 0:
            raise ConfigError(f"{dataset.name} has no {part} images; training needs them: see Dataset.split")
    if dataset.num_classes < 2:
        raise ConfigError(f"{dataset.name} has {dataset.num_classes} class; training needs at least 2")
    if config.augment and len(dataset.shape) != 3:
        raise ConfigError(f"augment needs images (C, H, W), but samples of {dataset.name} have shape {dataset.shape}")
    if resume and checkpoint is None:
        raise ConfigError("resume=True needs a checkpoint to resume from")
    report = callback or (lambda record: None)
    with random_state.preserved():
        if config.devices == 1:
            return _train(build, dataset, config, checkpoint, resume, report)
        return _train_in_processes(build, dataset, config, checkpoint, resume, report)


def _train(
    build: Callable[[], nn.Module],
    dataset: Dataset,
    config: TrainConfig,
    checkpoint: Path | None,
    resume: bool,
    report: Callback,
) -> TrainResult:
    """Train in this process, which may be one of several."""
    fabric = _fabric(config)
    run = Run(fabric, build, dataset, config)
    identity = _identity(dataset, config)
    curve: list[EpochRecord] = []
    reason = None

    def measure() -> str | None:
        record, reason = run.measure()
        curve.append(record)
        if checkpoint is not None and reason is None and run.epoch > 0:
            state = run.state() | {"run": identity, "curve": [asdict(record) for record in curve]}
            if fabric.is_global_zero:
                checkpoints.save(checkpoint, state)
        report(record)
        return reason

    if resume and checkpoint is not None:
        state = checkpoints.load(checkpoint)
        checkpoints.require_same_run(checkpoint, state.get("run", {}), identity)
        try:
            run.load_state(state)
            curve = [EpochRecord.from_dict(values) for values in state["curve"]]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            line = str(error).split("\n")[0]
            raise CheckpointError(f"{checkpoint}: does not fit this network: {line}") from error
    else:
        run.rehearse()
        reason = measure()
    while reason is None and run.epoch < config.epochs:
        reason = run.train_epoch() or measure()
    return TrainResult(
        model=run.model.cpu().eval(),
        curve=curve,
        status="complete" if reason is None else "diverged",
        reason=reason,
        seconds=run.seconds,
        steps=run.step,
    )


def _train_in_processes(
    build: Callable[[], nn.Module],
    dataset: Dataset,
    config: TrainConfig,
    checkpoint: Path | None,
    resume: bool,
    report: Callback,
) -> TrainResult:
    """Train in ``config.devices`` fresh processes and put the result together here."""
    arguments = (build, dataset, config, checkpoint, resume)
    state, outcome = launch.run(_train_and_share, arguments, config.devices, report)
    model = assemble(build, dataset, config)
    if config.precision in _TRUE:
        model.to(_TRUE[config.precision])
    model.load_state_dict(state)
    return TrainResult(model=model.eval(), **outcome)


def _train_and_share(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and return the result without the module, which need not be one that can be pickled."""
    result = _train(*arguments)
    return result.model.state_dict(), {name: value for name, value in vars(result).items() if name != "model"}


def _fabric(config: TrainConfig) -> Fabric:
    """Set up device, precision and, in one of several processes, the process group."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it would announce each choice on stderr
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fabric = Fabric(
                accelerator=config.accelerator,
                devices=config.devices,
                precision=config.precision,  # type: ignore[arg-type]
                strategy="auto" if config.devices == 1 else "ddp",
                plugins=None if config.devices == 1 else LightningEnvironment(),
            )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        line = str(error).split("\n")[0]
        raise ConfigError(
            f"accelerator {config.accelerator}, {config.devices} devices, precision {config.precision}: {line}"
        ) from error
    if fabric.strategy.precision.precision != config.precision:
        raise ConfigError(
            f"precision {config.precision} needs a GPU; use bf16-mixed or 32-true on {fabric.device.type}"
        )
    fabric.launch()
    return fabric


def _identity(dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that resumes from it."""
    return config.to_dict() | {
        "data": dataset.name,
        "train": len(dataset.train),
        "labels": zlib.crc32(dataset.train.labels.cpu().numpy().tobytes()),
    }
