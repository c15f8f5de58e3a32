"""Read plain containers and numeric arrays from a pickle without running anything that it asks for.

A pickle is a program. Here every function that it calls is only written down, never called; what was written down is
then read as an array if it has exactly the form in which numpy describes one.
"""

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from normprop.errors import DataError

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_KNOWN = {(module, "_reconstruct") for module in _NUMPY} | {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Call:
    """A call that the pickle asks for: its name, arguments and state, and nothing done."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args, self.state = name, args, None

    def __call__(self, *args: Any) -> "_Call":
        return _Call(self.name, args)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Replaces the few names that describe arrays by `_Call` and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            asked = f"{module}.{name}"
            raise pickle.UnpicklingError(f"it asks for {asked!r}, and only plain containers and arrays are read")
        return _Call(name)


def loads(content: bytes) -> Any:
    """The value of a pickle made of plain containers and numeric numpy arrays, of Python 2 or 3.

    Args:
        content: the pickle. Byte strings of Python 2 become bytes, dictionary keys become str.

    Returns:
        None, numbers, strings, bytes, lists, tuples, dictionaries, and arrays (read-only).

    Raises:
        DataError: if the pickle is damaged or asks for anything else. Nothing that it asks for is executed.

    Example:
        >>> loads(pickle.dumps({b"labels": [1, 2]}, protocol=2))
        {'labels': [1, 2]}
        >>> loads(pickle.dumps(print))
        Traceback (most recent call last):
        normprop.errors.DataError: not a pickle of plain arrays: it asks for 'builtins.print', ...
    """
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # The unpickler allocates a table up to the highest memo number; a damaged one can ask for all memory.
            if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(content):
                raise pickle.UnpicklingError(f"memo number {argument} in {len(content)} bytes")
        return _resolve(_Unpickler(io.BytesIO(content), encoding="bytes").load(), {})
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"not a pickle of plain arrays: {reason}") from error


def _resolve(value: Any, done: dict[int, Any]) -> Any:
    """Turn the calls inside a value into arrays and bytes; each object once, whoever shares it."""
    if id(value) not in done and isinstance(value, dict | list | tuple | _Call):
        done[id(value)] = _resolve_new(value, done)
    return done.get(id(value), value)


def _resolve_new(value: Any, done: dict[int, Any]) -> Any:
    """The value of a container or call."""
    if isinstance(value, dict):
        return {_text(_resolve(key, done)): _resolve(item, done) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item, done) for item in value)
    if value.name == "encode":  # how Python 3 writes bytes for Python 2
        text, codec = value.args
        if codec != "latin1":
            raise pickle.UnpicklingError(f"bytes in the encoding {codec!r}, expected 'latin1'")
        return text.encode("latin-1")
    if value.name == "_reconstruct" and value.state is not None:
        _version, shape, dtype, fortran, content = value.state
        values = np.frombuffer(_resolve(content, done), _number_type(dtype))
        return values.reshape(shape, order="F" if fortran else "C")
    raise pickle.UnpicklingError(f"an incomplete array ({value.name})")


def _number_type(call: Any) -> np.dtype[Any]:
    """The type that a call of numpy.dtype describes; the second entry of its state is the byte order."""
    code, order = _text(call.args[0]), _text(call.state[1])
    if call.name != "dtype" or not re.fullmatch("[biuf][1248]", code) or order not in ("<", ">", "|"):
        raise pickle.UnpicklingError(f"an array of {code!r} in order {order!r}, and only arrays of numbers are read")
    return np.dtype(f"{order}{code}")


def _text(value: Any) -> Any:
    """Byte strings as str, all else as it is."""
    return value.decode("ascii") if isinstance(value, bytes) else value
