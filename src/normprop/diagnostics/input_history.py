"""Means and standard deviations of what goes into hidden layers, recorded while a network trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normprop.diagnostics.channels import pooled, recording
from normprop.errors import ConfigError
from normprop.training import EpochRecord, random_state
from normprop.training.statistics import evaluating, watched


@dataclass(frozen=True)
class History:
    """Moments of hidden layers' inputs at some steps of a run.

    Args:
        steps: when, (T,).
        means: by layer: mean of each unit of its input, (T, units), float64 on the CPU.
        stds: likewise the standard deviations.
    """

    steps: tuple[int, ...]
    means: Mapping[str, Tensor]
    stds: Mapping[str, Tensor]


class InputRecorder:
    """Records how the inputs of a network's hidden layers move, inside any training loop.

    A record is one forward pass of the probe; of it two numbers per unit are kept. Layers are those of
    :func:`normprop.training.statistics.watched` but for the first, whose input is the data. A layer called several
    times counts with all its calls.

    Args:
        model: the network; left as it is by every record.
        probe: a batch of inputs, the same for all records; moved to where the model stands.
        every: record at the steps that this divides.

    Raises:
        ConfigError: without hidden layers, for a probe of fewer than two samples, or ``every`` below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> recorder = InputRecorder(model, torch.randn(16, 4), every=10)
        >>> [recorder.record(step) for step in (0, 5, 10)]
        [True, False, True]
        >>> found = recorder.history
        >>> found.steps, {name: tuple(means.shape) for name, means in found.means.items()}
        ((0, 10), {'2': (2, 3)})
    """

    def __init__(self, model: nn.Module, probe: Tensor, every: int = 1) -> None:
        self.model, self.probe, self.every = model, probe.detach().clone(), every
        self._layers = watched(model)[1:]
        self._steps: list[int] = []
        self._moments: dict[str, list[Tensor]] = {}
        if not self._layers:
            raise ConfigError(
                f"covariate-shift: {type(model).__name__} has no hidden layer; give two linear maps or more"
            )
        if len(probe) < 2 or every < 1:
            raise ConfigError(
                f"covariate-shift: a probe of {len(probe)} samples, every={every}; expected at least 2 samples, every=1"
            )

    def record(self, step: int) -> bool:
        """Take the moments, if it is time.

        Args:
            step: updates made so far.

        Returns:
            Whether they were taken.
        """
        if step % self.every:
            return False
        place = next(self.model.parameters())
        with evaluating(self.model), random_state.preserved(), recording(self._layers, inputs=True) as found:
            self.model(self.probe.to(place.device).clone())
        self._steps.append(step)
        for name, calls in found.items():
            mean, var = pooled(torch.stack(calls))
            self._moments.setdefault(name, []).append(torch.stack([mean, var.sqrt()]).cpu().double())
        return True

    @property
    def history(self) -> History:
        """What was recorded so far."""
        stacked = {name: torch.stack(records, 1) for name, records in self._moments.items()}
        means, stds = ({name: both[part] for name, both in stacked.items()} for part in (0, 1))
        return History(tuple(self._steps), means, stds)


class Following(NamedTuple):
    """What :func:`following` gives to :func:`normprop.training.loop.fit`, and the way to the history."""

    build: Callable[[], nn.Module]
    callback: Callable[[EpochRecord], None]
    history: Callable[[], History]


def following(build: Callable[[], nn.Module], probe: Tensor) -> Following:
    """Record a run of :func:`normprop.training.loop.fit` before training and after each epoch.

    Only with one device: several train in processes of their own. A resumed run is recorded from there on.

    Args:
        build: makes the network, as for ``fit``.
        probe: a batch as the network gets it, behind the input normalisation that ``fit`` puts before it.

    Returns:
        Arguments ``build`` and ``callback`` for ``fit``; ``history()`` afterwards.

    Example:
        >>> run = following(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4))
        >>> model = run.build()  # as fit does
        >>> run.callback(EpochRecord(0, 0, 0.1, None, 0.5, 0.5, 0.0))
        >>> run.history().steps
        (0,)
    """
    made: list[InputRecorder] = []

    def build_watched() -> nn.Module:
        model = build()
        made[:] = [InputRecorder(model, probe)]
        return model

    def current() -> InputRecorder:
        if not made:
            raise ConfigError(
                "covariate-shift: no network was built in this process; give fit the build of following(), devices=1"
            )
        return made[0]

    def callback(record: EpochRecord) -> None:
        current().record(record.step)

    return Following(build_watched, callback, lambda: current().history)
