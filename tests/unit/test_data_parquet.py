"""Parquet rows: types kept, readers reused, damaged rows and files told apart."""

from __future__ import annotations

import datetime
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.data import parquet, parquet_reader
from fanfold.data.opening import open_source
from fanfold.errors import InputError


@pytest.fixture(autouse=True)
def _no_reader_stays_open():
    yield
    while parquet_reader._READERS:
        parquet_reader._READERS.popitem()[1].close()


@pytest.fixture
def source(tmp_path):
    def make(*tables, row_group_size=1000, **options):
        paths = []
        for i, table in enumerate(tables):
            path = tmp_path / f"{i}.parquet"
            table = table if isinstance(table, pa.Table) else pa.table(table)
            pq.write_table(table, path, row_group_size=row_group_size)
            paths.append(str(path))
        return open_source(paths, **options)

    return make


def rows(source, window_rows=7):
    texts, kept, failures = [], [], []
    for window in source.windows(window_rows):
        offset = 0
        for chunk in source.chunks(window):
            assert chunk.offset == offset
            offset += len(chunk.texts)
            assert chunk.kept.schema.equals(source.kept_schema, check_metadata=True)
            failures += [(window.first_row + f.offset, f) for f in chunk.failures]
            texts += chunk.texts
            kept += chunk.kept.to_pylist()
        assert offset == window.num_rows
    assert [at for at, _ in failures] == [i for i, text in enumerate(texts) if text is None]
    return texts, kept, [f for _, f in failures]


def strings(*values, large=False):
    """An array of these bytes, UTF-8 or not."""
    kind = pa.large_string() if large else pa.string()
    return pa.array(values, pa.large_binary() if large else pa.binary()).view(kind)


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_type_of_text_is_read_and_null_is_a_failure(source, kind):
    made = source({"text": pa.array(["a", None, "", "é"] * 5).cast(kind), "n": range(20)})
    assert made.kept_schema.field("text").type == kind
    texts, kept, failures = rows(made)
    assert texts == ["a", None, "", "é"] * 5
    assert [row["n"] for row in kept[:3]] == [0, None, 2]
    assert {f.error for f in failures} == {"NullText"}
    assert "0.parquet, row 1: column 'text' is null" in failures[0].message


def test_a_column_that_is_no_text_is_refused(source):
    with pytest.raises(InputError, match="its type is int64"):
        source({"text": [1]})


@pytest.mark.parametrize("options", [{"column": "b"}, {"keep": ["b"]}, {"id_column": "b"}])
def test_a_missing_column_is_refused_with_those_there_are(source, options):
    with pytest.raises(InputError, match="no such column") as caught:
        source({"text": ["a"], "n": [1]}, **options)
    assert caught.value.allowed == "text, n"


def test_kept_columns_keep_their_types(source):
    table = pa.table(
        {
            "text": ["a", "b"],
            "t": pa.array([1, None], pa.timestamp("ns", "Europe/Paris")),
            "s": pa.array([{"x": [1]}, None], pa.struct([("x", pa.list_(pa.int8()))])),
            "d": pa.array(["x", "y"]).dictionary_encode(),
            "f": pa.array([b"12", None], pa.binary(2)),
        }
    )
    made = source(table)
    assert made.kept_schema.types == table.schema.types
    assert made.kept_schema.names == table.schema.names
    (chunk,) = made.chunks(next(made.windows(10)))
    assert pa.Table.from_batches([chunk.kept]).equals(table)
    assert source(table, keep=["f", "text"]).kept_schema.names == ["f", "text"]
    assert rows(source(table, keep="none"))[0] == ["a", "b"]


def test_invalid_utf8_fails_its_row_alone(source):
    table = pa.table(
        {
            "text": strings(b"a", b"\xff\x1b", b"c", b"d"),
            "k": strings(b"a", b"b", b"\xfe", b"d", large=True),
            "id": [5, 6, 7, 8],
        }
    )
    for form in ("typed", "json"):
        texts, kept, failures = rows(source(table, id_column="id", form=form))
        assert texts == ["a", None, None, "d"]
        assert [(f.error, f.id) for f in failures] == [("BadUtf8", 6), ("BadUtf8", 7)]
        assert failures[0].message.endswith("row 1: column 'text' is not UTF-8: \\xff\\x1b")
        assert "column 'k' is not UTF-8" in failures[1].message
        assert set(kept[1].values()) == {None}
    assert rows(source(table, keep="none"))[0] == ["a", None, "c", "d"]


def test_invalid_utf8_in_a_dictionary_concerns_only_rows_that_use_it():
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), strings(b"a", b"\xff"))
    assert parquet._bad_utf8(words) == [1]


def test_a_parquet_dictionary_that_pyarrow_refuses_is_an_input_error(source):
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), strings(b"a", b"\xff"))
    with pytest.raises(InputError, match="cannot be read as Parquet: Invalid UTF8 payload"):
        rows(source({"text": words}))


def test_form_json_writes_each_row_as_an_object(source):
    table = pa.table(
        {
            "text": ["a"],
            "b": [b"\x00\xff"],
            "t": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns")),
            "z": pa.array([1_700_000_000_000], pa.timestamp("ms", "Europe/Paris")),
            "y": pa.array([2**61], pa.timestamp("s")),
            "d": [datetime.date(2024, 2, 1)],
            "c": pa.array([1], pa.time64("ns")),
            "u": pa.array([5], pa.duration("ns")),
            "n": [float("nan")],
            "s": [{"x": [1, None, "é"][0:2]}],
        }
    ).drop_columns(["y"])
    (row,) = rows(source(table, form="json"))[1]
    assert row["{record}"] == (
        '{"text":"a","b":"AP8=","t":"2023-11-14T22:13:20.000000001","z":"2023-11-14T22:13:20.000Z",'
        '"d":"2024-02-01","c":"00:00:00.000000001","u":5,"n":NaN,"s":{"x":[1,null]}}'
    )
    assert json.loads(rows(source(table, form="json", keep=["d"]))[1][0]["{record}"]) == {"d": "2024-02-01"}
    assert rows(source(table, form="json", keep="none"))[1] == [{"{record}": "{}"}]


def test_a_value_that_json_cannot_hold_fails_its_row(source):
    far = pa.array([[0], [2**61], [1]], pa.list_(pa.timestamp("us")))
    texts, _, (failure,) = rows(source({"text": ["a", "b", "c"], "t": far}, form="json"))
    assert texts == ["a", None, "c"]
    assert failure.error == "BadRecord"
    assert "cannot be written as JSON" in failure.message


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"text": ["a"]}, "lacks column 'n'"),
        ({"text": ["a"], "n": [1], "m": [1]}, "has column 'm'"),
        ({"text": ["a"], "n": [1.5]}, "column 'n' of"),
    ],
)
def test_files_that_differ_are_refused(source, second, told):
    with pytest.raises(InputError, match="need the same columns") as caught:
        source({"text": ["a"], "n": [1]}, second)
    assert told in caught.value.found
    assert "1.parquet" in caught.value.found


def test_columns_may_stand_in_another_order(source):
    made = source({"text": ["a"], "n": [1]}, {"n": [2], "text": ["b"]})
    assert rows(made)[1] == [{"text": "a", "n": 1}, {"text": "b", "n": 2}]


def test_windows_span_row_groups_and_files(source):
    tables = [{"text": [f"{i}-{j}" for j in range(n)]} for i, n in enumerate((5, 0, 13, 9))]
    want = [text for table in tables for text in table["text"]]
    made = source(*(pa.table({"text": pa.array(t["text"], pa.string())}) for t in tables), row_group_size=4)
    for window_rows in (1, 6, 27, 100):
        assert rows(made, window_rows)[0] == want
    windows = list(made.windows(6))
    assert [w.num_rows for w in windows] == [6, 6, 6, 6, 3]
    assert [len(w.spans) for w in windows] == [2, 1, 1, 1, 1]
    for window in reversed(windows):  # each window stands alone, whatever was read before
        texts = [text for chunk in made.chunks(window) for text in chunk.texts]
        assert texts == want[window.first_row : window.first_row + window.num_rows]


def test_a_reader_goes_on_where_the_window_before_ended(source, monkeypatch):
    opened = []
    real = parquet_reader.open_parquet
    monkeypatch.setattr(parquet_reader, "open_parquet", lambda path: opened.append(path) or real(path))
    made = source(*({"text": [str(i)] * 100} for i in range(4)))
    rows(made, 10)
    assert len(opened) == 4
    assert len(parquet_reader._READERS) <= parquet_reader.MAX_OPEN


def test_a_changed_file_is_refused(source, tmp_path):
    made = source({"text": ["a", "b"]})
    windows = list(made.windows(1))
    list(made.chunks(windows[0]))
    os.utime(tmp_path / "0.parquet", ns=(1, 1))
    with pytest.raises(InputError, match="must not change"):
        list(made.chunks(windows[1]))


def test_a_truncated_file_is_refused_at_open(source, tmp_path):
    source({"text": ["a"] * 100})
    path = tmp_path / "0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    for content in (path.read_bytes(), b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            open_source([str(path)])


def test_limit_and_url(source, tmp_path):
    made = source({"text": list("abcdef")}, limit=4)
    assert [w.num_rows for w in made.windows(3)] == [3, 1]
    assert rows(open_source([f"file://{tmp_path}/0.parquet"]))[0] == list("abcdef")


def test_wide_rows_come_in_small_batches(source, monkeypatch):
    monkeypatch.setattr(parquet_reader, "CHUNK_BYTES", 2000)
    made = source(pa.table({"text": [f"{i:0100}" for i in range(50)]}))
    (window,) = made.windows(50)
    sizes = [len(chunk.texts) for chunk in made.chunks(window)]
    assert sum(sizes) == 50
    assert max(sizes) <= 20
