"""Curves of trained networks over seeds, as lines of a plot and as numbers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from normprop.diagnostics.plot import Line
from normprop.experiments.grid import Combination
from normprop.experiments.trial import COMPLETE, TrialRecord

T = TypeVar("T")


def by_method(found: Mapping[Combination, T | None], methods: Iterable[str]) -> dict[str, list[T]]:
    """Sort what was trained or measured by its method; runs that diverged, ``None``, are left out.

    Args:
        found: by combination.
        methods: all that are to be in the result.

    Returns:
        For each method its results in the order of the combinations.

    Example:
        >>> a, b = Combination("none", 8, 0.1, 0), Combination("batch", 8, 0.1, 0)
        >>> by_method({a: None, b: 0.5}, ["none", "batch"])
        {'none': [], 'batch': [0.5]}
    """
    sorted_: dict[str, list[T]] = {method: [] for method in methods}
    for combination, result in found.items():
        if result is not None and combination.method in sorted_:
            sorted_[combination.method].append(result)
    return sorted_


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
