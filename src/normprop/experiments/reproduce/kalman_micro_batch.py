"""Kalman Normalization at statistics of two images, against batch norm and group norm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from normprop import models, norms
from normprop.diagnostics.plot import Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import accuracy_line, by_method, complete
from normprop.experiments.reproduce.reproduction import Difference, Reproduction, Table, judged, spread
from normprop.experiments.settings import Settings
from normprop.experiments.trial import TrialRecord
from normprop.norms import kalman
from normprop.norms.batch_variants import GhostBatchNorm
from normprop.norms.plain import of_layers
from normprop.norms.registry import Method
from normprop.training.config import TrainConfig

BATCH_SIZE, RATE = 128, 0.1
_MICRO = 2
# With every part of the batch this much, the running averages move by a tenth at each step, as Kalman norm's do.
_MOMENTUM = 1 - 0.9 ** (_MICRO / BATCH_SIZE)


def _ghost_batch(dims: int, channels: int) -> nn.Module:
    return GhostBatchNorm(channels, ghost_size=_MICRO, momentum=_MOMENTUM)


def _group(dims: int, channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


@dataclass(frozen=True)
class Arm:
    """What is trained: a method, what its statistics are of, and the public code's validation error in percent.

    Args:
        method: how blocks are built.
        images: whose statistics a layer takes.
        prior: weight of the prior.
        printed: read off the public code's plots, near 100,000 steps.
    """

    method: Method
    images: int
    prior: str
    printed: float


BATCH_2, GROUP = "batch on 2 images", "group with 4 groups"
KALMAN_2, SAMPLED_2 = "kalman on 2 images", "sampled kalman on 2 images"
BATCH_128, KALMAN_128 = "batch on 128 images", "kalman on 128 images"
ARMS = {
    BATCH_2: Arm(of_layers("Ioffe & Szegedy 2015, on parts of the batch", _ghost_batch), _MICRO, "–", 8.7),
    GROUP: Arm(of_layers("Wu & He 2018", _group), 1, "–", 8.5),
    KALMAN_2: Arm(kalman.batch_method(prior_weight=0.9, micro_batch=_MICRO), _MICRO, "0.9", 7.7),
    SAMPLED_2: Arm(kalman.batch_method("sampled", prior_weight=0.9, micro_batch=_MICRO), _MICRO, "0.9", 7.7),
    BATCH_128: Arm(norms.method("batch"), BATCH_SIZE, "–", 6.2),
    KALMAN_128: Arm(kalman.batch_method(prior_weight=0.05), BATCH_SIZE, "0.05", 5.9),
}
_TITLES = ("statistics of parts of 2 images", "statistics of whole batches of 128")
_PAIRS = (
    (KALMAN_2, BATCH_2),
    (KALMAN_2, GROUP),
    (SAMPLED_2, BATCH_2),
    (SAMPLED_2, GROUP),
    (KALMAN_128, BATCH_128),
)


def _network(norm: str, depth: int, width: float = 1.0) -> nn.Module:
    # Networks look their method up by name; these have settings of their own and are known here alone.
    if norm not in norms.names():
        norms.register(norm, ARMS[norm].method)
    return models.resnet(depth, 3, 10, norm=norm, width=width)


# Networks by scale: called with norm=, one of ARMS. The public code has 32 layers for 2 images and 110 for 128.
small = partial(_network, depth=8, width=0.5)
micro = partial(_network, depth=32)
large = partial(_network, depth=110)


def run(context: Context) -> Reproduction:
    """Train a residual network with statistics of 2 and of 128 images, the gradient over 128 in both.

    Args:
        context: scale, data and storage.

    Returns:
        Test errors next to those of the public code.

    Source:
        Wang et al. 2018; protocol and figures: its public code.
    """
    is_small = context.scale == "small"
    seeds = context.seed_list(3)
    parts = {"2": ("micro", (BATCH_2, GROUP, KALMAN_2, SAMPLED_2)), "128": ("large", (BATCH_128, KALMAN_128))}
    runs: dict[str, list[TrialRecord]] = {}
    for images, (factory, methods) in parts.items():
        settings = _settings(context, "small" if is_small else factory)
        wanted = [Combination(method, BATCH_SIZE, RATE, seed) for seed in seeds for method in methods]
        trained = context.train(f"kalman-micro-batch-{context.scale}-{images}", settings, wanted)
        runs |= by_method(trained, methods)
    errors = {method: _errors(records) for method, records in runs.items()}
    agrees, contradicts = judged([_claim(pair, errors) for pair in _PAIRS])
    return Reproduction(
        name="kalman-micro-batch",
        title="Kalman norm on statistics of 2 images has lower errors than batch norm and group norm",
        paper="Wang et al. 2018, Kalman Normalization; protocol and figures of its public code for CIFAR-10",
        scale=context.scale,
        protocol=_protocol(settings, len(seeds)),
        differs_from_paper=_DIFFERS + (_SMALLER if is_small else ""),
        table=Table(
            ("method", "images in its statistics", "weight of the prior", "test error, %", "public code's plots"),
            [_row(method, errors[method]) for method in ARMS],
        ),
        figures=[
            Plot(
                f"Test accuracy, {title}",
                "epoch",
                "%",
                [accuracy_line(_short(method), runs[method]) for method in methods],
            )
            for title, (_, methods) in zip(_TITLES, parts.values(), strict=True)
        ],
        agrees=agrees,
        contradicts=contradicts,
        notes=[
            "The two forms of the prior: the public code draws a Gaussian map and sends it through activation and "
            'convolution ("sampled"); this library has the moments in closed form as well.',
            "Errors of 2 and of 128 images are not to be compared with each other as printed: the public code trains "
            "32 layers for the one and 110 for the other.",
        ],
        numbers={method: {str(seed): error for seed, error in found.items()} for method, found in errors.items()},
    )


def _settings(context: Context, factory: str) -> Settings:
    is_small = context.scale == "small"
    training = TrainConfig(
        epochs=12 if is_small else 400,
        momentum=0.9,
        weight_decay=2e-4,
        schedule="linear",
        augment=("flip", "crop"),
        accelerator=context.accelerator,
    )
    sizes = {"train": 4500, "validation": 500, "test": 2000} if is_small else {}
    return Settings(
        data="cifar10", data_dir=context.data_dir, model=f"{__name__}:{factory}", training=training, **sizes
    )


_DIFFERS = (
    "The public code's residual network normalises before the convolution, ours after it; its rate falls in steps "
    "(0.1, 0.01, 0.001, 0.0002 from epochs 1, 82, 123, 300), and so does its decay."
)
_SMALLER = " It trains 32 layers (110 at 128 images) at full width for 400 epochs on all images."


def _protocol(settings: Settings, seeds: int) -> str:
    training = settings.training
    network = "Residual networks of 32 layers (statistics of 2 images) and 110 (of 128)"
    if settings.model.endswith("small"):
        network = "A residual network of 8 layers at half its width"
    images = f"{settings.train:,}" if settings.train else "45,000"
    return (
        f"{network}, {images} training and {settings.test or 10_000:,} test images of cifar10 with flips and crops, "
        f"{training.epochs} epochs of SGD on batches of {BATCH_SIZE} with momentum {training.momentum:g} and weight "
        f"decay {training.weight_decay:g}, rate {RATE} for all, warmed up over a tenth of the run and then falling "
        f"linearly to 0, {seeds} seeds. Statistics of 2 images: the batch is cut into 64 parts, each normalised by "
        "itself. A difference counts if it is more than twice its standard error over the seeds."
    )


def _errors(records: Sequence[TrialRecord]) -> dict[int, float]:
    """Test errors in percent by seed."""
    return {r.combination.seed: 100 * r.test_error for r in complete(records) if r.test_error is not None}


def _short(method: str) -> str:
    return method.split(" on ")[0]


def _row(name: str, errors: Mapping[int, float]) -> tuple[str, ...]:
    arm = ARMS[name]
    return (_short(name), str(arm.images), arm.prior, spread(list(errors.values())), f"about {arm.printed}")


def _claim(pair: tuple[str, str], errors: Mapping[str, Mapping[int, float]]) -> tuple[bool, str]:
    """Whether the first method's error is below the second's by more than noise."""
    ours, theirs = pair
    apart = Difference.of(errors[ours], errors[theirs])
    if not apart.values:
        return False, f"{ours} against {theirs}: one of the two diverged with every seed."
    printed = ARMS[ours].printed - ARMS[theirs].printed
    noise = "" if apart.clear else ", no more than the noise over seeds"
    return (
        apart.clear and apart.mean < 0,
        f"Error of {ours} less that of {theirs}: {apart} points{noise} (the public code: about {printed:+.1f}).",
    )
