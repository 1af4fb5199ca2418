"""Prepare: read a window's rows, make tokens of them, cut them into pieces, write both down.

Two files, neither durable (they can be made again): the items, one Arrow record batch per piece in the order
of computation, and the kept columns in row order, which the assembler puts beside the results.
"""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from fanfold.data.source import RowFailure
from fanfold.job.work import JobWork, PreparedWindow, WindowDetail, items_name, kept_name, unique
from fanfold.split.batch import cut, deal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fanfold.data.source import Window
    from fanfold.data.store import Store
    from fanfold.split.batch import Cut
    from fanfold.tasks.task import Opened

# offset: the row within its window; batch: within its piece; length: what the batch is padded to
ITEMS = pa.schema(
    [
        ("offset", pa.int32()),
        ("batch", pa.int32()),
        ("length", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("id", pa.string()),  # the id column's value as JSON, null where none was named
    ]
)
PART = pa.field("part", pa.int32())  # of texts that are cut into parts
MORE = pa.field("more", pa.list_(pa.int64()))  # where the task has more than ids for a row


TOO_LONG = ("TooLong", "the text is longer than the model's limit (--max-length)")


class Item(NamedTuple):
    """What is computed as one row: a text, or a part of it."""

    offset: int  # of the record within its window
    part: int
    ids: np.ndarray
    name: Any  # the id column's value
    cost: int
    more: tuple[int, ...] | None = None


class HashingFile:
    """A file to write to, whose sha256 is known when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.num_bytes += self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def prepare_window(
    work: JobWork, opened: Opened, window: Window, store: Store, alive: Callable[[], None] = lambda: None
) -> PreparedWindow:
    """Both files of the window stand in OUT/windows; the same rows always give the same files."""
    failures: list[RowFailure] = []
    items: list[Item] = []
    truncated = 0
    tag = f"{window.index:09d}-{unique()}"
    kept_tmp = f"tmp/k-{tag}"
    with (
        HashingFile(store.new_file(kept_tmp)) as kept_file,
        pa.ipc.new_stream(pa.PythonFile(kept_file, mode="w"), work.source.kept_schema) as kept,
    ):
        for chunk in work.source.chunks(window):
            failures += chunk.failures
            rows = [(chunk.offset + i, text) for i, text in enumerate(chunk.texts) if text is not None]
            if rows:
                first = window.first_row
                prepared = opened.prepare([text for _, text in rows], [first + offset for offset, _ in rows])
                names = {} if chunk.ids is None else {chunk.offset + i: name for i, name in enumerate(chunk.ids)}
                failed = dict(prepared.failures)
                if work.output.too_long == "quarantine":
                    failed |= dict.fromkeys(prepared.truncated, TOO_LONG)
                else:
                    truncated += len(prepared.truncated)
                for i, (error, message) in sorted(failed.items()):
                    offset = rows[i][0]
                    failures.append(RowFailure(offset=offset, error=error, message=message, id=names.get(offset)))
                parts = prepared.parts or [1] * len(rows)
                for i, ((offset, _), stop) in enumerate(zip(rows, accumulate(parts), strict=True)):
                    if i not in failed:
                        for part, at in enumerate(range(stop - parts[i], stop)):
                            ids = prepared.ids[at]
                            cost = prepared.costs[at] if prepared.costs else len(ids)
                            more = prepared.more[at] if prepared.more else None
                            items.append(Item(offset, part, ids, names.get(offset), cost, more))
            kept.write_batch(chunk.kept)
            alive()
    numerics, costs = work.numerics, [item.cost for item in items]
    if numerics.order == "dealt":
        plan = deal(range(len(items)), costs, piece_cost=numerics.batch_tokens)
    else:
        plan = cut(range(len(items)), costs, batch_tokens=numerics.batch_tokens, piece_batches=numerics.piece_batches)
    items_tmp = f"tmp/w-{tag}"
    items_sha256 = _write_items(store.new_file(items_tmp), plan, items, in_parts=work.task.chunking is not None)
    store.place(kept_tmp, kept_name(window.index))
    store.place(items_tmp, items_name(window.index))
    return PreparedWindow(
        costs=plan.costs,
        rows=plan.rows,
        tokens=sum(len(item.ids) for item in items),
        truncated=truncated,
        failures=tuple(failures),
        source_sha256=work.source.digest(window),
        items_sha256=items_sha256,
        kept_sha256=kept_file.sha256,
    )


def _write_items(path: Path, plan: Cut, items: list[Item], *, in_parts: bool) -> str:
    schema = ITEMS.append(PART) if in_parts else ITEMS
    has_more = bool(items) and items[0].more is not None
    if has_more:
        schema = schema.append(MORE)
    with HashingFile(path) as file, pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
        for piece in plan.pieces:
            rows = [items[slot] for slot in plan.order[piece[0].start : piece[-1].stop]]
            batch_of = [number for number, batch in enumerate(piece) for _ in range(batch.rows)]
            length_of = [batch.length for batch in piece for _ in range(batch.rows)]
            ends = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int32)
            flat = np.concatenate([row.ids for row in rows])
            names = [None if row.name is None else json.dumps(row.name) for row in rows]
            columns = [
                pa.array([row.offset for row in rows], pa.int32()),
                pa.array(batch_of, pa.int32()),
                pa.array(length_of, pa.int32()),
                pa.ListArray.from_arrays(pa.array(ends), pa.array(flat)),
                pa.array(names, pa.string()),
            ]
            if in_parts:
                columns.append(pa.array([row.part for row in rows], pa.int32()))
            if has_more:
                columns.append(pa.array([row.more for row in rows], MORE.type))
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return file.sha256


def ensure_prepared(
    work: JobWork, opened: Opened, detail: WindowDetail, store: Store, *, to_compute: bool = False
) -> None:
    """The window's files are there and sound: looked at once per process, made again where they are not.

    `to_compute` needs the items only: the kept columns of a remote window are not fetched for it.
    """
    window = detail.window
    files = [(items_name(window.index), detail.items_sha256), (kept_name(window.index), detail.kept_sha256)]
    for name, sha256 in files[:1] if to_compute else files:
        if not is_sound(store, name, sha256):
            _forget(store)
            prepare_window(work, opened, window, store)
            return


_sound: set[tuple[str, int, int, int, str]] = set()


def is_sound(store: Store, name: str, sha256: str | None) -> bool:
    """Whether what stands under the name has this hash; a copy that has not is fetched once more."""
    return _has_hash(store.file(name), sha256) or (store.refresh(name) and _has_hash(store.file(name), sha256))


def _has_hash(path: Path, sha256: str | None) -> bool:
    """Whether the file has this hash; read again only if inode, size or time of change differ."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, sha256 or "")
    if key in _sound:
        return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return False
    if len(_sound) > 10_000:
        _sound.clear()
    _sound.add(key)
    return True


def _forget(store: Store) -> None:
    root = str(store.files)
    _sound.difference_update([key for key in _sound if key[0].startswith(root)])
