"""The line formats as a source: windows from the cutter, rows from a decoder, bounded memory in both."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from fanfold.data.failures import HEAD_BYTES, Problem, message, place
from fanfold.data.lines import (
    BLOCK_BYTES,
    MAX_RECORD_BYTES,
    NO_RECORDS,
    Cut,
    Cutter,
    Dealer,
    Rules,
    blocks,
    changed,
)
from fanfold.data.listing import open_binary
from fanfold.data.source import Chunk, InputFile, RowFailure, Span, Window
from fanfold.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pyarrow as pa

CHUNK_ROWS = 1024
CHUNK_BYTES = 32 << 20


class Record(NamedTuple):
    """One record's bytes with its line end; `data` None: longer than MAX_RECORD_BYTES, `head` is left."""

    file: int
    line: int
    data: bytes | None
    head: bytes


class Decoded(NamedTuple):
    """Rows of some records; `texts[i]` is None and `kept` holds nulls exactly where i is in `problems`."""

    texts: list[str | None]
    kept: pa.RecordBatch
    problems: dict[int, Problem]
    ids: list[str | int | float | None] | None = None


class Decoder(Protocol):
    """Turns the bytes of records into texts and kept columns."""

    @property
    def rules(self) -> Rules: ...

    @property
    def schema(self) -> pa.Schema: ...

    def decode(self, records: Sequence[bytes | None]) -> Decoded:
        """One row for each record; None stands for one that is too long, which is a problem of its own."""


def read_records(handed: Iterable[bytes], cutter: Cutter, *, file: int, offset: int) -> Iterator[Record]:
    """The records in these blocks, whose first byte is at `offset`; a too long one is never held whole."""
    carry: list[bytes] = []  # the record under way, from the blocks before
    carried = 0
    base = offset
    for block in handed:
        before = cutter.record_start
        cut = cutter.feed(block)
        for start, end, line in zip(*(column.tolist() for column in cut), strict=True):
            if start >= base:
                data: bytes | None = block[start - base : end - base]
            else:
                data = b"".join((*carry, block[: end - base])) if end - start <= MAX_RECORD_BYTES else None
            yield _record(file, line, data, carry)
        if cutter.record_start != before:
            carry, carried = [], 0
        tail_at = max(cutter.record_start - base, 0)
        base += len(block)
        if carried <= MAX_RECORD_BYTES:
            carry.append(block[tail_at:])
            carried += len(block) - tail_at
        else:
            del carry[1:]
    for start, end, line in zip(*(column.tolist() for column in cutter.finish()), strict=True):
        yield _record(file, line, b"".join(carry) if end - start <= MAX_RECORD_BYTES else None, carry)


def _record(file: int, line: int, data: bytes | None, carry: list[bytes]) -> Record:
    if data is not None and len(data) <= MAX_RECORD_BYTES:
        return Record(file, line, data, b"")
    return Record(file, line, None, (b"".join(carry[:1]) if data is None else data)[: HEAD_BYTES + 4])


def chunks_of(
    records: Iterable[Record], decoder: Decoder, files: Sequence[InputFile], window: Window
) -> Iterator[Chunk]:
    """The window's rows in chunks bounded in rows and bytes. Raises InputError if rows are missing."""
    offset = num_bytes = 0
    held: list[Record] = []
    for record in records:
        record_bytes = len(record.data or b"")
        if held and (len(held) == CHUNK_ROWS or num_bytes + record_bytes > CHUNK_BYTES):
            yield _chunk(held, decoder, files, offset)
            offset, num_bytes = offset + len(held), 0
            held = []
        held.append(record)
        num_bytes += record_bytes
    if held:
        yield _chunk(held, decoder, files, offset)
    if offset + len(held) != window.num_rows:
        raise changed(
            files[window.spans[0].file].path,
            f"{offset + len(held)} records in window {window.index}, {window.num_rows} when it was cut",
        )


def _chunk(held: list[Record], decoder: Decoder, files: Sequence[InputFile], offset: int) -> Chunk:
    decoded = decoder.decode([record.data for record in held])
    failures = []
    for i, problem in sorted(decoded.problems.items()):
        record = held[i]
        where = place(files[record.file].path, record.line)
        told = message(where, problem.reason, record.head or record.data or b"")
        failures.append(RowFailure(offset=offset + i, error=problem.error, message=told, id=problem.id))
    return Chunk(offset=offset, texts=decoded.texts, kept=decoded.kept, failures=tuple(failures), ids=decoded.ids)


def too_long(rules: Rules) -> Problem:
    """The failure of a record that is not read at all."""
    hint = "; is a quote never closed?" if rules == "csv" else ""
    return Problem("RecordTooLong", f"the record is longer than {MAX_RECORD_BYTES >> 20} MB{hint}")


def total_bytes(files: Sequence[InputFile]) -> int | None:
    """Sum of the sizes, None where one is unknown."""
    sizes = [file.size_bytes for file in files]
    return None if None in sizes else sum(size for size in sizes if size is not None)


class SpanJoiner:
    """Collects the shares of a window; shares of one file become one span."""

    def __init__(self, after: Window | None) -> None:
        self.index = after.index + 1 if after else 0
        self.first_row = after.first_row + after.num_rows if after else 0
        self.spans: list[Span] = []

    def add(self, *, file: int, start: int, stop: int, rows: int, line: int) -> None:
        if self.spans and self.spans[-1].file == file:
            last = self.spans.pop()
            start, rows, line = last.start, last.rows + rows, last.first_line
        self.spans.append(Span(file=file, start=start, stop=stop, rows=rows, first_line=line))

    def close(self, sha256: str | None = None) -> Window:
        rows = sum(span.rows for span in self.spans)
        window = Window(
            index=self.index, first_row=self.first_row, num_rows=rows, spans=tuple(self.spans), sha256=sha256
        )
        self.index, self.first_row, self.spans = self.index + 1, self.first_row + rows, []
        return window


def rows_left(limit: int | None, after: Window | None) -> int | None:
    """Rows behind `after` up to the limit."""
    return None if limit is None else limit - (after.first_row + after.num_rows if after else 0)


def check_window_rows(window_rows: int) -> None:
    """Raises InternalError for a window that cannot hold a row."""
    if window_rows < 1:
        raise InternalError(
            "windows of rows", found=f"window_rows={window_rows}", allowed="1 or more", do="report this"
        )


@dataclass(frozen=True, kw_only=True)
class LineSource:
    """Uncompressed files of a line format, read in place."""

    files: tuple[InputFile, ...]
    decoder: Decoder
    limit: int | None = None
    block_bytes: int = BLOCK_BYTES

    @property
    def kept_schema(self) -> pa.Schema:
        return self.decoder.schema

    @property
    def total_bytes(self) -> int | None:
        return total_bytes(self.files)

    def windows(self, window_rows: int, after: Window | None = None) -> Iterator[Window]:
        check_window_rows(window_rows)
        dealer = Dealer(window_rows, left=rows_left(self.limit, after))
        joiner = SpanJoiner(after)
        for file, cut in self._cuts(after):
            for share in dealer.shares(cut):
                joiner.add(file=file, start=share.start, stop=share.stop, rows=share.rows, line=share.line)
                if share.last:
                    yield joiner.close()
            if dealer.done:
                return
        if joiner.spans:
            yield joiner.close()

    def chunks(self, window: Window) -> Iterator[Chunk]:
        return chunks_of(self._records(window), self.decoder, self.files, window)

    def digest(self, window: Window) -> str:
        digest = hashlib.sha256()
        for span in window.spans:
            with open_binary(self.files[span.file].path) as handle:
                for block in self._blocks(handle, span.file, span.start, span.stop):
                    digest.update(block)
        return digest.hexdigest()

    def release(self, window_index: int) -> None:
        pass

    def _blocks(self, handle: BinaryIO, file: int, start: int, stop: int | None) -> Iterator[bytes]:
        path = self.files[file].path
        return blocks(handle, path=path, start=start, stop=stop, block_bytes=self.block_bytes)

    def _cuts(self, after: Window | None) -> Iterator[tuple[int, Cut]]:
        """The records behind `after`, file by file, block by block."""
        rules = self.decoder.rules
        yield 0, NO_RECORDS  # so that a limit of 0 is seen before a file is read
        for file in range(after.spans[-1].file if after else 0, len(self.files)):
            with open_binary(self.files[file].path) as handle:
                start = 0
                cutter = Cutter(rules, at_file_start=True)
                if after and file == after.spans[-1].file:
                    start = after.spans[-1].stop
                    cutter = Cutter(rules, offset=start, line=self._line_behind(handle, after.spans[-1]))
                for block in self._blocks(handle, file, start, self.files[file].size_bytes):
                    yield file, cutter.feed(block)
                yield file, cutter.finish()

    def _line_behind(self, handle: BinaryIO, span: Span) -> int:
        """The line on which the bytes behind a span begin: only the span's own line ends are counted."""
        counted = sum(b.count(b"\n") for b in self._blocks(handle, span.file, span.start, span.stop))
        return span.first_line + counted

    def _records(self, window: Window) -> Iterator[Record]:
        for span in window.spans:
            with open_binary(self.files[span.file].path) as handle:
                cutter = Cutter(self.decoder.rules, offset=span.start, line=span.first_line)
                handed = self._blocks(handle, span.file, span.start, span.stop)
                yield from read_records(handed, cutter, file=span.file, offset=span.start)
