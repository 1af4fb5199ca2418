"""Going on with a finished job: its failed rows once more, or rows that were appended to its input."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fanfold.data import journal
from fanfold.data.csv import long_fields
from fanfold.data.folder import RUN, SUCCESS, write_json
from fanfold.data.listing import open_binary
from fanfold.engine.schedule import Schedule
from fanfold.errors import ResumeError
from fanfold.job.compute import WHOLE, arrow_type, result_schema
from fanfold.job.log import borders, open_windows, settle
from fanfold.job.window import window_of
from fanfold.job.work import JobWork, merges, place_names, rescue_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fanfold.data.folder import Output
    from fanfold.data.source import Source
    from fanfold.data.store import Store

Entry = dict[str, Any]


def mend(store: Store, output: Output, entries: Sequence[Entry]) -> list[Entry]:
    """The entries, once files and log agree: lines to add are written, files that no line names are removed.

    A lease or part that was published but not logged is computed again: it was not committed. A logged part
    that is gone or has another size takes its windows back to the beginning; leases are looked at when they are
    assembled, and are not kept beyond that.
    """
    held = settle(entries)
    _check_log_is_there(store, entries)
    still_open = open_windows(held)
    named = {
        entry["name"]
        for entry in held
        if entry["kind"] == "part" or (entry["kind"] in ("lease", "rescue") and entry["window"] in still_open)
    }
    for folder in ("pieces", "data"):
        for name in store.list(folder):
            if name.startswith(("w-", "part-")) and f"{folder}/{name}" not in named:
                store.remove(f"{folder}/{name}")
    if output.file is not None and any(entry["kind"] == "file" for entry in held):
        return held  # parts have gone into the file
    lost: list[int] = []
    for entry in held:
        if entry["kind"] == "part" and store.size_bytes(entry["name"]) != entry["bytes"]:
            lost += range(entry["first"], entry["last"] + 1)
            store.remove(entry["name"])
    if lost:
        store.remove(SUCCESS)
        store.sync_folder(".")
        journal.append(store, [{"kind": "drop", "windows": lost}])
        held = settle([*held, {"kind": "drop", "windows": lost}])
    return held


def _check_log_is_there(store: Store, entries: Sequence[Entry]) -> None:
    """Results are never published before the log holds a line: without one, somebody has deleted it."""
    if entries:
        return
    results = [f"{folder}/{name}" for folder in ("data", "pieces") for name in store.list(folder)]
    if results or store.read(SUCCESS) is not None:
        raise ResumeError(
            f"going on in {store.shown}",
            found=f"no {journal.NAME} beside {', '.join(results[:2]) or SUCCESS}: it was deleted or emptied",
            allowed="a run folder as Fanfold has left it",
            do="restore the file, or start anew with --overwrite; nothing was changed",
        )


# -- failed rows ----------------------------------------------------------------------------------------


def reopen_failed(work: JobWork, store: Store, output: Output, entries: Sequence[Entry]) -> int:
    """Pieces with rows that failed while they were computed are in line again; how many rows those are.

    All other rows are saved from the output into files that the assembler reads like leases. Rows that could
    not be read from the input are not tried again: the input is the same.
    """
    held = settle(entries)
    failed = _failed_pieces(held)
    if not failed:
        return 0
    parts = [entry for entry in held if entry["kind"] == "part"]
    affected = [part for part in parts if any(window in failed for window in range(part["first"], part["last"] + 1))]
    if output.file is not None:
        affected = parts  # the one file is rebuilt from all of them
    windows = {entry["window"]: entry for entry in held if entry["kind"] == "window"}
    generations = {
        part["part"]: part["generation"] for entry in held if entry["kind"] == "reopen" for part in entry["parts"]
    }
    reopened = []
    for part in affected:
        generation = generations.get(part["part"], 0) + 1
        path = output.file or store.file(part["name"])
        rescued = []
        for index in range(part["first"], part["last"] + 1):
            name, sha256, pieces = None, None, sorted(failed.get(index, {}))
            if pieces and merges(work.task):  # the merged rows hold no part's own result
                pieces = [*range(len(windows[index]["rows"]))]
            else:
                name, sha256 = _rescue(work, store, path, windows[index], generation)
            rescued.append({"window": index, "name": name, "sha256": sha256, "pieces": pieces})
        reopened.append({"part": part["part"], "generation": generation, "windows": rescued})
    store.sync_folder("pieces")
    journal.append(store, [{"kind": "reopen", "parts": reopened}])  # one line: all of them or none
    store.remove(SUCCESS)
    store.sync_folder(".")
    return sum(count for pieces in failed.values() for count in pieces.values())


def _failed_pieces(entries: Sequence[Entry]) -> dict[int, dict[int, int]]:
    """window -> piece -> rows of it that failed."""
    found: dict[int, dict[int, int]] = {}
    for entry in entries:
        if entry["kind"] == "lease":
            for failure in entry["failed"]:
                of_window = found.setdefault(entry["window"], {})
                of_window[failure["piece"]] = of_window.get(failure["piece"], 0) + 1
    return found


def _rescue(work: JobWork, store: Store, path: Path, entry: Entry, generation: int) -> tuple[str | None, str | None]:
    """The window's results as they stand in the output, in a sealed and published file."""
    window = window_of(entry)
    table = stored_results(work, path, window.first_row, window.num_rows)
    if not table.num_rows:
        return None, None
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    data = buffer.getvalue()
    name, temporary = rescue_name(window.index, generation), f"tmp/rescue-{window.index}"
    store.remove(name)  # of an attempt that died before it was logged
    store.write_temporary(temporary, data)
    store.put_if_absent(temporary, name)
    return name, hashlib.sha256(data).hexdigest()


def stored_results(work: JobWork, path: Path, first: int, count: int) -> pa.Table:
    """What the output file holds of the records [first, first + count), as results of the task."""
    prefix, columns = work.output.prefix, work.task.columns
    names = [prefix + name for name in (*place_names(work.task), *(column.name for column in columns))]
    if work.output.format == "parquet":
        import pyarrow.dataset as ds

        row = ds.field(names[0])
        table = ds.dataset(str(path), format="parquet").to_table(
            columns=names, filter=(row >= first) & (row < first + count)
        )
    else:
        table = _text_rows(path, work, names, first, count)
    table = table.filter(pc.is_valid(table.column(prefix + columns[0].name))).combine_chunks()
    place = [table.column(0).to_numpy() - first]
    if work.task.chunking is not None:
        parts = np.full(len(table), WHOLE) if merges(work.task) else table.column(1).to_numpy()
        place += [parts, np.zeros(len(table))]
    arrays = [*(pa.array(values.astype(np.int32)) for values in place), *table.columns[len(names) - len(columns) :]]
    return pa.table(arrays, schema=result_schema(work.task))


def _text_rows(path: Path, work: JobWork, names: list[str], first: int, count: int) -> pa.Table:
    import csv
    import json

    num_places = len(names) - len(work.task.columns)
    cells: list[list[Any]] = [[] for _ in names]
    with path.open(encoding="utf-8", newline="") as file, long_fields():
        records: Any = map(json.loads, file) if work.output.format == "jsonl" else csv.DictReader(file)
        for record in records:
            if not first <= int(record[names[0]]) < first + count:
                continue
            for at in range(num_places):
                cells[at].append(int(record[names[at]]))
            for at, column in enumerate(work.task.columns, num_places):
                name = names[at]
                value = record[name]
                if isinstance(value, str) and column.kind == "float":
                    value = float(value) if value else None
                elif isinstance(value, str) and column.kind != "text":
                    value = json.loads(value) if value else None
                if column.kind == "vector" and value is not None:
                    value = np.asarray(value, dtype=np.float32)
                cells[at].append(value)
    types = [*[pa.int64()] * num_places, *(arrow_type(column) for column in work.task.columns)]
    return pa.table([pa.array(values, kind) for values, kind in zip(cells, types, strict=True)], names=names)


# -- appended and touched inputs ------------------------------------------------------------------------


def accept_inputs(
    source: Source, store: Store, run: Entry, wanted: Entry, entries: Sequence[Entry], *, append: bool
) -> tuple[Entry, bool]:
    """(run.json with today's inputs, whether rows were appended), where the rows read so far are unchanged.

    A file with another time of change but the same size is read again and accepted if its windows have the
    same hash. With `append`, the last file may have grown and files may have been added behind it.
    """
    old, new = run["fingerprint"]["inputs"], wanted["inputs"]
    if old == new:
        return run, False
    grown = _grown(old, new)
    if (grown and not append) or (not grown and not _touched(old, new)):
        return run, False  # the comparison of fingerprints says what differs
    if grown:
        _check_can_grow(source, old)
    _check_read_so_far(source, settle(entries))
    updated = {**run, "fingerprint": {**run["fingerprint"], "inputs": new}}
    if grown:
        _begin_append(store, settle(entries), wanted["numerics"]["windows_per_part"])
    else:
        write_json(store, RUN, updated)
        return updated, False
    write_json(store, RUN, updated)
    return updated, True


def _touched(old: list[Entry], new: list[Entry]) -> bool:
    """Same files, same sizes, other times."""
    strip = [[{**file, "mtime_ns": None} for file in files] for files in (old, new)]
    return strip[0] == strip[1]


def _grown(old: list[Entry], new: list[Entry]) -> bool:
    """The old files in the same order, the last one perhaps longer, perhaps more files behind."""
    if not old or len(new) < len(old) or [f["path"] for f in new[: len(old)]] != [f["path"] for f in old]:
        return False
    sizes = [(a["bytes"], b["bytes"]) for a, b in zip(old, new, strict=False)]
    if any(a is None or b is None for a, b in sizes) or any(a != b for a, b in sizes[:-1]):
        return False
    last_old, last_new = sizes[-1]
    return bool(last_new >= last_old and (last_new > last_old or len(new) > len(old)))


def _check_can_grow(source: Source, old: list[Entry]) -> None:
    last = source.files[len(old) - 1]
    size_bytes = old[-1]["bytes"]
    found = None
    if any(file.path.endswith((".gz", ".zst")) or file.size_bytes is None for file in source.files):
        found = "a compressed or streamed input"
    elif size_bytes and last.size_bytes != size_bytes:
        with open_binary(last.path) as handle:
            handle.seek(size_bytes - 1)
            if handle.read(1) != b"\n":
                found = f"{last.path} did not end with a line end: its last row may have grown"
    if found:
        raise ResumeError(
            "going on with appended rows (--allow-append)",
            found=found,
            allowed="plain files whose last line was complete, and new files behind them",
            do="start anew with --overwrite",
        )


def _check_read_so_far(source: Source, entries: Sequence[Entry]) -> None:
    for entry in entries:
        if entry["kind"] != "window":
            continue
        window = window_of(entry)
        if source.digest(window) != entry["source_sha256"]:
            raise ResumeError(
                f"going on with {source.files[window.spans[0].file].path}",
                found=f"rows {window.first_row} to {window.first_row + window.num_rows - 1} have changed",
                allowed="the same bytes as before, with new rows only behind them",
                do="start anew with --overwrite",
            )


def _begin_append(store: Store, entries: Sequence[Entry], windows_per_part: int) -> None:
    """Rows from here on begin a new window and a new part; windows behind a gap are forgotten."""
    windows = sorted(entry["window"] for entry in entries if entry["kind"] == "window")
    count = next((i for i, index in enumerate(windows) if i != index), len(windows))
    so_far = Schedule(num_units=1, windows_per_part=windows_per_part, borders=borders(entries))
    lines: list[Entry] = []
    if count < len(windows):
        lines.append({"kind": "drop", "windows": windows[count:]})
    lines.append({"kind": "append", "first_window": count, "first_part": so_far.part_of(count - 1) + 1 if count else 0})
    store.remove(SUCCESS)
    store.sync_folder(".")
    journal.append(store, lines)
