"""Figure 1 of the SELU paper: training loss of deep fully connected networks, SELU against batch norm."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from normprop import models
from normprop.diagnostics.plot import Line, Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import complete
from normprop.experiments.reproduce.reproduction import Difference, Reproduction, Table, judged, spread
from normprop.experiments.settings import Settings
from normprop.experiments.trial import TrialRecord
from normprop.training.config import TrainConfig

METHODS = ("selu", "batch", "normprop", "normprop-paper")
DEPTHS = (8, 16, 32)
DATA = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
BATCH_SIZE = 128
# One rate for all, as in the paper; then each cell's best of several, which the paper does not have. The printed
# 1e-5 is for the sum of the losses of a batch: 128 times as much for their mean.
RATE = {"small": 0.01, "paper": 128e-5}
RATES = {"small": (0.001, 0.01, 0.1), "paper": (128e-5,)}

_SHOWN = 10.0  # a training loss above this leaves a gap in the curves: ten classes are guessed at 2.3

Cell = tuple[str, int]  # method and depth
Curves = Mapping[int, Sequence[float]]  # training loss after each epoch, by seed


def _network(norm: str, features: int, hidden: int) -> nn.Module:
    """Build the network of "METHOD, DEPTH layers"."""
    method, _, depth = norm.removesuffix(" layers").partition(", ")
    return models.mlp(features, 10, norm=method, depth=int(depth), hidden_features=hidden)


# Networks by data and scale: called with norm=, a method and a depth. In the paper as many hidden units as inputs.
mnist_small = partial(_network, features=784, hidden=128)
cifar10_small = partial(_network, features=3072, hidden=128)
mnist_paper = partial(_network, features=784, hidden=784)
cifar10_paper = partial(_network, features=3072, hidden=3072)


def run(context: Context) -> Reproduction:
    """Train perceptrons of 8, 16 and 32 hidden layers on MNIST and CIFAR-10.

    Args:
        context: scale, data and storage.

    Returns:
        Training losses of SELU, batch norm and normalisation propagation.

    Source:
        Klambauer et al. 2017, figure 1; its protocol: the public code's directory figure1.
    """
    small = context.scale == "small"
    seeds = context.seed_list(3)
    rate, rates = RATE[context.scale], {BATCH_SIZE: RATES[context.scale]}
    cells = [(method, depth) for depth in DEPTHS for method in METHODS]
    shared: dict[str, dict[Cell, Curves]] = {}
    tuned: dict[str, dict[Cell, list[TrialRecord]]] = {}
    for data in DATA:
        settings = _settings(context, data)
        study = f"selu-depth-{context.scale}-{data}"
        wanted = [Combination(_name(cell), BATCH_SIZE, rate, seed) for seed in seeds for cell in cells]
        trained = context.train(study, settings, wanted)
        shared[data] = {cell: curves([trained[c] for c in wanted if c.method == _name(cell)]) for cell in cells}
        best = context.tuned(study, settings, [(_name(cell), BATCH_SIZE) for cell in cells], rates, seeds)
        tuned[data] = {cell: best[_name(cell), BATCH_SIZE] for cell in cells}
    agrees, contradicts = judged([claim(DATA[data], shared[data]) for data in DATA for claim in (_lower, _steadier)])
    deepest = {method: shared["cifar10"][method, DEPTHS[-1]] for method in METHODS}
    return Reproduction(
        name="selu-depth",
        title="Deep SELU networks learn faster than networks with batch norm, and more steadily",
        paper="Klambauer et al. 2017, figure 1",
        scale=context.scale,
        protocol=_protocol(settings, rate, rates[BATCH_SIZE], len(seeds)),
        differs_from_paper=_DIFFERS + (_SMALLER if small else ""),
        table=Table(
            (
                "data",
                "layers",
                *(f"{method} at {rate:g}" for method in METHODS),
                *(f"{m} at its best" for m in METHODS),
            ),
            [
                (
                    DATA[data],
                    str(depth),
                    *(_end(shared[data][method, depth]) for method in METHODS),
                    *(_at_best(tuned[data][method, depth]) for method in METHODS),
                )
                for data in DATA
                for depth in DEPTHS
            ],
        ),
        figures=[
            *(_against_depth(DATA[data], shared[data]) for data in DATA),
            Plot(
                f"{DATA['cifar10']}, {DEPTHS[-1]} layers",
                "epoch",
                "training loss",
                [
                    _line(method, dict(enumerate(zip(*found.values(), strict=True), start=1)))
                    for method, found in deepest.items()
                ],
            ),
        ],
        agrees=agrees,
        contradicts=contradicts,
        notes=[
            *(_own_rates(DATA[data], tuned[data]) for data in DATA if len(rates[BATCH_SIZE]) > 1),
            "The paper prints curves and no numbers: only their order is compared. Normalisation propagation is ours. "
            f"Losses above {_SHOWN:g}, on the way of some runs, are not drawn.",
        ],
        numbers={
            data: {_name(cell): {str(seed): list(loss) for seed, loss in found.items()} for cell, found in all_.items()}
            for data, all_ in shared.items()
        },
    )


def _name(cell: Cell) -> str:
    return f"{cell[0]}, {cell[1]} layers"


def _settings(context: Context, data: str) -> Settings:
    small = context.scale == "small"
    training = TrainConfig(
        epochs=15 if small else 2000,
        momentum=0.0,
        weight_decay=0.0,
        schedule="constant",
        accelerator=context.accelerator,
    )
    sizes = {"train": 4500, "validation": 500, "test": 1000} if small else {}
    model = f"{__name__}:{data}_{context.scale}"
    return Settings(data=data, data_dir=context.data_dir, model=model, training=training, **sizes)


_DIFFERS = (
    "The paper's batch norm stands after the ReLU, ours before it; the paper measures the loss of all training images "
    "before each epoch, ours is the mean over the epoch's batches as they are trained on."
)
_SMALLER = (
    " The paper has as many units in each layer as inputs (784 and 3,072), a rate of 1e-5 on the sum of a batch's "
    "losses, 0.00128 on their mean, all training images and 2,000 epochs: 2,000 times as many steps."
)


def _protocol(settings: Settings, rate: float, rates: Sequence[float], seeds: int) -> str:
    small = settings.train is not None
    images = f"{settings.train:,}" if settings.train else "nine tenths of the"
    own = f" (best: the one of {', '.join(f'{r:g}' for r in rates)} with the lowest validation error of the first seed)"
    return (
        f"Fully connected networks of {', '.join(map(str, DEPTHS))} hidden layers of "
        f"{'128 units' if small else 'as many units as inputs'}, {images} training images of each data set, inputs "
        f"standardised, plain SGD without momentum or decay on batches of {BATCH_SIZE}, a constant rate of {rate:g} "
        f"for all{own if len(rates) > 1 else ''}, {settings.training.epochs:,} epochs, {seeds} seeds. A difference "
        "counts if it is more than twice its standard error over the seeds."
    )


def curves(records: Sequence[TrialRecord]) -> dict[int, list[float]]:
    """Training loss after every epoch of each complete trial, by seed.

    Example:
        >>> epochs = [{"epoch": 0, "train_loss": None}, {"epoch": 1, "train_loss": 0.5}]
        >>> curves([TrialRecord(Combination("selu", 8, 0.1, 3), "complete", epochs=epochs)])
        {3: [0.5]}
    """
    return {r.combination.seed: [e["train_loss"] for e in r.epochs if e["epoch"] > 0] for r in complete(records)}


def rise(losses: Sequence[float]) -> float:
    """Mean rise of the loss from one epoch to the next; a fall counts as 0.

    Example:
        >>> rise([1.0, 0.5, 0.75])
        0.125
    """
    rises = [max(0.0, after - before) for before, after in itertools.pairwise(losses)]
    return statistics.fmean(rises) if rises else 0.0


def _ends(found: Curves) -> dict[int, float]:
    return {seed: losses[-1] for seed, losses in found.items()}


def _end(found: Curves) -> str:
    return spread(list(_ends(found).values()), 3) if found else "diverged"


def _at_best(records: Sequence[TrialRecord]) -> str:
    return f"{_end(curves(records))} ({records[0].combination.lr:g})" if records else "every rate diverged"


def _lower(name: str, found: Mapping[Cell, Curves], rate: str = "") -> tuple[bool, str]:
    """Whether SELU's loss is below batch norm's by more than noise at all depths."""
    lower, texts = 0, []
    for depth in DEPTHS:
        ours, theirs = found["selu", depth], found["batch", depth]
        lead = Difference.of(_ends(theirs), _ends(ours))
        lower += (lead.clear and lead.mean > 0) if ours and theirs else bool(ours)
        texts.append(f"{_end(ours)} against {_end(theirs)} at {depth} layers")
    return (
        lower == len(DEPTHS),
        f"{name}{rate}: the last training loss of selu is below batch norm's by more than noise at {lower} of "
        f"{len(DEPTHS)} depths: {', '.join(texts)} (the paper: SELU learns faster at all).",
    )


def _steadier(name: str, found: Mapping[Cell, Curves]) -> tuple[bool, str]:
    """Whether SELU's loss rises less between epochs than batch norm's, over all depths."""
    rises = {
        method: {
            seed: statistics.fmean(rise(found[method, depth][seed]) for depth in DEPTHS)
            for seed in found[method, DEPTHS[0]]
            if all(seed in found[method, depth] for depth in DEPTHS)
        }
        for method in ("selu", "batch")
    }
    lead = Difference.of(rises["batch"], rises["selu"])
    ours, theirs = (spread(list(rises[method].values()), 4) for method in ("selu", "batch"))
    noise = "" if lead.clear else "; no difference beyond the noise"
    return (
        lead.clear and lead.mean > 0,
        f"{name}: from one epoch to the next the loss rises by {ours} on average with selu and by {theirs} with batch "
        f"norm{noise} (the paper: batch norm varies much, SELU does not).",
    )


def _own_rates(name: str, tuned: Mapping[Cell, Sequence[TrialRecord]]) -> str:
    return _lower(name, {cell: curves(r) for cell, r in tuned.items()}, ", each with its own best rate")[1]


def _against_depth(name: str, found: Mapping[Cell, Curves]) -> Plot:
    lines = [
        _line(method, {depth: list(_ends(found[method, depth]).values()) for depth in DEPTHS}) for method in METHODS
    ]
    ticks = [(float(depth), str(depth)) for depth in DEPTHS]
    return Plot(f"{name}, last epoch", "hidden layers", "training loss", lines, x_ticks=ticks)


def _line(name: str, seeds: Mapping[int, Sequence[float]]) -> Line:
    """Means over seeds; the band is from least to largest."""
    there = {float(x): values for x, values in seeds.items() if values}
    means, low, high = (
        [value if (value := end(values)) <= _SHOWN else math.nan for values in there.values()]
        for end in (statistics.fmean, min, max)
    )
    return Line(name, list(there), means, low, high)
