"""Example inputs by their shapes."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from normprop.errors import ConfigError, DataError, first_line
from normprop.graph.capture import Inputs

_FORM = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?"
    r"(?:(?P<shape>[1-9]\d*(?:x[1-9]\d*)*)(?::(?P<below>[1-9]\d*))?|(?P<file>.+\.npy))"
)


def example(texts: Sequence[str]) -> Inputs:
    """Draw an example input from torch's generator.

    Args:
        texts: one text for each argument of the model: "8x3x32x32" for standard Gaussian values, "8x16:1000" for whole
            numbers from 0 to 999, or an .npy file; "name=8x16:1000" for an argument passed by its name.

    Returns:
        The tensor, a tuple of several, or a dict of those with names.

    Raises:
        ConfigError: for a text of another form, or names on some and not on others.
        DataError: for a file that is missing or holds no numbers.

    Example:
        >>> [tensor.shape for tensor in example(["2x3", "2x4:10"])]
        [torch.Size([2, 3]), torch.Size([2, 4])]
    """
    forms = _forms(texts)
    values = [_tensor(form) for form in forms]
    if forms[0]["name"]:
        return {form["name"]: value for form, value in zip(forms, values, strict=True)}
    return tuple(values) if len(values) > 1 else values[0]


def as_python(texts: Sequence[str]) -> str:
    """What :func:`example` does as a Python expression of torch and numpy.

    Example:
        >>> as_python(["ids=2x4:10", "mask=2x4"])
        "{'ids': torch.randint(10, (2, 4)), 'mask': torch.randn((2, 4))}"
    """
    forms = _forms(texts)
    parts = [_expression(form) for form in forms]
    if forms[0]["name"]:
        return "{" + ", ".join(f"{form['name']!r}: {part}" for form, part in zip(forms, parts, strict=True)) + "}"
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def _forms(texts: Sequence[str]) -> list[re.Match[str]]:
    """Every text in its parts."""
    forms = []
    for text in texts:
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"--input must be a shape such as 8x3x32x32, 8x16:1000 for whole numbers below 1000, or an .npy file, "
                f"with name= in front for an argument passed by its name; got {text!r}"
            )
        forms.append(found)
    names = [form["name"] for form in forms if form["name"]]
    if len(set(names)) not in (0, len(forms)):
        raise ConfigError("--input: give every input a name of its own (name=8x16), or none")
    return forms


def _shape(form: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(size) for size in form["shape"].split("x"))


def _tensor(form: re.Match[str]) -> Tensor:
    if form["file"]:
        return _read(Path(form["file"]))
    return torch.randint(int(form["below"]), _shape(form)) if form["below"] else torch.randn(_shape(form))


def _expression(form: re.Match[str]) -> str:
    if form["file"]:
        return f"torch.from_numpy(numpy.load({form['file']!r}))"
    return f"torch.randint({form['below']}, {_shape(form)})" if form["below"] else f"torch.randn({_shape(form)})"


def _read(path: Path) -> Tensor:
    import numpy

    try:
        return torch.from_numpy(numpy.load(path, allow_pickle=False))
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no array of numbers: {first_line(error)}") from error
