"""Random draws that leave no trace: the states of all generators that a network may draw from, put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def preserved(model: nn.Module, *tensors: Tensor, seed: int | None = None) -> Iterator[None]:
    """Put back all random states that a model may draw from.

    Args:
        model: the model; of the accelerators those are looked after that it stands on.
        *tensors: what it is called with, if that may stand elsewhere.
        seed: where all of them start inside, by default where they are.

    Example:
        >>> before = torch.get_rng_state()
        >>> with preserved(nn.Dropout(), seed=0):
        ...     _ = torch.rand(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    states = random.getstate(), np.random.get_state()
    devices = accelerators(model, *tensors)
    kind = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
            if seed is not None:
                start(seed, devices)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def start(seed: int, devices: list[torch.device]) -> None:
    """Seed the generators of Python, NumPy, torch and some accelerators, and no others, as torch.manual_seed would."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for device in devices:
        state = torch.Generator(device).manual_seed(seed).get_state()
        torch.get_device_module(device).set_rng_state(state, device.index or 0)


def accelerators(model: nn.Module, *tensors: Tensor) -> list[torch.device]:
    """The devices beside the CPU that a model and other tensors stand on."""
    every = (*model.parameters(), *model.buffers(), *tensors)
    return [*dict.fromkeys(tensor.device for tensor in every if tensor.device.type not in ("cpu", "meta"))]
