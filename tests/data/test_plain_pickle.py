"""The pickle reader: published batches are read, and nothing is ever run."""

import _codecs
import builtins
import contextlib
import copyreg
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normprop.data import plain_pickle
from normprop.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)


def test_reads_a_python2_batch_as_numpy_does(python2_pickle):
    content = python2_pickle(PIXELS, [3, 9], "labels")
    expected = pickle.loads(content, encoding="bytes")
    batch = plain_pickle.loads(content)
    assert {key.encode() for key in batch} == set(expected)
    assert batch["labels"] == expected[b"labels"] == [3, 9]
    assert batch["filenames"] == expected[b"filenames"]
    assert batch["data"].dtype == np.uint8
    np.testing.assert_array_equal(batch["data"], expected[b"data"])
    np.testing.assert_array_equal(batch["data"], PIXELS)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<i4", ">i4", "f8", ">f2", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_reads_what_python3_writes(protocol, dtype, order):
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 7, dtype=dtype, order=order)
    value = {b"data": array, "names": [b"a\xff", "b"], "more": ({"n": None}, 1.5, True, 2**70)}
    read = plain_pickle.loads(pickle.dumps(value, protocol=protocol))
    assert read["data"].dtype == array.dtype
    np.testing.assert_array_equal(read["data"], array)
    assert read["names"] == [b"a\xff", "b"]
    assert read["more"] == ({"n": None}, 1.5, True, 2**70)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


# Each is tried in a folder that holds `array.npy`; `hit` must not appear.
CALLS = {
    "os.system": lambda: Call(os.system, "touch hit"),
    "eval": lambda: Call(builtins.eval, "open('hit', 'w').close()"),
    "exec": lambda: Call(builtins.exec, "open('hit', 'w').close()"),
    "open": lambda: Call(builtins.open, "hit", "w"),
    "getattr": lambda: Call(builtins.getattr, "text", "upper"),
    "import": lambda: Call(builtins.__import__, "os"),
    "numpy.memmap": lambda: Call(np.memmap, "hit", "u1", "w+", 0, (4,)),
    "numpy.load": lambda: Call(np.load, "array.npy"),
    "numpy.fromfile": lambda: Call(np.fromfile, "array.npy"),
    "numpy.save": lambda: Call(np.save, "hit", 1),
    "numpy.ndarray": lambda: Call(np.ndarray, (4,), "O"),
    "numpy.dtype": lambda: Call(np.dtype, "O"),
    "object array": lambda: np.array([{"a": 1}], dtype=object),
    "text array": lambda: np.array(["a"]),
    "structured array": lambda: np.zeros(2, dtype=[("a", "u1")]),
    "array subclass": lambda: np.ma.masked_array([1], [True]),
    "other codec": lambda: Call(_codecs.encode, "x", "rot13"),
    "reconstructor": lambda: Call(copyreg._reconstructor, Path, object, None),
    "class": lambda: Path,
    "module function": lambda: sys.exit,
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_and_not_made(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("array.npy", np.arange(3))
    content = pickle.dumps({"data": CALLS[name]()}, protocol=protocol)
    with pytest.raises(DataError, match="not a pickle of plain arrays") as caught:
        plain_pickle.loads(content)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array.npy"]


def short(text):
    return b"U" + bytes([len(text)]) + text


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
EMPTY_ARRAY = RECONSTRUCT + NDARRAY + b"K\x00\x85" + short(b"b") + b"\x87R"


def u1(code=b"u1", order=b"|"):
    return DTYPE + short(code) + b"\x89\x88\x87R(K\x03" + short(order) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def array(shape=b"K\x02\x85", dtype=None, content=b"ab"):
    return EMPTY_ARRAY + b"(K\x01" + shape + (u1() if dtype is None else dtype) + b"\x89" + short(content) + b"tb"


def test_the_handmade_array_is_read():
    np.testing.assert_array_equal(plain_pickle.loads(b"\x80\x02" + array() + b"."), [97, 98])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\xff}.",
        b"not a pickle at all",
        b"\x80\x02" + EMPTY_ARRAY + b".",
        b"\x80\x02" + RECONSTRUCT + b".",
        b"\x80\x02" + u1() + b".",
        b"\x80\x02" + array(shape=b"K\x03\x85") + b".",
        b"\x80\x02" + array(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86") + b".",
        b"\x80\x02" + array(dtype=u1(b"O8")) + b".",
        b"\x80\x02" + array(dtype=u1(b"O")) + b".",
        b"\x80\x02" + array(dtype=u1(b"u1,O")) + b".",
        b"\x80\x02" + array(dtype=u1(order=b"O")) + b".",
        b"\x80\x02" + array(dtype=b"N") + b".",
        b"\x80\x02" + array(dtype=RECONSTRUCT) + b".",
        # A state set on a function or a type, by attribute name: none may take.
        b"\x80\x02" + NDARRAY + b"N}" + short(b"__init__") + b"K\x01s\x86b.",
        b"\x80\x02" + RECONSTRUCT + b"}" + short(b"__call__") + b"K\x01sb.",
        # Calls by the other opcodes: NEWOBJ, OBJ, INST, EXT1, a persistent identity, a dotted name.
        b"\x80\x02" + NDARRAY + b"K\x04\x85\x81.",
        b"(cos\nsystem\n" + b"S'touch hit'\no.",
        b"(S'touch hit'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"Pos.system\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0clib.npyio.os\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x0actypeslib\n\x93.",
        # A call whose result is thrown away.
        b"cos\nsystem\n(S'touch hit'\ntR0N.",
        # Memory: memo numbers far beyond the length, for which tables would be allocated; a length.
        b"\x80\x02Nr" + struct.pack("<I", 10**6) + b".",
        b"Np1000000\n.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    ],
)
def test_handmade_attacks_and_damage_give_one_line(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="not a pickle of plain arrays") as caught:
        plain_pickle.loads(content)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    # Nothing stays behind from one pickle to the next.
    np.testing.assert_array_equal(plain_pickle.loads(b"\x80\x02" + array() + b"."), [97, 98])


def test_shared_containers_do_not_multiply():
    value = [1]
    for _ in range(200):
        value = [value, value]
    read = plain_pickle.loads(pickle.dumps(value, protocol=2))
    assert read[0] is read[1]


def test_a_container_inside_itself_is_refused():
    value = []
    value.append(value)
    with pytest.raises(DataError):
        plain_pickle.loads(pickle.dumps(value, protocol=2))


@settings(deadline=None)
@given(data=st.data())
def test_damaged_batches_give_a_value_or_a_data_error(data):
    valid = pickle.dumps({b"data": np.arange(8, dtype=np.uint8).reshape(2, 4), b"labels": [1, 2]}, protocol=2)
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(valid) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        plain_pickle.loads(bytes(content[: data.draw(st.integers(0, len(valid)))]))
