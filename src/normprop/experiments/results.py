"""The results of a study as one plain document, and the table that it boils down to."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from normprop.experiments.study import Study
from normprop.experiments.trial import COMPLETE, DIVERGED, IMPOSSIBLE, TrialRecord

_CURVE = ("epoch", "step", "lr", "train_loss", "validation_error", "test_error", "seconds")


def document(study: Study) -> dict[str, Any]:
    """Collect everything that is known of a study in plain JSON values.

    Args:
        study: the study, finished or not.

    Returns:
        Settings, versions, machine, the grid, all trials with their curves, step times and the table.
    """
    attributes = study.attributes
    settings = attributes["settings"]
    records = study.trials()
    trials = [_trial(record) for record in records]
    step_time = attributes.get("step_time", [])
    return {
        "title": f"{settings.get('model', study.name)} on {settings.get('data', 'data')}",
        "command": attributes.get("command", ""),
        "created": attributes["created"],
        "settings": settings,
        "versions": attributes.get("versions", {}),
        "machine": attributes.get("machine", {}),
        "methods": list(dict.fromkeys(trial["method"] for trial in trials)),
        "batch_sizes": sorted({trial["batch_size"] for trial in trials}),
        "lrs": sorted({trial["lr"] for trial in trials}),
        "seeds": sorted({trial["seed"] for trial in trials}),
        "trials": trials,
        "step_time": step_time,
        "table": table(trials, step_time),
    }


def table(trials: Sequence[Mapping[str, Any]], step_time: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Choose each method's learning rate by its validation error and report the test error at that rate.

    The best rate of a method at a batch size is the one with the lowest mean validation error over the seeds, among
    rates at which no seed diverged. Where only some rates were trained with all seeds, the best was chosen before, with
    fewer, and is among those with the most seeds.

    Args:
        trials: the document's trials.
        step_time: the document's step times.

    Returns:
        One row per method and batch size: best_lr, error_mean and error_std (sample standard deviation over seeds) of
        the test error, number of seeds behind them, diverged_lrs, impossible (the reason), edge (the best rate is the
        smallest or largest one tried, so a better one may lie outside) and step_time (ratio to "none").

    Example:
        >>> trial = {"method": "none", "batch_size": 8, "seed": 0, "status": "complete"}
        >>> rows = table([
        ...     {**trial, "lr": 0.1, "validation_error": 0.2, "test_error": 0.3},
        ...     {**trial, "lr": 0.2, "validation_error": 0.3, "test_error": 0.1},
        ... ])
        >>> rows[0]["best_lr"], rows[0]["error_mean"]
        (0.1, 0.3)
    """
    ratios = {(time["method"], time["batch_size"]): time["ratio"] for time in step_time}
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for trial in trials:
        cells.setdefault((trial["method"], trial["batch_size"]), []).append(trial)
    methods = list(dict.fromkeys(trial["method"] for trial in trials))
    return [
        {"method": method, "batch_size": batch_size, **_row(cells[method, batch_size])}
        | {"step_time": ratios.get((method, batch_size))}
        for method, batch_size in sorted(cells, key=lambda cell: (methods.index(cell[0]), cell[1]))
    ]


def _row(trials: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The table's row for one method at one batch size."""
    lrs = sorted({trial["lr"] for trial in trials})
    diverged = sorted({trial["lr"] for trial in trials if trial["status"] == DIVERGED})
    complete = {
        lr: [trial for trial in trials if trial["lr"] == lr and trial["status"] == COMPLETE]
        for lr in lrs
        if lr not in diverged
    }
    most = max(map(len, complete.values()), default=0)
    validation = {lr: _mean(seeds, "validation_error") for lr, seeds in complete.items() if 0 < len(seeds) == most}
    best = min(validation, key=lambda lr: validation[lr], default=None)
    chosen = complete[best] if best is not None else []
    errors = [trial["test_error"] for trial in chosen]
    return {
        "best_lr": best,
        "error_mean": statistics.fmean(errors) if errors else None,
        "error_std": statistics.stdev(errors) if len(errors) > 1 else None,
        "seeds": len(errors),
        "diverged_lrs": diverged,
        "impossible": next((trial.get("reason") for trial in trials if trial["status"] == IMPOSSIBLE), None),
        "edge": best is not None and best in (lrs[0], lrs[-1]),
    }


def _mean(trials: list[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(trial[key] for trial in trials)


def _trial(record: TrialRecord) -> dict[str, Any]:
    """One trial of the document."""
    return {
        **record.combination._asdict(),
        "status": record.status,
        "reason": record.reason,
        "test_error": record.test_error,
        "validation_error": record.validation_error,
        "train_loss": record.train_loss,
        "seconds": record.seconds,
        "steps": record.steps,
        "curve": [{key: epoch.get(key) for key in _CURVE} for epoch in record.epochs],
        "layers": [{"epoch": epoch["epoch"], **layer} for epoch in record.epochs for layer in epoch.get("layers", [])],
    }
