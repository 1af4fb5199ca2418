"""The scanner finds the same records as a parser that reads byte by byte, whatever the block borders."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fanfold.data.lines import BOM, Cutter, Dealer, blocks
from fanfold.data.records import read_records
from fanfold.errors import InputError

HOSTILE = st.lists(
    st.sampled_from([b"a", b",", b'"', b'""', b"\n", b"\r", b"\r\n", b" ", b"\t", b"\xff", b"\n\n"]),
    max_size=40,
).map(b"".join)


def naive(rules, data):
    """(start, end, line) of every record, by a state machine that looks at one byte at a time."""
    at = 3 if data.startswith(BOM) else 0
    start, line, first, state = at, 1, 1, "field start"
    found = []
    for i in range(at, len(data)):
        byte = data[i : i + 1]
        if rules == "csv" and byte == b'"':
            state = {"field start": "quoted", "quoted": "closed", "closed": "quoted"}.get(state, state)
        elif byte == b"\n":
            line += 1
            if state != "quoted":
                found.append((start, i + 1, first))
                start, first, state = i + 1, line, "field start"
        elif state != "quoted":
            state = "field start" if byte == b"," else "plain"
    if start < len(data):
        found.append((start, len(data), first))
    blank = {
        "text": lambda record: False,
        "jsonl": lambda record: not record.strip(),
        "csv": lambda record: not record.removesuffix(b"\n").removesuffix(b"\r"),
    }[rules]
    return [(s, e, n) for s, e, n in found if not blank(data[s:e])]


def scanned(rules, data, block_bytes, **options):
    cutter = Cutter(rules, at_file_start=True, **options)
    cuts = [cutter.feed(b) for b in blocks(io.BytesIO(data), path="x", block_bytes=block_bytes)]
    cuts.append(cutter.finish())
    return [record for cut in cuts for record in zip(*(c.tolist() for c in cut), strict=True)]


@settings(max_examples=40, deadline=None)
@given(rules=st.sampled_from(["jsonl", "csv", "text"]), data=HOSTILE, block_bytes=st.integers(3, 9))
@example(rules="csv", data=b'a,"b\n\r\n""",c\nd"e,"\n"\r\n', block_bytes=3)
@example(rules="csv", data=b'ab"\r\n"x', block_bytes=3)
@example(rules="jsonl", data=BOM + b" \n{}", block_bytes=3)
def test_scanner_equals_a_byte_by_byte_parser(rules, data, block_bytes):
    assert scanned(rules, data, block_bytes, passes_header=False) == naive(rules, data)


@settings(max_examples=40, deadline=None)
@given(data=HOSTILE, block_bytes=st.integers(3, 9))
def test_reading_gives_the_bytes_that_scanning_located(data, block_bytes):
    cutter = Cutter("csv", at_file_start=True)
    handed = blocks(io.BytesIO(data), path="x", block_bytes=block_bytes)
    read = [(r.line, r.data) for r in read_records(handed, cutter, file=0, offset=0)]
    assert read == [(n, data[s:e]) for s, e, n in naive("csv", data)[1:]]


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.lists(st.text(alphabet='a,"\n é', max_size=6), min_size=2, max_size=3), min_size=1, max_size=6))
def test_csv_records_are_those_of_the_csv_module(rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    data = out.getvalue().encode()
    cut = scanned("csv", data, 5, passes_header=False)
    assert [next(csv.reader([data[s:e].decode()])) for s, e, _ in cut] == rows


def test_many_blank_lines_are_passed_over_at_once():
    data = b" \r\n" * 500 + b'  {"a": 1}\n' + b"\n" * 500 + b" \t"
    assert scanned("jsonl", data, 64) == [(1500, 1511, 501)]


def test_csv_header_may_hold_line_ends_and_be_the_only_record():
    assert scanned("csv", b'"a\nb",c\n1,2', 3) == [(8, 11, 3)]
    assert scanned("csv", b'"a\nb",c', 3) == []


def test_text_keeps_blank_lines_and_adds_none_at_the_end():
    assert [e - s for s, e, _ in scanned("text", b"a\n\n\nb", 3)] == [2, 1, 1, 1]
    assert len(scanned("text", b"a\nb\n", 3)) == 2


def test_dealer_fills_windows_exactly_and_stops_at_the_limit():
    cutter = Cutter("text", at_file_start=True)
    cut = cutter.feed(b"x\n" * 10)
    assert [(s.rows, s.last) for s in Dealer(4).shares(cut)] == [(4, True), (4, True), (2, False)]
    dealer = Dealer(4, skip=3, left=5)
    assert [(s.start, s.rows, s.line, s.last) for s in dealer.shares(cut)] == [
        (6, 4, 4, True),
        (14, 1, 8, True),
    ]
    assert dealer.done


def test_a_file_that_became_shorter_is_refused():
    with pytest.raises(InputError, match="must not change while it is read") as caught:
        list(blocks(io.BytesIO(b"abc"), path="/d/a.txt", stop=9))
    assert "it ends at byte 3, 9 were there" in str(caught.value)
