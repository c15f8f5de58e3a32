"""Telling early that a run has diverged, without waiting for the device at each step."""

import math
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_WINDOW = 50


class LossWatch:
    """Collects the loss of each step and reads them in windows of 50 steps.

    Reading a loss makes the host wait for the device, so losses are kept as tensors and read together. A run has
    diverged when a loss is not finite, or when, after the warm-up, the mean of the last ``span`` losses is above
    ``limit``.

    Args:
        limit: largest mean loss of a run that still learns.
        warmup: steps at the start during which the mean may be anything.
        span: losses in the running mean.
        reduce: averages a tensor over all processes.

    Example:
        >>> watch = LossWatch(limit=23.0)
        >>> watch.add(torch.tensor(2.0), samples=8)
        >>> watch.add(torch.tensor(math.nan), samples=8)
        >>> watch.read()
        'loss was nan at step 2'
    """

    def __init__(
        self,
        limit: float,
        warmup: int = 0,
        span: int = _WINDOW,
        reduce: Callable[[Tensor], Tensor] = lambda losses: losses,
    ) -> None:
        self.limit = limit
        self.warmup = warmup
        self.reduce = reduce
        self.recent: deque[float] = deque(maxlen=span)
        self.start(step=0)

    def start(self, step: int, recent: Iterable[float] | None = None) -> None:
        """Begin a new epoch after ``step`` steps; a resumed run brings its ``recent`` losses along."""
        self._step = step
        self._total = 0.0
        self._samples = 0
        self._unread: list[tuple[Tensor, int]] = []
        if recent is not None:
            self.recent = deque(recent, maxlen=self.recent.maxlen)

    @property
    def mean(self) -> float:
        """Mean loss over the samples of the epoch that have been read."""
        return self._total / self._samples

    def add(self, loss: Tensor, samples: int) -> str | None:
        """Take the loss of one step, a mean over ``samples``; return the reason if a full window shows divergence."""
        self._unread.append((loss.detach(), samples))
        return self.read() if len(self._unread) == _WINDOW else None

    def read(self) -> str | None:
        """Read what has been added; return the reason if the run has diverged."""
        if not self._unread:
            return None
        losses = self.reduce(torch.stack([loss for loss, _ in self._unread])).tolist()
        sizes = [samples for _, samples in self._unread]
        self._unread = []
        for loss, samples in zip(losses, sizes, strict=True):
            self._step += 1
            if not math.isfinite(loss):
                return f"loss was {loss} at step {self._step}"
            self._total += loss * samples
            self._samples += samples
            if self._step <= self.warmup:
                continue
            self.recent.append(loss)
            mean = sum(self.recent) / len(self.recent)
            if len(self.recent) == self.recent.maxlen and mean > self.limit:
                return (
                    f"loss averaged {mean:.4g} over {len(self.recent)} steps up to step {self._step}, "
                    f"above the limit of {self.limit:.4g}"
                )
        return None
