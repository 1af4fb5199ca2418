"""Rows of files as Python sees them: dicts of JSONL and CSV, strings of plain text, Arrow tables of Parquet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fanfold.data.csv import fields, long_fields
from fanfold.data.failures import Problem, RowProblem
from fanfold.data.jsonl import parse
from fanfold.data.parquet import ParquetSource
from fanfold.data.parquet_reader import batches
from fanfold.data.records import Decoded, too_long
from fanfold.data.spool import SpoolSource
from fanfold.data.text import plain_text
from fanfold.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fanfold.data.lines import Rules
    from fanfold.data.records import LineSource
    from fanfold.data.source import Window

STEP_ROWS = 64  # record boundaries are kept every so many rows; a piece is a number of these


@dataclass(frozen=True, kw_only=True)
class RowDecoder:
    """The rows themselves stand where a job's decoders give texts. `names`: the header of CSV."""

    rules: Rules
    names: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([])

    def decode(self, records: Sequence[bytes | None]) -> Decoded:
        rows: list[Any] = []
        problems: dict[int, Problem] = {}
        with long_fields():
            for i, data in enumerate(records):
                row = None
                try:
                    if data is None:
                        raise RowProblem(*too_long(self.rules)[:2])
                    row = self._row(data)
                except RowProblem as error:
                    problems[i] = error.problem
                rows.append(row)
        return Decoded(rows, pa.RecordBatch.from_pylist([{}] * len(rows), self.schema), problems)

    def _row(self, data: bytes) -> Any:
        if self.rules == "jsonl":
            return parse(data)[1]
        if self.rules == "text":
            return plain_text(data)
        cells = fields(data)
        if len(cells) != len(self.names):
            raise RowProblem("BadRecord", f"{len(cells)} fields, the header has {len(self.names)}")
        return dict(zip(self.names, cells, strict=True))


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """Files of one format. What the parent has found of them, any process can read."""

    source: LineSource | SpoolSource | ParquetSource

    def windows(self) -> Iterator[Window]:
        """Runs of STEP_ROWS rows, the last may be shorter."""
        return self.source.windows(STEP_ROWS)

    @property
    def is_spooled(self) -> bool:
        """Whether windows are read from files of this machine."""
        return isinstance(self.source, SpoolSource)

    def opened(self) -> FileRows:
        """In another process: it opens files as it reads."""
        return self

    def read(self, piece: int, lent: tuple[Window, ...] | list[Any]) -> Any:
        """The rows of these consecutive windows: a list, or a table. Raises DataError where a record is none."""
        if isinstance(lent, list):
            return lent  # the rows themselves
        if isinstance(self.source, ParquetSource):
            return self._table(self.source, lent)
        rows: list[Any] = []
        for window in lent:
            for chunk in self.source.chunks(window):
                if chunk.failures:
                    first = chunk.failures[0]
                    raise DataError(
                        f"read row {window.first_row + first.offset} of the input",
                        found=f"{first.error}: {first.message}",
                        allowed="records of the file's format",
                        do="repair or remove the record",
                    )
                rows += chunk.texts
        return rows

    def _table(self, source: ParquetSource, windows: Sequence[Window]) -> pa.Table:
        names = tuple(source.kept.names)
        read: list[pa.RecordBatch] = []
        for span in (span for window in windows for span in window.spans):
            read += batches(source.files[span.file], names, span.start, span.stop)
        return pa.Table.from_batches(read)

    def release(self, window: Window) -> None:
        """The window will not be read again."""
        self.source.release(window.index)

    def share_before(self, window: Window) -> float:
        """How much of the input lies before the window's end, from 0 to 1; a guess where files are compressed."""
        last, files = window.spans[-1], self.source.files
        if isinstance(self.source, SpoolSource):
            return (last.file + 0.1) / len(files)
        parts = self.source.rows if isinstance(self.source, ParquetSource) else [file.size_bytes or 0 for file in files]
        return (last.stop + sum(parts[: last.file])) / max(1, sum(parts))
