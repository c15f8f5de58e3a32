"""Live progress on standard error: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from normprop.errors import requires

with requires("cli"):
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

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
        screen = _Screen()
        with Live(screen, console=console, transient=True, refresh_per_second=5):
            yield screen.update
    else:
        yield _Lines()


class _Screen:
    """A bar, and a line for each trial in progress."""

    def __init__(self) -> None:
        columns = TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Bars(*columns, TextColumn("{task.description}", style="dim"))
        self._task = self._bar.add_task("starting workers", total=None)
        self._running: list[str] = []

    def update(self, progress: "Progress") -> None:
        """Take in how far the comparison is."""
        total, remarks = len(progress.trials), ", ".join(_remarks(progress))
        self._bar.update(self._task, total=total, completed=_finished(progress), description=remarks)
        self._running = [_running(trial) for trial in progress.trials if trial.status == "running"]

    def __rich__(self) -> Group:
        return Group(self._bar, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._running))


class _Lines:
    """Prints a line every few seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, progress: "Progress") -> None:
        finished = _finished(progress)
        if progress.seconds < self._next and finished < len(progress.trials) and not progress.timing:
            return
        self._next = progress.seconds + _LINE_SECONDS
        parts = [f"{finished}/{len(progress.trials)} trials", *_remarks(progress), f"{progress.seconds:.0f} s"]
        print(", ".join(parts), file=sys.stderr, flush=True)


def _finished(progress: "Progress") -> int:
    return sum(trial.status in _FINISHED for trial in progress.trials)


def _remarks(progress: "Progress") -> list[str]:
    """How many diverged or were impossible, and about how long the rest will take."""
    counts = Counter(trial.status for trial in progress.trials)
    remarks = [f"{counts[status]} {status}" for status in ("diverged", "impossible") if counts[status]]
    seconds = [trial.seconds for trial in progress.trials if trial.seconds is not None]
    left = counts["waiting"] + counts["running"]
    if seconds and left:
        remarks.append(f"about {left * sum(seconds) / len(seconds) / progress.workers + 1:.0f} s left")
    return [*remarks, "measuring step times"] if progress.timing else remarks


def _running(trial: "TrialRecord") -> str:
    """What a worker is at."""
    method, batch_size, lr, seed = trial.combination
    line = f"  {method}, batch {batch_size}, lr {lr:g}, seed {seed}"
    if not trial.epochs:
        return line
    last = trial.epochs[-1]
    return f"{line}: epoch {last['epoch']}, validation error {100 * last['validation_error']:.1f} %"
