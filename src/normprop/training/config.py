"""The settings of one training run."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from normprop.errors import ConfigError

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
SCHEDULES = ("constant", "halving", "linear", "cosine")
OPTIMIZERS = ("sgd", "muon")
AUGMENTATIONS = ("flip", "crop")
DATA_NORMS = ("global", "batch", "none")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; checked when built.

    Args:
        epochs: passes over the training split.
        batch_size: samples per update, over all processes together.
        lr: peak learning rate per update; not scaled with the batch size.
        momentum: of the optimiser, or ``None`` for 0.9; with Muon at batch sizes below 8 that of
            :func:`normprop.training.momentum_at`.
        optimizer: ``"sgd"`` or ``"muon"`` (:class:`normprop.training.Muon`).
        weight_decay: of the decayed parameters (see :func:`normprop.training.groups.parameter_groups`).
        schedule: course of the learning rate, a name of :mod:`normprop.training.schedules`.
        warmup: fraction of all updates spent warming up, for ``"linear"`` and ``"cosine"``.
        halve_every: epochs between halvings, for ``"halving"``.
        label_smoothing: share of each target spread evenly over all classes.
        clip_grad: largest global norm of the gradient, or ``None``.
        clip_unit: largest norm of the gradient of a weight's row (filter), as a multiple of the row's own norm, or
            ``None`` (:func:`normprop.training.adaptive_clip.adaptive_gradient_clip_`).
        augment: any of ``"flip"`` (left-right) and ``"crop"`` (pad 4, crop at random).
        data_norm: input normalisation per element: ``"global"``, ``"batch"`` or ``"none"``.
        seed: of the initial weights, the data order and the augmentation.
        precision: Lightning Fabric's name, e.g. ``"32-true"`` or ``"bf16-mixed"``.
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``, ``"cuda"`` or ``"mps"``.
        devices: number of training processes.
        unit_norm: whether NormProp weights are kept at unit norm after each update.
        gain_rate: how many times the learning rate of their filters NormProp gains and biases have.
        decouple: whether NormProp filters' gradients leave out mean and scale of their pre-activations
            (:func:`normprop.training.decouple`).
        channels_last: whether images and the weights of two-dimensional convolutions lie channels last in memory, which
            changes results by rounding alone.

    Raises:
        ConfigError: one line for each setting that cannot work.

    Example:
        >>> TrainConfig(epochs=2, schedule="cosine").lr
        0.02
        >>> TrainConfig(epochs=0)
        Traceback (most recent call last):
        normprop.errors.ConfigError: epochs must be a whole number of at least 1, got 0
    """

    epochs: int = 6
    batch_size: int = 32
    lr: float = 0.02
    momentum: float | None = None
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.1
    halve_every: int = 10
    label_smoothing: float = 0.0
    clip_grad: float | None = None
    clip_unit: float | None = None
    augment: tuple[str, ...] = ()
    data_norm: str = "global"
    seed: int = 0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    unit_norm: bool = True
    gain_rate: float = 1.0
    decouple: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise ConfigError("\n".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a plain dict that JSON can store.

        Example:
            >>> TrainConfig(augment=("flip",)).to_dict()["augment"]
            ['flip']
        """
        return asdict(self) | {"augment": list(self.augment)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """Build the settings from a plain dict, such as :meth:`to_dict` returns; missing ones get their default.

        Args:
            settings: values by name.

        Raises:
            ConfigError: for a name that does not exist or a value that cannot work.

        Example:
            >>> TrainConfig.from_dict({"epochs": 3, "augment": ["flip"]}).augment
            ('flip',)
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ConfigError(f"unknown training setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        values = dict(settings)
        if isinstance(values.get("augment"), list):
            values["augment"] = tuple(values["augment"])
        return cls(**values)


def _whole(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    """Accept whole numbers in [low, high]."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    """Accept finite numbers in [low, high)."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value < high


def _one_of(names: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    """Accept one of a few names."""
    return lambda value: isinstance(value, str) and value in names, "one of " + ", ".join(names)


def _positive(value: Any) -> bool:
    """Accept finite numbers above 0."""
    return _real(0, math.inf)(value) and value > 0


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (_whole(1), "a whole number of at least 1"),
    "batch_size": (_whole(1), "a whole number of at least 1"),
    "lr": (_positive, "a finite number above 0"),
    "momentum": (lambda value: value is None or _real(0, 1)(value), "a number from 0 to below 1, or None"),
    "optimizer": _one_of(OPTIMIZERS),
    "weight_decay": (_real(0, math.inf), "a finite number of at least 0"),
    "schedule": _one_of(SCHEDULES),
    "warmup": (_real(0, 1), "a fraction from 0 to below 1"),
    "halve_every": (_whole(1), "a whole number of at least 1"),
    "label_smoothing": (_real(0, 1), "a fraction from 0 to below 1"),
    "clip_grad": (lambda value: value is None or _positive(value), "a finite number above 0, or None"),
    "clip_unit": (lambda value: value is None or _positive(value), "a finite number above 0, or None"),
    "augment": (
        lambda value: isinstance(value, tuple) and all(name in AUGMENTATIONS for name in value),
        "a tuple of names out of " + ", ".join(AUGMENTATIONS),
    ),
    "data_norm": _one_of(DATA_NORMS),
    # NumPy's generator takes no larger seed.
    "seed": (_whole(0, 2**32 - 1), "a whole number from 0 to 4294967295"),
    "precision": _one_of(PRECISIONS),
    "accelerator": _one_of(ACCELERATORS),
    "devices": (_whole(1), "a whole number of at least 1"),
    "unit_norm": (lambda value: isinstance(value, bool), "True or False"),
    "gain_rate": (_positive, "a finite number above 0"),
    "decouple": (lambda value: isinstance(value, bool), "True or False"),
    "channels_last": (lambda value: isinstance(value, bool), "True or False"),
}


def _problems(config: TrainConfig) -> Iterator[str]:
    """Describe each setting that cannot work in one line."""
    wrong = set()
    for name, (accepts, expected) in _CHECKS.items():
        value = getattr(config, name)
        if not accepts(value):
            wrong.add(name)
            yield f"{name} must be {expected}, got {value!r}"
    if not wrong & {"batch_size", "devices"} and config.batch_size < config.devices:
        yield (
            f"batch_size must be at least devices, because processes share each batch: got batch_size "
            f"{config.batch_size} for {config.devices} devices"
        )
