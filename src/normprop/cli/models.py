"""The models that the commands work on: where they come from, and where their parameters go."""

import importlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from normprop.cli.inputs import as_python, example
from normprop.cli.weights import load_weights
from normprop.errors import ConfigError, requires
from normprop.graph.capture import Inputs
from normprop.graph.exported import load_exported

with requires("cli"):
    import typer


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Model")


Name = Annotated[str, typer.Argument(metavar="MODEL", help="package.module:factory, or a .pt2 file of torch.export.")]
Args = Annotated[str, _option("Keyword arguments of the factory, as JSON: '{\"num_classes\": 10}'.", "--args")]
Input = Annotated[
    list[str] | None,
    _option("Shape of an input: 8x3x32x32, or 8x16:1000 for whole numbers below 1000, or an .npy file; name=... to "
            "pass it by name. Repeat it for several inputs.", "--input"),
]  # fmt: skip
Weights = Annotated[Path | None, _option("Parameters to load: .safetensors, or a state dict.", "--weights")]
Seed = Annotated[int, _option("Seed of the model's parameters and of the input.", "--seed")]
OnUnknown = Annotated[str, _option("At an operator without a rule: error, warn or measure.", "--on-unknown")]


@dataclass(frozen=True)
class Loaded:
    """A model from the command line.

    Args:
        model: the network.
        x: example input.
        imports: lines of Python that import what ``lines`` need.
        lines: lines of Python that make ``model`` and ``x``.
    """

    model: nn.Module
    x: Inputs
    imports: tuple[str, ...]
    lines: tuple[str, ...]


def load(
    name: str, args: str = "", inputs: Sequence[str] | None = None, weights: Path | None = None, seed: int = 0
) -> Loaded:
    """Build or read a model and draw an example input.

    Args:
        name: "package.module:factory", with the current directory importable, or a .pt2 file. The factory is a callable
            that returns a module, or a module.
        args: keyword arguments of the factory, as JSON.
        inputs: see :func:`normprop.cli.inputs.example`; a .pt2 file may bring an example of its own.
        weights: file of parameters to load.
        seed: of the parameters and of the input.

    Returns:
        The model and the input, and the Python that does the same.

    Raises:
        ConfigError: for a name or arguments that do not lead to a module, or parameters of another one.
        DataError: for a file that is missing, damaged or refused.
    """
    given = _json(args)
    found = None if name.endswith(".pt2") else _found(name)
    torch.manual_seed(seed)  # after the import, which may draw numbers of its own
    imports, lines = ["import normprop, torch"], [f"torch.manual_seed({seed})"]
    if found is None:
        if given:
            raise ConfigError(f"--args is for factories, and {name} is a file")
        model, x = load_exported(name)
        imports.append("from normprop.graph.exported import load_exported")
        lines.append(f"model, x = load_exported({name!r})")
    else:
        model, x, factory = _made(name, found, given), None, name.partition(":")[2]
        imports.append(f"from {name.partition(':')[0]} import {factory.partition('.')[0]}")
        called = f"({', '.join(f'{key}={value!r}' for key, value in given.items())})"
        lines.append(f"model = {factory}{'' if found is model else called}")
    if weights is not None:
        load_weights(model, weights)
        imports += ["import safetensors.torch"] * (weights.suffix == ".safetensors")
        lines.append(f"model.load_state_dict({loading(weights)})")
    if inputs:
        x = example(inputs)
        imports += ["import numpy"] * any(text.endswith(".npy") for text in inputs)
        lines.append(f"x = {as_python(inputs)}")
    if x is None:
        raise ConfigError("--input is missing: give the shape of the model's input, such as --input 8x3x32x32")
    return Loaded(model, x, tuple(imports), tuple(lines))


def python(loaded: Loaded, more: Sequence[str], weights: Path) -> str:
    """Python that makes a network as a command did.

    Args:
        loaded: the model that the command began with.
        more: lines that make ``net`` of ``model`` and ``x``.
        weights: file of the parameters of ``net``.

    Returns:
        Indented lines.
    """
    imports = [*loaded.imports, *["import safetensors.torch"] * (weights.suffix == ".safetensors")]
    imports = sorted(dict.fromkeys(imports), key=lambda line: line.startswith("from"))
    lines = [*imports, *loaded.lines, *more, f"net.load_state_dict({loading(weights)})"]
    return "\n".join(f"    {line}" for line in lines)


def loading(path: Path) -> str:
    """Python that reads a file of parameters."""
    if path.suffix == ".safetensors":
        return f"safetensors.torch.load_file({str(path)!r})"
    return f"torch.load({str(path)!r}, weights_only=True)"


def _json(text: str) -> dict[str, Any]:
    """The keyword arguments of a factory."""
    try:
        given = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"--args must be JSON such as '{{\"num_classes\": 10}}', got {text!r}: {error}") from error
    if not isinstance(given, dict) or not all(key.isidentifier() for key in given):
        raise ConfigError(
            f"--args must be an object of names and values, such as '{{\"num_classes\": 10}}', got {text!r}"
        )
    return given


def _found(name: str) -> Any:
    """What "package.module:factory" names."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigError(f"model {name!r}: give package.module:factory, or a .pt2 file that torch.export.save wrote")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there but something it imports is not
        raise ConfigError(f"model {name!r}: there is no module {error.name!r} here or among the installed") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"model {name!r}: {getattr(found, '__name__', module_name)} has no {part!r}")
        found = getattr(found, part)
    return found


def _made(name: str, factory: Any, given: Mapping[str, Any]) -> nn.Module:
    """The module that a factory makes, or that is there."""
    if isinstance(factory, nn.Module):
        if given:
            raise ConfigError(f"--args is for factories, and {name} is a {type(factory).__name__} already")
        return factory
    if not callable(factory):
        raise ConfigError(f"model {name!r} is a {type(factory).__name__}, neither a factory nor a torch.nn.Module")
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        raise ConfigError(f"model {name!r} cannot be called with {dict(given)}: {error}; see --args") from error
    model = factory(**given)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r}: the factory returned {type(model).__name__}, not a torch.nn.Module")
    return model
