"""Lengths of filters: measured, recorded over a run, kept in a file."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normprop.errors import CheckpointError, ConfigError
from normprop.files import write_whole
from normprop.fused import at_least_float32


def filter_norms(weight: Tensor) -> Tensor:
    """Lengths of the filters of a weight, without gradient and in float32 or better.

    Args:
        weight: (out, ...).

    Returns:
        (out,).

    Example:
        >>> filter_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    norms: Tensor = torch.linalg.vector_norm(at_least_float32(weight.detach()).flatten(1), dim=1)
    return norms


class NormRecorder:
    """Note the length of every filter before each step of an optimiser.

    Args:
        optimizer: whose steps count.
        weights: by name.

    Source:
        Hoffer et al. 2018.

    Example:
        >>> layer = nn.Linear(4, 3, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> recorder = NormRecorder(optimizer, {"weight": layer.weight})
        >>> for _ in range(5):
        ...     optimizer.step()
        >>> recorder.norms()["weight"].shape
        torch.Size([5, 3])
    """

    def __init__(self, optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
        group_of(optimizer, weights)
        self._steps: dict[str, list[Tensor]] = {name: [] for name in weights}

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            for name, weight in weights.items():
                self._steps[name].append(filter_norms(weight))

        self._handle = optimizer.register_step_pre_hook(before_step)

    def norms(self) -> dict[str, Tensor]:
        """Return the lengths so far, (steps, out) for each weight; empty before the first step."""
        return {name: torch.stack(steps) for name, steps in self._steps.items() if steps}

    def remove(self) -> None:
        """Stop recording."""
        self._handle.remove()


def save_norms(path: Path, norms: Mapping[str, Tensor]) -> Path:
    """Write recorded lengths to a file, whole or not at all.

    Args:
        path: the file, .npz; one array (steps, out) for each weight.
        norms: what :meth:`NormRecorder.norms` returned.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_norms(Path(folder) / "norms.npz", {"0.weight": torch.ones(5, 3)})
        ...     load_norms(path)["0.weight"].shape
        torch.Size([5, 3])
    """
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in norms.items()}
    return write_whole(path, lambda file: np.savez(file, **arrays))


def load_norms(path: Path) -> dict[str, Tensor]:
    """Read what :func:`save_norms` wrote.

    Args:
        path: the file.

    Returns:
        Lengths (steps, out) of each weight's filters.

    Raises:
        CheckpointError: if the file is missing, damaged or holds anything but such arrays.

    Example:
        >>> load_norms(Path("nowhere.npz"))
        Traceback (most recent call last):
        normprop.errors.CheckpointError: nowhere.npz: cannot be read as recorded filter norms (...)
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            norms = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        line = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as recorded filter norms ({line})") from error
    for name, value in norms.items():
        if value.ndim != 2 or not value.is_floating_point() or not torch.isfinite(value).all() or (value < 0).any():
            raise CheckpointError(f"{path}: {name} is no record of filter norms, finite and of shape (steps, filters)")
    return norms


def group_of(optimizer: Optimizer, weights: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Find the parameter group of each weight.

    Raises:
        ConfigError: for a weight that the optimiser does not update.

    Example:
        >>> weight = nn.Parameter(torch.ones(3, 4))
        >>> group_of(torch.optim.SGD([weight], lr=0.1), {"weight": weight})["weight"]["lr"]
        0.1
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, weight in weights.items() if id(weight) not in groups]:
        raise ConfigError(f"{', '.join(missing)}: not updated by this optimizer; pass weights that it was built with")
    return {name: groups[id(weight)] for name, weight in weights.items()}
