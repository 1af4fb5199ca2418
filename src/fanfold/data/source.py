"""What a source is: rows in a fixed order, cut into windows by the parent, read window by window in workers.

The parent calls `windows` (it only looks for record boundaries); a worker calls `chunks` with one of those
windows and gets its rows back, in order. A source is picklable; open handles are not part of its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

# How the kept columns of a record travel: `typed` as Arrow columns of a schema fixed before work starts (for
# Parquet and CSV output), `json` as one column of JSON objects as strings (for JSONL output).
Form = Literal["typed", "json"]
RECORD_COLUMN = "{record}"  # no column of an input or a result is called so


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One input as listed before work: path or URL, size and time of last change."""

    path: str
    size_bytes: int | None  # None: a stream (stdin)
    mtime_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive records of one file: [start, stop) are bytes of a line format, rows of Parquet."""

    file: int  # index into Source.files
    start: int
    stop: int
    rows: int
    first_line: int  # 1-based line of the first record in a line format; 0-based row of the file in Parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A contiguous run of rows, the scope in which rows are sorted by length.

    `sha256` is set for spooled inputs only (stdin, .gz, .zst): the hash of the window's decompressed bytes.
    """

    index: int
    first_row: int
    num_rows: int
    spans: tuple[Span, ...]
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFailure:
    """A row that cannot be computed, and why; `offset` counts from the window's first row."""

    offset: int
    error: str  # BadRecord, BadUtf8, NullText, NotText, MissingColumn, SchemaMismatch, RecordTooLong, ...
    message: str  # names the file, the line and the first 80 characters of the record
    id: str | int | float | None = None  # value of the id column where it could be read
    piece: int | None = None  # the piece that it was computed in; None: it never got that far
    attempts: int = 1
    part: int | None = None  # the part of the record's text, where texts are cut into parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive rows of a window: the texts, the kept columns, and the rows that failed.

    `texts[i]` is None exactly where row i stands in `failures`; `kept` then holds nulls for that row.
    """

    offset: int
    texts: list[str | None]
    kept: pa.RecordBatch
    failures: tuple[RowFailure, ...]
    ids: list[str | int | float | None] | None = None  # the id column's values, where one was named


class Source(Protocol):
    """Rows of one or many files of one format, in a fixed order."""

    @property
    def files(self) -> tuple[InputFile, ...]:
        """The inputs in the order in which their rows count."""

    @property
    def kept_schema(self) -> pa.Schema:
        """Schema of every chunk's `kept`: the kept columns (form `typed`) or `record: string` (`json`)."""

    @property
    def total_bytes(self) -> int | None:
        """Sum of the files' sizes as they lie on disk; None where one of them is a stream."""

    def windows(self, window_rows: int, after: Window | None = None) -> Iterator[Window]:
        """Windows of `window_rows` rows (the last may be shorter), continuing behind `after`.

        A function of the records alone: the same rows give the same cuts in every format.
        """

    def chunks(self, window: Window) -> Iterator[Chunk]:
        """The window's rows in order, in chunks bounded in rows and bytes."""

    def digest(self, window: Window) -> str:
        """sha256 that changes whenever the window's records do: of its bytes, or of a Parquet file's footer."""

    def release(self, window_index: int) -> None:
        """Removes what `windows` kept on disk for this window; nothing to do where it kept nothing."""
