"""What is written is what was there: values, digits, nulls, hostile text; in Parquet, JSONL and CSV."""

from __future__ import annotations

import base64
import csv
import datetime
import decimal
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.data.sink import open_sink

VECTOR = pa.list_(pa.float32(), 3)
SCHEMA = pa.schema([("row", pa.int64()), ("title", pa.string()), ("embedding", VECTOR)])
RECORDS = pa.schema([("row", pa.int64()), ("{record}", pa.string()), ("embedding", VECTOR)])
HOSTILE = [
    "",
    " blank ",
    "a,b;c\td",
    'say "hi"',
    "two\nlines",
    "two\r\nlines",
    "old\rmac",
    "\r",
    "\0nul",
    "\x1b[31mred\x1b[0m",
    "=cmd|' /C calc'!A0",
    "+1",
    "@SUM(1)",
    "<script>alert(1)</script>",
    "\u2028\u2029\x85",
    "\u202egnp.exe",
    "\ufeffbom",
    "e\u0301 ü 漢 😀",
    "null",
    "NaN",
    "[1]",
    "\\N",
    "a'b`c",
]


class Unclosed(io.BytesIO):
    """Bytes that can still be read after the sink is closed."""

    def close(self):
        pass


def written(name, schema, *batches, window_ends=()):
    """The bytes after these batches; a window ends behind each batch whose index stands in `window_ends`."""
    file = Unclosed()
    with open_sink(name, file, schema) as sink:
        for i, batch in enumerate(batches):
            sink.write(batch)
            if i in window_ends:
                sink.end_window()
    return file.getvalue()


def batch_of(schema, **columns):
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def jsonl_rows(data):
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


def csv_rows(data):
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


THREE = batch_of(
    SCHEMA, row=[0, 1, 4], title=["a", None, "c"], embedding=[[0.1, -2.0, 0.75], None, [1.0, 0.5, 16777216.0]]
)


# -- Parquet ----------------------------------------------------------------------------------------------


def test_parquet_gives_the_same_table_back():
    table = pq.read_table(pa.BufferReader(written("parquet", SCHEMA, THREE)))
    assert table.schema.equals(SCHEMA)
    assert table.equals(pa.Table.from_batches([THREE]))


def test_parquet_has_one_row_group_a_window():
    data = written("parquet", SCHEMA, THREE, THREE, THREE, window_ends={1, 2})
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [6, 3]


def test_parquet_with_no_rows_still_has_its_schema():
    table = pq.read_table(pa.BufferReader(written("parquet", SCHEMA)))
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == 0


def test_parquet_writes_what_no_window_end_followed():
    data = written("parquet", SCHEMA, THREE, THREE, window_ends={0})
    assert pq.read_table(pa.BufferReader(data)).num_rows == 6


def test_parquet_keeps_nested_and_other_types():
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("tags", pa.list_(pa.string())),
            ("meta", pa.struct([("a", pa.int8()), ("b", pa.list_(pa.float64()))])),
            ("when", pa.timestamp("ns", "UTC")),
            ("raw", pa.binary()),
            ("kind", pa.dictionary(pa.int32(), pa.string())),
        ]
    )
    batch = batch_of(
        schema,
        row=[0, 1],
        tags=[["x", None], None],
        meta=[{"a": 1, "b": [0.5]}, None],
        when=[1, None],
        raw=[b"\xff\0", None],
        kind=["p", "q"],
    )
    table = pq.read_table(pa.BufferReader(written("parquet", schema, batch)))
    assert table.equals(pa.Table.from_batches([batch]))


def test_the_same_rows_give_the_same_parquet_bytes_however_they_come():
    whole = pa.Table.from_batches([THREE, THREE]).combine_chunks().to_batches()[0]
    assert written("parquet", SCHEMA, THREE, THREE) == written("parquet", SCHEMA, whole)


# -- digits -----------------------------------------------------------------------------------------------

FLOATS = [0.0, -0.0, 1.0, 0.1, 1 / 3, 1e-5, 1e-45, 1.17549435e-38, 3.4028235e38, -16777216.0, 16777217.0, 123456.79]


def vector_of(data, name):
    """The first row's vector, as written in this format."""
    if name == "csv":
        return json.loads(csv_rows(data)[0]["embedding"], parse_int=float)
    return json.loads(data.decode(), parse_int=float)["embedding"]


def same_bits(values, name):
    vector = np.array(values, dtype=np.float32)
    schema = pa.schema([("row", pa.int64()), ("embedding", pa.list_(pa.float32(), len(values)))])
    batch = batch_of(schema, row=[0], embedding=[vector])
    found = np.array(vector_of(written(name, schema, batch), name), dtype=np.float32)
    assert found.tobytes() == vector.tobytes()


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_every_float32_comes_back_with_the_same_bits(name):
    same_bits(FLOATS, name)
    bits = np.random.default_rng(0).integers(0, 2**32, 5_000, dtype=np.uint32).view(np.float32)
    same_bits(bits[np.isfinite(bits)], name)


@settings(max_examples=20)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_digits_round_trip_in_jsonl_and_csv(values):
    for name in ("jsonl", "csv"):
        same_bits(values, name)


def test_vectors_are_written_in_few_digits():
    data = written("jsonl", RECORDS, batch_of(RECORDS, row=[0], **{"{record}": ["{}"]}, embedding=[[0.1, 1.0, -0.25]]))
    assert data == b'{"row": 0, "embedding": [0.1, 1, -0.25]}\n'


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_nan_and_infinity_stay_readable_by_json(name):
    """What Python's json reads and writes, as for kept columns (data/kept.py); `nan` is no JSON to anyone."""
    schema = pa.schema([("row", pa.int64()), ("embedding", VECTOR)])
    batch = batch_of(schema, row=[0], embedding=[[float("nan"), float("inf"), float("-inf")]])
    vector = vector_of(written(name, schema, batch), name)
    assert np.isnan(vector[0])
    assert vector[1:] == [np.inf, -np.inf]


def test_slices_are_written_as_what_they_show():
    for name, rows in (("jsonl", jsonl_rows), ("csv", csv_rows)):
        whole = rows(written(name, SCHEMA, THREE))
        for start in range(3):
            assert rows(written(name, SCHEMA, THREE.slice(start, 2))) == whole[start : start + 2], name


# -- JSONL ------------------------------------------------------------------------------------------------


def test_a_jsonl_row_is_its_number_the_record_and_the_results():
    records = ['{"id": 7, "text": "x"}', None]
    data = written(
        "jsonl", RECORDS, batch_of(RECORDS, row=[3, 4], **{"{record}": records}, embedding=[[1, 2, 3], None])
    )
    assert data.decode().splitlines() == [
        '{"row": 3, "id": 7, "text": "x", "embedding": [1, 2, 3]}',
        '{"row": 4, "embedding": null}',
    ]


@pytest.mark.parametrize(
    "record",
    [
        '{"n":1.50,"big":12345678901234567890123,"e":1E5}',
        '{"u":"\\u00e9\\ud83d\\ude00","s":"a\\/b"}',
        '{ "spaced" : [ 1 , 2 ] , "o" : { } }',
        '{"nan":NaN,"deep":{"a":[{"b":null}]}}',
        '{"text":"}{"}',
        '{"raw":"\u2028 ü 😀"}',
        "{}",
        " { } ",
    ],
)
def test_a_record_keeps_the_text_it_had(record):
    data = written(
        "jsonl", RECORDS, batch_of(RECORDS, row=[0], **{"{record}": [record]}, embedding=[[1, 2, 3]])
    ).decode()
    inside = record.strip()[1:-1].strip()
    assert data == '{"row": 0, ' + (inside + ", " if inside else "") + '"embedding": [1, 2, 3]}\n'
    assert list(json.loads(data)) == ["row", *json.loads(record), "embedding"]


def test_hostile_text_comes_back_from_jsonl():
    records = [json.dumps({"text": text}, ensure_ascii=ascii) for text in HOSTILE for ascii in (False, True)]
    batch = batch_of(RECORDS, row=range(len(records)), **{"{record}": records}, embedding=[[1, 2, 3]] * len(records))
    data = written("jsonl", RECORDS, batch)
    assert data.count(b"\n") == len(records)
    assert [row["text"] for row in jsonl_rows(data)] == [text for text in HOSTILE for _ in range(2)]


def test_hostile_column_names_stay_names_in_jsonl():
    names = ['a"b', "x\ny", "}", "ü"]
    schema = pa.schema([(name, pa.string()) for name in names])
    batch = pa.record_batch([pa.array(["v"])] * len(names), schema=schema)
    assert jsonl_rows(written("jsonl", schema, batch)) == [dict.fromkeys(names, "v")]


def test_other_result_columns_are_json_values():
    schema = pa.schema(
        [("label", pa.string()), ("score", pa.float64()), ("ok", pa.bool_()), ("ids", pa.list_(pa.int64()))]
    )
    batch = batch_of(schema, label=['"x"', None], score=[0.1, None], ok=[True, None], ids=[[1, 2], None])
    assert jsonl_rows(written("jsonl", schema, batch)) == [
        {"label": '"x"', "score": 0.1, "ok": True, "ids": [1, 2]},
        {"label": None, "score": None, "ok": None, "ids": None},
    ]


def test_jsonl_with_no_rows_is_empty():
    assert written("jsonl", RECORDS) == b""


# -- CSV --------------------------------------------------------------------------------------------------


def test_csv_has_a_header_and_json_vectors():
    assert written("csv", SCHEMA, THREE).decode() == (
        'row,title,embedding\n0,a,"[0.1, -2, 0.75]"\n1,,\n4,c,"[1, 0.5, 16777216]"\n'
    )


def test_csv_with_no_rows_has_its_header():
    assert written("csv", SCHEMA) == b"row,title,embedding\n"


def test_hostile_text_comes_back_from_csv():
    schema = pa.schema([("row", pa.int64()), ("text", pa.string()), ("last", pa.string())])
    batch = batch_of(schema, row=range(len(HOSTILE)), text=HOSTILE, last=HOSTILE[::-1])
    rows = csv_rows(written("csv", schema, batch))
    assert [row["text"] for row in rows] == HOSTILE
    assert [row["last"] for row in rows] == HOSTILE[::-1]


@pytest.mark.parametrize("text", ["old\rmac", "\r", "a\rb\r"])
def test_a_lone_carriage_return_in_a_csv_cell_is_quoted(text):
    """Unquoted, it ends the record for every reader; Python's csv writer quotes it only from 3.13 on."""
    schema = pa.schema([("text", pa.string()), ("n", pa.int64())])
    data = written("csv", schema, batch_of(schema, text=[text], n=[1]))
    assert data == f'text,n\n"{text}",1\n'.encode()


def test_a_column_of_empty_texts_keeps_its_rows_in_csv():
    schema = pa.schema([("text", pa.string())])
    data = written("csv", schema, batch_of(schema, text=["", "x", ""]))
    assert [row["text"] for row in csv_rows(data)] == ["", "x", ""]


def test_nested_columns_are_json_in_a_csv_cell():
    schema = pa.schema([("tags", pa.list_(pa.string())), ("meta", pa.struct([("a", pa.int64()), ("b", pa.string())]))])
    batch = batch_of(schema, tags=[["x,y", 'q"', None], None, []], meta=[{"a": 1, "b": "ü"}, None, {"a": None}])
    rows = csv_rows(written("csv", schema, batch))
    assert json.loads(rows[0]["tags"]) == ["x,y", 'q"', None]
    assert json.loads(rows[0]["meta"]) == {"a": 1, "b": "ü"}
    assert rows[1] == {"tags": "", "meta": ""}
    assert json.loads(rows[2]["tags"]) == []


def test_whole_and_broken_numbers_keep_their_digits_in_csv():
    schema = pa.schema([("i", pa.int64()), ("f", pa.float64()), ("d", pa.decimal128(30, 5))])
    batch = batch_of(schema, i=[2**63 - 1], f=[0.1 + 0.2], d=[decimal.Decimal("1234567890123456789.12345")])
    row = csv_rows(written("csv", schema, batch))[0]
    assert (int(row["i"]), float(row["f"]), row["d"]) == (2**63 - 1, 0.1 + 0.2, "1234567890123456789.12345")


def test_an_instant_outside_of_pythons_years_does_not_stop_a_csv():
    """Parquet input may hold it; the JSON form of the same column writes it as text (data/parquet.py)."""
    schema = pa.schema([("when", pa.timestamp("s")), ("row", pa.int64())])
    batch = batch_of(schema, when=[0, 316_537_897_600], row=[0, 1])
    rows = csv_rows(written("csv", schema, batch))
    assert rows[0]["when"].startswith("1970-01-01")
    assert rows[1]["when"].startswith("12000-")


def test_bytes_in_csv_are_base64_as_in_jsonl():
    """`b'\\xff'` is Python's way to show bytes, not the bytes; nobody reads it back."""
    schema = pa.schema([("raw", pa.binary()), ("row", pa.int64())])
    rows = csv_rows(written("csv", schema, batch_of(schema, raw=[b"\xff\0x", None], row=[0, 1])))
    assert [row["raw"] for row in rows] == [base64.b64encode(b"\xff\0x").decode(), ""]


def test_dates_and_times_are_readable_in_csv():
    schema = pa.schema([("day", pa.date32()), ("at", pa.time32("s"))])
    batch = batch_of(schema, day=[datetime.date(2026, 1, 2)], at=[datetime.time(3, 4, 5)])
    assert csv_rows(written("csv", schema, batch)) == [{"day": "2026-01-02", "at": "03:04:05"}]
