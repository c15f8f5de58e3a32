"""Checkpoints: plain containers of tensors and numbers, written atomically, read without running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from normprop.errors import CheckpointError
from normprop.files import write_whole

_FORMAT = "normprop checkpoint"
_VERSION = 1


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that ``path`` always holds a whole one, the old or the new.

    Args:
        path: the file; its folder is made if there is none.
        state: tensors, numbers, strings, ``None``, and lists, tuples and dicts of them.

    Raises:
        CheckpointError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(Path(folder) / "last.pt", {"step": 3})
        ...     load(Path(folder) / "last.pt")["step"]
        3
    """
    content = {"format": _FORMAT, "version": _VERSION, **state}
    try:
        write_whole(path, lambda file: torch.save(content, file))
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be written: {error.strerror or error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Args:
        path: a file written by :func:`save`.

    Returns:
        The state that was saved.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a checkpoint of this program.

    Example:
        >>> load(Path("missing.pt"))
        Traceback (most recent call last):
        normprop.errors.CheckpointError: missing.pt: there is no such checkpoint; start the run anew without resuming
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint; start the run anew without resuming") from error
    except OSError as error:
        raise CheckpointError(f"{path}: the checkpoint cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises whatever its unpickler and zip reader stumble over
        raise CheckpointError(
            f"{path}: not a checkpoint, or a damaged one; delete it and start the run anew"
        ) from error
    if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a training run; expected a file written by normprop")
    if (version := state.pop("version", None)) != _VERSION:
        raise CheckpointError(f"{path}: checkpoint version {version}, expected {_VERSION}; start the run anew")
    return state


def require_same_run(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint belongs to the run that wants to resume from it.

    Args:
        path: the file, for the message.
        saved: settings in the checkpoint, by name.
        current: settings of the run.

    Raises:
        CheckpointError: if a setting differs.

    Example:
        >>> require_same_run(Path("last.pt"), {"lr": 0.1}, {"lr": 0.2})
        Traceback (most recent call last):
        normprop.errors.CheckpointError: last.pt: belongs to another run: lr is 0.1 there and 0.2 here
    """
    different = [
        f"{name} is {saved.get(name)!r} there and {current.get(name)!r} here"
        for name in dict.fromkeys([*saved, *current])
        if saved.get(name) != current.get(name)
    ]
    if different:
        raise CheckpointError(f"{path}: belongs to another run: {'; '.join(different)}")
