"""The grid of a comparison: every method with every batch size, learning rate and seed."""

import itertools
from collections.abc import Iterator
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

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
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

    def combinations(self) -> Iterator[Combination]:
        """Yield the trials seed by seed, small (slow) batches first, so that partial results are of use.

        Returns:
            An iterator over every combination.
        """
        for seed, batch_size, lr, method in itertools.product(
            self.seeds, sorted(self.batch_sizes), self.lrs, self.methods
        ):
            yield Combination(method, batch_size, lr, seed)
