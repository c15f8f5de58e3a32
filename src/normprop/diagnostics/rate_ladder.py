"""How large a learning rate does a network bear? Training at every rate of a grid until runs stop being finite.

Source:
    Bjorck, Gomes, Selman & Weinberger 2018, Understanding Batch Normalization (the ladder of rates; its definition here
    is ours).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from normprop.data import Dataset
from normprop.diagnostics.diagnosis import Diagnosis, by_network, finite
from normprop.diagnostics.plot import Line, Plot, Reference
from normprop.errors import ConfigError
from normprop.training import TrainConfig

RATES = tuple(10 ** (half / 2) for half in range(-8, 3))
"""From 1e-4 to 10, each the square root of ten times the one before."""


@dataclass(frozen=True)
class Rung:
    """One run of the ladder.

    Args:
        rate: peak learning rate.
        seed: of the initial weights and the order of the data.
        reason: what showed that the run diverged; ``None`` if it stayed finite.
        validation: fraction of the validation images classified correctly at the end; nan if the run diverged.
        accuracy: the same of the test images.
    """

    rate: float
    seed: int
    reason: str | None
    validation: float
    accuracy: float


@dataclass(frozen=True)
class Ladder:
    """What a network did at each learning rate.

    Args:
        rungs: one for each rate, in ascending order, and seed.
        epochs: of each run.
        classes: number of classes.
    """

    rungs: tuple[Rung, ...]
    epochs: int
    classes: int

    def at(self, rate: float) -> tuple[Rung, ...]:
        """The runs at one rate."""
        return tuple(rung for rung in self.rungs if rung.rate == rate)

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates, in ascending order."""
        return tuple(dict.fromkeys(rung.rate for rung in self.rungs))

    @property
    def limit(self) -> float | None:
        """Largest rate below the first at which a run diverged; ``None`` if that is the smallest.

        Runs may be finite again at far higher rates: one step then kills all units and nothing moves any more.
        """
        borne = None
        for rate in self.rates:
            if any(rung.reason is not None for rung in self.at(rate)):
                break
            borne = rate
        return borne

    @property
    def best(self) -> float | None:
        """Rate with the highest mean accuracy on validation images, of those at which every run stayed finite."""
        borne = [rate for rate in self.rates if all(rung.reason is None for rung in self.at(rate))]
        return max(borne, key=lambda rate: fmean(rung.validation for rung in self.at(rate)), default=None)

    def accuracy(self, rate: float) -> float:
        """Mean accuracy on test images over the seeds; nan if any run diverged."""
        return fmean(rung.accuracy for rung in self.at(rate))


def rate_ladder(
    build: Callable[[], nn.Module],
    dataset: Dataset,
    rates: Sequence[float] = RATES,
    config: TrainConfig | None = None,
    seeds: Sequence[int] = (0,),
) -> Ladder:
    """Train a network at every learning rate of a grid, and note which runs stay finite and how well they classify.

    Runs have diverged where :func:`normprop.training.loop.fit` says so: a loss or an output is not finite, or the mean
    loss stays above ten times that of guessing.

    Args:
        build: makes the network, as for ``fit``; for several methods call this once for each.
        dataset: with training, validation and test images.
        rates: peak learning rates.
        config: everything else; its rate and seed are not used. ``None``: one epoch at a constant rate.
        seeds: one run at each rate for each.

    Returns:
        The ladder.

    Raises:
        ConfigError: if a rate or a setting cannot work.

    Source:
        Bjorck et al. 2018.

    Example:
        >>> import torch
        >>> from normprop.data import Split
        >>> _ = torch.manual_seed(0)
        >>> part = Split(torch.randn(40, 4), torch.arange(40) % 2)
        >>> data = Dataset("tiny", ("a", "b"), part, part).split()
        >>> config = TrainConfig(epochs=4, batch_size=8, schedule="constant", accelerator="cpu")
        >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rate_ladder(build, data, [0.01, 1e4], config).limit
        0.01
    """
    from normprop.training.loop import fit  # needs an extra

    if not rates or not seeds:
        raise ConfigError(f"rate_ladder: {len(rates)} rates and {len(seeds)} seeds; expected at least one of each")
    config = config or TrainConfig(epochs=1, schedule="constant")
    rungs = []
    for rate in sorted(set(rates)):
        for seed in seeds:
            result = fit(build, dataset, dataclasses.replace(config, lr=rate, seed=seed))
            last = result.curve[-1]
            complete = result.status == "complete"
            rungs.append(
                Rung(
                    rate=rate,
                    seed=seed,
                    reason=result.reason,
                    validation=1 - last.validation_error if complete else math.nan,
                    accuracy=1 - last.test_error if complete else math.nan,
                )
            )
    return Ladder(tuple(rungs), config.epochs, dataset.num_classes)


def describe(results: Mapping[str, Ladder]) -> Diagnosis:
    """Say which rates each network bears and what it gains by them.

    Args:
        results: by network name.

    Returns:
        Sentences, numbers, and plots of accuracy and of the share of finite runs against the rate.

    Example:
        >>> ladder = Ladder((Rung(0.1, 0, None, 0.8, 0.75), Rung(1.0, 0, "loss was nan", math.nan, math.nan)), 2, 10)
        >>> describe({"none": ladder}).found
        'none: stays finite for 2 epochs up to a rate of 0.1; its best test accuracy is 75.0 %, at a rate of 0.1.'
    """
    chance = sorted({1 / ladder.classes for ladder in results.values()})
    accuracy = Plot(
        "Accuracy at each rate",
        "learning rate",
        "test accuracy, %",
        [_accuracies(name, ladder) for name, ladder in results.items()],
        x_scale="log",
        references=[Reference(100 * share, "guessing") for share in chance],
    )
    survivors = Plot(
        "Runs that stay finite",
        "learning rate",
        "share of runs, %",
        [Line(name, ladder.rates, [100 * share for share in _finite(ladder)]) for name, ladder in results.items()],
        x_scale="log",
    )
    return Diagnosis(
        name="rate-ladder",
        title="How large a learning rate does the network bear?",
        look_for="At small rates all curves lie close together; a method that helps training goes on to larger rates "
        "before its curve ends, and reaches its highest accuracy there.",
        found="\n".join([by_network(results, _words), *_comparison(results)]),
        numbers={name: _numbers(ladder) for name, ladder in results.items()},
        figures=[accuracy, survivors],
        source="Bjorck, Gomes, Selman & Weinberger 2018, Understanding Batch Normalization",
    )


def _words(ladder: Ladder) -> str:
    """What was found of one network."""
    epochs = f"{ladder.epochs} epoch{'s' if ladder.epochs > 1 else ''}"
    if ladder.limit is None:
        borne = f"diverges within {epochs} at a rate of {ladder.rates[0]:.3g}, the smallest tried"
    else:
        tried = ", the largest tried" if ladder.limit == ladder.rates[-1] else ""
        borne = f"stays finite for {epochs} up to a rate of {ladder.limit:.3g}{tried}"
    if ladder.best is None:
        return f"{borne}."
    accuracy = 100 * ladder.accuracy(ladder.best)
    return f"{borne}; its best test accuracy is {accuracy:.1f} %, at a rate of {ladder.best:.3g}."


def _comparison(results: Mapping[str, Ladder]) -> list[str]:
    """How far apart the largest and the smallest limit are, if there are two."""
    limits = {name: ladder.limit for name, ladder in results.items() if ladder.limit is not None}
    if len(limits) < 2 or len(set(limits.values())) == 1:
        return []
    high, low = max(limits, key=lambda name: limits[name]), min(limits, key=lambda name: limits[name])
    least = "at least " if limits[high] == results[high].rates[-1] else ""
    return [f"The limit of {high} is {least}{limits[high] / limits[low]:.3g} times that of {low}."]


def _accuracies(name: str, ladder: Ladder) -> Line:
    """Mean over seeds, with the range of the seeds as a band."""
    runs = [[100 * rung.accuracy for rung in ladder.at(rate)] for rate in ladder.rates]
    mean = [fmean(values) for values in runs]
    if len(runs[0]) == 1:
        return Line(name, ladder.rates, mean)
    known = [values if math.isfinite(sum(values)) else [math.nan] for values in runs]
    low, high = ([end(values) for values in known] for end in (min, max))
    return Line(name, ladder.rates, mean, low, high)


def _finite(ladder: Ladder) -> list[float]:
    """Share of the runs at each rate that stayed finite."""
    return [fmean(rung.reason is None for rung in ladder.at(rate)) for rate in ladder.rates]


def _numbers(ladder: Ladder) -> dict[str, Any]:
    accuracies = [ladder.accuracy(rate) for rate in ladder.rates]
    return {
        "limit": ladder.limit,
        "best rate": ladder.best,
        "best accuracy": None if ladder.best is None else ladder.accuracy(ladder.best),
        "epochs": ladder.epochs,
        "rates": list(ladder.rates),
        "accuracy": [finite(value) for value in accuracies],
        "share of finite runs": _finite(ladder),
    }
