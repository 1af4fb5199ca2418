"""Data in memory: texts, frames and tables go through the same job as files do, in a folder that is then gone."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fanfold.data.scratch import scratch_folder
from fanfold.errors import DataError, InputError, PlanError
from fanfold.job.finish import read_output
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.job.work import merges
from fanfold.tasks.embed import make_embed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.job.run import Display

_MODEL_OPTIONS = ("revision", "dtype", "max_length", "prefix_text", "prompt_name", "chunk", "overlap", "merge")
_REQUEST_OPTIONS = ("limit", "prefix", "memory_per_unit", "max_failures", "compile")


def embed_in_memory(
    data: Any,
    *,
    column: str,
    model: str | None,
    on: str,
    on_error: str,
    display: Display | None = None,
    **options: Any,
) -> Any:
    """Same kind out as in: an ndarray for texts, the frame with one more column for a frame."""
    unknown = sorted(set(options) - {*_MODEL_OPTIONS, *_REQUEST_OPTIONS})
    if unknown:
        raise PlanError(
            f"ff.embed(data, {', '.join(f'{name}=...' for name in unknown)})",
            found="options that have no meaning for data in memory",
            allowed=", ".join((*_MODEL_OPTIONS, *_REQUEST_OPTIONS)),
            do="leave them away, or give an output: ff.embed('docs.jsonl', 'out/', ...)",
        )
    task = make_embed(model=model, **{name: options.pop(name) for name in _MODEL_OPTIONS if name in options})
    if task.chunking is not None and not merges(task):
        raise PlanError(
            f"ff.embed(data, chunk={task.chunking.tokens})",
            found="several vectors for one text",
            allowed="one vector for each text in memory",
            do='add merge="mean", or give an output: ff.embed("docs.jsonl", "out/", chunk=...)',
        )
    width = task.columns[0].width
    if isinstance(data, str | Path):
        return _run(task, [str(data)], column, on, on_error, width, display, options)
    texts = texts_of(data, column)
    if not texts:
        vectors = np.empty((0, width), dtype=np.float32)
    elif on_error == "null" and all(text is None for text in texts):
        vectors = np.full((len(texts), width), math.nan, dtype=np.float32)
    else:
        with scratch_folder() as folder:
            path = folder / "texts.parquet"
            pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), path, compression="none")
            vectors = _run(task, [str(path)], "text", on, on_error, width, display, options)
    return like(data, vectors, options.get("prefix", "") + "embedding")


def _run(
    task: Any,
    inputs: list[str],
    column: str,
    on: str,
    on_error: str,
    width: int,
    display: Display | None,
    options: dict[str, Any],
) -> np.ndarray:
    """float32 [n, d]; NaN rows for failed ones under `null`."""
    with scratch_folder() as folder:
        out = folder / "out"
        request = Request(
            inputs=tuple(inputs),
            out=out,
            column=column,
            on=on,
            on_error=on_error,
            keep="none",
            sync=False,
            **options,
        )
        run = run_job(task, request, display)
        vectors = read_output(run.folder).column(options.get("prefix", "") + "embedding").combine_chunks()
        if vectors.null_count:
            filled = np.full((len(vectors), width), math.nan, dtype=np.float32)
            filled[vectors.is_valid().to_numpy(zero_copy_only=False)] = _flat(vectors.drop_null(), width)
            return filled
        return _flat(vectors, width).copy()


def _flat(vectors: pa.Array, width: int) -> np.ndarray:
    flat: np.ndarray = vectors.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, width)


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
                f"embedding row {row}",
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


def like(data: Any, vectors: np.ndarray, name: str) -> Any:
    """The vectors themselves for texts; a copy of the frame or table with the column `name` for frames."""
    if isinstance(data, pa.Table | pa.RecordBatch):
        column = _arrow_column(vectors)
        return data.append_column(pa.field(name, column.type), column)
    if hasattr(data, "columns") and hasattr(data, "__getitem__"):
        if hasattr(data, "with_columns"):  # Polars
            series = sys.modules["polars"].from_arrow(_arrow_column(vectors)).rename(name)
            return data.with_columns(series)
        frame = data.copy()
        frame[name] = list(vectors)
        return frame
    return vectors


def _arrow_column(vectors: np.ndarray) -> pa.Array:
    missing = np.isnan(vectors).all(axis=1) if vectors.size else None
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    mask = pa.array(missing) if missing is not None and missing.any() else None
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=mask)


def _no_column(column: str, names: list[str]) -> InputError:
    return InputError(
        f"column {column!r}",
        found=f"the columns {', '.join(names)}",
        allowed="a column of the data",
        do="name it with column=",
    )


def _unknown(found: str) -> PlanError:
    return PlanError(
        "ff.embed(data)",
        found=found,
        allowed="a list of texts, a Series, a one-dimensional array, a pandas or Polars frame, an Arrow table, a path",
        do="convert the data to one of these",
    )
