"""The grid of a comparison: every method with every batch size, learning rate and seed."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from normprop.errors import ConfigError


class Combination(NamedTuple):
    """One trial: a method trained with one batch size, learning rate and seed.

    Example:
        >>> Combination("normprop", 32, 0.02, seed=0).method
        'normprop'
    """

    method: str
    batch_size: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Grid:
    """The methods, batch sizes, learning rates and seeds whose combinations are compared.

    Args:
        methods: names of normalisers, in the order of the results.
        batch_sizes: samples per step.
        lrs: learning rates per step, the same ones for every method.
        seeds: seeds of the initial weights and of the order of the data.
        tuning_seeds: how many of the seeds, from the first, are trained at every rate; the others are trained only at
            the rate that these choose. ``None`` for all.

    Raises:
        ConfigError: if a list is empty, names something twice or holds a value that cannot work.

    Example:
        >>> [c.method for c in Grid(["none", "normprop"], [8], [0.1], [0]).combinations()]
        ['none', 'normprop']
    """

    methods: list[str]
    batch_sizes: list[int]
    lrs: list[float]
    seeds: list[int]
    tuning_seeds: int | None = None

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if name == "tuning_seeds":
                continue
            if not values:
                raise ConfigError(f"{name} is empty: give at least one value")
            repeated = [value for value in values if values.count(value) > 1]
            if repeated:
                raise ConfigError(f"{name} names {repeated[0]} more than once: give every value once")
        for name, numbers in (("batch_sizes", self.batch_sizes), ("lrs", self.lrs)):
            bad = [number for number in numbers if not 0 < number < float("inf")]
            if bad:
                raise ConfigError(f"{name} holds {bad[0]}: expected finite numbers above zero")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds holds {min(self.seeds)}: expected numbers from zero up")
        if self.tuning_seeds is not None and not 1 <= self.tuning_seeds <= len(self.seeds):
            raise ConfigError(
                f"tuning_seeds is {self.tuning_seeds}: expected 1 to {len(self.seeds)}, the number of seeds"
            )

    def combinations(self) -> Iterator[Combination]:
        """Yield the trials seed by seed, small (slow) batches first, so that partial results are of use.

        Returns:
            An iterator over every combination of the tuning seeds.
        """
        for seed, batch_size, lr, method in itertools.product(
            self.seeds[: self.tuning_seeds], sorted(self.batch_sizes), self.lrs, self.methods
        ):
            yield Combination(method, batch_size, lr, seed)

    def repetitions(self, best_lrs: Mapping[tuple[str, int], float]) -> Iterator[Combination]:
        """Yield the trials of the other seeds, at the rates chosen.

        Args:
            best_lrs: for a method and batch size the rate that the tuning seeds chose; what is missing is left out.

        Returns:
            An iterator over the combinations of all seeds at these rates.

        Example:
            >>> grid = Grid(["none"], [8], [0.1, 0.2], [0, 1], tuning_seeds=1)
            >>> [c.seed for c in grid.repetitions({("none", 8): 0.2})]
            [0, 1]
        """
        for seed, batch_size, method in itertools.product(self.seeds, sorted(self.batch_sizes), self.methods):
            if (method, batch_size) in best_lrs:
                yield Combination(method, batch_size, best_lrs[method, batch_size], seed)
