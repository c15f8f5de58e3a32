"""Understanding batch norm: its gain comes from the large learning rates that it bears."""

import statistics
from collections.abc import Mapping, Sequence

from normprop.diagnostics.plot import Line, Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce.context import Context, Scale
from normprop.experiments.reproduce.curves import complete
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread
from normprop.experiments.settings import Settings
from normprop.experiments.trial import TrialRecord
from normprop.training.config import TrainConfig

METHODS = ("none", "batch", "normprop")
_SMALL_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)  # six epochs at 1e-4 learn nothing
RATES: dict[Scale, tuple[float, ...]] = {"small": _SMALL_RATES, "paper": (1e-4, *_SMALL_RATES)}
BATCH_SIZE = 128
_GUESSING = 15.0  # percent of ten classes; a tenth is guessed, and a little more when all images get one class

Runs = Mapping[tuple[str, float], Sequence[TrialRecord]]


def settings(context: Context) -> Settings:
    """A residual network on CIFAR-10 with flips and crops: 110 layers, or 20 at half width."""
    small = context.scale == "small"
    training = TrainConfig(
        epochs=6 if small else 165,
        momentum=0.9,
        weight_decay=5e-4,
        schedule="linear",
        augment=("flip", "crop"),
        accelerator=context.accelerator,
    )
    full = Settings(data="cifar10", data_dir=context.data_dir, model="resnet110", training=training)
    if not small:
        return full
    return Settings("cifar10", context.data_dir, None, "resnet20", 0.5, 5500, 500, 2000, training)


def run(context: Context) -> Reproduction:
    """Train a residual network at a ladder of learning rates, with batch norm, without, and with NormProp.

    Args:
        context: scale, data and storage.

    Returns:
        Test accuracy against the rate, and the largest rate that every run bears.

    Source:
        Bjorck, Gomes, Selman & Weinberger 2018, section 3.
    """
    shared, rates = settings(context), RATES[context.scale]
    seeds = context.seed_list(2 if context.scale == "small" else 3)
    wanted = [Combination(method, BATCH_SIZE, rate, seed) for seed in seeds for rate in rates for method in METHODS]
    trained = context.train(f"bjorck-lr-{context.scale}", shared, wanted)
    runs = {
        (method, rate): [trained[c] for c in wanted if (c.method, c.lr) == (method, rate)]
        for method in METHODS
        for rate in rates
    }
    agrees, contradicts = judged(_claims(runs))
    return Reproduction(
        name="bjorck-lr",
        title="At the same small learning rate batch norm gains little; its gain comes from large rates",
        paper="Bjorck, Gomes, Selman & Weinberger 2018",
        scale=context.scale,
        protocol=f"{shared.model} at width {shared.width:g}, CIFAR-10 with flips and crops"
        + ("" if shared.train is None else f", the first {shared.train:,} training and {shared.test:,} test images")
        + f", {shared.training.epochs} epochs, batch size {BATCH_SIZE}, SGD with momentum 0.9 and weight decay 5e-4, "
        f"rates warmed up over a tenth of the steps and then falling to 0 in a line, {len(seeds)} seeds.",
        differs_from_paper="The paper trains 110 layers on 50,000 images and divides the rate by ten at half and three "
        "quarters of the run."
        if context.scale == "small"
        else "The paper divides the rate by ten at half and three quarters of the run.",
        table=Table(
            ("rate", *(f"{method}, %" for method in METHODS)),
            [(f"{rate:g}", *(_cell(runs[method, rate]) for method in METHODS)) for rate in rates],
        ),
        figures=[
            Plot("Test accuracy", "learning rate", "%", [_line(method, runs) for method in METHODS], x_scale="log"),
        ],
        agrees=agrees,
        contradicts=contradicts,
        notes=["The paper's own figures were not at hand; its claim is what is tested."],
        numbers={f"{method} {rate:g}": accuracies(records) for (method, rate), records in runs.items()},
    )


def accuracies(records: Sequence[TrialRecord]) -> list[float]:
    """Test accuracies in percent of the runs that stayed finite."""
    return [100 * (1 - record.test_error) for record in complete(records) if record.test_error is not None]


def largest_rate(method: str, runs: Runs) -> float | None:
    """Largest rate, from the best one on, below the first at which a run is lost; ``None`` if all are.

    A run is lost if its loss is not finite, or if it does no better than guessing: a small network can go on at a rate
    that it does not bear.
    """
    rates = sorted({rate for name, rate in runs if name == method})
    found = {rate: accuracies(runs[method, rate]) for rate in rates}
    if not any(found.values()):
        return None
    best = max((rate for rate in rates if found[rate]), key=lambda rate: statistics.fmean(found[rate]))
    borne = None
    for rate in rates[rates.index(best) :]:
        if len(found[rate]) < len(runs[method, rate]) or min(found[rate]) < _GUESSING:
            break
        borne = rate
    return borne


def _cell(records: Sequence[TrialRecord]) -> str:
    diverged = len(records) - len(complete(records))
    text = spread(accuracies(records), 1)
    return f"{text} ({diverged} of {len(records)} diverged)" if diverged else text


def _line(method: str, runs: Runs) -> Line:
    rates = [rate for name, rate in runs if name == method and accuracies(runs[method, rate])]
    values = [accuracies(runs[method, rate]) for rate in rates]
    means = [statistics.fmean(seeds) for seeds in values]
    return Line(method, rates, means, [min(seeds) for seeds in values], [max(seeds) for seeds in values])


def _claims(runs: Runs) -> list[tuple[bool, str]]:
    means = {key: statistics.fmean(accuracies(records)) for key, records in runs.items() if accuracies(records)}
    plain = {rate: value for (method, rate), value in means.items() if method == "none"}
    batch = {rate: value for (method, rate), value in means.items() if method == "batch"}
    if not plain or not batch:
        return [(False, "A method diverged at every rate.")]
    best_plain, best_batch = max(plain, key=lambda r: plain[r]), max(batch, key=lambda r: batch[r])
    limits = largest_rate("none", runs), largest_rate("batch", runs)
    at_equal = batch.get(best_plain, float("nan")) - plain[best_plain]
    gain = batch[best_batch] - plain[best_plain]
    return [
        (
            best_batch > best_plain and (limits[1] or 0) > (limits[0] or 0),
            f"Batch norm is best at a rate of {best_batch:g} and bears {limits[1] or 0:g}; without it the best rate is "
            f"{best_plain:g} and {limits[0] or 0:g} is borne (the paper: batch norm bears far larger rates).",
        ),
        (
            at_equal < 0.5 * gain,
            f"At {best_plain:g}, the best rate without it, batch norm gains {at_equal:+.1f} points; at its own best "
            f"rate {gain:+.1f} (the paper: little at equal small rates, most by larger ones).",
        ),
    ]
