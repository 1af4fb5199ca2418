"""Where records begin and end in JSONL, CSV and plain text: found in blocks, never line by line.

A cutter is fed a file's bytes block by block and says where records lie. It holds no bytes itself, so its
memory does not grow with the length of a line. IntArray: int64[number of records], byte offsets or lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fanfold.data.failures import inert
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Rules = Literal["jsonl", "csv", "text"]
IntArray: TypeAlias = npt.NDArray[np.int64]
ByteArray: TypeAlias = npt.NDArray[np.uint8]

BLOCK_BYTES = 1 << 22
MAX_RECORD_BYTES = 256 << 20  # a longer record is a failed row
BOM = b"\xef\xbb\xbf"
_NEWLINE, _RETURN, _QUOTE, _COMMA = 10, 13, 34, 44
_IS_SPACE = np.zeros(256, dtype=np.bool_)
_IS_SPACE[list(b" \t\n\r\x0b\x0c")] = True
_FEW = 64  # up to so many lines that may be blank are looked at one by one


class Cut(NamedTuple):
    """Records found: bytes [starts, ends) including the line end, and the 1-based line each begins on."""

    starts: IntArray
    ends: IntArray
    lines: IntArray

    def behind(self, num_records: int) -> Cut:
        """All but the first records."""
        return Cut(self.starts[num_records:], self.ends[num_records:], self.lines[num_records:])

    @property
    def num_records(self) -> int:
        return int(self.ends.shape[0])


_NONE = np.zeros(0, dtype=np.int64)
NO_RECORDS = Cut(_NONE, _NONE, _NONE)


class Cutter:
    """Finds the records of one file from `offset` on, which must be a record's start on line `line`.

    With `at_file_start` a UTF-8 BOM and, in CSV with `passes_header`, the header record are passed over.
    A record may be complete only blocks later; `record_start` is where the one under way begins.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        offset: int = 0,
        line: int = 1,
        at_file_start: bool = False,
        passes_header: bool = True,
    ) -> None:
        self.rules = rules
        self.record_start = offset
        self.body_start: int | None = None if at_file_start else offset  # None: header not passed yet
        self._offset = offset
        self._line = line  # of the next byte
        self._record_line = line
        self._at_file_start = at_file_start
        self._passes_header = passes_header and rules == "csv"
        self._blank = True  # the record under way is blank so far
        self._quoted = False  # CSV: inside a quoted field
        self._opens = True  # CSV: a quote here opens a quoted field, or goes on with one (doubled)

    def feed(self, block: bytes) -> Cut:
        """The records that end in this block, which follows the block fed before."""
        if self._at_file_start and block:
            self._at_file_start = False
            if block.startswith(BOM):
                block = block[len(BOM) :]
                self._offset += len(BOM)
                self.record_start = self._offset
            if not self._passes_header:
                self.body_start = self._offset
        if not block:
            return NO_RECORDS
        data: ByteArray = np.frombuffer(block, dtype=np.uint8)
        newlines: IntArray = np.flatnonzero(data == _NEWLINE)
        which: IntArray = np.arange(newlines.shape[0])
        if self.rules == "csv":
            which = self._outside_quotes(block, data, newlines)
        cut = self._cut(block, data, newlines, which)
        self._offset += len(block)
        self._line += newlines.shape[0]
        return self._without_header(cut)

    def finish(self) -> Cut:
        """The last record, where no line end closes it; call once, at the end of the file."""
        cut = NO_RECORDS
        if self.record_start < self._offset and (self.rules == "text" or not self._blank):
            cut = Cut(*(np.array([n]) for n in (self.record_start, self._offset, self._record_line)))
        self.record_start = self._offset
        return self._without_header(cut)

    def _cut(self, block: bytes, data: ByteArray, newlines: IntArray, which: IntArray) -> Cut:
        """Records ended by the newlines `which` (indices into `newlines`), blank ones left out."""
        if not which.shape[0]:
            self._note_tail(block, from_record_start=False)
            return NO_RECORDS
        ends = newlines[which] + (1 + self._offset)
        starts, lines = np.empty_like(ends), np.empty_like(ends)
        starts[0], lines[0] = self.record_start, self._record_line
        starts[1:] = ends[:-1]
        lines[1:] = which[:-1] + (self._line + 1)
        cut = Cut(starts, ends, lines)
        if self.rules != "text":
            blank = (self._blank_csv if self.rules == "csv" else self._blank_jsonl)(block, data, cut)
            if blank is not None and blank.any():
                keep = ~blank
                cut = Cut(starts[keep], ends[keep], lines[keep])
        self.record_start = int(ends[-1])
        self._record_line = self._line + int(which[-1]) + 1
        self._note_tail(block[self.record_start - self._offset :], from_record_start=True)
        return cut

    def _note_tail(self, tail: bytes, *, from_record_start: bool) -> None:
        """Remembers whether the record under way, which `tail` begins or goes on with, is blank so far."""
        if self.rules == "jsonl":
            self._blank = (from_record_start or self._blank) and (not tail or tail.isspace())
        elif self.rules == "csv":
            before = 0 if from_record_start else self._offset - self.record_start
            self._blank = not tail or (tail == b"\r" and before == 0)

    def _blank_jsonl(self, block: bytes, data: ByteArray, cut: Cut) -> npt.NDArray[np.bool_] | None:
        begins = np.maximum(cut.starts - self._offset, 0)
        maybe = np.flatnonzero(_IS_SPACE[data[begins]])
        if not maybe.shape[0]:
            return None
        blank = np.zeros(begins.shape[0], dtype=np.bool_)
        stops = cut.ends - self._offset
        if maybe.shape[0] <= _FEW:
            for i in maybe.tolist():
                blank[i] = block[begins[i] : stops[i]].isspace()
        else:
            blank[:] = np.logical_and.reduceat(_IS_SPACE[data[: stops[-1]]], begins)
        blank[0] &= self._blank
        return blank

    def _blank_csv(self, block: bytes, data: ByteArray, cut: Cut) -> npt.NDArray[np.bool_]:
        num_bytes = cut.ends - cut.starts
        stops = cut.ends - self._offset
        blank: npt.NDArray[np.bool_] = (num_bytes == 1) | ((num_bytes == 2) & (data[stops - 2] == _RETURN))
        if num_bytes[0] == 2 and stops[0] == 1:  # its first byte was in the block before
            blank[0] = self._blank
        return blank

    def _outside_quotes(self, block: bytes, data: ByteArray, newlines: IntArray) -> IntArray:
        """Indices of the newlines that end a CSV record."""
        last = data[-1]
        if b'"' not in block:
            self._opens = not self._quoted and bool(last in (_COMMA, _NEWLINE))
            return _NONE if self._quoted else np.arange(newlines.shape[0])
        toggles = self._toggles(data)
        inside = (np.searchsorted(toggles, newlines) + self._quoted) & 1
        self._quoted = bool((toggles.shape[0] + self._quoted) & 1)
        just_closed = toggles.shape[0] > 0 and toggles[-1] == len(block) - 1
        self._opens = not self._quoted and bool(last in (_COMMA, _NEWLINE) or just_closed)
        return np.flatnonzero(inside == 0)

    def _toggles(self, data: ByteArray) -> IntArray:
        """Positions of the quotes that open or close a quoted field (a doubled quote does both).

        A quote opens only at the start of a field or right behind one that closed; elsewhere in an unquoted
        field it is a letter. If every second quote may open, the quotes simply alternate.
        """
        quotes: IntArray = np.flatnonzero(data == _QUOTE)
        before = data[quotes - 1]
        at_field_start = (before == _COMMA) | (before == _NEWLINE)
        behind_quote = before == _QUOTE
        if quotes[0] == 0:
            at_field_start[0], behind_quote[0] = self._opens, False
        opening = slice(1 if self._quoted else 0, None, 2)
        if (at_field_start[opening] | behind_quote[opening]).all():
            return quotes
        toggles: list[int] = []
        quoted, closed_at = self._quoted, -2
        for at, may_open in zip(quotes.tolist(), at_field_start.tolist(), strict=True):
            if quoted:
                quoted, closed_at = False, at
            elif may_open or closed_at == at - 1:
                quoted = True
            else:
                continue
            toggles.append(at)
        return np.array(toggles, dtype=np.int64)

    def _without_header(self, cut: Cut) -> Cut:
        if not self._passes_header or self.body_start is not None or not cut.num_records:
            return cut
        self.body_start = int(cut.ends[0])
        return cut.behind(1)


class Share(NamedTuple):
    """Consecutive records that go to one window; `last`: they fill it."""

    start: int
    stop: int
    rows: int
    line: int
    last: bool


class Dealer:
    """Deals records out to windows of `window_rows` rows, passing over `skip` rows and stopping at `left`."""

    def __init__(self, window_rows: int, *, skip: int = 0, left: int | None = None) -> None:
        self.window_rows = window_rows
        self.skip = skip
        self.left = left
        self._room = window_rows

    @property
    def done(self) -> bool:
        """Whether the limit is reached."""
        return self.left is not None and self.left <= 0

    def shares(self, cut: Cut) -> Iterator[Share]:
        """The parts of `cut` that go to the window under way and to those behind it."""
        at, stop = min(self.skip, cut.num_records), cut.num_records
        self.skip -= at
        while at < stop and not self.done:
            rows = min(self._room, stop - at)
            if self.left is not None:
                rows = min(rows, self.left)
                self.left -= rows
            self._room -= rows
            last = self._room == 0 or self.done
            yield Share(int(cut.starts[at]), int(cut.ends[at + rows - 1]), rows, int(cut.lines[at]), last)
            self._room = self._room or self.window_rows
            at += rows


def blocks(
    handle: BinaryIO, *, path: str, start: int = 0, stop: int | None = None, block_bytes: int = BLOCK_BYTES
) -> Iterator[bytes]:
    """Bytes [start, stop) in blocks of at least len(BOM) bytes; to the end where `stop` is None.

    Raises: InputError if the file ends before `stop`.
    """
    if start:
        handle.seek(start)
    at, block_bytes = start, max(block_bytes, len(BOM))
    while stop is None or at < stop:
        want = block_bytes if stop is None else min(block_bytes, stop - at)
        block = handle.read(want)
        if 0 < len(block) < want:  # a pipe or a decompressor gives what it has
            parts, missing = [block], want - len(block)
            while missing and (more := handle.read(missing)):
                parts.append(more)
                missing -= len(more)
            block = b"".join(parts)
        if not block:
            break
        at += len(block)
        yield block
    if stop is not None and at < stop:
        raise changed(path, f"it ends at byte {at}, {stop} were there when it was listed")


def changed(path: str, found: str) -> InputError:
    """The error for a file that is not what it was when its records were counted."""
    return InputError(
        f"the input {inert(path)} must not change while it is read",
        found=found,
        allowed="files that stay as they are until the job is done",
        do="let the file come to rest, then start the job again with --overwrite",
    )
