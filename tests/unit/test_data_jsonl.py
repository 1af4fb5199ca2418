"""JSONL rows: what is a text, what is a failure and what is kept."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from fanfold.data import records
from fanfold.data.opening import open_source
from fanfold.errors import InputError


@pytest.fixture
def source(tmp_path):
    def make(lines, **options):
        path = tmp_path / "a.jsonl"
        if not isinstance(lines, bytes):
            lines = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
        path.write_bytes(lines)
        return open_source([str(path)], **options)

    return make


def rows(source):
    """(texts, kept as a list of dicts, failures) of the whole source."""
    texts, kept, failures = [], [], []
    for window in source.windows(1000):
        for chunk in source.chunks(window):
            assert chunk.kept.schema.equals(source.kept_schema, check_metadata=True)
            assert chunk.kept.num_rows == len(chunk.texts)
            texts += chunk.texts
            kept += chunk.kept.to_pylist()
            failures += chunk.failures
    assert [f.offset for f in failures] == [i for i, text in enumerate(texts) if text is None]
    return texts, kept, failures


GOOD = {"id": 1, "text": "x"}


@pytest.mark.parametrize(
    ("line", "error", "told"),
    [
        (b'{"text": "\xff"}', "BadUtf8", "byte 10 of the record is 0xff"),
        (b'{"text": ', "BadRecord", "Expecting value at character 8"),
        (b'["text"]', "BadRecord", "holds a list, not an object"),
        (b'{"text": "a"} {}', "BadRecord", "Extra data"),
        (b'{"text": "a", "text": "b"}', "BadRecord", "the key 'text' stands twice"),
        (b"[" * 100_000, "BadRecord", "nested deeper than 200"),
        (b'{"text":"a","id":' + b"9" * 5000 + b"}", "BadRecord", "not readable JSON"),
        (b'{"id": 7}', "MissingColumn", "no column 'text'; the record has id"),
        (b'{"id": 7, "text": null}', "NullText", "column 'text' is null"),
        (b'{"id": 7, "text": 5}', "NotText", "a whole number, not a string"),
        (b'{"id": 7, "text": true}', "NotText", "true or false, not a string"),
        (b'{"id": 7, "text": "\\ud800"}', "BadText", "half of a surrogate pair"),
        (b'{"id": 7, "text": "a", "new": 1}', "SchemaMismatch", "column 'new' is new"),
        (
            b'{"id": "7", "text": "a"}',
            "SchemaMismatch",
            "column 'id' holds a string, the first records made it int64",
        ),
    ],
)
def test_a_bad_record_is_a_failed_row_that_says_where_and_why(source, line, error, told, monkeypatch):
    monkeypatch.setattr("fanfold.data.jsonl.INFERRED_RECORDS", 1)
    made = source(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode(), id_column="id")
    texts, kept, (failure,) = rows(made)
    assert texts == ["x", None, "x"]
    assert kept == [GOOD, {"id": None, "text": None}, GOOD]
    assert failure.error == error
    assert told in failure.message
    assert "a.jsonl, line 3: " in failure.message
    if b'"id": 7' in line:
        assert failure.id == 7


def test_a_message_shows_80_characters_and_is_inert(source):
    _, _, (failure,) = rows(source(['{"text": "a"}', "\x1b[31m\u202e" + "é" * 200]))
    assert "\\x1b[31m\\u202e" + "é" * 74 in failure.message
    assert "é" * 75 not in failure.message
    assert failure.message.isprintable()


def test_empty_text_crlf_bom_blank_lines_and_no_last_newline_are_fine(source):
    made = source(b'\xef\xbb\xbf{"text": ""}\r\n \t\r\n\n{"text": "b"}\r\n   {"text": "c"}')
    assert rows(made)[0] == ["", "b", "c"]


def test_types_are_inferred_and_values_unaltered(source):
    first = {
        "text": "t", "s": "x", "b": True, "i": 2**62, "f": 1, "w": 2**53 + 1, "ls": ["a", None],
        "lf": [1, 0.5], "d": {"k": [1, "é"]}, "m": 1, "n": None, "e": [], "h": 2**70,
        "lb": [True], "mix": [1, "a"],
    }  # fmt: skip
    second = {**first, "b": None, "f": 0.5, "w": 0.5, "m": "a", "ls": []}
    made = source([first, second])
    kinds = {field.name: (str(field.type), field.metadata) for field in made.kept_schema}
    marked = ("string", {b"fanfold": b"json"})
    assert kinds == {
        "text": ("string", None), "s": ("string", None), "b": ("bool", None), "i": ("int64", None),
        "f": ("double", None), "w": marked, "ls": ("list<item: string>", None),
        "lf": ("list<item: double>", None), "d": marked, "m": marked, "n": marked, "e": marked, "h": marked,
        "lb": ("list<item: bool>", None), "mix": marked,
    }  # fmt: skip
    assert list(kinds) == list(first)
    _, kept, failures = rows(made)
    assert failures == []
    for row, given in zip(kept, (first, second), strict=True):
        for name, value in row.items():
            is_json = kinds[name] == marked and value is not None
            assert (json.loads(value) if is_json else value) == given[name], name
    assert kept[0]["d"] == '{"k":[1,"é"]}'


@pytest.mark.parametrize(
    ("first", "later", "told"),
    [
        (1, True, "true or false"),
        (1, 1.0, "a number"),
        (1, 2**63, "beyond 64 bits"),
        (True, 1, "a whole number"),
        (0.5, 2**53 + 1, "which float64 would round"),
        ("a", ["a"], "a list"),
        (["a"], "a", "a string"),
        (["a"], [1], "a list holding a whole number"),
        ([1], [True], "a list holding true or false"),
        ([0.5], [2**60], "beyond 2**53"),
    ],
)
def test_a_later_value_that_does_not_fit_fails_its_row_alone(source, first, later, told, monkeypatch):
    monkeypatch.setattr("fanfold.data.jsonl.INFERRED_RECORDS", 1)
    made = source([{"text": "a", "c": first}, {"text": "b", "c": later}, {"text": "c", "c": None}, {"text": "d"}])
    texts, kept, (failure,) = rows(made)
    assert texts == ["a", None, "c", "d"]
    assert kept[0]["c"] == first
    assert failure.error == "SchemaMismatch"
    assert told in failure.message
    assert "name the columns wanted with --keep, or write to .jsonl" in failure.message


@pytest.mark.parametrize("form", ["typed", "json"])
@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"a": "\ud800"}])
def test_half_a_surrogate_pair_in_a_kept_column_fails_its_row(source, value, form):
    made = source([{"text": "a", "c": value}, {"text": "b"}], keep=["c"], form=form)
    texts, _, (failure,) = rows(made)
    assert texts == [None, "b"]
    assert failure.error == "BadText"


def test_form_json_keeps_the_line_as_it_stands(source):
    lines = ['  {"text" : "a","n":1.0, "x": NaN} ', '{"text":"b", "other": "\\u00e9"}']
    assert [row["{record}"] for row in rows(source(lines, form="json"))[1]] == [line.strip() for line in lines]


def test_form_json_with_named_columns_keeps_those_there_are(source):
    made = source([{"text": "a", "b": "é", "c": 2}, {"text": "b", "b": 0}], form="json", keep=["c", "b"])
    assert [row["{record}"] for row in rows(made)[1]] == ['{"c":2,"b":"é"}', '{"b":0}']
    assert rows(source([GOOD], form="json", keep="none"))[1] == [{"{record}": "{}"}]


def test_keep_none_and_keep_named(source):
    assert source([GOOD], keep="none").kept_schema == pa.schema([])
    assert rows(source([GOOD, GOOD], keep="none"))[0] == ["x", "x"]
    assert rows(source([{**GOOD, "b": 2}, {"id": 3, "text": "y", "z": 1}], keep=["b", "id"]))[1] == [
        {"b": 2, "id": 1},
        {"b": None, "id": 3},
    ]


@pytest.mark.parametrize("options", [{"column": "body"}, {"keep": ["body"]}, {"id_column": "body"}])
def test_a_column_that_is_not_there_is_refused_with_those_there_are(source, options):
    with pytest.raises(InputError) as caught:
        source([GOOD], **options)
    assert "column 'body'" in caught.value.asked
    assert caught.value.allowed == "id, text"


def test_no_record_at_all_gives_no_window_and_no_error(source):
    made = source(b"\n \n", keep=["a"])
    assert list(made.windows(10)) == []
    assert made.kept_schema == pa.schema([])


def test_inference_passes_over_bad_records_and_stops_at_the_limit(source):
    made = source(["{", "[]", {"text": "a", "n": 1}, {"text": "b", "new": 1}], limit=3)
    assert made.kept_schema.names == ["text", "n"]
    assert rows(made)[0] == [None, None, "a"]


@pytest.mark.parametrize("megabytes", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_long_text_comes_through(source, megabytes):
    text = "abc " * (megabytes << 18)
    assert rows(source([{"text": text}, GOOD], keep="none"))[0] == [text, "x"]


def test_a_record_too_long_fails_without_being_held(source, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 50)
    for size in (80, 20_000):
        made = source([GOOD, {"text": "y" * size}, GOOD], block_bytes=64)
        texts, _, (failure,) = rows(made)
        assert texts == ["x", None, "x"]
        assert failure.error == "RecordTooLong"
        assert 'line 2: the record is longer than 0 MB: {"text": "yyy' in failure.message


def test_chunks_are_bounded_in_rows_and_bytes(source, monkeypatch):
    made = source([GOOD] * 3000)
    window = next(made.windows(5000))
    assert [len(c.texts) for c in made.chunks(window)] == [1024, 1024, 952]
    monkeypatch.setattr(records, "CHUNK_BYTES", 100)
    window = next(made.windows(30))
    assert {len(c.texts) for c in made.chunks(window)} <= {2, 3, 4}


def test_a_file_that_changed_between_scan_and_read_is_refused(source, tmp_path):
    made = source([GOOD, GOOD])
    (window,) = made.windows(10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b" "))
    with pytest.raises(InputError, match="must not change"):
        list(made.chunks(window))
    path.unlink()
    with pytest.raises(InputError, match=r"a\.jsonl"):
        list(made.chunks(window))
