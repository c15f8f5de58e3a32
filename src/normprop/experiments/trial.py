"""One trial: what the database knows of it, and a worker's turn to run it."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from normprop.errors import requires
from normprop.experiments.grid import Combination

with requires("experiments"):
    import optuna
    from optuna.trial import FrozenTrial, TrialState

WAITING, RUNNING, COMPLETE, DIVERGED, IMPOSSIBLE = "waiting", "running", "complete", "diverged", "impossible"
STATUSES = (COMPLETE, DIVERGED, IMPOSSIBLE, RUNNING, WAITING)
_EPOCH = "epoch "


@dataclass(frozen=True)
class TrialRecord:
    """What is known of one trial.

    Args:
        combination: method, batch size, lr and seed.
        status: one of "waiting", "running", "complete", "diverged", "impossible".
        reason: why it diverged or is impossible.
        test_error: fraction of wrong test answers after the last epoch, if complete.
        validation_error: the same of the validation images.
        train_loss: mean training loss of the last epoch, if complete.
        seconds: training time.
        steps: optimiser steps.
        epochs: one mapping per epoch with the fields of `EpochRecord`.
        measured: whatever else a trial measured, as JSON has it.

    Example:
        >>> TrialRecord(Combination("none", 8, 0.1, 0), "waiting").epochs
        []
    """

    combination: Combination
    status: str
    reason: str | None = None
    test_error: float | None = None
    validation_error: float | None = None
    train_loss: float | None = None
    seconds: float | None = None
    steps: int | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Translate one of Optuna's trials.

    Args:
        trial: a trial of a study.

    Returns:
        Its record.
    """
    attributes = trial.user_attrs
    params = trial.params
    status = {TrialState.WAITING: WAITING, TrialState.RUNNING: RUNNING}.get(trial.state)
    epochs = [attributes[key] for key in attributes if key.startswith(_EPOCH)]
    return TrialRecord(
        combination=Combination(attributes["method"], params["batch_size"], params["lr"], params["seed"]),
        status=status or attributes.get("status", WAITING),
        epochs=sorted(epochs, key=lambda epoch: epoch["epoch"]),
        **attributes.get("result", {}),
    )


class LostError(Exception):
    """The trial was given to another worker because this one gave no sign of life for too long."""


class Turn:
    """A worker's turn at one trial; as a context it gives signs of life and never leaves the trial hanging.

    Leaving the context by an exception marks the attempt as cut short; by anything else that ends the process (such as
    KeyboardInterrupt) it puts the trial back to waiting.

    Args:
        database: Optuna's storage.
        trial_id: the trial's id in it.
        combination: what to run.
        add: adds a waiting trial to the study.
    """

    def __init__(self, database: Any, trial_id: int, combination: Combination, add: Callable[[Combination], None]):
        self.combination = combination
        self._database, self._trial_id, self._add = database, trial_id, add
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Turn":
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self._over.set()
        if isinstance(error, LostError):
            return True
        if isinstance(error, Exception):
            self._end(TrialState.FAIL, reason=str(error))
        elif error is not None:
            self.release()
        return False

    def record(self, epoch: Mapping[str, Any]) -> None:
        """Store one epoch of the curve.

        Args:
            epoch: the fields of an `EpochRecord`; numbers that are not finite are stored as None.

        Raises:
            LostError: if the trial was meanwhile given to another worker.
        """
        self._set(f"{_EPOCH}{epoch['epoch']}", plain(epoch))

    def finish(self, status: str, **result: Any) -> None:
        """Store the outcome and end the trial.

        Args:
            status: "complete", "diverged" or "impossible".
            **result: reason, test_error, validation_error, train_loss, seconds, steps, measured, as far as known.

        Raises:
            LostError: if the trial was meanwhile given to another worker.
        """
        self._set("status", status)
        self._set("result", plain(result))
        if status == COMPLETE:
            self._end(TrialState.COMPLETE, value=result.get("validation_error", 0.0))
        else:
            self._end(TrialState.PRUNED)

    def release(self) -> None:
        """Put the trial back to waiting: this attempt ends, and a new trial waits in its place."""
        try:
            self._database.set_trial_state_values(self._trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return
        self._add(self.combination)

    def _end(self, state: TrialState, *, value: float | None = None, reason: str | None = None) -> None:
        try:
            if reason is not None:
                self._database.set_trial_user_attr(self._trial_id, "reason", reason)
            self._database.set_trial_state_values(self._trial_id, state, None if value is None else [value])
        except optuna.exceptions.UpdateFinishedTrialError:
            if state != TrialState.FAIL:
                raise LostError from None

    def _set(self, key: str, value: Any) -> None:
        try:
            self._database.set_trial_user_attr(self._trial_id, key, value)
        except optuna.exceptions.UpdateFinishedTrialError:
            raise LostError from None

    def _beat(self) -> None:
        """Give signs of life until the turn is over."""
        while not self._over.wait(self._database.get_heartbeat_interval()):
            self._database.record_heartbeat(self._trial_id)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples become lists and numbers that are not finite None.

    Args:
        value: numbers, texts, and mappings and sequences of them.

    Returns:
        The plain value.

    Example:
        >>> plain({"loss": float("nan"), "lrs": (0.1, 0.2)})
        {'loss': None, 'lrs': [0.1, 0.2]}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
