"""Writers of the published formats, written from their descriptions and not with the code under test."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def write_idx() -> Callable[..., None]:
    """write(path, array): an idx file of unsigned bytes, compressed when the name ends in .gz."""

    def write(path: Path, array: np.ndarray) -> None:
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

    return write


@pytest.fixture
def python2_pickle() -> Callable[..., bytes]:
    """make(pixels, labels, key): the bytes of a batch of the python version, opcode by opcode as published."""

    def short(text: str) -> bytes:
        return b"U" + bytes([len(text)]) + text.encode()

    def integer(number: int) -> bytes:
        return b"K" + bytes([number]) if 0 <= number < 256 else b"J" + struct.pack("<i", number)

    def make(pixels: np.ndarray, labels: list[int], key: str) -> bytes:
        array = b"".join(
            [
                b"cnumpy.core.multiarray\n_reconstruct\nq\x06cnumpy\nndarray\nq\x07",
                integer(0) + b"\x85" + short("b") + b"\x87R(",
                *(integer(1), integer(pixels.shape[0]), integer(pixels.shape[1]), b"\x86"),
                *(b"cnumpy\ndtype\nq\x08", short("u1"), integer(0), integer(1), b"\x87R("),
                *(integer(3), short("|"), b"NNN", integer(-1), integer(-1), integer(0), b"tb\x89"),
                *(b"T", struct.pack("<i", pixels.nbytes), pixels.tobytes(), b"tb"),
            ]
        )
        return b"".join(
            [
                b"\x80\x02}q\x01(",
                *(short("batch_label"), short("training batch 1 of 5")),
                *(short(key), b"]q\x04(", *map(integer, labels), b"e"),
                *(short("data"), array),
                *(short("filenames"), b"](", *(short(f"image_{i}.png") for i in range(len(labels))), b"e"),
                b"u.",
            ]
        )

    return make
