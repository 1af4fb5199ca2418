"""CSV and plain text: cells as they stand, one header for all, each line a row."""

from __future__ import annotations

import csv

import pyarrow as pa
import pytest

from fanfold.data.opening import open_source
from fanfold.errors import InputError

pa.array(["x"])  # pyarrow imports pandas here where it is installed: outside of any test's time


@pytest.fixture
def source(tmp_path):
    def make(*contents, suffix="csv", **options):
        paths = []
        for i, content in enumerate(contents):
            path = tmp_path / f"{i}.{suffix}"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(str(path))
        return open_source(paths, **options)

    return make


def rows(source):
    texts, kept, failures = [], [], []
    for window in source.windows(1000):
        for chunk in source.chunks(window):
            assert chunk.kept.schema == source.kept_schema
            texts += chunk.texts
            kept += chunk.kept.to_pylist()
            failures += chunk.failures
    assert [f.offset for f in failures] == [i for i, text in enumerate(texts) if text is None]
    return texts, kept, failures


@pytest.mark.parametrize("block_bytes", [3, 4, 5, 7, 64])
def test_quoted_cells_may_hold_anything_across_block_borders(source, block_bytes):
    content = '\ufeffid,text\r\n1,"a\n""b"",\r\n"\r\n\r\n2,5" pipe\n\n3,\n4, "x" \n5,"é"'
    texts, kept, failures = rows(source(content, block_bytes=block_bytes))
    assert texts == ['a\n"b",\r\n', '5" pipe', "", ' "x" ', "é"]
    assert [row["id"] for row in kept] == list("12345")
    assert failures == []


def test_form_json_and_named_columns(source):
    made = source("a,text\n1,x\n", keep=["text", "a"], form="json")
    assert rows(made)[1] == [{"{record}": '{"text":"x","a":"1"}'}]
    assert rows(source("a,text\n1,x\n", keep=["a"]))[1] == [{"a": "1"}]
    assert source("a,text\n1,x\n", keep="none").kept_schema == pa.schema([])


def test_bad_records_are_failed_rows(source):
    content = b'id,text\n1,a\n2,b,c\n"3"\n4,\xff\n5,"x\ry"\n6,a\rb\n7,"open\n8,z\n'
    texts, kept, failures = rows(source(content, id_column="id"))
    assert texts == ["a", None, None, None, "x\ry", None, None]
    assert kept[1] == {"id": None, "text": None}
    assert [(f.error, f.id) for f in failures] == [
        ("BadRecord", "2"), ("BadRecord", "3"), ("BadUtf8", None), ("BadRecord", None), ("BadRecord", None),
    ]  # fmt: skip
    told = [f.message.split("0.csv, ")[1] for f in failures]
    assert told[0] == "line 3: 3 fields, the header has 2: 2,b,c\\n"
    assert told[2].startswith("line 5: not UTF-8: byte 2 of the record is 0xff")
    assert "line 7: not CSV: new-line character seen in unquoted field" in told[3]
    assert told[4] == 'line 8: not CSV: a quoted field is never closed: 7,"open\\n8,z\\n'


def test_files_need_one_header_and_empty_files_none(source):
    assert rows(source("", "text\na\n", "\n\n", "text\nb"))[0] == ["a", "b"]
    assert list(source("", "").windows(5)) == []
    assert list(source("text\n").windows(5)) == []
    with pytest.raises(InputError, match="need the same header") as caught:
        source("text\na\n", "id,text\n1,b\n")
    assert "1.csv: id, text" in caught.value.found


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ("text,a,text\n", {}, "stands twice: text"),
        (b"text,\xff\n", {}, "not UTF-8"),
        ("a,b\n1,2\n", {}, "no such column"),
        ("a,text\n1,2\n", {"keep": ["c"]}, "no such column"),
        ("a,text\n1,2\n", {"id_column": "c"}, "no such column"),
    ],
)
def test_a_header_that_does_not_serve_is_refused(source, content, options, told):
    with pytest.raises(InputError, match=r"0\.csv") as caught:
        source(content, **options)
    assert told in caught.value.found


@pytest.mark.parametrize("megabytes", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_long_cell_comes_through_and_the_limit_is_put_back(source, megabytes):
    before = csv.field_size_limit()
    text = "x" * (megabytes << 20)
    assert rows(source(f"text\n{text}\n", keep="none"))[0] == [text]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("block_bytes", [3, 64])
def test_each_line_of_plain_text_is_a_row(source, block_bytes):
    content = "\ufeffa\r\n\n  \nb\r\r\n\ufeffc\nd\r"
    made = source(content, suffix="txt", block_bytes=block_bytes)
    texts, kept, _ = rows(made)
    assert texts == ["a", "", "  ", "b\r", "\ufeffc", "d"]
    assert kept == [{"text": text} for text in texts]


def test_plain_text_in_form_json_and_with_bad_utf8(source):
    texts, kept, (failure,) = rows(source(b"\xc3\xa9\n\xc3\n", suffix="txt", form="json"))
    assert texts == ["é", None]
    assert kept == [{"{record}": '{"text":"é"}'}, {"{record}": None}]
    assert failure.error == "BadUtf8"
    assert "0.txt, line 2: not UTF-8" in failure.message
    assert rows(source("a", suffix="txt", keep="none"))[1] == [{}]


@pytest.mark.parametrize("options", [{"column": "body"}, {"keep": ["id"]}, {"id_column": "id"}])
def test_plain_text_has_one_column(source, options):
    with pytest.raises(InputError, match="plain text has one column, text"):
        source("a", suffix="txt", **options)
