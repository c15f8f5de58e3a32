"""What a reproduction leaves: ours next to what the paper prints, where they agree and where not."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normprop.diagnostics.plot import Figure


@dataclass(frozen=True)
class Table:
    """Rows of texts under headings.

    Args:
        head: headings.
        rows: texts, as many to a row as there are headings.

    Raises:
        ValueError: if a row is longer or shorter.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.head) for row in self.rows):
            raise ValueError(f"rows of {[len(row) for row in self.rows]} texts under {len(self.head)} headings")


@dataclass(frozen=True)
class Reproduction:
    """A figure, table or claim of a paper, measured again.

    Args:
        name: of the reproduction, as on the command line.
        title: what is claimed, in plain words.
        paper: authors, year, and the figure, table or section.
        scale: "small" or "paper".
        protocol: what was trained or measured here, a sentence or two with every setting.
        differs_from_paper: in what a small protocol is smaller than the printed one; empty at paper scale.
        table: ours next to the printed numbers, "–" where nothing is printed.
        figures: what to draw.
        agrees: sentences, computed from the numbers, on what came out as the paper says.
        contradicts: sentences on what came out otherwise.
        notes: what a reader should know beside that.
        numbers: everything behind it, as JSON has it.
    """

    name: str
    title: str
    paper: str
    scale: str
    protocol: str
    differs_from_paper: str
    table: Table
    figures: Sequence[Figure]
    agrees: Sequence[str] = ()
    contradicts: Sequence[str] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Of two methods, one value for each seed that both finished.

    Args:
        values: the differences.

    Example:
        >>> difference = Difference.of({0: 3.0, 1: 4.0, 2: 5.0}, {0: 1.0, 1: 2.2})
        >>> str(difference), difference.clear
        ('+1.90 ± 0.14', True)
    """

    values: tuple[float, ...]

    @classmethod
    def of(cls, first: Mapping[int, float], second: Mapping[int, float]) -> "Difference":
        """Subtract the second from the first, seed by seed."""
        return cls(tuple(first[seed] - second[seed] for seed in first if seed in second))

    @property
    def mean(self) -> float:
        """Over the seeds; not a number of none."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def clear(self) -> bool:
        """Whether the mean is more than twice its standard error away from 0; never of one seed."""
        count = len(self.values)
        return count > 1 and abs(self.mean) > 2 * statistics.stdev(self.values) / math.sqrt(count)

    def __str__(self) -> str:
        if len(self.values) < 2:
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} ± {statistics.stdev(self.values):.2f}"


def judged(claims: Sequence[tuple[bool, str]]) -> tuple[list[str], list[str]]:
    """Sort sentences by whether what they say is as in the paper.

    Args:
        claims: for each whether it agrees, and the sentence that gives the figures.

    Returns:
        Those that agree and those that contradict.

    Example:
        >>> judged([(True, "a"), (False, "b"), (True, "c")])
        (['a', 'c'], ['b'])
    """
    return [text for agrees, text in claims if agrees], [text for agrees, text in claims if not agrees]


def spread(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean and sample standard deviation over seeds as a text; the mean alone of a single value, "–" of none.

    Args:
        values: one for each seed.
        digits: after the point.
        scale: factor on all, 100 for percent.

    Returns:
        "41.40 ± 0.80".

    Example:
        >>> spread([0.4, 0.42], 1, 100), spread([0.4], 1, 100), spread([])
        ('41.0 ± 1.4', '40.0', '–')
    """
    if not values:
        return "–"
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"
