"""`fanfold verify`: recompute the whole batches of a sample of rows on one unit, and compare bytes.

Whole batches, because the composition of a batch is part of the result. Every checksum is compared too.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fanfold.data.folder import SUCCESS
from fanfold.data.opening import open_source
from fanfold.data.run_folder import RunFolder
from fanfold.data.scratch import scratch_folder
from fanfold.engine.engine import Desk
from fanfold.errors import DifferenceFound, ResumeError
from fanfold.job.compute import batches_of, column_array, compute_rows
from fanfold.job.fingerprint import check_same, fingerprint
from fanfold.job.finish import hash_of, output_sha256
from fanfold.job.opened import OpenedRun, open_existing
from fanfold.job.prepare import prepare_window
from fanfold.job.reopen import stored_results
from fanfold.job.request import Request
from fanfold.job.verbs import task_of
from fanfold.job.window import window_of
from fanfold.job.work import JobWork, OutputRules, items_name, merges, place_names
from fanfold.machine.discover import discover
from fanfold.machine.threads import held_threads
from fanfold.plan.numerics import Numerics
from fanfold.plan.plan import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fanfold.data.source import Window
    from fanfold.data.store import Store
    from fanfold.tasks.task import Task

Place = tuple[int, int | None]  # a record's offset within its window, and the part of its text
Values = tuple[Any, ...]  # one result a column


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What verify found; `differing` names rows whose bytes differ."""

    rows_in: int
    rows_compared: int
    batches: int
    parts_checked: int
    level: str
    max_difference: float
    differing: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """For a person."""
        same = "all bytes are the same" if not self.max_difference else f"largest difference {self.max_difference:g}"
        if not self.rows_compared:
            same = "no rows compared"
        return (
            f"{self.parts_checked} part(s): every checksum is right\n"
            f"{self.rows_compared:,} of {self.rows_in:,} rows in {self.batches} whole batches computed again: "
            f"{same} (level {self.level})"
        )

    @property
    def record(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows_in,
            "rows_compared": self.rows_compared,
            "batches": self.batches,
            "parts_checked": self.parts_checked,
            "level": self.level,
            "max_difference": self.max_difference,
            "differing_rows": list(self.differing),
        }


def verify(out: str | Path, *, sample: int = 200, seed: int = 0, model: str | None = None) -> Verdict:
    """Checks every checksum, then recomputes whole batches until they hold `sample` rows (0: checksums only).

    Raises: DifferenceFound (exit 5) names the rows or files that differ; ResumeError if inputs, model or
    library versions are no longer those of the run, because then a difference would say nothing.
    """
    opened = open_existing(out)
    if opened.store.read(SUCCESS) is None:
        raise ResumeError(
            f"verifying {opened.output.shown}",
            found="the job is not finished",
            allowed="finished jobs",
            do="run the same command again to finish it",
        )
    _check_sums(opened)
    request = opened.run["request"]
    numerics = Numerics(**opened.run["plan"]["numerics"])
    stored = opened.run["fingerprint"]
    task = task_of(opened.run, model)
    windows = {index: entry for index, entry in opened.windows.items() if sum(entry["rows"])}
    in_parts = "part" in place_names(task)
    rows_in = sum(
        sum(entry["rows"]) + len(entry["failed"]) if in_parts else entry["num_rows"]
        for entry in opened.windows.values()
    )
    checked = len(opened.parts)
    if not windows or not sample:
        return Verdict(
            rows_in=rows_in,
            rows_compared=0,
            batches=0,
            parts_checked=checked,
            level=numerics.level,
            max_difference=0.0,
        )
    if "-" in request["inputs"]:
        raise ResumeError(
            f"verifying rows of {opened.output.shown}",
            found="the input was stdin, which cannot be read again; every checksum is right",
            allowed="inputs that are files",
            do="use --sample 0 to check the checksums alone",
        )
    with scratch_folder() as folder:
        run_folder = RunFolder(place=str(folder), sync=False)
        store = run_folder.open()
        store.make_folders(["windows", "tmp", "spool"])
        keep = request["keep"]
        source = open_source(
            request["inputs"],
            column=task.reading(request["column"]),
            id_column=request["id"],
            keep=tuple(keep) if isinstance(keep, list) else keep,
            form="json" if opened.output.format == "jsonl" else "typed",
            spool=folder / "spool",
            limit=request["limit"],
        )
        asked = Request(
            inputs=tuple(request["inputs"]),
            out=opened.output.shown,
            column=request["column"],
            id=request["id"],
            keep=tuple(keep) if isinstance(keep, list) else keep,
            on_error="null" if request["failed_as_null"] else "quarantine",
            limit=request["limit"],
            prefix=request["prefix"],
            too_long=request["too_long"],
        )
        wanted = fingerprint(
            source=source,
            task=task,
            request=asked,
            numerics=numerics,
            format_name=opened.output.format,
            machine=discover(),
        )
        check_same(stored, wanted, str(opened.output.shown))
        work = JobWork(
            task=task,
            source=source,
            numerics=numerics,
            output=OutputRules(format=opened.output.format, prefix=request["prefix"], too_long=request["too_long"]),
            folder=run_folder,
        )
        with held_threads(numerics.threads_per_unit):
            if numerics.compiled and not task.compiled_for(numerics):
                task.compile(numerics)
            unit = Unit(name="verify", device=f"{numerics.device}:0" if numerics.device == "cuda" else "cpu")
            desk = Desk(unit)
            try:
                return _compare(work, desk, opened, windows, sample, random.Random(seed), rows_in, store)
            finally:
                desk.clear()


def _compare(
    work: JobWork,
    desk: Desk,
    opened: OpenedRun,
    windows: dict[int, dict[str, Any]],
    sample: int,
    chance: random.Random,
    rows_in: int,
    store: Store,
) -> Verdict:
    loaded = work.loaded(desk)
    differing: list[int] = []
    compared = batches = 0
    worst = 0.0
    for index, pieces in _draw(windows, sample, chance):
        window = _find_window(work, opened, index)
        prepared = prepare_window(work, loaded, window, store)
        if prepared.items_sha256 != windows[index]["items_sha256"]:
            raise DifferenceFound(
                f"preparing window {index} again",
                found="other tokens or another cut than the run had",
                allowed="the same rows, tokens and batches",
                do="did the input change? Start anew with --overwrite, or report this",
            )
        expected = _stored_rows(work, opened, window)
        failed = {
            (failure["offset"], failure.get("part"))
            for lease in opened.leases.get(index, ())
            for failure in lease["failed"]
        }
        with pa.memory_map(str(store.file(items_name(index)))) as mapped:
            reader = pa.ipc.open_file(mapped)
            if merges(work.task):
                pieces, offsets = _with_all_parts(reader, pieces)
                offsets -= {offset for offset, _ in failed}
            values: dict[Place, Values] = {}
            tokens: dict[Place, int] = {}
            for piece in pieces:
                for batch in batches_of(reader.get_batch(piece), piece):
                    places = [*zip(batch.offsets, batch.parts or repeat(None), strict=False)]
                    real = {i for i, place in enumerate(places) if place not in failed}
                    result, bad = compute_rows(loaded, batch, real)
                    rows = _values(work.task, result)
                    values.update((places[i], rows[i]) for i in real - bad.keys())
                    tokens.update((places[i], len(batch.ids[i])) for i in real)
                    batches += 1
        if merges(work.task):
            values = _merged(work.task, values, tokens, offsets)
        for (offset, part), value in values.items():
            compared += 1
            stored = expected.get((offset, part))
            if stored is None or not _same(stored, value):
                differing.append(window.first_row + offset)
                worst = max(worst, math.inf if stored is None else _distance(stored, value))
    verdict = Verdict(
        rows_in=rows_in,
        rows_compared=compared,
        batches=batches,
        parts_checked=len(opened.parts),
        level=work.numerics.level,
        max_difference=worst,
        differing=tuple(sorted(differing)),
    )
    tolerance = 0.0 if verdict.level == "B" else 1e-5 if work.numerics.dtype == "float32" else 1e-2
    if differing and worst <= tolerance and tolerance:
        return verdict
    if differing:
        shown = ", ".join(map(str, verdict.differing[:10]))
        raise DifferenceFound(
            f"verifying {opened.output.shown}",
            found=f"{len(differing)} of {compared} recomputed rows differ (largest difference {worst:g}): rows {shown}"
            + (" ..." if len(differing) > 10 else ""),
            allowed="the same bytes" if verdict.level == "B" else f"a difference of {tolerance:g}",
            do="if the machine or the libraries changed, that is why; otherwise report this",
        )
    return verdict


def _draw(windows: dict[int, dict[str, Any]], sample: int, chance: random.Random) -> Iterator[tuple[int, list[int]]]:
    """Whole pieces by chance until they hold `sample` rows, grouped by window."""
    every = [(index, piece) for index, entry in sorted(windows.items()) for piece in range(len(entry["rows"]))]
    chance.shuffle(every)
    rows = 0
    drawn: dict[int, list[int]] = {}
    for index, piece in every:
        if rows >= sample:
            break
        drawn.setdefault(index, []).append(piece)
        rows += windows[index]["rows"][piece]
    yield from sorted(drawn.items())


def _find_window(work: JobWork, opened: OpenedRun, index: int) -> Any:
    window = window_of(opened.windows[index])
    if window.sha256 is None:
        return window
    for found in work.source.windows(work.numerics.window_rows):  # a spooled input: unpacked once more
        if found.index == index:
            return found
        work.source.release(found.index)
    raise DifferenceFound(
        f"finding window {index} again",
        found="the input ends before it",
        allowed="the input of the run",
        do="start anew with --overwrite",
    )


def _values(task: Task, results: dict[str, Any]) -> list[Values]:
    """The results row by row, as they will stand in the output."""
    arrays = [column_array([results[column.name]], column) for column in task.columns]
    return _rows_of(arrays)


def _rows_of(arrays: list[pa.Array]) -> list[Values]:
    columns: list[Any] = []
    for array in arrays:
        if pa.types.is_fixed_size_list(array.type):
            columns.append(array.flatten().to_numpy().reshape(len(array), -1))
        else:
            columns.append(array.to_pylist())
    return list(zip(*columns, strict=True))


def _same(a: Any, b: Any) -> bool:
    """Equal to the bit, NaN and the sign of zero included."""
    if isinstance(a, np.ndarray):
        return bool(a.tobytes() == b.tobytes())
    if isinstance(a, tuple):
        return all(map(_same, a, b))
    return repr(a) == repr(b)


def _distance(a: Any, b: Any) -> float:
    """The largest difference between numbers; infinite where anything else differs."""
    if _same(a, b):
        return 0.0
    if isinstance(a, np.ndarray):
        return float(np.max(np.abs(a - b)))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b)
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return max(_distance(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return max(map(_distance, a, b))
    return math.inf


def _stored_rows(work: JobWork, opened: OpenedRun, window: Window) -> dict[Place, Values]:
    """(offset, part) -> stored results, for the rows of one window."""
    part = next(part for part in opened.parts if part["first"] <= window.index <= part["last"])
    path = opened.output.file or opened.store.file(part["name"])
    table = stored_results(work, path, window.first_row, window.num_rows)
    values = _rows_of([table.column(column.name).combine_chunks() for column in work.task.columns])
    in_parts = "part" in place_names(work.task)
    parts = table.column("part").to_pylist() if in_parts else [None] * table.num_rows
    return dict(zip(zip(table.column("offset").to_pylist(), parts, strict=True), values, strict=True))


def _with_all_parts(reader: Any, pieces: list[int]) -> tuple[list[int], set[int]]:
    """The offsets of the records in these pieces, and all pieces that hold parts of them."""
    held = [set(reader.get_batch(piece).column("offset").to_pylist()) for piece in range(reader.num_record_batches)]
    offsets = set().union(*(held[piece] for piece in pieces))
    return [piece for piece, found in enumerate(held) if found & offsets], offsets


def _merged(
    task: Task, values: dict[Place, Values], tokens: dict[Place, int], offsets: set[int]
) -> dict[Place, Values]:
    """One row of results for each of these records."""
    names = [column.name for column in task.columns]
    places: dict[int, list[Place]] = {offset: [] for offset in offsets}
    for place in sorted(values):
        if place[0] in places:
            places[place[0]].append(place)
    found: dict[Place, Values] = {}
    for offset, parts in places.items():
        of_parts = {name: np.stack([values[place][at] for place in parts]) for at, name in enumerate(names)}
        merged = task.merge_parts(of_parts, [tokens[place] for place in parts])
        found[offset, None] = tuple(merged[name] for name in names)
    return found


def _check_sums(opened: OpenedRun) -> None:
    """Every part has the bytes that the log says."""
    parts = opened.parts
    if opened.output.file is not None:
        summary = opened.store.read("summary.json")
        assert summary is not None
        single = opened.output.file
        paths: Iterator[tuple[Path | str, Path, str | None]] = iter([(single, single, _single_sha256(opened, parts))])
    else:
        names = ((part["name"], part["sha256"]) for part in parts)
        paths = ((opened.store.path(name), opened.store.file(name), sha256) for name, sha256 in names)
    for shown, path, sha256 in paths:
        if not path.exists():
            found = "it is gone"
        elif sha256 is not None and hash_of(path) != sha256:
            found = "its bytes are not those that were committed"
        else:
            continue
        raise DifferenceFound(
            f"verifying {shown}",
            found=found,
            allowed="the file as the run has written it",
            do="start anew with --overwrite, or restore the file from a backup",
        )


def _single_sha256(opened: OpenedRun, parts: list[dict[str, Any]]) -> str | None:
    import json

    summary = json.loads(opened.store.read("summary.json") or b"{}")
    if summary.get("output_sha256") != output_sha256(parts):
        raise DifferenceFound(
            f"verifying {opened.store.shown}",
            found="summary.json and commits.log disagree on the output's hash",
            allowed="records as the run has written them",
            do="start anew with --overwrite",
        )
    sha256: str | None = summary.get("file_sha256")
    return sha256
