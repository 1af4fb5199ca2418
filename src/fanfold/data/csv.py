"""CSV: one record by Python's csv module, every kept cell a string just as it stands."""

from __future__ import annotations

import contextlib
import csv
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from fanfold.data.failures import Problem, RowProblem, column_list, inert, usable_id
from fanfold.data.kept import batch_of, compact
from fanfold.data.reading import columns_of
from fanfold.data.records import Decoded, too_long
from fanfold.data.source import RECORD_COLUMN, Form
from fanfold.data.text import bad_utf8
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fanfold.data.lines import Rules
    from fanfold.data.reading import Reading

_FIELD_LIMIT = threading.Lock()


@contextlib.contextmanager
def long_fields() -> Iterator[None]:
    """The csv module's limit on the length of a field, one for the process, is lifted inside."""
    with _FIELD_LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def fields(data: bytes) -> list[str]:
    """The cells of one record. Raises RowProblem."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RowProblem("BadUtf8", bad_utf8(error)) from None
    lines = iter((text, ""))
    try:
        fields = next(csv.reader(lines))
    except csv.Error as error:
        raise RowProblem("BadRecord", f"not CSV: {error}") from None
    if next(lines, None) is None:  # the reader asked for more than the record
        raise RowProblem("BadRecord", "not CSV: a quoted field is never closed")
    return fields


@dataclass(frozen=True, kw_only=True)
class CsvDecoder:
    """Cells of the header's columns; an empty cell is the empty text. No header: no rows either."""

    header: tuple[str, ...]
    reads: tuple[str, ...]
    composes: bool  # a text is the JSON object of what `reads` names; else it is the one column's cell
    id_at: int | None
    kept: tuple[str, ...]
    form: Form

    @property
    def rules(self) -> Rules:
        return "csv"

    @property
    def schema(self) -> pa.Schema:
        names = (RECORD_COLUMN,) if self.form == "json" else self.kept
        return pa.schema([pa.field(name, pa.string()) for name in names])

    def decode(self, records: Sequence[bytes | None]) -> Decoded:
        rows: list[list[str] | None] = []
        problems: dict[int, Problem] = {}
        with long_fields():
            for i, data in enumerate(records):
                row = None
                if data is None:
                    problems[i] = too_long("csv")
                else:
                    try:
                        row = self._row(data)
                    except RowProblem as error:
                        problems[i] = error.problem
                rows.append(row)
        texts = self._texts(rows)
        at = self.id_at
        ids = None if at is None else [None if row is None else usable_id(row[at]) for row in rows]
        return Decoded(texts, self._kept(rows), problems, ids)

    def _texts(self, rows: list[list[str] | None]) -> list[str | None]:
        at = {name: self.header.index(name) for name in self.reads} if self.header else {}
        if self.composes:
            return [None if row is None else compact({name: row[i] for name, i in at.items()}) for row in rows]
        return [None if row is None else row[at[self.reads[0]]] for row in rows]

    def _row(self, data: bytes) -> list[str]:
        row = fields(data)
        if len(row) != len(self.header):
            row_id = row[self.id_at] if self.id_at is not None and self.id_at < len(row) else None
            reason = f"{len(row)} fields, the header has {len(self.header)}"
            raise RowProblem("BadRecord", reason, row_id)
        return row

    def _kept(self, rows: list[list[str] | None]) -> pa.RecordBatch:
        at = [self.header.index(name) for name in self.kept]
        if self.form == "json":
            pairs = list(zip(self.kept, at, strict=True))
            cells = [None if row is None else compact({name: row[i] for name, i in pairs}) for row in rows]
            return batch_of([pa.array(cells, pa.string())], self.schema, len(rows))
        arrays = [pa.array([None if row is None else row[i] for row in rows], pa.string()) for i in at]
        return batch_of(arrays, self.schema, len(rows))


def read_header(data: bytes, path: str) -> tuple[str, ...]:
    """The names in a header record. Raises InputError where it cannot be one."""
    asked = f"the header of {inert(path)}"
    try:
        with long_fields():
            header = tuple(fields(data))
    except RowProblem as error:
        raise InputError(
            asked,
            found=error.problem.reason,
            allowed="a first record in UTF-8 that names the columns, separated by commas",
            do="repair the first record of the file",
        ) from None
    names = ", ".join(inert(name) for name in dict.fromkeys(header) if header.count(name) > 1)
    if names:
        raise InputError(
            asked,
            found=f"the column name stands twice: {names}",
            allowed="a different name for each column",
            do="rename the columns in the file",
        )
    return header


def csv_decoder(
    headers: Sequence[tuple[str, tuple[str, ...]]],
    *,
    column: Reading,
    id_column: str | None,
    keep: str | tuple[str, ...],
    form: Form,
) -> CsvDecoder:
    """The decoder for files with these headers, given as (path, names); files without a byte have none.

    Raises: InputError where headers differ or lack a column.
    """
    composes = not isinstance(column, str)
    if not headers:
        return CsvDecoder(header=(), reads=(), composes=composes, id_at=None, kept=(), form=form)
    first_path, header = headers[0]
    for path, other in headers[1:]:
        if other != header:
            raise InputError(
                "CSV files are read as one sequence of rows, so they need the same header",
                found=f"{inert(first_path)}: {column_list(header)}; {inert(path)}: {column_list(other)}",
                allowed="the same names in the same order in every file",
                do="run one job for each header, or make the headers the same",
            )
    reads = columns_of(column, header)
    for name in (*reads, *([id_column] if id_column else []), *(keep if isinstance(keep, tuple) else ())):
        if name not in header:
            raise InputError(
                f"column '{inert(name)}' of {inert(first_path)}",
                found="the header has no such column",
                allowed=column_list(header),
                do="name one of these columns (--column for the text, --id, --keep)",
            )
    kept = header if keep == "all" else keep if isinstance(keep, tuple) else ()
    id_at = header.index(id_column) if id_column else None
    return CsvDecoder(header=header, reads=reads, composes=composes, id_at=id_at, kept=kept, form=form)
