"""Norm Matters: what weight decay does to filters that batch norm follows is an effective step, and no more."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from torch import Tensor

from normprop.data import Dataset
from normprop.diagnostics.plot import Line, Plot
from normprop.errors import ConfigError
from normprop.experiments import norm_schedule
from normprop.experiments.grid import Combination
from normprop.experiments.norm_curves import ARMS, Row
from normprop.experiments.norm_schedule import Plan
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.reproduction import Difference, Reproduction, Table, judged, spread
from normprop.experiments.settings import Settings
from normprop.training import random_state
from normprop.training.config import TrainConfig
from normprop.training.run import assemble

PAPER = Plan(data="cifar10", model="nin", width=1.0, epochs=80, batch_size=128, weight_decay=5e-4, seeds=(0, 1, 2))
# A tenth of the steps: a decay of the printed size would hardly move a length before the run is over.
SMALL = replace(PAPER, train=4400, test=2000, width=0.125, epochs=10, batch_size=64, weight_decay=3e-3)
_MEANS = {
    "decay": "rate in steps, weight decay",
    "no decay": "rate in steps, none",
    "corrected rate": "rate in steps, none, each filter's rate as if it had the length of decay",
    "norm schedule": "rate fixed, none, lengths that give the effective step of decay",
    "fixed rate": "rate fixed, none",
}

Curves = Mapping[str, Mapping[int, Sequence[Row]]]  # by arm and seed


def run(context: Context) -> Reproduction:
    """Train with and without weight decay, and in two ways that give decay's effective step without it.

    Args:
        context: scale, data and storage.

    Returns:
        Test errors and effective steps of the five arms.

    Source:
        Hoffer et al. 2018; protocol: the public code's directory normmatters_wd.
    """
    small = context.scale == "small"
    plan = replace(SMALL if small else PAPER, data_dir=context.data_dir)
    seeds = context.seed_list(len(plan.seeds))
    wanted = [Combination(arm, plan.batch_size, plan.lr, seed) for seed in seeds for arm in ARMS]
    settings = asdict(replace(plan, data_dir=None))
    del settings["seeds"]
    measured = context.measure(f"norm-matters-decay-{context.scale}", settings, wanted, _measure(plan))
    curves: dict[str, dict[int, list[Row]]] = {arm: {} for arm in ARMS}
    for combination, found in measured.items():
        if found is not None:
            curves[combination.method][combination.seed] = found["curve"]
    errors = {arm: _errors(curves[arm]) for arm in ARMS}
    agrees, contradicts = judged(_claims(errors))
    return Reproduction(
        name="norm-matters-decay",
        title="With batch norm, weight decay is a larger effective step, and can be replaced by one",
        paper="Hoffer, Banner, Golan & Soudry 2018, Norm matters; protocol of its public code",
        scale=context.scale,
        protocol=_protocol(plan, len(seeds)),
        differs_from_paper=_DIFFERS + (_SMALLER if small else ""),
        table=Table(
            (
                "arm",
                "rate and decay",
                "test error, %",
                "less that of decay",
                "training loss",
                "effective step",
            ),
            [_row(arm, curves, errors) for arm in ARMS],
        ),
        figures=[
            Plot("Test error", "epoch", "%", [_line(arm, curves[arm], "test_error", 100) for arm in ARMS]),
            Plot(
                "Effective step",
                "epoch",
                "rate / length² of a filter",
                [_line(arm, curves[arm], "effective_step") for arm in ARMS],
                y_scale="log" if any(curves.values()) else "linear",  # a log axis needs a value
            ),
        ],
        agrees=agrees,
        contradicts=contradicts,
        notes=[
            "The paper's errors are not at hand; its claims are compared, not its figures.",
            "The effective step of the corrected rate is that of decay by construction, and so is, but for rounding, "
            "that of the norm schedule: what is tested is whether equal steps give equal errors.",
            "The arm at a fixed rate is ours: what is left without decay and without a schedule of any kind.",
        ],
        numbers={arm: {str(seed): list(rows) for seed, rows in found.items()} for arm, found in curves.items()},
    )


def _measure(plan: Plan) -> Callable[[Combination], dict[str, Any] | None]:
    """Return what trains an arm; an arm that follows the lengths of decay finds them, or trains decay for them."""
    lengths: dict[int, dict[str, Tensor]] = {}  # of the last seed alone: arms come seed by seed

    @cache
    def dataset() -> Dataset:
        return _settings(plan, 0).load()

    def train(arm: str, seed: int) -> list[Row]:
        followed = arm in ("corrected rate", "norm schedule")
        if followed and seed not in lengths:
            train("decay", seed)
        settings = _settings(plan, seed)
        with random_state.preserved():
            model = assemble(settings.builder(dataset(), "batch"), dataset(), settings.training)
            recorded = lengths[seed] if followed else {}
            curve, norms = norm_schedule.train_arm(arm, model, dataset(), plan, seed, recorded)
        if arm == "decay":
            lengths.clear()
            lengths[seed] = norms
        return curve

    def measure(combination: Combination) -> dict[str, Any] | None:
        try:
            return {"curve": train(combination.method, combination.seed)}
        except ConfigError:  # a loss that is not finite, or a length of 0: the plan itself is a valid one
            return None

    return measure


def _settings(plan: Plan, seed: int) -> Settings:
    training = TrainConfig(
        epochs=plan.epochs, batch_size=plan.batch_size, lr=plan.lr, momentum=plan.momentum, seed=seed
    )
    shared = {name: getattr(plan, name) for name in ("data", "data_dir", "train", "test", "model", "width")}
    return Settings(**shared, training=training)


_DIFFERS = (
    "The public code trains VGG-11 with flips and crops; ours is another plain convolutional network, without, and "
    "holds a tenth of the training images out."
)
_SMALLER = (
    " It takes the whole network and all images, 80 epochs, batches of 128 and a decay of 5e-4; ours is larger, as the "
    "run is shorter."
)


def _protocol(plan: Plan, seeds: int) -> str:
    width = "" if plan.width == 1 else f" at {plan.width:g} of its width"
    images = f"{plan.train:,}" if plan.train else "45,000"
    return (
        f"The NIN of Arpit et al. 2016 with batch norm{width}, {images} training and {plan.test or 10_000:,} test "
        f"images of {plan.data}, {plan.epochs} epochs of SGD on batches of {plan.batch_size} with momentum "
        f"{plan.momentum:g}, rate {plan.lr:g}, divided by ten after each quarter where it falls in steps; decay "
        f"{plan.weight_decay:g} of the filters where there is one, {plan.last_decay:g} of the last layer in all; "
        f"{seeds} seeds, which the arms share. "
        "A difference counts if it is more than twice its standard error over the seeds."
    )


def _errors(curves: Mapping[int, Sequence[Row]]) -> dict[int, float]:
    """Test errors after the last epoch, in percent, by seed."""
    return {seed: 100 * rows[-1]["test_error"] for seed, rows in curves.items()}


def _row(arm: str, curves: Curves, errors: Mapping[str, Mapping[int, float]]) -> tuple[str, ...]:
    last = [rows[-1] for rows in curves[arm].values()]
    step = f"{statistics.fmean(row['effective_step'] for row in last):.2g}" if last else "–"
    apart = Difference.of(errors[arm], errors["decay"])
    return (
        arm,
        _MEANS[arm],
        spread(list(errors[arm].values())) if last else "diverged",
        str(apart) if apart.values else "–",
        spread([row["train_loss"] for row in last], 3),
        step,
    )


def _line(arm: str, curves: Mapping[int, Sequence[Row]], key: str, scale: float = 1.0) -> Line:
    """Means over seeds, from the least to the largest."""
    epochs = [[scale * row[key] for row in rows] for rows in zip(*curves.values(), strict=True)]
    low, high = ([end(values) for values in epochs] for end in (min, max))
    x = [float(epoch) for epoch in range(1, len(epochs) + 1)]
    return Line(arm, x, [statistics.fmean(values) for values in epochs], low, high)


def _claims(errors: Mapping[str, Mapping[int, float]]) -> list[tuple[bool, str]]:
    """That decay helps, and that the same effective steps without it help as much."""
    apart = {arm: Difference.of(errors[arm], errors["decay"]) for arm in ARMS}
    if not all(difference.values for difference in apart.values()):
        return [(False, "An arm diverged with every seed: " + ", ".join(a for a in ARMS if not apart[a].values) + ".")]
    gap = apart["no decay"]
    noise = "" if gap.clear else ", no more than the noise over seeds"
    return [
        (gap.clear and gap.mean > 0, f"Without decay the error is {gap} points higher{noise} (the paper: higher)."),
        _closes("Correcting the rates", apart["corrected rate"], "without decay", gap),
        _closes(
            "Scheduling lengths in place of the rate", apart["norm schedule"], "at a fixed rate", apart["fixed rate"]
        ),
    ]


def _closes(what: str, left: Difference, without: str, gap: Difference) -> tuple[bool, str]:
    """Whether something leaves less than half of the gap to decay, if there is a gap."""
    test = "" if gap.clear and gap.mean > 0 else "; with no clear gap to close this shows nothing"
    return (
        not test and abs(left.mean) < gap.mean / 2,
        f"{what} leaves {left} points to the error of decay, of {gap} {without}{test} (the paper: it recovers what "
        "decay gives).",
    )
