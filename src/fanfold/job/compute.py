"""Compute: run a lease of pieces through the model, write the results down, report name, count and hash."""

from __future__ import annotations

import hashlib
import io
import os
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fanfold.errors import InternalError
from fanfold.job.prepare import ensure_prepared
from fanfold.job.work import JobWork, LeaseDone, WindowDetail, items_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.data.durable import PosixStore
    from fanfold.engine.engine import Desk
    from fanfold.engine.schedule import Compute
    from fanfold.tasks.task import Column, Opened


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type of a result column."""
    if column.kind == "vector":
        return pa.list_(pa.float32(), column.width)
    return {"text": pa.string(), "float": pa.float64(), "integer": pa.int64()}[column.kind]


def result_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """offset within the window, then the result columns."""
    return pa.schema([("offset", pa.int32()), *((column.name, arrow_type(column)) for column in columns)])


def compute_lease(
    work: JobWork, opened: Opened, lease: Compute, detail: WindowDetail, desk: Desk, store: PosixStore
) -> LeaseDone:
    """Pieces lease.first..last, or fewer if a stop was requested, in one sealed file: one record batch a piece."""
    ensure_prepared(work, opened, detail, store)
    columns = work.task.columns
    buffer = io.BytesIO()
    rows = tokens = padded_tokens = 0
    last = lease.first - 1
    start_s = time.monotonic()
    with (
        desk.timed("compute", f"window {lease.window} pieces {lease.first}-{lease.last}"),
        pa.memory_map(str(store.path(items_name(lease.window)))) as mapped,
        pa.ipc.new_stream(buffer, result_schema(columns)) as writer,
    ):
        reader = pa.ipc.open_file(mapped)
        for piece in range(lease.first, lease.last + 1):
            items = reader.get_batch(piece)
            results = []
            for ids, length in batches_of(items):
                results.append(opened.compute(ids, length))
                rows += len(ids)
                tokens += sum(map(len, ids))
                padded_tokens += len(ids) * length
                desk.beat(len(ids), len(ids) * length)
            writer.write_batch(_record(items.column(0), results, columns))
            last = piece
            if desk.stopping():
                break
    elapsed_s = time.monotonic() - start_s
    data = buffer.getbuffer()
    temporary = f"tmp/{lease.window:09d}-{lease.first:06d}-{lease.attempt}-{os.getpid()}"
    with desk.timed("write"):
        sha256 = hashlib.sha256(data).hexdigest()
        store.write_temporary(temporary, data)
    return LeaseDone(
        last=last,
        rows=rows,
        temporary=temporary,
        sha256=sha256,
        tokens=tokens,
        padded_tokens=padded_tokens,
        elapsed_s=elapsed_s,
    )


def batches_of(items: pa.RecordBatch) -> Iterator[tuple[list[np.ndarray], int]]:
    """The batches of a piece: token ids of each row, and the length they are padded to."""
    batch = items.column(1).to_numpy()
    lengths = items.column(2).to_numpy()
    column = items.column(3)
    ends = column.offsets.to_numpy()
    flat = column.values.to_numpy()
    borders = [0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(batch)]
    for start, stop in pairwise(borders):
        yield [flat[ends[row] : ends[row + 1]] for row in range(start, stop)], int(lengths[start])


def _record(offsets: pa.Array, results: list[dict[str, Any]], columns: tuple[Column, ...]) -> pa.RecordBatch:
    arrays = [offsets]
    for column in columns:
        values = [result[column.name] for result in results]
        if column.kind == "vector":
            flat = np.ascontiguousarray(np.concatenate(values), dtype=np.float32)
            array = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), column.width)
        else:
            array = pa.array([value for batch in values for value in batch], arrow_type(column))
        if len(array) != len(offsets):
            raise InternalError(
                f"{len(offsets)} values of {column.name}",
                found=f"the task returned {len(array)}",
                allowed="one value a row",
                do="report this, or fix the task if it is yours",
            )
        arrays.append(array)
    return pa.record_batch(arrays, schema=result_schema(columns))
