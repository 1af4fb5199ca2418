"""Concat gives the rows of all pieces in order, in the kind that the pieces gave."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from fanfold.errors import DataError
from fanfold.merge import Concat, fold
from fanfold.testing.laws import exactly

TABLE = pa.table({"text": ["a", "b", None], "score": [0.5, None, 2.0]})


def concat(values):
    merge = Concat()
    return merge.finish(fold(merge, [merge.lift(value, len(value)) for value in values]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[1, "a"], [], [None]], [1, "a", None]),
        ([(1,), (2, 3)], (1, 2, 3)),
        ([np.arange(3), np.arange(2)], np.array([0, 1, 2, 0, 1])),
        ([np.ones((1, 2)), np.zeros((2, 2))], np.array([[1.0, 1], [0, 0], [0, 0]])),
        ([np.array(["a"]), np.array(["ccc"])], np.array(["a", "ccc"])),
        ([pa.array([1, None]), pa.array([3])], pa.array([1, None, 3])),
        ([pa.array(["a"]).dictionary_encode()] * 2, pa.array(["a", "a"]).dictionary_encode()),
        ([pa.chunked_array([["a"], ["b"]]), pa.chunked_array([["c"]])], pa.chunked_array([["a", "b", "c"]])),
        ([TABLE.slice(0, 1), TABLE.slice(1)], TABLE),
        ([TABLE.to_batches()[0]] * 2, pa.concat_tables([TABLE, TABLE])),
    ],
)
def test_rows_come_back_in_order_and_in_kind(values, expected):
    assert exactly(concat(values), expected)


def test_dictionaries_that_differ_between_pieces_keep_their_values():
    pieces = [pa.array(words).dictionary_encode() for words in (["a", "b"], ["c", "a"])]
    assert concat(pieces).to_pylist() == ["a", "b", "c", "a"]


def test_schema_metadata_is_the_first_piece_s():
    fields = pa.schema([pa.field("a", pa.int64(), metadata={"k": "field"})], metadata={"k": "table"})
    first, second = pa.table({"a": [1]}, schema=fields), pa.table({"a": [2]})
    for pieces in ([first, second], [first.to_batches()[0], second.to_batches()[0]]):
        found = concat(pieces)
        assert found.schema.equals(fields, check_metadata=True)
        assert found["a"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    "values",
    [
        [np.array([]), np.array([1, 2]), np.empty((0, 7))],
        [[], np.array([1, 2])],
        [np.array([1, 2]), pa.table({})],
    ],
)
def test_a_piece_without_rows_does_not_change_dtype_or_kind(values):
    assert exactly(concat(values), np.array([1, 2]))


@pytest.mark.parametrize("empty", [[], (), np.empty((0, 3), "int8"), pa.array([], pa.string()), TABLE.slice(0, 0)])
def test_pieces_without_any_row_give_an_empty_result_of_their_kind(empty):
    assert exactly(concat([empty, empty]), empty)


def test_memory_mapped_arrays_come_back_as_an_array(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert exactly(concat([mapped[:2], np.arange(1)]), np.array([0, 1, 0]))


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ([1], (2,), "list, then tuple"),
        ([1], np.array([2]), r"list, then array int64 \(\)"),
        (np.array([1]), np.array([2.0]), r"array int64 \(\), then array float64 \(\)"),
        (np.array([1.0]), np.array([2.0], "float32"), "then array float32"),
        (np.ones((1, 2)), np.ones((1, 3)), r"array float64 \(2,\), then array float64 \(3,\)"),
        (np.array(["a"]), np.array([b"a"]), r"array U \(\), then array S \(\)"),
        (pa.array([1]), pa.array([2.0]), "Arrow Array int64, then Arrow Array double"),
        (pa.array([1]), pa.chunked_array([[2]]), "Arrow Array int64, then Arrow ChunkedArray int64"),
        (
            TABLE,
            TABLE.select(["text"]),
            "Arrow Table text: string score: double, then Arrow Table text: string",
        ),
        (TABLE, TABLE.to_batches()[0], "then Arrow RecordBatch"),
    ],
)
def test_kinds_that_differ_are_refused_with_both_named(left, right, found):
    with pytest.raises(DataError, match=found) as caught:
        concat([left, right])
    assert caught.value.allowed == "one kind, dtype, trailing shape and schema for all pieces"
    assert "return the same kind for every piece" in caught.value.do


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("text", "a piece gave a str"),
        (1.5, "a piece gave a float"),
        ({"a": [1]}, "a piece gave a dict"),
        (np.array(1.0), "a piece gave a numpy.ndarray of no dimension"),
        (np.ma.masked_array([1, 2], [True, False]), "a piece gave a numpy.MaskedArray"),
        (pa.scalar(1), "a piece gave a pyarrow.Int64Scalar"),
        (iter([1]), "a piece gave a list_iterator"),
    ],
)
def test_values_that_cannot_be_concatenated_are_refused(value, found):
    with pytest.raises(DataError, match=found):
        Concat().lift(value, 1)


def test_no_pieces_have_no_kind():
    with pytest.raises(DataError, match="no pieces"):
        concat([])


def test_parts_with_arrow_survive_pickling():
    merge = Concat()
    part = pickle.loads(pickle.dumps(merge.lift(TABLE, 3)))
    assert merge.finish(part).equals(TABLE)
