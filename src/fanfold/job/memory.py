"""Data in memory: texts, frames and tables go through the same job as files do, in a folder that is then gone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fanfold.data.scratch import scratch_folder
from fanfold.errors import DataError, InputError, PlanError
from fanfold.job.compute import arrow_type
from fanfold.job.finish import read_output
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.job.verbs import MAKERS, options_of
from fanfold.job.work import merges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.job.run import Display
    from fanfold.tasks.task import Task

_REQUEST_OPTIONS = ("limit", "prefix", "memory_per_unit", "max_failures", "compile", "too_long", "threads")


def in_memory(
    verb: str,
    data: Any,
    *,
    column: str,
    on: str,
    on_error: str,
    display: Display | None = None,
    **options: Any,
) -> Any:
    """Same kind out as in: for texts an ndarray where the result is a vector, else a dict each; a frame for a frame."""
    known = options_of(verb)
    unknown = sorted(set(options) - {*known, *_REQUEST_OPTIONS})
    if unknown:
        raise PlanError(
            f"ff.{verb}(data, {', '.join(f'{name}=...' for name in unknown)})",
            found="options that have no meaning for data in memory",
            allowed=", ".join((*known, *_REQUEST_OPTIONS)),
            do=f"leave them away, or give an output: ff.{verb}('docs.jsonl', 'out/', ...)",
        )
    task = MAKERS[verb]()(**{name: options.pop(name) for name in known if name in options})
    if task.chunking is not None and not merges(task):
        raise PlanError(
            f"ff.{verb}(data, chunk={task.chunking.tokens})",
            found="several vectors for one text",
            allowed="one vector for each text in memory",
            do=f'add merge="mean", or give an output: ff.{verb}("docs.jsonl", "out/", chunk=...)',
        )
    request = {"column": column, "on": on, "on_error": on_error, **options}
    if isinstance(data, str | Path):
        return like(None, _run(task, [str(data)], display, request), options.get("prefix", ""))
    with scratch_folder() as folder:
        reading = task.reading(column)
        if isinstance(reading, str):
            texts = texts_of(data, column)
            num_rows, is_missing = len(texts), all(text is None for text in texts)
            path = folder / "texts.parquet"
            pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path, compression="none")
            request["column"] = "text"
        else:
            records = records_of(data, column)
            num_rows, is_missing = len(records), False
            path = folder / "records.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="ascii")
        if not num_rows or (on_error == "null" and is_missing):
            schema = pa.schema([(options.get("prefix", "") + c.name, arrow_type(c)) for c in task.columns])
            results = schema.empty_table() if not num_rows else _all_null(schema, num_rows)
        else:
            results = _run(task, [str(path)], display, request)
    return like(data, results, options.get("prefix", ""))


def _all_null(schema: pa.Schema, num_rows: int) -> pa.Table:
    return pa.table([pa.nulls(num_rows, field.type) for field in schema], schema=schema)


def _run(task: Task, inputs: list[str], display: Display | None, request: dict[str, Any]) -> pa.Table:
    """The result columns, nulls for failed rows under `null`."""
    with scratch_folder() as folder:
        asked = Request(inputs=tuple(inputs), out=folder / "out", keep="none", sync=False, **request)
        run = run_job(task, asked, display)
        prefix = request.get("prefix", "")
        table = read_output(run.folder).select([prefix + column.name for column in task.columns])
        return pa.table([_own(column) for column in table.columns], schema=table.schema)


def _own(column: pa.ChunkedArray) -> pa.Array:
    """The column in memory of its own: what was read may be mapped from a file that is about to go."""
    return pa.concat_arrays([*column.chunks, pa.nulls(0, column.type)]).take(pa.array(np.arange(len(column))))


def _vectors(column: pa.Array) -> np.ndarray:
    """float32 [n, d]; rows of NaN for nulls."""
    width = column.type.list_size
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    found: np.ndarray = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    if valid.all():
        return found.copy()
    filled = np.full((len(column), width), math.nan, dtype=np.float32)
    filled[valid] = found
    return filled


def records_of(data: Any, column: str) -> list[dict[str, Any]]:
    """The rows of any kind of data in memory as objects; texts become rows with the one column `column`."""
    if isinstance(data, pa.Table | pa.RecordBatch):
        return list(data.to_pylist())
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):  # a pandas or Polars frame
        columns = {str(name): data[name].to_list() for name in data.columns}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(data, list | tuple) and data and all(isinstance(row, dict) for row in data):
        return list(data)
    return [{column: text} for text in texts_of(data, column)]


def texts_of(data: Any, column: str) -> list[str | None]:
    """The texts of any kind of data in memory; DataError names the first that is neither a text nor missing."""
    values = _column(data, column)
    texts: list[str | None] = []
    for row, value in enumerate(values):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            texts.append(None)
        elif isinstance(value, str):
            texts.append(value)
        else:
            raise DataError(
                f"row {row} of the data",
                found=f"a {type(value).__name__}: {value!r:.80}",
                allowed="texts (str); None for a missing one",
                do="convert the values, for example with map(str, values)",
            )
    return texts


def _column(data: Any, column: str) -> Sequence[Any]:
    if isinstance(data, pa.Table | pa.RecordBatch):
        names = data.schema.names
        if column in names:
            return data.column(column).to_pylist()  # type: ignore[no-any-return]
        raise _no_column(column, names)
    if isinstance(data, pa.Array | pa.ChunkedArray):
        return data.to_pylist()  # type: ignore[no-any-return]
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):  # a pandas or Polars frame
        names = [str(name) for name in data.columns]
        if column not in names:
            raise _no_column(column, names)
        return list(data[column].to_list())
    if hasattr(data, "to_list"):  # a Series
        return list(data.to_list())
    if isinstance(data, np.ndarray):
        if data.ndim != 1:
            raise _unknown(f"an array of shape {data.shape}")
        return list(data.tolist())
    if isinstance(data, list | tuple):
        return data
    if hasattr(data, "__iter__") and not isinstance(data, bytes | dict):
        return list(data)
    raise _unknown(f"a {type(data).__name__}")


def like(data: Any, results: pa.Table, prefix: str) -> Any:
    """For texts the vectors, or a dict a text; for a frame or table a copy of it with the result columns."""
    if isinstance(data, pa.Table | pa.RecordBatch):
        for field, column in zip(results.schema, results.columns, strict=True):
            chunk = column.combine_chunks() if isinstance(data, pa.RecordBatch) else column
            data = data.append_column(field, chunk)
        return data
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        if hasattr(data, "with_columns"):  # Polars
            return data.with_columns(sys.modules["polars"].from_arrow(results))
        frame = data.copy()
        for name in results.column_names:
            column = results.column(name).combine_chunks()
            vector = pa.types.is_fixed_size_list(column.type)
            frame[name] = list(_vectors(column)) if vector else column.to_pylist()
        return frame
    if results.num_columns == 1 and pa.types.is_fixed_size_list(results.schema.types[0]):
        return _vectors(results.column(0).combine_chunks())
    names = {name: name.removeprefix(prefix) for name in results.column_names}
    return [{names[name]: value for name, value in row.items()} for row in results.to_pylist()]


def _no_column(column: str, names: list[str]) -> InputError:
    return InputError(
        f"column {column!r}",
        found=f"the columns {', '.join(names)}",
        allowed="a column of the data",
        do="name it with column=",
    )


def _unknown(found: str) -> PlanError:
    return PlanError(
        "data in memory",
        found=found,
        allowed="a list of texts, a Series, a one-dimensional array, a pandas or Polars frame, an Arrow table, a path",
        do="convert the data to one of these",
    )
