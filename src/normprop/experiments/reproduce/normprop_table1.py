"""Table 1 of the paper: test errors of NormProp and batch norm, with and without flips."""

import dataclasses
import statistics
from dataclasses import dataclass

from normprop.diagnostics.plot import Line, Plot
from normprop.experiments.grid import Combination
from normprop.experiments.reproduce import cifar
from normprop.experiments.reproduce.context import Context
from normprop.experiments.reproduce.curves import by_method, complete
from normprop.experiments.reproduce.reproduction import Reproduction, Table, judged, spread
from normprop.experiments.settings import Settings
from normprop.experiments.trial import TrialRecord

METHODS = ("normprop-paper", "batch", "normprop")


@dataclass(frozen=True)
class _Row:
    """A row of the table: data, augmentation, protocol and the printed errors of NormProp and batch norm."""

    data: str
    flip: bool
    batch_size: int
    rate: float
    epochs: int
    halve_every: int
    validation: int
    printed: tuple[float, float]

    @property
    def name(self) -> str:
        """Data and augmentation."""
        return f"{self.data}{', flips' if self.flip else ''}"


_ROWS = (
    _Row("cifar10", False, 50, 0.05, 200, 25, 5000, (9.11, 9.41)),
    _Row("cifar10", True, 50, 0.05, 200, 25, 5000, (7.47, 7.25)),
    _Row("cifar100", False, 50, 0.05, 200, 25, 5000, (32.19, 35.32)),
    _Row("cifar100", True, 50, 0.05, 200, 25, 5000, (29.24, 30.26)),
    _Row("svhn-extra", False, 100, 0.08, 25, 5, 6000, (1.88, 2.25)),
)


def run(context: Context) -> Reproduction:
    """Train the paper's network by the protocol of its table; small: the rows of CIFAR-10, reduced.

    Args:
        context: scale, data and storage.

    Returns:
        Test errors next to the printed ones.

    Source:
        Arpit et al. 2016, section 5.5, table 1.
    """
    small = context.scale == "small"
    seeds = context.seed_list(2 if small else 3)
    rows = [row for row in _ROWS if not small or row.data == "cifar10"]
    errors: dict[str, dict[str, list[float]]] = {}
    texts = []
    for row in rows:
        settings = _settings(context, row)
        wanted = [Combination(method, row.batch_size, row.rate, seed) for seed in seeds for method in METHODS]
        trained = context.train(cifar.study(context, settings), settings, wanted)
        runs = by_method(trained, METHODS)
        errors[row.name] = {method: _errors(records) for method, records in runs.items()}
        ours = [spread(errors[row.name][method]) for method in METHODS]
        texts.append((row.name, *ours, *(f"{value:.2f}" for value in row.printed)))
    agrees, contradicts = judged([_claim(row, errors[row.name]) for row in rows])
    positions = [float(index) for index in range(len(rows))]
    lines = [
        Line(method, positions, [_mean(errors[row.name][method]) for row in rows], style="points") for method in METHODS
    ]
    return Reproduction(
        name="normprop-table1",
        title="NormProp's test errors are below batch norm's, but for CIFAR-10 with flips",
        paper="Arpit et al. 2016, section 5.5, table 1",
        scale=context.scale,
        protocol=f"{cifar.described(_settings(context, rows[0]))} Data normalised by the batch, batch size 50, rate "
        f"0.05, flips where said, {len(seeds)} seeds; the error after the last epoch."
        + ("" if small else " SVHN: batch size 100, rate 0.08, 25 epochs, rate halved every 5."),
        differs_from_paper="The paper trains the network at full width on 45,000 images for 200 epochs and halves the "
        "rate every 25; CIFAR-100 and SVHN are left out."
        if small
        else "",
        table=Table(("data", *(f"{m}, %" for m in METHODS), "printed, NormProp", "printed, batch norm"), texts),
        figures=[
            Plot(
                "Test error",
                "",
                "%",
                lines,
                x_ticks=[(position, row.name) for position, row in zip(positions, rows, strict=True)],
            )
        ],
        agrees=agrees,
        contradicts=contradicts,
        notes=["The paper does not say of how many seeds, nor of which epoch, its errors are."],
        numbers=errors,
    )


def _settings(context: Context, row: _Row) -> Settings:
    settings = cifar.settings(context, data_norm="batch", augment=("flip",) if row.flip else (), data=row.data)
    if context.scale == "small":
        return settings
    training = dataclasses.replace(settings.training, epochs=row.epochs, halve_every=row.halve_every)
    return dataclasses.replace(settings, validation=row.validation, training=training)


def _errors(records: list[TrialRecord]) -> list[float]:
    return [100 * record.test_error for record in complete(records) if record.test_error is not None]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


def _claim(row: _Row, errors: dict[str, list[float]]) -> tuple[bool, str]:
    """Whether the order of the two methods is that of the table."""
    ours, batch = _mean(errors["normprop-paper"]), _mean(errors["batch"])
    lead, printed = batch - ours, row.printed[1] - row.printed[0]
    return (
        lead * printed > 0,
        f"{row.name}: normprop-paper is {abs(lead):.2f} points {'below' if lead > 0 else 'above'} batch norm (the "
        f"paper: {abs(printed):.2f} {'below' if printed > 0 else 'above'}).",
    )
