"""A worker: takes trials of a study one after the other and trains them."""

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import torch

from normprop import norms
from normprop.data import Dataset
from normprop.errors import ConfigError, NormPropError
from normprop.experiments.settings import Settings
from normprop.experiments.storage import silence
from normprop.experiments.study import Study
from normprop.experiments.trial import COMPLETE, IMPOSSIBLE, Turn
from normprop.training.loop import fit
from normprop.training.records import EpochRecord

_IDLE_SECONDS = 0.5


def work(study: Study, settings: Settings, dataset: Dataset, worker: str) -> None:
    """Run trials until none of the study waits or runs.

    A worker with nothing to take waits for the others: should one of them die, its trial is taken over.

    Args:
        study: where the trials are.
        settings: what they share.
        dataset: the data that the settings name, loaded.
        worker: this worker's name, unique among all workers.
    """
    while study.unfinished():
        turn = study.claim(worker)
        if turn is None:
            time.sleep(_IDLE_SECONDS)
            continue
        with turn:
            run_trial(turn, settings, dataset)


def run_trial(turn: Turn, settings: Settings, dataset: Dataset) -> None:
    """Train one trial and store its curve and outcome.

    A method that cannot build the network, or a network that refuses the batch size, as batch norm does a single value
    per channel, makes the trial impossible.

    Args:
        turn: the trial.
        settings: what all trials share.
        dataset: the data.
    """
    build = settings.builder(dataset, turn.combination.method)
    if ":" not in settings.model:
        norms.method(turn.combination.method)  # a worker of an older version must not call new methods impossible
    try:
        build()
    except ConfigError as error:
        turn.finish(IMPOSSIBLE, reason=str(error).split("\n")[0])
        return
    started = False

    def store(record: EpochRecord) -> None:
        nonlocal started
        started = True
        turn.record(dataclasses.asdict(record))

    try:
        result = fit(build, dataset, settings.config(turn.combination), callback=store)
    except NormPropError:
        raise
    except ValueError as error:
        if started:
            raise
        turn.finish(IMPOSSIBLE, reason=str(error).split("\n")[0])
        return
    last = result.curve[-1]
    outcome = {"reason": result.reason, "seconds": result.seconds, "steps": result.steps}
    if result.status == COMPLETE:
        outcome |= {name: getattr(last, name) for name in ("test_error", "validation_error", "train_loss")}
    turn.finish(result.status, **outcome)


def process(study: tuple[str, str, int], settings: Settings, worker: str, threads: int, failures: Any) -> None:
    """Work in a process of its own; a SIGTERM puts the trial back and ends it.

    Args:
        study: storage, name and lease of the study.
        settings: what its trials share.
        worker: this worker's name.
        threads: threads for torch.
        failures: queue that takes an error raised on purpose; any other leaves its traceback and exit code 1.
    """
    stopped = False
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_follow_parent, daemon=True).start()
    silence()
    torch.set_num_threads(threads)
    storage, name, lease = study
    try:
        work(Study(storage, name, lease=lease), settings, settings.load(), worker)
    except KeyboardInterrupt:
        stopped = True
    except NormPropError as error:
        failures.put(error)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is in hand any more: leave without a traceback
    if stopped:
        os.kill(os.getpid(), signal.SIGTERM)  # so that it counts as killed


def _stop(signum: int, frame: object) -> None:
    """Leave the trial by an exception that puts it back; once is enough."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow_parent() -> None:
    """Stop this process when its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
