"""A whole comparison: the trials of a grid trained by worker processes, then the step times."""

import multiprocessing
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from normprop import norms
from normprop.data import Dataset, batches
from normprop.errors import ConfigError, NormPropError
from normprop.experiments import machine, results
from normprop.experiments.grid import Combination, Grid
from normprop.experiments.settings import Settings
from normprop.experiments.study import Study
from normprop.experiments.timing import BASELINE, step_times
from normprop.experiments.trial import DIVERGED, IMPOSSIBLE, TrialRecord
from normprop.experiments.worker import process

_POLL_SECONDS = 1.0
_STOP_SECONDS = 20


class WorkerError(NormPropError):
    """Worker processes that ended before the study did."""


@dataclass(frozen=True)
class Progress:
    """How far a comparison is.

    Args:
        trials: every trial of the study, those of other shells and machines included.
        seconds: time since this run began.
        workers: number of its workers.
        timing: whether training is over and step times are being measured.

    Example:
        >>> Progress([], 0.0, workers=2).timing
        False
    """

    trials: list[TrialRecord]
    seconds: float
    workers: int
    timing: bool = False


def compare(
    settings: Settings,
    grid: Grid,
    *,
    storage: str,
    name: str,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    step_time_seconds: float = 6.0,
    command: str = "",
) -> Study:
    """Train every combination of the grid that the study lacks and time the steps of every method.

    A study that was interrupted goes on where it was; with a larger grid only what is missing is trained. Several
    processes, also on several machines, may run this on one study at the same time and share its trials.

    Args:
        settings: data, network and training settings.
        grid: methods, batch sizes, learning rates and seeds.
        storage: SQLAlchemy URL of the database.
        name: name of the study in it.
        workers: number of worker processes; by default one per core, or one if training runs on a GPU.
        progress: called about once a second.
        step_time_seconds: time to spend on the step times; 0 leaves them out.
        command: the command line, for the results document.

    Returns:
        The study; `results.document(study)` gives its results.

    Raises:
        ConfigError: if the study exists with other settings, or a name or value cannot work.
        DataError: if the data cannot be read.
        WorkerError: if all workers were killed.
    """
    dataset = settings.load()
    _check(settings, dataset, [*grid.methods, *([BASELINE] if step_time_seconds > 0 else [])])
    arguments: Any = {"storage": storage, "name": name, "workers": workers, "progress": progress, "command": command}
    study = train(settings, grid.combinations(), **arguments)
    tuning = grid.seeds[: grid.tuning_seeds]
    while grid.tuning_seeds is not None and study.enrol(grid.repetitions(_best_lrs(study, tuning))):
        study = train(settings, [], **arguments)
    if step_time_seconds > 0:
        if progress is not None:
            progress(Progress(study.trials(), 0.0, 0, timing=True))
        time_steps(study, settings, step_time_seconds)
    return study


def train(
    settings: Settings,
    combinations: Iterable[Combination],
    *,
    storage: str,
    name: str,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    command: str = "",
) -> Study:
    """Train the combinations that a study lacks, and those that wait in it.

    Args:
        settings: data, network and training settings.
        combinations: trials in the order in which they should run within each seed.
        storage: SQLAlchemy URL of the database.
        name: name of the study in it.
        workers: number of worker processes; by default one per core, or one if training runs on a GPU.
        progress: called about once a second.
        command: the command line, for the results document.

    Returns:
        The study.

    Raises:
        ConfigError: if the study exists with other settings, or a name or value cannot work.
        DataError: if the data cannot be read.
        WorkerError: if all workers were killed.
    """
    dataset = settings.load()
    wanted = list(combinations)
    for combination in wanted:
        settings.config(combination)
    study = Study.create(storage, name, settings.identity(dataset))
    study.enrol(wanted)
    accelerator = settings.training.accelerator
    study.annotate(command=command, versions=machine.versions(), machine=machine.describe(accelerator))
    if workers is None:
        workers = machine.cores() if machine.device(accelerator).type == "cpu" else 1
    start = time.monotonic()
    workers = max(1, min(workers, study.unfinished()))

    def report() -> None:
        if progress is not None:
            progress(Progress(study.trials(), time.monotonic() - start, workers))

    while study.unfinished():  # again, where another process added trials when the workers had just ended
        _train(study, settings, workers, report)
    return study


def time_steps(study: Study, settings: Settings, seconds: float) -> None:
    """Measure the step time of the study's methods at its batch sizes and note it on the study.

    Batch sizes that were measured before for all their methods are left alone.

    Args:
        study: the study, its trials finished.
        settings: its settings.
        seconds: time to spend, shared by the batch sizes.
    """
    combinations = [record.combination for record in study.trials() if record.status != IMPOSSIBLE]
    wanted = {(combination.batch_size, combination.method): None for combination in combinations}
    measured = study.attributes.get("step_time", [])
    missing = wanted.keys() - {(time["batch_size"], time["method"]) for time in measured}
    sizes = sorted({batch_size for batch_size, _ in missing})
    dataset = settings.load()
    device = machine.device(settings.training.accelerator)
    for batch_size in sizes:
        methods = [BASELINE, *(method for size, method in wanted if size == batch_size and method != BASELINE)]
        networks = {method: settings.builder(dataset, method)().to(device) for method in methods}
        images, labels = next(batches(dataset.train, batch_size, shuffle=False, device=device))
        times = step_times(networks, images, labels, seconds / len(sizes))
        measured = [time for time in measured if time["batch_size"] != batch_size] + [asdict(time) for time in times]
        study.annotate(step_time=measured)


def _check(settings: Settings, dataset: Dataset, methods: list[str]) -> None:
    """Refuse a network that no method can build; if only some cannot, their trials are impossible."""
    errors = []
    for method in methods:
        if ":" not in settings.model:
            norms.method(method)
        try:
            settings.builder(dataset, method)()
        except ConfigError as error:
            errors.append(error)
    if len(errors) == len(methods):
        raise errors[0]


def _best_lrs(study: Study, tuning: Sequence[int]) -> dict[tuple[str, int], float]:
    """The rates that the tuning seeds choose: those that were given all seeds before have no advantage."""
    trials = results.document(study)["trials"]
    rows = results.table([trial for trial in trials if trial["seed"] in tuning or trial["status"] == DIVERGED])
    return {(row["method"], row["batch_size"]): row["best_lr"] for row in rows if row["best_lr"] is not None}


def _train(study: Study, settings: Settings, count: int, report: Callable[[], None]) -> None:
    """Run worker processes until no trial of the study is left."""
    context = multiprocessing.get_context("spawn")
    failures: Any = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // count)
    workers: dict[str, SpawnProcess] = {}
    # glibc would give every large block back to the system and fault it in again at the next step: a fifth of the time.
    for name, value in (("MALLOC_MMAP_THRESHOLD_", 2**25), ("MALLOC_TRIM_THRESHOLD_", 2**30)):
        os.environ.setdefault(name, str(value))
    try:
        with _interrupts_ignored():
            for _ in range(count):
                name = f"{socket.gethostname()}-{uuid.uuid4().hex}"
                arguments = ((study.storage, study.name, study.lease), settings, name, threads, failures)
                workers[name] = context.Process(target=process, args=arguments)
                workers[name].start()
        alive = dict(workers)
        killed: list[int] = []
        while alive and study.unfinished():
            report()
            time.sleep(_POLL_SECONDS)
            if not failures.empty():
                raise failures.get()
            for name, worker in list(alive.items()):
                if not worker.is_alive():
                    del alive[name]
                    study.release(name)
                    if worker.exitcode is not None and worker.exitcode < 0:
                        killed.append(-worker.exitcode)
                    elif worker.exitcode:
                        raise WorkerError("a worker failed: its error is printed above; what it trained so far is kept")
        report()
    finally:
        _stop(study, workers)
    if len(killed) == count and study.unfinished():
        signals = ", ".join(str(number) for number in killed)
        raise WorkerError(
            f"all workers were killed (signal {signals}), perhaps for want of memory; {study.unfinished()} trials are "
            "left: run the same command again to go on, perhaps with fewer workers"
        )


def _stop(study: Study, workers: dict[str, SpawnProcess]) -> None:
    """End the workers that still run; they put their trials back, and what they could not put back is put back here."""
    for worker in workers.values():
        if worker.is_alive():
            worker.terminate()
    for name, worker in workers.items():
        worker.join(_STOP_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
        study.release(name)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C: it reaches the whole terminal, but it is for the parent to stop them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
