"""Writers of output parts: Parquet, JSONL, CSV. They get record batches in row order."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from fanfold.data.source import RECORD_COLUMN

if TYPE_CHECKING:
    from types import TracebackType


class Sink(Protocol):
    """Takes rows in order; a window's end is a border at which the file may be cut."""

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, batch: pa.RecordBatch) -> None: ...

    def end_window(self) -> None: ...


def open_sink(name: str, file: Any, schema: pa.Schema) -> Sink:
    """A sink of the format `name`, writing to a file object. JSONL takes kept columns in the form `json`."""
    sinks = {"parquet": ParquetSink, "jsonl": JsonlSink, "csv": CsvSink}
    return sinks[name](file, schema)


class _Sink:
    def write(self, batch: pa.RecordBatch) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None: ...

    def end_window(self) -> None: ...


class ParquetSink(_Sink):
    """One row group a window. Vectors are stored plain: they do not compress and have no useful statistics."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        import pyarrow.parquet as pq

        others = [field.name for field in schema if not pa.types.is_fixed_size_list(field.type)]
        self._schema = schema
        self._writer = pq.ParquetWriter(
            pa.PythonFile(file, mode="w"),
            schema,
            use_dictionary=others,
            write_statistics=others,
            compression="snappy",
        )
        self._held: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)

    def end_window(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_batches(self._held, schema=self._schema))
            self._held = []

    def close(self) -> None:
        self.end_window()
        self._writer.close()


class JsonlSink(_Sink):
    """A JSON object a row: row, the record as it was, the results."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        self._file = file
        self._schema = schema

    def write(self, batch: pa.RecordBatch) -> None:
        columns = [_json_cells(field, column) for field, column in zip(batch.schema, batch.columns, strict=True)]
        names = [json.dumps(name, ensure_ascii=False) for name in batch.schema.names]
        lines = []
        for cells in zip(*columns, strict=True):
            members = []
            for name, field, cell in zip(names, batch.schema, cells, strict=True):
                if field.name == RECORD_COLUMN:
                    inside = cell.strip()[1:-1].strip() if cell is not None else ""
                    if inside:
                        members.append(inside)
                else:
                    members.append(f"{name}: {cell if cell is not None else 'null'}")
            lines.append("{" + ", ".join(members) + "}\n")
        self._file.write("".join(lines).encode("utf-8"))


class CsvSink(_Sink):
    """RFC 4180; vectors are JSON arrays in one cell. The header stands in the first part only when parts are joined."""

    def __init__(self, file: Any, schema: pa.Schema) -> None:
        self._file = file
        self._schema = schema
        self._write_rows([schema.names])

    def write(self, batch: pa.RecordBatch) -> None:
        columns = [_csv_cells(column) for column in batch.columns]
        self._write_rows(list(zip(*columns, strict=True)))

    def _write_rows(self, rows: list[Any]) -> None:
        # One empty cell alone would be a blank line, which is no record.
        lines = ((",".join(map(_quoted, row)) or '""') + "\n" for row in rows)
        self._file.write("".join(lines).encode("utf-8"))


def _quoted(cell: str) -> str:
    """RFC 4180; a lone carriage return is quoted too, which Python's csv writer forgets."""
    if any(mark in cell for mark in ',"\r\n'):
        return '"' + cell.replace('"', '""') + '"'
    return cell


_NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}  # as Python's json writes and reads them


def _vector_cells(column: pa.Array) -> list[str | None]:
    """Each vector as a JSON array; every number in the fewest digits that give the same float32 back."""
    width = column.type.list_size
    flat = pc.cast(column.flatten() if not column.null_count else column.drop_null().flatten(), pa.string())
    digits = [_NOT_FINITE.get(number, number) for number in flat.to_pylist()]
    rows = iter(range(0, len(digits), width))
    return [
        "[" + ", ".join(digits[start : start + width]) + "]" if valid and (start := next(rows)) >= 0 else None
        for valid in column.is_valid().to_pylist()
    ]


def _values(column: pa.Array) -> list[Any]:
    """Python values; dates and times as ISO text, bytes as base64, whatever their range."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
        return list(pc.cast(column, pa.string()).to_pylist())
    if pa.types.is_duration(column.type):
        return list(pc.cast(column, pa.int64()).to_pylist())
    values: list[Any] = column.to_pylist()
    if pa.types.is_nested(column.type):
        return values
    return [_plain(value) if isinstance(value, bytes) else value for value in values]


def _plain(value: Any) -> str:
    """What JSON has no word for."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return str(value)


def _json_cells(field: pa.Field, column: pa.Array) -> list[str | None]:
    if pa.types.is_fixed_size_list(column.type):
        return _vector_cells(column)
    values = _values(column)
    if field.name == RECORD_COLUMN:
        return [str(value) if value is not None else None for value in values]  # JSON text already
    return [None if value is None else json.dumps(value, ensure_ascii=False, default=_plain) for value in values]


def _csv_cells(column: pa.Array) -> list[str]:
    if pa.types.is_fixed_size_list(column.type):
        return ["" if cell is None else cell for cell in _vector_cells(column)]
    nested = pa.types.is_nested(column.type)
    return [
        "" if value is None else json.dumps(value, ensure_ascii=False, default=_plain) if nested else str(value)
        for value in _values(column)
    ]
