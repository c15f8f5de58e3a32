"""A study: the trials of a comparison in a database, taken by any number of workers, each trial by one.

A trial's combination is its method (user attribute) and its batch size, lr and seed (parameters). Waiting, running and
complete trials have Optuna's states of these names; a diverged or impossible trial is PRUNED and says so in its
attribute `status`; FAIL marks an attempt that was cut short, which is replaced by a new waiting trial. Should two
processes ever add the same combination, the trial with the lowest number counts.
"""

import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from normprop.errors import ConfigError, requires
from normprop.experiments.grid import Combination
from normprop.experiments.storage import connect
from normprop.experiments.trial import RUNNING, TrialRecord, Turn, record_of
from normprop.training.config import TrainConfig

with requires("experiments"):
    import optuna
    from optuna.distributions import FloatDistribution, IntDistribution
    from optuna.trial import FrozenTrial, TrialState

LEASE = 30
_LARGEST = 2**53  # integers up to here are exact in the database's floats
_DISTRIBUTIONS = {
    "batch_size": IntDistribution(1, _LARGEST),
    "lr": FloatDistribution(1e-300, 1e300, log=True),
    "seed": IntDistribution(0, _LARGEST),
}


class Study:
    """A comparison's trials in a database, open for any number of workers on any number of machines.

    Args:
        storage: SQLAlchemy URL of the database.
        name: name of the study in it.
        lease: seconds without a sign of life after which a worker counts as dead.

    Raises:
        ConfigError: if the database cannot be opened or holds no study of that name.

    Example:
        >>> study = Study.create("sqlite:///:memory:", "small", {"epochs": 1})
        >>> study.enrol([Combination("none", 8, 0.1, 0), Combination("normprop", 8, 0.1, 0)])
        2
        >>> study.claim("me").combination.method
        'none'
    """

    def __init__(self, storage: str, name: str, *, lease: int = LEASE) -> None:
        self._open(connect(storage, lease, _add_again), storage, name, lease)

    @classmethod
    def create(cls, storage: str, name: str, settings: Mapping[str, Any], *, lease: int = LEASE) -> "Study":
        """Open the study, or create it with these settings.

        Args:
            storage: SQLAlchemy URL of the database.
            name: name of the study in it.
            settings: what all its trials share, flat and JSON-able.
            lease: seconds without a sign of life after which a worker counts as dead.

        Returns:
            The study.

        Raises:
            ConfigError: if the study exists with other settings, or the database cannot be opened.
        """
        database = connect(storage, lease, _add_again)
        optuna.create_study(storage=database, study_name=name, direction="minimize", load_if_exists=True)
        study = cls.__new__(cls)
        study._open(database, storage, name, lease)
        if "settings" not in study.attributes:
            study.annotate(settings=dict(settings), created=datetime.now(UTC).isoformat(timespec="seconds"))
        study._check(settings)
        return study

    def _open(self, database: Any, storage: str, name: str, lease: int) -> None:
        self.storage, self.name, self.lease = storage, name, lease
        self._database = database
        try:
            self._study = optuna.load_study(storage=database, study_name=name)
        except KeyError:
            known = ", ".join(sorted(study.study_name for study in database.get_all_studies())) or "none"
            raise ConfigError(f"no study {name!r} in this storage: it holds {known}") from None
        self._id = database.get_study_id_from_name(name)

    def _check(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings other than the study's own, naming the first difference.

        A study made before a training setting existed was made with what is now its default.
        """
        own = {key: value for key, value in TrainConfig().to_dict().items() if key in settings}
        own |= self.attributes["settings"]
        for key in [*own, *(key for key in settings if key not in own)]:
            if own.get(key) != settings.get(key):
                raise ConfigError(
                    f"study {self.name!r} was made with {key}={own.get(key)!r}, not {key}={settings.get(key)!r}: "
                    "repeat its settings, or choose another study name"
                )

    @property
    def attributes(self) -> dict[str, Any]:
        """What was noted on the study: settings, created, command, machine, versions, step_time."""
        return dict(self._study.user_attrs)

    def annotate(self, **attributes: Any) -> None:
        """Note JSON-able values on the study.

        Args:
            **attributes: names and values; an existing name is overwritten.
        """
        for key, value in attributes.items():
            self._study.set_user_attr(key, value)

    def enrol(self, combinations: Iterable[Combination]) -> int:
        """Add the combinations that the study does not have yet.

        Args:
            combinations: trials in the order in which they should run within each seed.

        Returns:
            How many were added.
        """
        known = {record.combination for record in self.trials()}
        missing = [combination for combination in combinations if combination not in known]
        for combination in missing:
            self._add(combination)
        return len(missing)

    def trials(self) -> list[TrialRecord]:
        """Read every trial of the study.

        Returns:
            One record per combination, in the order of enrolment.
        """
        return [record_of(trial) for trial in self._counting()]

    def claim(self, worker: str) -> Turn | None:
        """Take the next waiting trial, seed by seed; trials of workers that died are put back first.

        Args:
            worker: who takes it, unique among all workers.

        Returns:
            The trial to run, or None if none is waiting.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        waiting = [trial for trial in self._counting() if trial.state == TrialState.WAITING]
        for trial in sorted(waiting, key=lambda trial: (trial.params["seed"], trial.number)):
            trial_id = self._trial_id(trial)
            # The sign of life comes before the claim: a fresh claim must never look like a dead worker's.
            self._database.record_heartbeat(trial_id)
            try:
                if not self._database.set_trial_state_values(trial_id, TrialState.RUNNING):
                    continue
            except optuna.exceptions.UpdateFinishedTrialError:
                continue
            self._database.set_trial_user_attr(trial_id, "worker", worker)
            return Turn(self._database, trial_id, record_of(trial).combination, self._add)
        return None

    def release(self, worker: str) -> None:
        """Put the running trial of a worker that is known to be dead back to waiting.

        Args:
            worker: the name it claimed with.
        """
        for trial in self._counting():
            if trial.state == TrialState.RUNNING and trial.user_attrs.get("worker") == worker:
                Turn(self._database, self._trial_id(trial), record_of(trial).combination, self._add).release()

    def unfinished(self) -> int:
        """Count the trials that wait or run.

        Returns:
            Their number, over all workers.
        """
        return sum(not trial.state.is_finished() for trial in self._counting())

    def running(self) -> list[TrialRecord]:
        """Read the trials in progress, of all workers.

        Returns:
            Their records, with the epochs so far.
        """
        return [record for record in self.trials() if record.status == RUNNING]

    def _counting(self) -> list[FrozenTrial]:
        """The trial of each combination: attempts cut short do not count, nor does a second trial of the same."""
        first: dict[Combination, FrozenTrial] = {}
        for trial in self._database.get_all_trials(self._id, deepcopy=False):
            if trial.state != TrialState.FAIL:
                first.setdefault(record_of(trial).combination, trial)
        return list(first.values())

    def _trial_id(self, trial: FrozenTrial) -> int:
        return int(self._database.get_trial_id_from_study_id_trial_number(self._id, trial.number))

    def _add(self, combination: Combination) -> None:
        _add(self._study, combination)


def names(storage: str) -> list[str]:
    """List the studies of a database.

    Args:
        storage: SQLAlchemy URL.

    Returns:
        The studies' names.

    Raises:
        ConfigError: if the database cannot be opened.

    Example:
        >>> names("sqlite:///:memory:")
        []
    """
    return [study.study_name for study in connect(storage, LEASE, _add_again).get_all_studies()]


def _add(study: optuna.Study, combination: Combination) -> None:
    """Add a waiting trial."""
    params = combination._asdict()
    method = params.pop("method")
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING, params=params, distributions=_DISTRIBUTIONS, user_attrs={"method": method}
        )
    )


def _add_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Replace the trial of a dead worker, which Optuna has just failed, by a waiting one."""
    _add(study, record_of(trial).combination)
