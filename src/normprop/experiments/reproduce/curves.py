"""Curves of trained networks over seeds, as lines of a plot and as numbers."""

import statistics
from collections.abc import Sequence

from normprop.diagnostics.plot import Line
from normprop.experiments.trial import COMPLETE, TrialRecord


def complete(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Keep the trials that reached their last epoch."""
    return [record for record in records if record.status == COMPLETE]


def accuracy(records: Sequence[TrialRecord]) -> dict[int, list[float]]:
    """Test accuracy in percent after every epoch, one value for each complete trial.

    Args:
        records: trials that differ in their seed alone.

    Returns:
        Values by epoch.

    Example:
        >>> from normprop.experiments.grid import Combination
        >>> epochs = [{"epoch": 0, "test_error": 0.9}, {"epoch": 1, "test_error": 0.5}]
        >>> accuracy([TrialRecord(Combination("none", 8, 0.1, 0), COMPLETE, epochs=epochs)])
        {1: [50.0]}
    """
    values: dict[int, list[float]] = {}
    for record in complete(records):
        for epoch in record.epochs:
            if epoch["epoch"] > 0:
                values.setdefault(epoch["epoch"], []).append(100 * (1 - epoch["test_error"]))
    return values


def accuracy_line(name: str, records: Sequence[TrialRecord]) -> Line:
    """Mean test accuracy against epoch, with a band of one standard deviation over the seeds.

    Args:
        name: of the line.
        records: trials that differ in their seed alone.

    Returns:
        The line; empty where no trial is complete.
    """
    values = accuracy(records)
    means = [statistics.fmean(seeds) for seeds in values.values()]
    if any(len(seeds) < 2 for seeds in values.values()):
        return Line(name, list(values), means)
    deviations = [statistics.stdev(seeds) for seeds in values.values()]
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    return Line(name, list(values), means, low, high)
