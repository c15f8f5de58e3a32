"""What one question found out: sentences, numbers and plots."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from normprop.diagnostics.plot import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """A network to look at.

    Args:
        name: in legends and sentences: that of the method, or of the model.
        model: the network, in the mode it is to be looked at in; no diagnostic changes its parameters, its buffers
            or its mode.
        inputs: a batch, (N, ...), on the network's device, of the network's type.
        labels: classes of the inputs, (N,), or ``None``.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What one question found out about some networks.

    Args:
        name: of the question, in lower case with hyphens: "canonical-error".
        title: the question in plain words, ending with a question mark.
        look_for: one sentence that tells a reader who does not know the paper what to look for in the plots.
        found: what was found, computed from the numbers: a sentence or two, or a line for each network.
        numbers: the numbers behind it, as JSON has them: floats, whole numbers, texts, lists and dicts of them, and
            ``None`` for what is not finite.
        figures: what to draw, at least one.
        source: paper and section.
    """

    name: str
    title: str
    look_for: str
    found: str
    numbers: Mapping[str, Any]
    figures: Sequence[Figure]
    source: str


def finite(value: float) -> float | None:
    """A number as JSON has it: ``None`` for what is not finite.

    Example:
        >>> finite(1.5), finite(math.nan)
        (1.5, None)
    """
    return value if math.isfinite(value) else None


def by_network(results: Mapping[str, T], words: Callable[[T], str]) -> str:
    """What was found of each network, a line for each.

    Args:
        results: by network.
        words: a sentence or two about one of them.

    Returns:
        The lines.

    Example:
        >>> print(by_network({"none": 2.0, "batch": 0.5}, lambda found: f"the factor is {found:g}."))
        none: the factor is 2.
        batch: the factor is 0.5.
    """
    return "\n".join(f"{name}: {words(found)}" for name, found in results.items())
