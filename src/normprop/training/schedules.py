"""Learning-rate schedules: pure functions from a step to a factor of the peak learning rate.

Steps count updates from 0; ``steps`` is the number of updates of the whole run.
"""

import math
from collections.abc import Callable

from normprop.errors import ConfigError


def constant(step: int) -> float:
    """Return 1 at every step.

    Example:
        >>> constant(1000)
        1.0
    """
    return 1.0


def halving(step: int, every: int) -> float:
    r"""Halve the rate at regular intervals: :math:`2^{-\lfloor step / every \rfloor}`.

    Args:
        step: update, from 0.
        every: updates between halvings.

    Source:
        Arpit et al. 2016, section 5 (every 10 epochs of 50; for table 1, every 25 of 200).

    Example:
        >>> [halving(step, 2) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    return 0.5 ** (step // every)


def linear(step: int, steps: int, warmup: int = 0) -> float:
    r"""Warm up linearly, then decay linearly: :math:`(step + 1) / (warmup + 1)`, then
    :math:`(steps - step) / (steps - warmup)`.

    The peak, 1, is at ``step == warmup``; the last update still moves, and 0 would follow it.

    Args:
        step: update, from 0.
        steps: updates of the whole run.
        warmup: updates before the peak.

    Source:
        Goyal et al. 2017, section 2.2 (gradual warm-up).

    Example:
        >>> [linear(step, 6, 2) for step in range(6)]
        [0.333..., 0.666..., 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return max(steps - step, 0) / (steps - warmup)


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    r"""Warm up linearly, then follow half a cosine: :math:`(1 + \cos(\pi (step - warmup) / (steps - warmup))) / 2`.

    Args:
        step: update, from 0.
        steps: updates of the whole run.
        warmup: updates before the peak.

    Source:
        Loshchilov and Hutter 2017, equation 5, without restarts; warm-up as in :func:`linear`.

    Example:
        >>> [round(cosine(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(step - warmup, steps - warmup) / (steps - warmup)))


def create(name: str, steps: int, warmup: int = 0, halve_every: int = 1) -> Callable[[int], float]:
    """Look up a schedule by name and fix its settings.

    Args:
        name: ``"constant"``, ``"halving"``, ``"linear"`` or ``"cosine"``.
        steps: updates of the whole run.
        warmup: updates of the warm-up, fewer than ``steps``; for ``"linear"`` and ``"cosine"``.
        halve_every: updates between halvings; for ``"halving"``.

    Returns:
        A function from the step to the factor.

    Raises:
        ConfigError: for an unknown name.

    Example:
        >>> create("linear", steps=10)(5)
        0.5
    """
    schedules: dict[str, Callable[[int], float]] = {
        "constant": constant,
        "halving": lambda step: halving(step, halve_every),
        "linear": lambda step: linear(step, steps, warmup),
        "cosine": lambda step: cosine(step, steps, warmup),
    }
    if name not in schedules:
        raise ConfigError(f"unknown schedule {name!r}; there are {', '.join(schedules)}")
    return schedules[name]
