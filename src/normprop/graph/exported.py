"""Models exported by torch.export, read without running anything that a file brings along.

``torch.export.load`` trusts its file: it unpickles objects, evaluates sizes as Python, imports modules that the form of
inputs and outputs names, and loads compiled libraries. Here the archive is looked through first, and only a copy of
what was found harmless is handed on: tensors, plain containers and torch's own operators.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from normprop.errors import DataError, first_line
from normprop.graph.capture import Inputs
from normprop.graph.exported_modules import modules

# Sizes such as "Mul(Integer(2), Symbol('s77', positive=True, integer=True))", as torch writes them.
_SIZE = re.compile(
    r"(?:Symbol\('\w+'(?:, [a-z]+=(?:True|False))*\)|Float\('[-+.\de]+', precision=\d+\)|\w+\d|\d|Integer|Rational"
    r"|Add|Mul|Pow|Max|Min|Mod|PythonMod|ModularIndexing|(?:Floor|Ceil|Clean)Div|(?:Int|Float)TrueDiv"
    r"|(?:Trunc|Ceil|Floor)ToInt|TruncToFloat|ToFloat|PowByNatural|FloatPow|Where|And|Or|Not"
    r"|Equality|Unequality|(?:Strict)?(?:Less|Greater)Than|[-+*/(), <>=&|~])*"
)
_ARITHMETIC = re.compile(
    r"math\.[a-z0-9]+|torch\.sym_\w+"
    r"|_operator\.(?:getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|lt|le|gt|ge|eq|ne|and_|or_|not_)"
)
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_ENTRY = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|models/model\.json|extra/.*"
    r"|data/sample_inputs/model\.pt|data/(weights|constants)/(model_\w+_config\.json|(weight|tensor)_\d+)"
)


def load_exported(path: str | Path) -> tuple[nn.Module, Inputs | None]:
    """Load a model that ``torch.export.save`` has written.

    Args:
        path: the file, of torch's present format.

    Returns:
        The model with a submodule for each of the original's, and the example input stored in the file, if there is
        any.

    Raises:
        DataError: if the file is missing, is no exported model, or holds anything beyond tensors, plain containers and
            torch's own operators.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no file of torch.export.save: {error}") from error
    if not {"archive_format", "models/model.json", "data/sample_inputs/model.pt"} <= entries.keys():
        raise DataError(f"{path} is no file of torch.export.save of torch {torch.__version__.split('+')[0]}")
    try:
        example = _checked(entries)
    except _RefusedError as reason:
        raise DataError(f"{path} is refused: {reason}; build the model by package.module:factory instead") from reason
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says about its own format
            program = torch.export.load(_archive(entries))
            model = modules(program)
    except Exception as error:  # whatever torch's reader trips over
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    return model, example


class _RefusedError(Exception):
    """Why a file is not loaded."""


def _checked(entries: dict[str, bytes]) -> Inputs | None:
    """Look through an archive; the example input in it."""
    for name in entries:
        if not _ENTRY.fullmatch(name):
            raise _RefusedError(f"it holds {name!r}, which is neither tensors nor their graph")
    for kind in ("weights", "constants"):
        config = json.loads(entries.get(f"data/{kind}/model_{kind}_config.json", b"{}"))
        for name, payload in config.get("config", {}).items():
            if payload["use_pickle"]:
                raise _RefusedError(f"{name!r} of its {kind} is pickled, and a pickle can run anything")
    _check_program(json.loads(entries["models/model.json"]))
    stored = entries["data/sample_inputs/model.pt"]
    if not stored:
        return None
    try:
        args, kwargs = torch.load(io.BytesIO(stored), weights_only=True)
    except Exception as error:  # the pickle's own choice
        raise _RefusedError(
            "its example input is a pickle of more than tensors, and a pickle can run anything"
        ) from error
    return tuple(pytree.tree_leaves((args, kwargs)))


def _check_program(program: Any) -> None:
    """Refuse a graph with more in it than arithmetic on tensors and sizes."""
    for key, value in _strings(program):
        if key == "target" and not _harmless(value):
            raise _RefusedError(f"it calls {value!r}, which is not an operator on tensors of torch's own")
        if key == "expr_str" and not _SIZE.fullmatch(value):
            raise _RefusedError(f"it holds {value!r} as the size of a tensor")
        if key in ("in_spec", "out_spec"):
            for name in _containers(json.loads(value)[1]):
                if name not in _CONTAINERS:
                    raise _RefusedError(f"an input or output of it is a {name}, not a tuple, list or dict of tensors")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a document with the name that it has there."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _strings(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part, key)
    elif isinstance(value, str):
        yield key, value


def _harmless(target: str) -> bool:
    """Whether a node calls arithmetic, or one of torch's operators that touches no file."""
    if _ARITHMETIC.fullmatch(target):
        return True
    known = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    found = known and getattr(getattr(torch.ops.aten, known[1], None), known[2], None)
    return isinstance(found, torch._ops.OpOverload) and all(part.name != "filename" for part in found._schema.arguments)


def _containers(spec: Any) -> Iterator[str | None]:
    """The types in the form of inputs or outputs."""
    yield spec["type"] if "__enum__" not in str(spec["context"]) else "dict with keys of another type"
    for child in spec["children_spec"]:
        yield from _containers(child)


def _archive(entries: dict[str, bytes]) -> io.BytesIO:
    """What was looked through and nothing else, as torch reads it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)
    return io.BytesIO(made.getvalue())
