"""Does RegBN remove what two views share? A planted confounder in both halves of real images.

Every image carries a number z as the brightness of stripes in both of its halves. In training z goes with the label;
at test time it does so as before, or not at all. A network of two branches, one for each half, is trained with each
method. Measured are its accuracy on both kinds of test images, how well z can be read off the left branch's features by
linear regression, and how much of their variance it makes, before and after the point where the branches are joined.

Run it with ``python -m normprop.experiments.two_view --data digits``.

Source:
    Ours, for Ghahremani & Wachinger 2023.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normprop import data
from normprop.data import Dataset, Split, batches
from normprop.data.confounder import planted
from normprop.errors import ConfigError
from normprop.experiments import machine
from normprop.models.two_view import RegressAndConcatenate, TwoViews, two_view
from normprop.training.config import TrainConfig
from normprop.training.loop import fit


class NormalizeAndConcatenate(nn.Module):
    """The fusion of RegBN without its regression, to tell what the layer norms do.

    Example:
        >>> NormalizeAndConcatenate()(torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 1.0]])).round()
        tensor([[-1.,  1.,  1., -1.]])
    """

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Layer norm of both, joined along axis 1."""
        return torch.cat([F.layer_norm(half, half.shape[1:]) for half in (left, right)], 1)


def _batch_and_layer(in_channels: int, num_classes: int, width: float = 1.0) -> nn.Sequential:
    network = two_view(in_channels, num_classes, norm="batch", width=width)
    network[0].fusion = NormalizeAndConcatenate()
    return network


VARIANTS: dict[str, Callable[..., nn.Sequential]] = {
    "none": partial(two_view, norm="none"),
    "layer": partial(two_view, norm="layer"),
    "batch": partial(two_view, norm="batch"),
    "batch-layer": _batch_and_layer,
    "reg": partial(two_view, norm="reg"),
    "reg-paper": partial(two_view, norm="reg", constraint="paper"),
    "reg-none": partial(two_view, norm="reg", constraint="none"),
}
"""Builders of the networks, as :func:`normprop.models.two_view`. ``"batch-layer"`` is RegBN without the regression."""

_EVALUATION_BATCH = 512
_PLANTING_SEED = 1_000_000  # so that what is planted is not drawn from the numbers that seed the network


@dataclass(frozen=True)
class TwoViewSettings:
    """Settings of the experiment.

    Args:
        data: name of a data set of images, or a path to people's own.
        data_dir: directory of a named data set's files.
        train: number of training images, None for all.
        test: number of test images, None for all.
        correlation: of z with the label in training, see :func:`normprop.data.confounder.draw`.
        strength: of the stripes, see :func:`normprop.data.confounder.plant`.
        width: factor on the network's channels.
        epochs: passes over the training images.
        batch_size: samples per update.
        lr: peak learning rate.

    Example:
        >>> TwoViewSettings(data="mnist").correlation
        0.9
    """

    data: str = "digits"
    data_dir: Path | None = None
    train: int | None = None
    test: int | None = None
    correlation: float = 0.9
    strength: float = 0.5
    width: float = 0.25
    epochs: int = 3
    batch_size: int = 32
    lr: float = 0.05


def readable(train: Tensor, train_target: Tensor, test: Tensor, test_target: Tensor) -> float:
    r"""How well a number can be read off features: :math:`R^2` of linear regression on images it was not fitted to.

    Args:
        train: (N, F) features to fit on.
        train_target: (N,) the number.
        test: (M, F) features of other images.
        test_target: (M,) their number.

    Returns:
        1 for perfect, 0 for no better than the mean; below 0 where the fit does harm.

    Example:
        >>> features = torch.randn(100, 3)
        >>> round(readable(features[:50], features[:50, 0], features[50:], features[50:, 0]), 6)
        1.0
    """
    train, test, train_target, test_target = (part.double() for part in (train, test, train_target, test_target))
    center = train.mean(0)
    fitted = torch.linalg.lstsq(train - center, (train_target - train_target.mean()).unsqueeze(1), driver="gelsd")
    predicted = ((test - center) @ fitted.solution).squeeze(1) + train_target.mean()
    residual = (test_target - predicted).square().sum()
    return 1 - float(residual / (test_target - test_target.mean()).square().sum())


def share(features: Tensor, target: Tensor) -> float:
    """How much of the features' variance, summed over the features, a number explains linearly.

    Args:
        features: (N, F).
        target: (N,) the number.

    Returns:
        From 0 to 1.

    Example:
        >>> round(share(torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 0.0]]), torch.tensor([1.0, 2.0, 3.0])), 6)
        0.75
    """
    features, target = (part.double() - part.double().mean(0) for part in (features, target))
    explained = (target @ features).square().sum() / target.square().sum()
    return float(explained / features.square().sum())


def trial(variant: str, seed: int, dataset: Dataset, settings: TwoViewSettings) -> dict[str, Any]:
    """Train one network and measure it.

    Args:
        variant: a key of :data:`VARIANTS`.
        seed: of the network, the order of the images and the confounder.
        dataset: the images without confounder, split.
        settings: all else.

    Returns:
        Accuracies ("correlated", "independent": z as in training or independent of the label), and :func:`readable` and
        :func:`share` of z ("left" features, "residual" of RegBN, "left_joined" and "right_joined" as the classifier
        sees them), all on test images.

    Raises:
        ConfigError: for what cannot work.
    """
    generator = torch.Generator().manual_seed(_PLANTING_SEED + seed)

    def plant(split: Split, correlation: float) -> tuple[Split, Tensor]:
        return planted(split, dataset.num_classes, correlation, settings.strength, generator)

    train, _ = plant(dataset.train, settings.correlation)
    validation, _ = plant(dataset.validation, settings.correlation)
    correlated, _ = plant(dataset.test, settings.correlation)
    independent, test_z = plant(dataset.test, 0.0)
    probe, probe_z = plant(dataset.train, 0.0)
    config = TrainConfig(
        epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, seed=seed, accelerator="cpu"
    )
    result = fit(
        partial(VARIANTS[variant], dataset.shape[0], dataset.num_classes, width=settings.width),
        dataclasses.replace(dataset, train=train, validation=validation, test=independent),
        config,
    )
    if result.status != "complete":
        raise ConfigError(f"two-view experiment: {variant}, seed {seed}: {result.reason}; take a smaller lr")
    fitted, held_out = _features(result.model, probe), _features(result.model, independent)
    return {
        "method": variant,
        "seed": seed,
        "seconds": result.seconds,
        "accuracy": {"correlated": _accuracy(result.model, correlated), "independent": 1 - result.curve[-1].test_error},
        "readable": {name: readable(fitted[name], probe_z, held_out[name], test_z) for name in fitted},
        "share": {name: share(held_out[name], test_z) for name in held_out},
    }


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float:
    parts = batches(split, _EVALUATION_BATCH, shuffle=False)
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts) / len(split)


@torch.no_grad()
def _features(model: nn.Module, split: Split) -> dict[str, Tensor]:
    """The features of every image of a split, at each place where the confounder is looked for."""
    views = next(part for part in model.modules() if isinstance(part, TwoViews))
    found: list[dict[str, Tensor]] = []

    def record(fusion: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        left, right = inputs
        joined = output.split([left.shape[1], right.shape[1]], 1)
        found.append({"left": left, "left_joined": joined[0], "right_joined": joined[1]})
        if isinstance(fusion, RegressAndConcatenate):
            found[-1]["residual"] = fusion.regbn.regression(left, right)

    handle = views.fusion.register_forward_hook(record)
    for images, _ in batches(split, _EVALUATION_BATCH, shuffle=False):
        model(images)
    handle.remove()
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def run(
    settings: TwoViewSettings,
    methods: Sequence[str] = tuple(VARIANTS),
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[dict[str, Any]], None] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and measure every method with every seed; same seed, same confounder.

    Args:
        settings: data, network and training.
        methods: keys of :data:`VARIANTS`.
        seeds: at least one.
        progress: called with each trial as it comes.
        command: the command line, for the document.

    Returns:
        A document that JSON can store: settings, versions, machine and trials.

    Raises:
        ConfigError: for what cannot work.
        DataError: if the data cannot be read.
    """
    unknown = [method for method in methods if method not in VARIANTS]
    if unknown or not methods or not seeds:
        what = f"no method {unknown[0]!r}" if unknown else "nothing to do without methods and seeds"
        raise ConfigError(f"two-view experiment: {what}; there are {', '.join(VARIANTS)}, and seeds are whole numbers")
    dataset = data.load(settings.data, data_dir=settings.data_dir)
    if len(dataset.shape) != 3:
        raise ConfigError(f"two-view experiment: needs images (C, H, W), {dataset.name} has shape {dataset.shape}")
    dataset = dataset.split(train=settings.train, test=settings.test)
    trials = []
    for seed in seeds:
        for method in methods:
            trials.append(trial(method, seed, dataset, settings))
            if progress is not None:
                progress(trials[-1])
    return {
        "title": f"A confounder in both halves of {dataset.name}",
        "command": command,
        "settings": dataclasses.asdict(settings)
        | {"data_dir": None, "train": len(dataset.train)}
        | {"test": len(dataset.test)},
        "methods": list(methods),
        "seeds": list(seeds),
        "trials": trials,
        "versions": machine.versions(),
        "machine": machine.describe("cpu"),
    }


if __name__ == "__main__":
    from normprop.experiments.two_view_command import main

    sys.exit(main())
