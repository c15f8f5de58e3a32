"""Files of parameters and buffers: safetensors, or torch's state dicts without anything else in them."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normprop.errors import ConfigError, DataError, first_line, requires

FORMATS = {"safetensors": ".safetensors", "state-dict": ".pt"}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file into a model, every name of the one in the other.

    Args:
        model: changed in place.
        path: a ``.safetensors`` file, or a state dict of torch, which is read with ``weights_only``.

    Raises:
        DataError: if the file is missing, damaged, or holds more than tensors.
        ConfigError: if names or shapes differ.
    """
    state = _read(path)
    own = model.state_dict()
    absent, beyond = own.keys() - state.keys(), state.keys() - own.keys()
    different = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    parts = [
        f"{len(names)} {what}, such as {min(names)!r}"
        for names, what in ((absent, "missing"), (beyond, "unknown to the model"), (different, "of another shape"))
        if names
    ]
    if parts:
        raise ConfigError(f"{path} does not belong to {type(model).__name__}: {'; '.join(parts)}")
    model.load_state_dict(state)


def packed(model: nn.Module, suffix: str) -> bytes:
    """The content of a file that :func:`load_weights` reads.

    Args:
        model: any module.
        suffix: ".safetensors", or any other for torch's own state dict.

    Returns:
        The bytes; tensors that share memory are written once for each name.

    Raises:
        ConfigError: if the model's state is more than tensors.
    """
    state = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} of the state dict is a {type(value).__name__}; tensors alone can be written")
        state[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if suffix == ".safetensors":
        with requires("models"):
            import safetensors.torch

        return bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        with requires("models"):
            import safetensors
            import safetensors.torch

        try:
            return dict(safetensors.torch.load_file(path))
        except safetensors.SafetensorError as error:
            raise DataError(f"{path} is no safetensors file: {error}") from error
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is refused: it is no state dict, or a pickle of more than tensors, which can run anything; save "
            f"model.state_dict() alone, or safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DataError(f"{path} is no state dict: {first_line(error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        inside = f" with {', '.join(map(repr, [*state][:3]))}" if isinstance(state, Mapping) else ""
        raise DataError(
            f"{path} holds a {type(state).__name__}{inside}, not names and tensors; save model.state_dict() alone"
        )
    return dict(state)
