"""Live progress on standard error: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from normprop.errors import requires

with requires("cli"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from normprop.experiments.compare import Progress
    from normprop.experiments.trial import TrialRecord

Callback = Callable[["Progress"], None]
_LINE_SECONDS = 5.0
_FINISHED = ("complete", "diverged", "impossible")


@contextmanager
def watch(*, quiet: bool) -> Iterator[Callback | None]:
    """Show the progress of a comparison while the block runs.

    Args:
        quiet: show nothing.

    Returns:
        A context that gives the callback for `compare`, None when nothing is shown.
    """
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield None
    elif console.is_terminal:
        with Bars(
            TextColumn("trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        ) as bars:
            task = bars.add_task("starting workers", total=None)
            yield lambda progress: bars.update(
                task,
                total=len(progress.trials),
                completed=_finished(progress),
                description=", ".join([*_remarks(progress), *map(_running, _in_progress(progress))]),
            )
    else:
        yield _Lines()


class _Lines:
    """Prints a line every few seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, progress: "Progress") -> None:
        finished = _finished(progress)
        if progress.seconds < self._next and finished < len(progress.trials):
            return
        self._next = progress.seconds + _LINE_SECONDS
        parts = [f"{finished}/{len(progress.trials)} trials", *_remarks(progress), f"{progress.seconds:.0f} s"]
        print(", ".join(parts), file=sys.stderr, flush=True)


def _finished(progress: "Progress") -> int:
    return sum(trial.status in _FINISHED for trial in progress.trials)


def _in_progress(progress: "Progress") -> list["TrialRecord"]:
    return [trial for trial in progress.trials if trial.status == "running"]


def _remarks(progress: "Progress") -> list[str]:
    """How many diverged or were impossible, and about how long the rest will take."""
    counts = Counter(trial.status for trial in progress.trials)
    remarks = [f"{counts[status]} {status}" for status in ("diverged", "impossible") if counts[status]]
    seconds = [trial.seconds for trial in progress.trials if trial.seconds is not None]
    left = counts["waiting"] + counts["running"]
    if seconds and left:
        remarks.append(f"about {left * sum(seconds) / len(seconds) / progress.workers:.0f} s left")
    return remarks


def _running(trial: "TrialRecord") -> str:
    method, batch_size, lr, _ = trial.combination
    epoch = trial.epochs[-1]["epoch"] if trial.epochs else 0
    return f"{method} batch {batch_size} lr {lr:g} epoch {epoch}"
