"""Saved parts come back bit for bit; damaged, foreign and hostile bytes are refused without being executed."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.errors import DataError
from fanfold.merge import Concat, Mean, TopK, codec
from fanfold.testing.laws import exactly

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)
TABLE = pa.table({"text": ["a", "b", None], "score": [0.5, None, 2.0]})


def again(part):
    return codec.load(codec.save(part))


def sealed(body_of):
    """A file with a right checksum and whatever is in it: what an enemy would send."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        body_of(file)
        file.comment = bytes(codec._COMMENT_BYTES)
    body = out.getvalue()[: -codec._COMMENT_BYTES]
    return body + codec._comment(body)


def with_tree(tree, **arrays):
    def fill(file):
        for name, data in arrays.items():
            file.writestr(f"{name}.npy", data)
        file.writestr("part.json", tree if isinstance(tree, str) else json.dumps(tree))

    return sealed(fill)


@few
@given(trees)
def test_plain_values_come_back(value):
    found = again(value)
    assert repr(found) == repr(value)
    assert codec.save(found) == codec.save(value)


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(2**53),
        -0.0,
        math.inf,
        -math.inf,
        5e-324,
        complex(-0.0, math.nan),
        "\ud800\0",
        b"\0\xff",
        "",
        b"",
        (),
    ],
    ids=lambda value: type(value).__name__,
)
def test_extremes_of_plain_values_come_back(value):
    assert again(value) == value or repr(again(value)) == repr(value)
    assert math.copysign(1, again(-0.0)) == -1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(10)[::-2],
        np.array([np.nan, -np.nan, -0.0, np.inf]),
        np.array(3.5),
        np.empty((0, 4), "int8"),
        np.array([], "U0"),
        np.array(["ab", "c"]),
        np.array([b"ab", b"c"]),
        np.array([1, 2], ">i4"),
        np.array([True, False]),
        np.array([1 + 2j], "complex64"),
        np.array(["2026-01-01"], "M8[D]"),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.float64(2.5),
        np.int8(-3),
        np.str_("x"),
        np.bool_(True),
    ],
)
def test_arrays_and_scalars_come_back_bit_for_bit(array):
    found = again((array, [array]))[0]
    assert type(found) is type(array)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_loaded_arrays_can_be_written_to_and_order_is_kept():
    found = again(np.asfortranarray(np.ones((2, 3))))
    found[0, 0] = 5
    assert found.flags.f_contiguous


@pytest.mark.parametrize(
    "block",
    [
        TABLE,
        TABLE.slice(1, 1),
        TABLE.slice(0, 0),
        TABLE.to_batches()[0],
        TABLE.to_batches()[0].slice(0, 0),
        pa.array([1, None, 3]),
        pa.array([1, None, 3]).slice(1),
        pa.array([], pa.string()),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.chunked_array([["a"], ["b", None]]),
        pa.chunked_array([], pa.int8()),
        pa.array([[1.5, 2.5], [0.0, 1.0]], pa.list_(pa.float32(), 2)),
    ],
)
def test_arrow_data_comes_back_in_kind(block):
    found = again(Concat().lift(block, len(block))).blocks[0]
    assert type(found) is type(block)
    assert found.equals(block)


def test_frames_come_back_in_kind():
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=[7, 9])
    pd.testing.assert_frame_equal(again(Concat().lift(frame, 2)).blocks[0], frame)
    for name in ("a", None):
        series = pd.Series([1.5, 2.5], name=name)
        pd.testing.assert_series_equal(again(Concat().lift(series, 2)).blocks[0], series)
    polar = pl.DataFrame({"a": [1, 2], "b": ["x", None]})
    assert again(Concat().lift(polar, 2)).blocks[0].equals(polar)
    assert again(Concat().lift(polar["b"], 2)).blocks[0].equals(polar["b"], null_equal=True, check_names=True)


@pytest.mark.torch
def test_tensors_come_back_bit_for_bit():
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64):
        tensor = torch.arange(6).reshape(2, 3).to(dtype).T
        assert torch.equal(again(tensor), tensor)
        assert again(tensor).dtype is dtype
    assert again(torch.empty((0, 3))).shape == (0, 3)
    assert again(torch.tensor(1.5)).shape == ()


class OwnMean:
    """A user's merge whose parts are plain."""

    def empty(self):
        return {"total": 0, "rows": (0,)}


@dataclass
class OwnPart:
    total: float


def test_a_users_plain_parts_are_saved():
    assert again(OwnMean().empty()) == {"total": 0, "rows": (0,)}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (OwnPart(1.0), "OwnPart"),
        ([{"a": OwnPart(1.0)}], "OwnPart"),
        ({1, 2}, "a set"),
        (OrderedDict(a=1), "OrderedDict"),
        (np.array([None]), "array of object"),
        (np.ma.masked_array([1], [True]), "MaskedArray"),
        (print, "builtin_function"),
        (pd.DataFrame({"a": [1, "x"]}), "Arrow cannot hold"),
        (pd.Index([1]), "Arrow cannot hold"),
    ],
)
def test_values_that_cannot_be_saved_are_refused_with_what_can(value, found):
    with pytest.raises(DataError, match="save a part") as caught:
        codec.save(value)
    assert found in caught.value.found
    assert "NumPy arrays" in caught.value.allowed
    assert "pickle" in caught.value.do


def test_values_in_themselves_are_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(DataError, match="in themselves"):
        codec.save(loop)


SAVED = codec.save(TopK(3).lift([1.0, 5.0, 2.0], 3))


def test_the_bytes_are_a_file_that_numpy_opens():
    with np.load(io.BytesIO(SAVED), allow_pickle=False) as file:
        assert file["a0"].tolist() == [5.0, 2.0, 1.0]
    assert codec.save(TopK(3).lift([1.0, 5.0, 2.0], 3)) == SAVED


def test_every_truncation_and_every_changed_byte_is_found():
    for length in range(len(SAVED)):
        with pytest.raises(DataError, match="load a part"):
            codec.load(SAVED[:length])
    for at in range(len(SAVED)):
        damaged = bytearray(SAVED)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(DataError, match="load a part") as caught:
            codec.load(bytes(damaged))
    assert "damaged" in caught.value.found


@pytest.mark.parametrize("foreign", [b"", b"PK", b"hello" * 99, pickle.dumps([1]), SAVED + b"\n"], ids=len)
def test_foreign_bytes_are_refused(foreign):
    with pytest.raises(DataError, match="load a part") as caught:
        codec.load(foreign)
    assert caught.value.do


def test_another_version_is_named():
    body = SAVED[: -codec._COMMENT_BYTES]
    with pytest.raises(DataError, match="format version 7") as caught:
        codec.load(body + codec._comment(body).replace(b" 001 ", b" 007 "))
    assert caught.value.allowed == "format version 1"


class Bomb:
    def __reduce__(self):
        return (os._exit, (1,))


def npy(shape, descr="<f8", data=b""):
    head = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    head += b" " * (63 - (10 + len(head)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


@pytest.mark.parametrize(
    "data",
    [
        with_tree(["array", 0], a0=npy((10**15,))),
        with_tree(["array", 0], a0=npy((2**62, 4))),
        with_tree(["array", 0], a0=npy((-1, -1), data=b"12345678")),
        with_tree(["array", 0], a0=npy((1,), "|O", pickle.dumps(Bomb()))),
        with_tree(["array", 0], a0=pickle.dumps(Bomb())),
        with_tree(["array", 0]),
        with_tree(["list", ["array", 0], ["array", 0]], a0=npy((1,), data=b"12345678")),
        with_tree(["part", "OwnPart", ["total", 1]]),
        with_tree(["part", "TopPart", ["k", 1]]),
        with_tree(["part", "os.system", ["command", "true"]]),
        with_tree(["dict", [["list"], 1]]),
        with_tree(["tensor", "load", [1], 0], a0=npy((8,), "|u1", b"12345678")),
        with_tree(["pyarrow", "Table", 0], a0=npy((8,), "|u1", b"12345678")),
        with_tree({"float": 1}),
        with_tree([]),
        with_tree("not JSON"),
        with_tree("[" * 100_000),
        sealed(lambda file: file.writestr("other", "x")),
        sealed(lambda file: file.writestr("part.json", " " * 10**6 + "1", zipfile.ZIP_DEFLATED)),
    ],
    ids=lambda data: "bytes",
)
def test_hostile_bytes_with_a_right_checksum_are_refused(data):
    with pytest.raises(DataError, match="load a"):
        codec.load(data)


def test_loading_arrow_data_without_arrow_says_what_to_import():
    code = (
        "import sys; from fanfold.merge import codec\n"
        "try: codec.load(sys.stdin.buffer.read())\n"
        "except Exception as e: print(e)\n"
        "print('pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=codec.save(TABLE), capture_output=True, check=True)
    assert b"write `import pyarrow` before" in done.stdout
    assert done.stdout.endswith(b"False\n")


def test_a_loaded_part_joins_and_finishes():
    merge = Mean()
    left, right = merge.lift([1.0, 2.0], 2), merge.lift([9.0], 1)
    assert exactly(merge.finish(merge.join(again(left), again(right))), 4.0)
