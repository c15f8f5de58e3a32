"""The protocol of the paper's experiments on CIFAR-10, as printed and reduced."""

import dataclasses

from normprop.experiments.reproduce.context import Context
from normprop.experiments.settings import Settings
from normprop.training.config import TrainConfig


def settings(context: Context, *, data_norm: str, augment: tuple[str, ...] = (), data: str = "cifar10") -> Settings:
    """Sections 5.1 to 5.4: the paper's NIN, 50 epochs, rate halved every 10 epochs; small: see :func:`described`.

    Args:
        context: gives the scale.
        data_norm: "global" or "batch".
        augment: any of "flip" and "crop".
        data: name of the data set.

    Returns:
        What all trials share.
    """
    small = context.scale == "small"
    training = TrainConfig(
        epochs=10 if small else 50,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="halving",
        halve_every=2 if small else 10,
        augment=augment,
        data_norm=data_norm,
        accelerator=context.accelerator,
    )
    full = Settings(data=data, data_dir=context.data_dir, model="nin", training=training)
    return dataclasses.replace(full, width=0.25, train=11_000, validation=1000, test=2000) if small else full


def study(context: Context, settings: Settings) -> str:
    """Name the study by what is trained, so that figures and tables that train the same share their trials.

    Example:
        >>> context = Context("small", "sqlite://")
        >>> study(context, settings(context, data_norm="batch", augment=("flip",)))
        'normprop-cifar10-batch-flip-10-epochs-small'
    """
    training = settings.training
    parts = (settings.data, training.data_norm, *training.augment, f"{training.epochs}-epochs", context.scale)
    return "normprop-" + "-".join(parts)


def described(settings: Settings) -> str:
    """Say what is trained."""
    training = settings.training
    width = "" if settings.width == 1 else f" at {settings.width:g} of its width"
    images = "all" if settings.train is None else f"the first {settings.train:,}"
    tests = "all" if settings.test is None else f"the first {settings.test:,}"
    return (
        f"The paper's NIN{width}, {images} training and {tests} test images of {settings.data}, {training.epochs} "
        f"epochs of SGD with momentum {training.momentum:g} and weight decay {training.weight_decay:g}, rate halved "
        f"every {training.halve_every} epochs."
    )
