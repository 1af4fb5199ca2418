"""Fanfold on DataFrames and RDDs of a Spark session that you have; Spark Connect sessions too.

import fanfold.spark
vectors = fanfold.spark.embed(df, column="text")             # lazy: df with the columns embedding and error
total = fanfold.spark.fold(rdd, f, ff.Mean())                 # one value per row of a partition, merged

For whole jobs over files, with resume and quarantine, see `fanfold embed ... --on spark://HOST:PORT`.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import traceback
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold import extras
from fanfold.engine._worker import portable
from fanfold.engine.supervisor import IN_WORKER
from fanfold.errors import DataError, PieceFailed, PlanError, cause_line
from fanfold.merge.merge import OrderedFold

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import pyarrow as pa

_WINDOW_ROWS = 4096  # rows that are sorted by length together, as in a job over files
_WINDOW_BYTES = 64_000_000  # of kept columns; a window ends with the Arrow batch that fills it
_BATCH_BYTES = 16_000_000  # of a batch that goes back to Spark

_TASK_OPTIONS = ("revision", "dtype", "max_length", "prefix_text", "prompt_name")


def embed(
    df: Any,
    *,
    column: str = "text",
    model: str | None = None,
    output: str = "embedding",
    error: str = "error",
    memory_per_unit: str | None = None,
    timeout_batch: str | None = None,
    **options: Any,
) -> Any:
    """The DataFrame with two columns more: `output` (array of float) and `error` (string); lazy, order kept.

    A row that is null, raises, or crashes, hangs or overfills the process that computes it has a null vector and
    the reason in `error`; the others do not notice, and no stage fails of it. One process per Python worker holds
    the model, for as long as Spark keeps that worker. A partition's rows give the same bytes every time.
    Options: revision, dtype, max_length, prefix_text, prompt_name.
    Raises: PlanError, InputError, MissingExtra before anything is computed.
    """
    extras.need("pyspark", extra="spark", purpose="fanfold.spark")
    from pyspark.sql.types import ArrayType, FloatType, StringType, StructField, StructType

    from fanfold.tasks.embed import make_embed

    unknown = sorted(set(options) - set(_TASK_OPTIONS))
    if unknown:
        raise PlanError(
            f"fanfold.spark.embed(df, {', '.join(f'{name}=...' for name in unknown)})",
            found="options that it does not know",
            allowed=", ".join(_TASK_OPTIONS),
            do="leave them away",
        )
    _check_columns(df, column, (output, error))
    task = make_embed(model=model, **options)
    request = {"memory_per_unit": memory_per_unit, "timeout_batch": timeout_batch}
    result = StructType(
        [
            *df.schema.fields,
            StructField(output, ArrayType(FloatType(), containsNull=False)),
            StructField(error, StringType()),
        ]
    )
    rows = functools.partial(_embed_partition, cloudpickle.dumps(task), column, (output, error), request)
    return df.mapInArrow(rows, result)


def fold(data: Any, f: Any, merge: Any) -> Any:
    """merge(f(p_1), ..., f(p_M)) over the partitions of an RDD or DataFrame, in their order.

    `f` gets a partition: of an RDD the list of its elements, of a DataFrame an Arrow table. Merges are those of
    `ff.fold` (a dict of them gives a dict of results) and take one value per row, unless told otherwise. Parts are
    joined by a tree reduction, but as the one fixed tree over the partitions says: its shape never shows in the bits.
    Raises: PieceFailed where f raises, with f's own error as its cause; PlanError.
    """
    extras.need("pyspark", extra="spark", purpose="fanfold.spark")
    from collections.abc import Mapping as Any_Mapping

    from fanfold.merge.record import Record

    if isinstance(merge, Any_Mapping):
        merge = Record(merge)
    body = cloudpickle.dumps((f, merge))
    # Asked of the class: a DataFrame of Spark Connect has a column for every name.
    if hasattr(type(data), "mapPartitionsWithIndex"):
        count = data.getNumPartitions()
        blobs = data.mapPartitionsWithIndex(functools.partial(_fold_rows, body))
    elif hasattr(type(data), "mapInArrow"):
        frame = data.mapInArrow(functools.partial(_fold_frame, body), "blob binary")
        if type(frame).__module__.startswith("pyspark.sql.connect"):  # it has no RDDs: the parts are joined here
            return _finish(merge, functools.reduce(functools.partial(_join, body), _blobs_of(frame), b""))
        count = data.rdd.getNumPartitions()
        blobs = frame.rdd.map(_blob_of)
    else:
        raise PlanError(
            f"fanfold.spark.fold({type(data).__name__}, ...)",
            found="neither an RDD nor a DataFrame",
            allowed="an RDD or a DataFrame of Spark; ff.fold takes data in memory",
            do="make it one, for example spark.createDataFrame(data)",
        )
    if not count:
        return merge.finish(merge.empty())
    return _finish(merge, blobs.treeReduce(functools.partial(_join, body)))


# -- embed, on the executors --------------------------------------------------------------------------


def _check_columns(df: Any, column: str, new: tuple[str, ...]) -> None:
    names = {field.name: field.dataType.simpleString() for field in df.schema.fields}
    if column not in names or names[column] != "string":
        found = f"it is {names[column]}" if column in names else f"the columns {', '.join(names)}"
        raise PlanError(
            f"fanfold.spark.embed(df, column={column!r})",
            found=found,
            allowed="a column of strings",
            do="name it with column=, or cast it: df.withColumn(...)",
        )
    taken = [name for name in new if name in names]
    if taken:
        raise PlanError(
            f"fanfold.spark.embed(df) with the new columns {', '.join(new)}",
            found=f"df has {', '.join(taken)} already",
            allowed="names that are free",
            do="name them with output= and error=",
        )


def _embed_partition(
    task: bytes,
    column: str,
    names: tuple[str, str],
    request: Mapping[str, Any],
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    os.environ.pop(IN_WORKER, None)  # a Python worker is no unit: it has one
    loaded = pickle.loads(task)
    for window in _windows(batches):
        texts = pa.chunked_array([batch.column(column) for batch in window])
        vectors, errors = _embed_window(loaded, texts, request)
        row = 0
        for batch in window:
            for start, count in _slices(batch, vectors.type.list_size * 4):
                kept = batch.slice(start, count)
                added = [vectors.slice(row, count).cast(pa.list_(pa.float32())), errors.slice(row, count)]
                yield pa.record_batch([*kept.columns, *added], names=[*kept.schema.names, *names])
                row += count


def _windows(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Consecutive batches, cut and gathered into windows that depend on the rows alone, not on Arrow's batches."""
    window: list[pa.RecordBatch] = []
    rows = num_bytes = 0
    for batch in batches:
        start = 0
        while start < batch.num_rows:
            per_row = max(1, batch.nbytes // batch.num_rows)
            room = max(1, min(_WINDOW_ROWS - rows, (_WINDOW_BYTES - num_bytes) // per_row))
            taken = batch.slice(start, room)
            window.append(taken)
            start, rows, num_bytes = start + taken.num_rows, rows + taken.num_rows, num_bytes + per_row * taken.num_rows
            if rows >= _WINDOW_ROWS or num_bytes >= _WINDOW_BYTES:
                yield window
                window, rows, num_bytes = [], 0, 0
    if window:
        yield window


def _slices(batch: pa.RecordBatch, more_per_row: int) -> Iterator[tuple[int, int]]:
    """(start, rows) of slices of bounded bytes, with `more_per_row` added to each row."""
    per_row = batch.nbytes // max(1, batch.num_rows) + more_per_row
    step = max(1, _BATCH_BYTES // per_row)
    for start in range(0, batch.num_rows, step):
        yield start, min(step, batch.num_rows - start)


def _embed_window(task: Any, texts: pa.ChunkedArray, request: Mapping[str, Any]) -> tuple[pa.Array, pa.Array]:
    """(vectors with nulls, errors with nulls): a job of its own on one unit of this Python worker, gone afterwards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fanfold.data.folder import QUARANTINE
    from fanfold.data.scratch import scratch_folder
    from fanfold.job.finish import read_output
    from fanfold.job.request import Request
    from fanfold.job.run import run_job

    width = task.columns[0].width
    errors: list[str | None] = [None] * len(texts)
    with scratch_folder() as folder:
        path, out = folder / "texts.parquet", folder / "out"
        table = pa.table({"text": texts.cast(pa.large_string())})
        pq.write_table(table, path, compression="none")
        wanted = Request(
            inputs=(str(path),), out=out, on="cpu:1", on_error="null", keep="none", sync=False, **dict(request)
        )
        vectors = None
        try:
            run_job(task, wanted)
        except DataError as error:  # not one row succeeded
            if not (out / QUARANTINE).exists():
                raise
            vectors = pa.nulls(len(texts), pa.list_(pa.float32(), width))
            errors = [cause_line(error)] * len(texts)
        if (out / QUARANTINE).exists():
            for line in (out / QUARANTINE).read_text(encoding="ascii").splitlines():
                failure = json.loads(line)
                message = re.sub(rf"^{re.escape(str(path))}, row \d+: ", "", failure["message"])  # not the user's rows
                errors[failure["row"]] = f"{failure['error']}: {message}"
        if vectors is None:
            vectors = pa.concat_arrays(read_output(out).column(task.columns[0].name).chunks)
    return vectors, pa.array(errors, pa.string())


# -- fold, on the executors ---------------------------------------------------------------------------


def _fold_rows(body: bytes, index: int, rows: Iterable[Any]) -> Iterator[bytes]:
    values = list(rows)
    yield _part(body, index, values, len(values))


def _fold_frame(body: bytes, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    found = list(batches)
    table = pa.Table.from_batches(found) if found else None
    blob = _part(body, context.partitionId(), table, table.num_rows if table is not None else 0)
    yield pa.record_batch([pa.array([blob], pa.binary())], names=["blob"])


def _blob_of(row: Any) -> bytes:
    return bytes(row.blob)


def _blobs_of(frame: Any) -> list[bytes]:
    return [bytes(row.blob) for row in frame.collect()]


def _pickled(value: Any) -> bytes:
    return bytes(cloudpickle.dumps(value))


def _part(body: bytes, index: int, values: Any, rows: int) -> bytes:
    """The partition's part as blocks of the fixed tree, or what f raised: pickled, so that no stage fails of it."""
    from fanfold.job.piecework import made

    f, merge = pickle.loads(body)
    if not rows:
        return _pickled(("blocks", [(0, index, merge.empty())]))
    try:
        part = merge.lift(made(f)(values), rows)
    except Exception as error:
        return _pickled(("failed", (index, rows, portable(error), traceback.format_exc())))
    return _pickled(("blocks", [(0, index, part)]))


def _join(body: bytes, left: bytes, right: bytes) -> bytes:
    """The blocks of both, neighbours joined; of two failures the one of the first partition."""
    found = [pickle.loads(blob) for blob in (left, right) if blob]
    failures = [value for kind, value in found if kind == "failed"]
    if failures:
        return _pickled(("failed", min(failures, key=lambda failure: failure[0])))
    folded: OrderedFold[Any] = OrderedFold(pickle.loads(body)[1])
    for _, blocks in found:
        for level, index, part in blocks:
            folded.add_block(level, index, part)
    return _pickled(("blocks", folded.blocks()))


def _finish(merge: Any, blob: bytes) -> Any:
    if not blob:
        return merge.finish(merge.empty())
    kind, value = pickle.loads(blob)
    if kind == "failed":
        index, rows, error, trace = value
        error.add_note(trace)
        raise PieceFailed(
            f"the function over partition {index} ({rows} row(s))",
            found=cause_line(error),
            allowed="a function that returns for every partition",
            do="repair the function, or the rows; the error above is its own",
        ) from error
    folded: OrderedFold[Any] = OrderedFold(merge)
    for level, index, part in value:
        folded.add_block(level, index, part)
    num_pieces = sum(1 << level for level, _, _ in value)
    return merge.finish(folded.part(num_pieces))
