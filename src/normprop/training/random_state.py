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
    """Return the state of Python's, NumPy's and torch's generators, that of a GPU in use included.

    Returns:
        A dict for :func:`restore` that ``torch.load(weights_only=True)`` reads back.

    Example:
        >>> {"numpy", "python", "torch"} <= set(capture())
        True
    """
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
    }
    if (accelerator := _accelerator()) is not None:
        state["accelerator"] = accelerator.get_rng_state()
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
    if "accelerator" in state and (accelerator := _accelerator()) is not None:
        accelerator.set_rng_state(state["accelerator"])


def _accelerator() -> Any:
    """Return torch's module of the accelerator in use; asking an idle GPU for its state would start it up."""
    if torch.cuda.is_initialized():
        return torch.cuda
    return torch.mps if torch.backends.mps.is_available() else None


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
