"""Files that are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file so that ``path`` always holds a whole one, the old or the new.

    Args:
        path: the file; its folder is made if there is none.
        write: writes the content to the file that it is given.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "note.txt", lambda file: file.write(b"hello")).read_text()
        'hello'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_content(path: Path, content: str | bytes) -> Path:
    """Write a text, as UTF-8, or bytes with :func:`write_whole`.

    Args:
        path: the file; its folder is made if there is none.
        content: of the file.

    Returns:
        The path.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_content(Path(folder) / "note.txt", "hello").read_bytes()
        b'hello'
    """
    data = content.encode() if isinstance(content, str) else content
    return write_whole(path, lambda file: file.write(data))
