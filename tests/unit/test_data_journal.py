"""The log of what is committed: torn ends are cut off, damage in the middle is refused, nothing is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.data.durable import PosixStore
from fanfold.data.journal import NAME, append, decode, encode, load
from fanfold.errors import ResumeError

ENTRIES = [
    {"kind": "window", "window": 0, "costs": [3, 2, 1], "failed": [{"message": 'Zeile 3: "x" \n \u2028 ü 😀'}]},
    {"kind": "lease", "first": 0, "last": 1, "sha256": "0" * 64},
    {"kind": "lease", "first": 2, "last": 2, "sha256": "f" * 64},
    {},
    {"kind": "part", "part": 0, "share": 0.1},
]
LINES = [encode(entry) for entry in ENTRIES]
LOG = b"".join(LINES)


class MemoryStore:
    """A store's log, without a disk: thousands of damaged logs in a moment."""

    def __init__(self):
        self.data = None

    def path(self, name):
        return Path("/memory") / name

    def read(self, name):
        return self.data

    def append(self, name, data):
        self.data = (self.data or b"") + data

    def truncate(self, name, size_bytes):
        self.data = self.data[:size_bytes]


@pytest.fixture
def store():
    return MemoryStore()


def holds(store, data):
    store.data = data
    return load(store)


def line_of(position):
    """Index of the line in which this byte of LOG stands."""
    return LOG[:position].count(b"\n")


def test_entries_come_back_in_order(store):
    append(store, ENTRIES[:2])
    append(store, ENTRIES[2:])
    assert load(store) == ENTRIES
    assert store.read(NAME) == LOG


def test_an_entry_is_one_ascii_line_whatever_it_holds():
    for line in LINES:
        assert line.isascii()
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('aé\n\r\0😀\u2028"\\', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20)
@given(st.dictionaries(st.text("abc", max_size=3), JSON, max_size=3))
def test_decode_reads_what_encode_writes(entry):
    assert decode(encode(entry)[:-1]) == entry


def test_entries_of_one_call_cost_one_flush(tmp_path, monkeypatch):
    store = PosixStore(tmp_path)
    append(store, ENTRIES[:1])
    flushes = []
    monkeypatch.setattr("fanfold.data.durable.os.fsync", flushes.append)
    append(store, ENTRIES)
    assert len(flushes) == 1
    store.close()


def test_no_log_and_an_empty_log_hold_nothing(store):
    assert load(store) == []
    assert holds(store, b"") == []


def test_a_log_on_a_disk_is_read_and_repaired_in_the_same_way(tmp_path):
    store = PosixStore(tmp_path)
    append(store, ENTRIES)
    store.append(NAME, LINES[0][:-3])
    store.close()
    other = PosixStore(tmp_path)
    assert load(other) == ENTRIES
    assert other.read(NAME) == LOG
    append(other, [{"n": 1}])
    assert load(other) == [*ENTRIES, {"n": 1}]
    other.close()


@pytest.mark.parametrize(
    "line", [b"", b"\0" * 40, b"12345678", b"00000000 {}", b"zzzzzzzz {}", encode({})[:-2], b"not a log line at all"]
)
def test_what_encode_did_not_write_decodes_as_none(line):
    assert decode(line) is None


@pytest.mark.parametrize("value", [[1], "text", 3, None])
def test_a_sound_line_that_holds_no_object_decodes_as_none(value):
    assert decode(encode(value)[:-1]) is None


# -- torn ends --------------------------------------------------------------------------------------------


def test_a_log_cut_at_any_byte_gives_a_prefix_and_loses_its_torn_end(store):
    for size in range(len(LOG) + 1):
        whole = LOG[:size].count(b"\n")
        assert holds(store, LOG[:size]) == ENTRIES[:whole], f"cut at byte {size}"
        assert store.read(NAME) == b"".join(LINES[:whole]), f"cut at byte {size}"


def test_the_log_goes_on_behind_a_cut_at_any_byte(store):
    for size in range(len(LOG) + 1):
        held = holds(store, LOG[:size])
        append(store, [{"n": size}])
        assert load(store) == [*held, {"n": size}], f"cut at byte {size}"


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096, b"\n", b"garbage", b"garbage\n", b"\xff\n\xfe\n"])
def test_an_end_that_was_never_written_is_cut_off(store, tail):
    """A crash may leave a longer file whose last bytes are zeros or old data."""
    assert holds(store, LOG + tail) == ENTRIES
    assert store.read(NAME) == LOG


def test_without_repair_the_file_stays_as_it_is(store):
    torn = LOG[:-5]
    store.data = torn
    assert load(store, repair=False) == ENTRIES[:-1]
    assert store.read(NAME) == torn


# -- damage -----------------------------------------------------------------------------------------------


def damaged(position, bit):
    data = bytearray(LOG)
    data[position] ^= 1 << bit
    return bytes(data)


def middle():
    """Every byte with a whole good line behind the line that its damage makes."""
    last_two = len(LOG) - len(LINES[-1]) - 1  # the newline before the last line: without it, both are the last one
    return range(last_two)


def test_a_flipped_bit_in_the_middle_is_refused_with_its_place(store):
    for position in middle():
        for bit in (0, 4, 5, 7):  # 5 makes capitals of letters
            data = damaged(position, bit)
            store.data = data
            with pytest.raises(ResumeError) as refused:
                load(store)
            start = sum(map(len, LINES[: line_of(position)]))
            assert refused.value.found == f"a damaged line at byte {start}, with good lines behind it"
            assert store.read(NAME) == data, "a refused log is not touched"
    assert refused.value.asked == f"reading {store.path(NAME)}"
    assert refused.value.allowed == "a log that only Fanfold has written"
    assert refused.value.do == "restore the file from a backup, or start anew with --overwrite"


def test_a_checksum_is_read_only_as_it_was_written():
    """int() also takes capitals, signs, blanks and underscores."""
    entry = next(entry for entry in ({"n": n} for n in range(10_000)) if encode(entry)[:1] == b"0")
    line = encode(entry)[:-1]
    assert decode(line) == entry
    for written in (b" " + line[1:], b"+" + line[1:], line[:8].upper() + line[8:]):
        if written != line:
            assert decode(written) is None, written


def test_a_damaged_last_line_is_dropped(store):
    start = len(LOG) - len(LINES[-1])
    for position in range(start, len(LOG)):
        assert holds(store, damaged(position, 0)) == ENTRIES[:-1], f"byte {position}"
        assert store.read(NAME) == b"".join(LINES[:-1])


def test_a_lost_newline_before_the_last_line_never_makes_an_entry_up(store):
    assert holds(store, damaged(len(LOG) - len(LINES[-1]) - 1, 0)) == ENTRIES[:-2]


def test_a_line_taken_out_or_doubled_is_not_the_journals_to_find(store):
    """Each line is checked alone: what the lines say together is checked by who reads them."""
    assert holds(store, b"".join(LINES[:1] + LINES[2:])) == ENTRIES[:1] + ENTRIES[2:]


def test_one_good_line_behind_many_damaged_ones_is_enough_to_refuse(store):
    with pytest.raises(ResumeError, match="with good lines behind it"):
        holds(store, LINES[0] + b"xx\n" * 50 + LINES[1])


def test_a_log_line_has_the_documented_form():
    checksum, body = LINES[1].split(b" ", 1)
    assert len(checksum) == 8
    assert json.loads(body) == ENTRIES[1]
