"""The state of all random number generators that a training run may draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Seed Python's, NumPy's and torch's generators, those of all accelerators included.

    Args:
        value: from 0 to 2**32 - 1.

    Example:
        >>> seed(7)
        >>> first = torch.rand(1)
        >>> seed(7)
        >>> bool(first == torch.rand(1))
        True
    """
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def capture() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators in plain containers.

    Returns:
        A dict for :func:`restore` that ``torch.load(weights_only=True)`` reads back.

    Example:
        >>> sorted(capture())[-2:]
        ['python', 'torch']
    """
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put all generators back into a state from :func:`capture`.

    Args:
        state: what :func:`capture` returned.

    Example:
        >>> state = capture()
        >>> first = torch.rand(1)
        >>> restore(state)
        >>> bool(first == torch.rand(1))
        True
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])


@contextmanager
def preserved() -> Iterator[None]:
    """Leave all generators as they were before the block, however it ends.

    Example:
        >>> state = torch.get_rng_state()
        >>> with preserved():
        ...     _ = torch.rand(1)
        >>> bool((state == torch.get_rng_state()).all())
        True
    """
    before = capture()
    try:
        yield
    finally:
        restore(before)
