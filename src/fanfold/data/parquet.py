"""Parquet: windows from the row counts in the metadata, rows from batches of the needed columns only.

In form `json` a row is the JSON object of its kept columns: numbers, strings, booleans, lists and structs as
they are, maps as lists of pairs, NaN as NaN, bytes as base64, dates and times as ISO text (an instant with a
zone in UTC), durations as a number of their unit, decimals as text.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fanfold.data.failures import Problem, column_list, inert, message, place, usable_id
from fanfold.data.kept import batch_of
from fanfold.data.parquet_reader import batches, footer, open_parquet
from fanfold.data.reading import columns_of
from fanfold.data.records import SpanJoiner, check_window_rows, rows_left, total_bytes
from fanfold.data.source import RECORD_COLUMN, Chunk, Form, InputFile, RowFailure, Span, Window
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from fanfold.data.reading import Reading


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Parquet files with the same columns; `rows[i]` rows in `files[i]`."""

    files: tuple[InputFile, ...]
    rows: tuple[int, ...]
    reads: tuple[str, ...]
    composes: bool  # a text is the JSON object of what `reads` names; else it is the one column's value
    id_column: str | None
    kept: pa.Schema  # the kept columns with their own types
    form: Form
    limit: int | None = None

    @property
    def kept_schema(self) -> pa.Schema:
        return pa.schema([pa.field(RECORD_COLUMN, pa.string())]) if self.form == "json" else self.kept

    @property
    def total_bytes(self) -> int | None:
        return total_bytes(self.files)

    def windows(self, window_rows: int, after: Window | None = None) -> Iterator[Window]:
        check_window_rows(window_rows)
        left = rows_left(self.limit, after)
        joiner, room = SpanJoiner(after), window_rows
        file, at = (after.spans[-1].file, after.spans[-1].stop) if after else (0, 0)
        while file < len(self.files) and (left is None or left > 0):
            take = min(room, self.rows[file] - at, room if left is None else left)
            if take:
                joiner.add(file=file, start=at, stop=at + take, rows=take, line=at)
                at, room = at + take, room - take
                left = None if left is None else left - take
            if room == 0:
                yield joiner.close()
                room = window_rows
            if at == self.rows[file]:
                file, at = file + 1, 0
        if joiner.spans:
            yield joiner.close()

    def chunks(self, window: Window) -> Iterator[Chunk]:
        offset = 0
        for span in window.spans:
            at = span.start
            for batch in self._batches(span):
                yield self._chunk(batch, offset, span.file, at)
                offset, at = offset + batch.num_rows, at + batch.num_rows

    def digest(self, window: Window) -> str:
        digest = hashlib.sha256()
        for span in window.spans:
            digest.update(footer(self.files[span.file].path))
            digest.update(f"{span.start}-{span.stop}".encode())
        return digest.hexdigest()

    def release(self, window_index: int) -> None:
        pass

    def _batches(self, span: Span) -> Iterator[pa.RecordBatch]:
        names = dict.fromkeys([*self.reads, *self.kept.names, *([self.id_column] if self.id_column else [])])
        return batches(self.files[span.file], tuple(names), span.start, span.stop)

    def _chunk(self, batch: pa.RecordBatch, offset: int, file: int, at: int) -> Chunk:
        problems: dict[int, Problem] = {}
        for name in self.kept.names:
            for i in _bad_utf8(batch.column(name)):
                problems[i] = Problem("BadUtf8", f"column '{inert(name)}' is not UTF-8")
        texts = self._composed(batch, problems) if self.composes else self._texts(batch, problems)
        if self.form == "json":
            records = self._json(batch, tuple(self.kept.names), problems)
            texts = [None if i in problems else text for i, text in enumerate(texts)]
            kept = batch_of([pa.array(records, pa.string())], self.kept_schema, len(texts))
        else:
            columns = [batch.column(name) for name in self.kept.names]
            kept = batch_of([_without(c, problems) for c in columns], self.kept, len(texts))
        failures = tuple(self._failure(batch, i, offset, file, at, problems[i]) for i in sorted(problems))
        ids = [self._id(batch, i) for i in range(len(texts))] if self.id_column else None
        return Chunk(offset=offset, texts=texts, kept=kept, failures=failures, ids=ids)

    def _texts(self, batch: pa.RecordBatch, problems: dict[int, Problem]) -> list[str | None]:
        shown = f"column '{inert(self.reads[0])}'"
        column = batch.column(self.reads[0])
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        for i in _bad_utf8(column):
            problems[i] = Problem("BadUtf8", f"{shown} is not UTF-8")
        column = _without(column, problems)
        texts: list[str | None] = column.to_pylist()
        for i, text in enumerate(texts):
            if text is None and i not in problems:
                problems[i] = Problem("NullText", f"{shown} is null")
        return texts

    def _composed(self, batch: pa.RecordBatch, problems: dict[int, Problem]) -> list[str | None]:
        for name in self.reads:
            for i in _bad_utf8(batch.column(name)):
                problems[i] = Problem("BadUtf8", f"column '{inert(name)}' is not UTF-8")
        return self._json(batch, self.reads, problems)

    def _failure(self, batch: pa.RecordBatch, i: int, offset: int, file: int, at: int, problem: Problem) -> RowFailure:
        where = place(self.files[file].path, at + i, "row")
        told = message(where, problem.reason, self._head(batch, i))
        return RowFailure(offset=offset + i, error=problem.error, message=told, id=self._id(batch, i))

    def _head(self, batch: pa.RecordBatch, i: int) -> bytes:
        """The beginning of the record's text, for a message."""
        column = batch.column(self.reads[0])
        return _bytes_of(column, i) if _is_text(column.type) else str(_rows(column, [i])[0]).encode()

    def _id(self, batch: pa.RecordBatch, i: int) -> str | int | float | None:
        if not self.id_column:
            return None
        try:
            return usable_id(batch.column(self.id_column)[i].as_py())
        except (ValueError, OverflowError):
            return None

    def _json(self, batch: pa.RecordBatch, names: tuple[str, ...], problems: dict[int, Problem]) -> list[str | None]:
        good: list[int | None] = [i for i in range(batch.num_rows) if i not in problems]
        columns = [_plain(_rows(batch.column(name), good)) for name in names]
        records: list[str | None] = [None] * batch.num_rows
        for at, i in enumerate(i for i in good if i is not None):
            try:
                values = [c[at].as_py() if isinstance(c[at], pa.Scalar) else c[at] for c in columns]
                row = dict(zip(names, values, strict=True))
                records[i] = json.dumps(row, ensure_ascii=False, separators=(",", ":"), default=_json_value)
            except (ValueError, TypeError, OverflowError) as error:
                problems[i] = Problem("BadRecord", f"the row cannot be written as JSON: {inert(str(error))}")
        return records


def _plain(column: pa.Array) -> list[Any]:
    """Values of a kept column; instants as text, since Python's hold neither nanoseconds nor every year."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        zone = "Z" if kind.tz else ""  # the instant in UTC, whatever zone it is shown in
        texts = column.view(pa.timestamp(kind.unit)).cast(pa.string()).to_pylist()
        return [None if text is None else text.replace(" ", "T", 1) + zone for text in texts]
    if pa.types.is_time(kind):
        column = column.cast(pa.string())
    elif pa.types.is_duration(kind):
        column = column.cast(pa.int64())
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return list(column)  # one by one, so that only the rows concerned fail


def _json_value(value: object) -> object:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    item = getattr(value, "item", None)  # a numpy scalar (float16)
    return item() if item else str(value)


def _without(column: pa.Array, rows: Collection[int]) -> pa.Array:
    """The column with nulls in these rows."""
    if not rows:
        return column
    return _rows(column, [None if i in rows else i for i in range(len(column))])


def _rows(column: pa.Array, rows: list[int | None]) -> pa.Array:
    """These rows of the column, null for None."""
    try:
        return column.take(pa.array(rows, pa.int64()))
    except pa.ArrowNotImplementedError:  # string_view, as of pyarrow 26
        parts = [pa.nulls(1, column.type) if i is None else column.slice(i, 1) for i in rows]
        return pa.concat_arrays(parts) if parts else column.slice(0, 0)


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _bad_utf8(column: pa.Array) -> list[int]:
    """Rows whose strings, at any depth, are not UTF-8."""
    if _is_valid(column):
        return []
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()  # a row must not answer for the whole dictionary
    return [i for i in range(len(column)) if not _is_valid(_rows(column, [i]))]


def _bytes_of(column: pa.Array, i: int) -> bytes:
    """The bytes of one text, whether or not they are UTF-8."""
    one = _rows(column, [i])
    if pa.types.is_dictionary(one.type):
        one = one.dictionary_decode()
    value = one.cast(pa.large_binary())[0].as_py()
    return b"" if value is None else bytes(value)


def parquet_source(
    files: tuple[InputFile, ...],
    *,
    column: Reading,
    id_column: str | None,
    keep: str | tuple[str, ...],
    form: Form,
    limit: int | None,
) -> ParquetSource:
    """Raises InputError for unreadable files, files that differ, a column that is missing or no text."""
    rows, schema = _look(files)
    reads = columns_of(column, schema.names)
    for name in (*reads, *([id_column] if id_column else []), *(keep if isinstance(keep, tuple) else ())):
        if name not in schema.names:
            raise InputError(
                f"column '{inert(name)}' of {inert(files[0].path)}",
                found="the file has no such column",
                allowed=column_list(schema.names),
                do="name one of these columns (--column for the text, --id, --keep)",
            )
    if isinstance(column, str):
        _check_text(files[0].path, schema.field(column))
    names = schema.names if keep == "all" else keep if isinstance(keep, tuple) else ()
    return ParquetSource(
        files=files,
        rows=rows,
        reads=reads,
        composes=not isinstance(column, str),
        id_column=id_column,
        kept=pa.schema([_kept_field(schema.field(name)) for name in names]),
        form=form,
        limit=limit,
    )


def parquet_tables(files: tuple[InputFile, ...]) -> ParquetSource:
    """All columns, none of them special. Raises InputError for unreadable files, or files that differ."""
    rows, schema = _look(files)
    return ParquetSource(files=files, rows=rows, reads=(), composes=True, id_column=None, kept=schema, form="typed")


def _look(files: tuple[InputFile, ...]) -> tuple[tuple[int, ...], pa.Schema]:
    """The number of rows of each file, and the schema of all."""
    rows: list[int] = []
    schema: pa.Schema | None = None
    for file in files:
        with open_parquet(file.path) as opened:
            rows.append(opened.metadata.num_rows)
            found = opened.schema_arrow
        schema = found if schema is None else schema
        _check_same(files[0].path, schema, file.path, found)
    return tuple(rows), pa.schema([]) if schema is None else schema


def _kept_field(field: pa.Field) -> pa.Field:
    """The field as it is, but a failed row may be null in it, and Parquet's numbering is left behind."""
    metadata = {k: v for k, v in (field.metadata or {}).items() if k != b"PARQUET:field_id"}
    return pa.field(field.name, field.type, nullable=True, metadata=metadata or None)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _check_text(path: str, field: pa.Field) -> None:
    if not _is_text(field.type):
        raise InputError(
            f"column '{inert(field.name)}' of {inert(path)} as the text",
            found=f"its type is {field.type}",
            allowed="string, large_string, string_view, or a dictionary of one of them",
            do="name a column of strings with --column",
        )


def _check_same(first_path: str, first: pa.Schema, path: str, other: pa.Schema) -> None:
    difference = ""
    twice = [name for name in other.names if other.names.count(name) > 1]
    if twice:
        difference = f"{inert(path)} has the column name '{inert(twice[0])}' twice"
    elif missing := [name for name in first.names if name not in other.names]:
        difference = f"{inert(path)} lacks column '{inert(missing[0])}' of {inert(first_path)}"
    elif more := [name for name in other.names if name not in first.names]:
        difference = f"{inert(path)} has column '{inert(more[0])}', {inert(first_path)} has not"
    elif unlike := [name for name in first.names if first.field(name).type != other.field(name).type]:
        types = f"{other.field(unlike[0]).type}, {first.field(unlike[0]).type} in {inert(first_path)}"
        difference = f"column '{inert(unlike[0])}' of {inert(path)} is {types}"
    if difference:
        raise InputError(
            "Parquet files are read as one sequence of rows, so they need the same columns",
            found=difference,
            allowed="the same names and types in every file, in any order",
            do="run one job for each schema, or make the files the same",
        )
