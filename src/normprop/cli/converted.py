"""What `normprop convert --out` leaves, and the commands that go on from there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from normprop.cli.models import Loaded, load, loading
from normprop.cli.weights import FORMATS, load_weights
from normprop.errors import ConfigError, DataError, requires

with requires("cli"):
    import typer

Converted = Annotated[
    Path | None,
    typer.Option(
        help="Folder of normprop convert --out: convert the model as there and load what was written, or --weights.",
        rich_help_panel="Model",
    ),
]


def bring(
    name: str, args: str, inputs: list[str] | None, weights: Path | None, converted: Path | None, seed: int
) -> Loaded:
    """Load a model, and convert it as a folder says, if one is given.

    Args:
        name, args, inputs, weights, seed: see :func:`normprop.cli.models.load`; with a folder, the weights are the
            converted network's.
        converted: folder that ``normprop convert --out`` wrote.

    Returns:
        The model, converted if asked for.

    Raises:
        DataError: if the folder does not hold what it should.
    """
    if converted is None:
        return load(name, args, inputs, weights, seed)
    options = _options(converted)
    found = weights or _written(converted)
    made = convert(load(name, args, inputs, None, seed), options)
    load_weights(made.model, found)
    imports = ("import safetensors.torch",) * (found.suffix == ".safetensors")
    lines = (*made.lines, f"model.load_state_dict({loading(found)})")
    return replace(made, imports=made.imports + imports, lines=lines)


def convert(loaded: Loaded, options: dict[str, Any]) -> Loaded:
    """Convert a loaded model.

    Args:
        loaded: the model.
        options: of :func:`normprop.convert`.

    Returns:
        The converted one, with the Python that makes it.
    """
    from normprop.graph.convert import convert as make

    net = make(loaded.model, loaded.x, inplace=True, **options)
    return replace(loaded, model=net, lines=(*loaded.lines, f"model = {as_python(options)}"))


def as_python(options: dict[str, Any]) -> str:
    """The call that converts ``model``.

    Example:
        >>> as_python({"weights": "exact"})
        "normprop.convert(model, x, weights='exact')"
    """
    return f"normprop.convert({', '.join(['model', 'x', *(f'{name}={value!r}' for name, value in options.items())])})"


def _options(folder: Path) -> dict[str, Any]:
    """The options of the conversion that a folder holds."""
    path = folder / "report.json"
    try:
        options = json.loads(path.read_text())["options"]
    except OSError as error:
        raise DataError(f"{folder} is no folder of normprop convert --out: {path.name} cannot be read") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: it names no options of a conversion") from error
    if not isinstance(options, dict) or "given" in options:
        raise DataError(f"{path} is damaged: it names no options of a conversion")
    return options


def _written(folder: Path) -> Path:
    for suffix in FORMATS.values():
        if (folder / f"weights{suffix}").exists():
            return folder / f"weights{suffix}"
    raise ConfigError(f"{folder} holds no weights; name the file with --weights")
