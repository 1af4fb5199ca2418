"""Compute: run a lease of pieces through the model, write the results down, report name, count and hash.

A batch that raises is taken apart here, on the unit: its rows are tried in halves, the others replaced by
fillers in the same shape, until the culprits are known; all other rows keep the bytes they always have.
"""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fanfold.data.source import RowFailure
from fanfold.errors import DataError, FanfoldError, InternalError, OutOfMemory, cause_line
from fanfold.job.prepare import ensure_prepared
from fanfold.job.work import JobWork, LeaseDetail, LeaseDone, Trial, TrialDone, items_name, unique
from fanfold.split.bisect import Bisection
from fanfold.tasks.task import BadRows, ModelBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from fanfold.data.store import Store
    from fanfold.engine.engine import Desk
    from fanfold.engine.schedule import Compute
    from fanfold.tasks.task import Column, Opened, Task


WHOLE = 0x7FFFFFFF  # as a part: the record's parts, merged already


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type of a result column."""
    if column.kind == "vector":
        return pa.list_(pa.float32(), column.width)
    if column.kind == "records":
        return pa.list_(pa.struct([(part.name, arrow_type(part)) for part in column.fields]))
    return {"text": pa.string(), "float": pa.float64(), "integer": pa.int64()}[column.kind]


def column_array(values: Sequence[Any], column: Column) -> pa.Array:
    """The results of batches, one array [rows, ...] each, as one Arrow array."""
    if column.kind != "vector":
        return pa.array([value for batch in values for value in batch], arrow_type(column))
    flat = np.concatenate([np.empty((0, column.width), dtype=np.float32), *values])
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), column.width)


def result_schema(task: Task) -> pa.Schema:
    """offset within the window, for texts in parts the part and its number of tokens, then the result columns."""
    place = ["offset"] if task.chunking is None else ["offset", "part", "tokens"]
    fields = [(name, pa.int32()) for name in place]
    return pa.schema([*fields, *((column.name, arrow_type(column)) for column in task.columns)])


class StoppedEarly(BaseException):
    """A stop was requested while a long batch was under way: no error of its rows."""


@dataclass(frozen=True, slots=True)
class BatchItems:
    """One batch as it was prepared: its rows' offsets, token ids, and the length they are padded to."""

    offsets: list[int]
    ids: list[np.ndarray]
    length: int
    piece: int
    names: list[str | None] = field(default_factory=list)  # the id column as JSON, where one was named
    parts: list[int] | None = None  # of each row's text
    more: list[tuple[int, ...]] = field(default_factory=list)  # what the task has beside the ids


def batches_of(items: pa.RecordBatch, piece: int) -> Iterator[BatchItems]:
    """The batches of the piece."""
    batch = items.column("batch").to_numpy()
    lengths = items.column("length").to_numpy()
    offsets = items.column("offset").to_pylist()
    names = items.column("id").to_pylist()
    parts = items.column("part").to_pylist() if "part" in items.schema.names else None
    more = items.column("more").to_pylist() if "more" in items.schema.names else None
    column = items.column("ids")
    ends = column.offsets.to_numpy()
    flat = column.values.to_numpy()
    borders = [0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(batch)]
    for start, stop in pairwise(borders):
        ids = [flat[ends[row] : ends[row + 1]] for row in range(start, stop)]
        of_batch = None if parts is None else parts[start:stop]
        beside = [] if more is None else [tuple(numbers) for numbers in more[start:stop]]
        yield BatchItems(offsets[start:stop], ids, int(lengths[start]), piece, names[start:stop], of_batch, beside)


def compute_lease(
    work: JobWork, opened: Opened, lease: Compute, detail: LeaseDetail, desk: Desk, store: Store
) -> LeaseDone | TrialDone:
    """Pieces lease.first..last, or fewer if a stop was requested, in one sealed file: one record batch a piece."""
    ensure_prepared(work, opened, detail, store, to_compute=True)
    if detail.trial is not None:
        return _try(opened, lease, detail.trial, desk, store)
    buffer = io.BytesIO()
    failures: list[RowFailure] = []
    rows = tokens = padded_tokens = 0
    sums = dict.fromkeys(work.task.counted, 0)
    last = lease.first - 1
    start_s = time.monotonic()

    def alive() -> None:
        desk.beat(0, 0)
        if desk.stopping():
            raise StoppedEarly

    with (
        desk.timed("compute", f"window {lease.window} pieces {lease.first}-{lease.last}"),
        pa.memory_map(str(store.file(items_name(lease.window)))) as mapped,
        pa.ipc.new_stream(buffer, result_schema(work.task)) as writer,
    ):
        reader = pa.ipc.open_file(mapped)
        for piece in range(lease.first, lease.last + 1):
            items = reader.get_batch(piece)
            results = []
            failures_before = len(failures)
            try:
                for number, batch in enumerate(batches_of(items, piece)):
                    desk.at(piece, number)
                    left_out = detail.left_out.get((piece, number), {})
                    together = work.numerics.order == "dealt"
                    result, failed = compute_batch(opened, batch, left_out, alive, together=together)
                    results.append(result)
                    failures += failed
                    num_tokens = sum(map(len, batch.ids))
                    padded = num_tokens if work.numerics.order == "dealt" else len(batch.ids) * batch.length
                    rows, tokens, padded_tokens = rows + len(batch.ids), tokens + num_tokens, padded_tokens + padded
                    desk.beat(len(batch.ids), padded)
            except StoppedEarly:
                del failures[failures_before:]
                break
            writer.write_batch(_record(items, results, work.task))
            for name in work.task.counted:
                sums[name] += sum(value for result in results for value in result[name])
            last = piece
            if desk.stopping():
                break
    elapsed_s = time.monotonic() - start_s
    data = buffer.getbuffer()
    temporary = f"tmp/{lease.window:09d}-{lease.first:06d}-{lease.attempt}-{unique()}"
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
        failures=tuple(failures),
        sums=sums,
    )


def compute_batch(
    opened: Opened,
    batch: BatchItems,
    left_out: dict[int, tuple[str, str]],
    alive: Callable[[], None] = lambda: None,
    *,
    together: bool = False,
) -> tuple[dict[str, Any], list[RowFailure]]:
    """The batch's results and its failed rows. `left_out` are rows known to be bad: place -> (error, message).

    `together`: what a row computes depends on which rows are left out, so all good ones are computed once more.
    """
    failures = [_failure(batch, row, error, message) for row, (error, message) in sorted(left_out.items())]
    try:
        result, bad = compute_rows(opened, batch, set(range(len(batch.ids))) - left_out.keys(), alive)
        return result, [*failures, *(_failure(batch, row, *cause) for row, cause in sorted(bad.items()))]
    except FanfoldError as error:
        if not isinstance(error, DataError):
            raise
        first: Exception = error
    except Exception as error:
        first = error
    result, failures = _take_apart(opened, batch, left_out, failures, first, alive)
    if together and len(failures) < len(batch.ids):
        names = {failure.offset for failure in failures}
        good = {place for place, offset in enumerate(batch.offsets) if offset not in names}
        result, bad = compute_rows(opened, batch, good, alive)
        failures += [_failure(batch, row, *cause) for row, cause in sorted(bad.items())]
    return result, failures


def compute_rows(
    opened: Opened, batch: BatchItems, real: Collection[int], alive: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], dict[int, tuple[str, str]]]:
    """The batch in its own shape, every row that is not in `real` replaced by a filler.

    The results, and the rows among `real` that have none: row -> (error, message).
    """
    ids, left_out = batch.ids, frozenset(range(len(batch.ids))).difference(real)
    if left_out:
        filler = opened.filler()[: batch.length]
        ids = [filler if row in left_out else own for row, own in enumerate(ids)]
    try:
        return opened.compute(
            ModelBatch(ids=ids, length=batch.length, more=batch.more, left_out=left_out, alive=alive)
        ), {}
    except BadRows as bad:
        return bad.results, {row: cause for row, cause in bad.failures.items() if row not in left_out}


def _take_apart(
    opened: Opened,
    batch: BatchItems,
    left_out: dict[int, tuple[str, str]],
    failures: list[RowFailure],
    first: Exception,
    alive: Callable[[], None],
) -> tuple[dict[str, Any], list[RowFailure]]:
    """Find the culprits among the rows that are not left out already, and the results of all others."""
    places = [row for row in range(len(batch.ids)) if row not in left_out]
    bisection = Bisection(len(places))
    merged: dict[str, Any] = {}
    errors: dict[int, Exception] = {}
    without: dict[int, tuple[str, str]] = {}
    while (tried := bisection.next()) is not None:
        rows = tuple(places[i] for i in tried)
        num_bad = len(bisection.bad)
        error: Exception | None = None
        try:
            result, bad = compute_rows(opened, batch, rows, alive)
        except Exception as caught:
            error = caught
        else:
            _put(merged, result, rows)
            without |= bad
        bisection.tell(error is None)
        if error is not None:
            first = error
        if len(bisection.bad) > num_bad:
            for i in bisection.bad - errors.keys():
                errors[i] = first
            if len(bisection.bad) == 2:
                _check_filler(opened, batch, first)
    for i, error in errors.items():
        failures.append(_failure(batch, places[i], *row_error(error)))
    failures += [_failure(batch, row, *cause) for row, cause in sorted(without.items())]
    if not merged:  # not one row is good: the shape of the results comes from fillers alone
        merged, _ = compute_rows(opened, batch, (), alive)
    return merged, failures


def _check_filler(opened: Opened, batch: BatchItems, error: Exception) -> None:
    """Two culprits in one batch are rare: where fillers alone fail too, the rows are not to blame."""
    try:
        compute_rows(opened, batch, ())
    except Exception:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise OutOfMemory(
                f"a batch of {len(batch.ids)} rows of {batch.length} tokens",
                found=cause_line(error),
                allowed="memory for one batch of any rows",
                do="give each unit more memory (--memory-per-unit, fewer units with --on cpu:1)",
            ) from error
        raise InternalError(
            f"a batch of {len(batch.ids)} rows of {batch.length} tokens",
            found=f"it fails whatever rows it holds: {cause_line(error)}",
            allowed="errors that single rows cause",
            do="run again with --verbose; report this if the model works elsewhere",
        ) from error


def _put(merged: dict[str, Any], result: dict[str, Any], rows: Iterable[int]) -> None:
    """Take over the results of these rows."""
    for name, values in result.items():
        if name not in merged:
            merged[name] = np.copy(values) if isinstance(values, np.ndarray) else list(values)
            continue
        for row in rows:
            merged[name][row] = values[row]


def row_error(error: Exception) -> tuple[str, str]:
    """Class and one line, as they stand in quarantine.jsonl."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "OutOfMemory", f"more memory than the unit may hold (--memory-per-unit): {cause_line(error)}"
    return type(error).__name__, cause_line(error)


def _failure(batch: BatchItems, row: int, error: str, message: str) -> RowFailure:
    import json

    name = batch.names[row] if batch.names else None
    return RowFailure(
        offset=batch.offsets[row],
        error=error,
        message=message,
        id=None if name is None else json.loads(name),
        part=batch.parts[row] if batch.parts else None,
        piece=batch.piece,
        attempts=2,
    )


def _try(opened: Opened, lease: Compute, trial: Trial, desk: Desk, store: Store) -> TrialDone:
    """Compute some rows of one batch, the others as fillers; surviving it is the result."""
    with (
        desk.timed("compute", f"window {lease.window} piece {lease.first}: looking for the bad row"),
        pa.memory_map(str(store.file(items_name(lease.window)))) as mapped,
    ):
        for number, batch in enumerate(batches_of(pa.ipc.open_file(mapped).get_batch(lease.first), lease.first)):
            if number == trial.batch:
                desk.at(lease.first, number)
                try:
                    compute_rows(opened, batch, trial.rows, lambda: desk.beat(0, 0))
                except Exception as error:
                    return TrialDone(passed=False, cause=row_error(error))
    return TrialDone(passed=True)


def _record(items: pa.RecordBatch, results: Sequence[dict[str, Any]], task: Task) -> pa.RecordBatch:
    arrays = [items.column("offset")]
    if task.chunking is not None:
        arrays += [items.column("part"), pc.list_value_length(items.column("ids"))]
    for column in task.columns:
        array = column_array([result[column.name] for result in results], column)
        if len(array) != len(items):
            raise InternalError(
                f"{len(items)} values of {column.name}",
                found=f"the task returned {len(array)}",
                allowed="one value a row",
                do="report this, or fix the task if it is yours",
            )
        arrays.append(array)
    return pa.record_batch(arrays, schema=result_schema(task))
