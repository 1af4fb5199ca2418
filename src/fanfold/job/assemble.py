"""Assemble: the rows of a part in input order, results beside the kept columns, written and sealed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from fanfold.data.sink import open_sink
from fanfold.errors import InternalError
from fanfold.job.compute import WHOLE, arrow_type, column_array, result_schema
from fanfold.job.prepare import HashingFile, ensure_prepared, is_sound
from fanfold.job.work import (
    Damaged,
    JobWork,
    PartDone,
    WindowResult,
    items_name,
    kept_name,
    merges,
    place_names,
    unique,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.data.store import Store
    from fanfold.engine.schedule import Assemble
    from fanfold.tasks.task import Opened

_ROWS_AT_ONCE = 1024


def output_schema(work: JobWork) -> pa.Schema:
    """row (or record and part), the kept columns, the result columns (with the prefix)."""
    prefix = work.output.prefix
    return pa.schema(
        [
            *((prefix + name, pa.int64()) for name in place_names(work.task)),
            *work.source.kept_schema,
            *((prefix + column.name, arrow_type(column)) for column in work.task.columns),
        ]
    )


def assemble_part(
    work: JobWork, opened: Opened, part: Assemble, windows: tuple[WindowResult, ...], store: Store
) -> PartDone | Damaged:
    """The part stands, sealed, under a temporary name; or which of the files it is made of are damaged."""
    damaged = [
        (window.detail.window.index, lease.name)
        for window in windows
        for lease in window.leases
        if not is_sound(store, lease.name, lease.sha256)
    ]
    if damaged:
        return Damaged(leases=tuple(damaged))
    temporary = f"tmp/part-{part.part:09d}-{part.attempt}-{unique()}"
    schema = output_schema(work)
    rows = 0
    window_sha256 = []
    with HashingFile(store.new_file(temporary)) as file, open_sink(work.output.format, file, schema) as sink:
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


def window_batches(work: JobWork, window: WindowResult, store: Store, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """A computed window's output rows in order, in batches of bounded size."""
    rows = _rows(work, window, store)
    starts = np.searchsorted(rows.offsets, np.arange(window.detail.window.num_rows + 1))  # of each record's rows
    first_row = window.detail.window.first_row
    num_records = 0
    with pa.memory_map(str(store.file(kept_name(window.detail.window.index)))) as mapped:
        for kept in pa.ipc.open_stream(mapped):
            end = num_records + kept.num_rows
            for begin in range(starts[num_records], starts[end], _ROWS_AT_ONCE):
                chosen = np.arange(begin, min(begin + _ROWS_AT_ONCE, starts[end]))
                if not work.output.failed_as_null:
                    chosen = chosen[rows.places[chosen] >= 0]
                if not len(chosen):
                    continue
                offsets, places = rows.offsets[chosen], rows.places[chosen]
                taken = rows.results.take(pa.array(places, mask=places < 0))
                numbers = [first_row + offsets, rows.parts[chosen]][: len(place_names(work.task))]
                columns = [taken.column(column.name).combine_chunks() for column in work.task.columns]
                repeated = kept.take(pa.array(offsets - num_records))
                yield pa.record_batch([*map(pa.array, numbers), *repeated.columns, *columns], schema=schema)
            num_records = end
    if num_records != window.detail.window.num_rows:
        raise InternalError(
            f"window {window.detail.window.index}: {window.detail.window.num_rows} rows",
            found=f"{num_records} rows of kept columns",
            allowed="every row once",
            do="report this",
        )


class _Rows(NamedTuple):
    """A window's output rows in order, int64 [n] each; places: where in `results` a row stands, -1: it failed."""

    offsets: np.ndarray
    parts: np.ndarray
    places: np.ndarray
    results: pa.Table


def _rows(work: JobWork, window: WindowResult, store: Store) -> _Rows:
    batches = []
    for lease in window.leases:
        with pa.memory_map(str(store.file(lease.name))) as mapped:
            batches += list(pa.ipc.open_stream(mapped))
    results = pa.Table.from_batches(batches, schema=result_schema(work.task)).combine_chunks()
    found = _keys(results)
    wanted = _wanted(work, window, store, found)
    found = np.concatenate([[-1], found])  # in front, so that there always is one that is not larger
    order = np.argsort(found, kind="stable")
    at = order[np.searchsorted(found, wanted, side="right", sorter=order) - 1]  # of rows found twice: the last
    places = np.where(found[at] == wanted, at - 1, -1)
    failed = np.isin(wanted, [offset << 32 | (part or 0) for offset, part in window.failed])
    if (places[~failed] < 0).any():
        raise InternalError(
            f"window {window.detail.window.index}: results of {np.count_nonzero(~failed)} rows",
            found=f"{np.count_nonzero(places[~failed] >= 0)}",
            allowed="a result or a recorded failure for each row",
            do="report this",
        )
    places[failed] = -1
    rows = _Rows(wanted >> 32, wanted & 0xFFFFFFFF, places, results)
    return _merge(work, rows) if merges(work.task) else rows


def _keys(rows: pa.Table) -> np.ndarray:
    """offset and part as one number, int64 [n]: in the order of (offset, part)."""
    keys: np.ndarray = rows.column("offset").to_numpy().astype(np.int64) << 32
    return keys | rows.column("part").to_numpy() if "part" in rows.column_names else keys


def _wanted(work: JobWork, window: WindowResult, store: Store, found: np.ndarray) -> np.ndarray:
    """The keys of all rows that the window must give, in order, failed ones included. `found`: keys of results."""
    records = np.arange(window.detail.window.num_rows)
    if work.task.chunking is None:
        return records << 32
    with pa.memory_map(str(store.file(items_name(window.detail.window.index)))) as mapped:
        prepared = _keys(pa.ipc.open_file(mapped).read_all())
    if merges(work.task):  # some were merged before, and saved from an older output
        whole = found[found & 0xFFFFFFFF == WHOLE]
        prepared = np.concatenate([prepared[~np.isin(prepared >> 32, whole >> 32)], whole])
    unread = np.setdiff1d(records, prepared >> 32)  # they failed before they had parts
    return np.sort(np.concatenate([prepared, unread << 32]))


def _merge(work: JobWork, rows: _Rows) -> _Rows:
    """One row a record: its parts' results merged; it failed where one of them did."""
    columns = work.task.columns
    tokens = rows.results.column("tokens").to_numpy()
    values = {
        column.name: rows.results.column(column.name).combine_chunks().flatten().to_numpy().reshape(-1, column.width)
        for column in columns
    }
    starts = np.flatnonzero(np.diff(rows.offsets, prepend=-1))
    ends = np.append(starts[1:], len(rows.offsets))
    good = np.array([(rows.places[start:end] >= 0).all() for start, end in zip(starts, ends, strict=True)], dtype=bool)
    merged: dict[str, list[Any]] = {column.name: [] for column in columns}
    for start, end in zip(starts[good], ends[good], strict=True):
        places = rows.places[start:end]
        of_parts = {name: value[places] for name, value in values.items()}
        for name, value in work.task.merge_parts(of_parts, tokens[places].tolist()).items():
            merged[name].append(value[None])
    results = pa.table({column.name: column_array(merged[column.name], column) for column in columns})
    offsets = rows.offsets[starts]
    return _Rows(offsets, np.zeros_like(offsets), np.where(good, np.cumsum(good) - 1, -1), results)


def hash_batch(digest: hashlib._Hash, batch: pa.RecordBatch) -> None:
    """Feed the rows' Arrow buffers, compacted, so that only the values count."""
    compact = pa.Table.from_batches([batch.take(pa.array(np.arange(batch.num_rows)))]).combine_chunks()
    for compacted in compact.to_batches():
        digest.update(compacted.serialize())
