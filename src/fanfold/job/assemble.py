"""Assemble: the rows of a part in input order, results beside the kept columns, written and sealed."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fanfold.data.sink import open_sink
from fanfold.errors import InternalError
from fanfold.job.compute import arrow_type, result_schema
from fanfold.job.prepare import HashingFile, ensure_prepared, is_sound
from fanfold.job.work import Damaged, JobWork, PartDone, WindowResult, kept_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.data.durable import PosixStore
    from fanfold.engine.schedule import Assemble
    from fanfold.tasks.task import Opened

_ROWS_AT_ONCE = 1024


def output_schema(work: JobWork) -> pa.Schema:
    """row, the kept columns, the result columns (with the prefix)."""
    prefix = work.output.prefix
    return pa.schema(
        [
            (prefix + "row", pa.int64()),
            *work.source.kept_schema,
            *((prefix + column.name, arrow_type(column)) for column in work.task.columns),
        ]
    )


def assemble_part(
    work: JobWork, opened: Opened, part: Assemble, windows: tuple[WindowResult, ...], store: PosixStore
) -> PartDone | Damaged:
    """The part stands, sealed, under a temporary name; or which of the files it is made of are damaged."""
    damaged = [
        (window.detail.window.index, lease.name)
        for window in windows
        for lease in window.leases
        if not is_sound(store.path(lease.name), lease.sha256)
    ]
    if damaged:
        return Damaged(leases=tuple(damaged))
    temporary = f"tmp/part-{part.part:09d}-{part.attempt}-{os.getpid()}"
    schema = output_schema(work)
    rows = 0
    window_sha256 = []
    with HashingFile(store.path(temporary)) as file, open_sink(work.output.format, file, schema) as sink:
        for window in windows:
            ensure_prepared(work, opened, window.detail, store)
            digest = hashlib.sha256()
            for batch in window_batches(work, window, store, schema):
                sink.write(batch)
                hash_batch(digest, batch)
                rows += batch.num_rows
            sink.end_window()
            window_sha256.append(digest.hexdigest())
    store.seal(temporary)
    return PartDone(
        temporary=temporary,
        rows=rows,
        num_bytes=file.num_bytes,
        sha256=file.sha256,
        window_sha256=tuple(window_sha256),
    )


def window_batches(
    work: JobWork, window: WindowResult, store: PosixStore, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """A computed window's output rows in order, in batches of bounded size."""
    results = _results(work, window, store)
    first_row = window.detail.window.first_row
    position = np.full(window.detail.window.num_rows, -1, dtype=np.int64)
    position[results.column("offset").to_numpy()] = np.arange(results.num_rows)
    position[list(window.failed)] = -1
    start = 0
    with pa.memory_map(str(store.path(kept_name(window.detail.window.index)))) as mapped:
        for kept in pa.ipc.open_stream(mapped):
            for begin in range(0, kept.num_rows, _ROWS_AT_ONCE):
                piece = kept.slice(begin, _ROWS_AT_ONCE)
                places = position[start : start + piece.num_rows]
                numbers = first_row + np.arange(start, start + piece.num_rows)
                start += piece.num_rows
                missing = places < 0
                if missing.any() and not work.output.failed_as_null:
                    chosen = np.flatnonzero(~missing)
                    piece, places, numbers = piece.take(pa.array(chosen)), places[chosen], numbers[chosen]
                    missing = places < 0
                if not len(places):
                    continue
                taken = results.take(pa.array(places, mask=missing))
                columns = [taken.column(i).combine_chunks() for i in range(1, taken.num_columns)]
                arrays = [pa.array(numbers), *piece.columns, *columns]
                yield pa.record_batch(arrays, schema=schema)
    if start != window.detail.window.num_rows:
        raise InternalError(
            f"window {window.detail.window.index}: {window.detail.window.num_rows} rows",
            found=f"{start} rows of kept columns",
            allowed="every row once",
            do="report this",
        )


def _results(work: JobWork, window: WindowResult, store: PosixStore) -> pa.Table:
    batches = []
    for lease in window.leases:
        with pa.memory_map(str(store.path(lease.name))) as mapped:
            batches += list(pa.ipc.open_stream(mapped))
    table = pa.Table.from_batches(batches, schema=result_schema(work.task.columns))
    expected = window.detail.window.num_rows - len(window.failed)
    if table.num_rows < expected:
        raise InternalError(
            f"window {window.detail.window.index}: results of {expected} rows",
            found=f"{table.num_rows}",
            allowed="a result or a recorded failure for each row",
            do="report this",
        )
    return table.combine_chunks()


def hash_batch(digest: hashlib._Hash, batch: pa.RecordBatch) -> None:
    """Feed the rows' Arrow buffers, compacted, so that only the values count."""
    compact = pa.Table.from_batches([batch.take(pa.array(np.arange(batch.num_rows)))]).combine_chunks()
    for compacted in compact.to_batches():
        digest.update(compacted.serialize())
