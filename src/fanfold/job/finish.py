"""The end of a job: every row accounted for, quarantine and summary written, one file made, _SUCCESS last."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from typing import TYPE_CHECKING, Any

from fanfold.data import journal
from fanfold.data.folder import QUARANTINE, SUCCESS, SUMMARY, TRACE, write_json
from fanfold.data.run_folder import RunFolder
from fanfold.errors import InternalError, StorageError
from fanfold.job.work import merges

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.data.folder import Output
    from fanfold.data.store import Store
    from fanfold.job.agenda import Totals
    from fanfold.job.work import JobWork
    from fanfold.plan.plan import Plan
    from fanfold.report.timeline import Timeline


def finish(
    work: JobWork, plan: Plan, store: Store, output: Output, totals: Totals, timeline: Timeline
) -> dict[str, Any]:
    """The summary; the output stands complete under the name that the user gave."""
    chunking, merged = work.task.chunking, merges(work.task)
    failures = _a_row_each(totals.failures, merged=merged)
    rows_in = totals.rows_found if chunking is None or merged else totals.rows_prepared
    rows_failed = len(failures)
    rows_ok = rows_in - rows_failed
    expected = rows_in if work.output.failed_as_null else rows_ok
    if totals.rows_assembled != expected:
        raise InternalError(
            f"{expected} rows in the output",
            found=f"{totals.rows_assembled} rows ({rows_in} in, {rows_failed} failed)",
            allowed="rows_in = rows_ok + rows_failed",
            do=f"report this; the folder {store.shown} is kept as it is",
        )
    write_quarantine(store, failures)
    parts = [entry for _, entry in sorted(totals.parts.items())]
    if not parts:
        parts = [_empty_part(work, store)]
    file_sha256 = None
    if output.file is not None:
        file_sha256 = _publish_file(work, store, output.file, parts, totals.files)
    elapsed_s = time.monotonic() - timeline.start_s
    computed = totals.rows_computed - totals.rows_resumed
    idle_share = timeline.idle_share()
    first = totals.first_commit_s
    summary = {
        "rows_in": rows_in,
        "rows_ok": rows_ok,
        "rows_failed": rows_failed,
        **({"records_in": totals.rows_found, "chunks": totals.rows_computed} if chunking else {}),
        "rows_resumed": totals.rows_resumed,
        "truncated": totals.truncated,
        "elapsed_s": round(elapsed_s, 3),
        "load_s": round(timeline.load_s(), 3),
        "first_commit_s": None if first is None else round(first - timeline.start_s, 3),
        "rows_per_s": round(computed / elapsed_s, 2) if elapsed_s > 0 else 0.0,
        "tokens_per_s": round((totals.tokens - totals.tokens_resumed) / elapsed_s, 1) if elapsed_s > 0 else 0.0,
        "tokens": totals.tokens,
        **_sums(totals, elapsed_s),
        "padding_share": round(1 - totals.tokens / totals.padded_tokens, 4) if totals.padded_tokens else 0.0,
        "peak_pss_bytes": timeline.peak_pss_bytes,
        "retries": totals.retries,
        "idle_share": round(idle_share, 4) if idle_share is not None else None,
        "units_used": len(timeline.units_used) or len(plan.units),
        "level": plan.numerics.level,
        "windows": totals.num_windows,
        "parts": len(totals.parts),
        "output": str(output.shown),
        "output_sha256": output_sha256(parts),
        "file_sha256": file_sha256,
    }
    write_json(store, SUMMARY, summary)
    store.replace(TRACE, timeline.trace())
    for folder in ("windows", "spool", "pieces", "tmp"):
        store.remove_folder(folder)
    for folder in ("data", "."):  # a part that was replaced must not come back beside _SUCCESS
        store.sync_folder(folder)
    store.replace(SUCCESS, b"")
    return summary


def _sums(totals: Totals, elapsed_s: float) -> dict[str, Any]:
    """What the task counts, over the whole job, and per second of this run."""
    found: dict[str, Any] = dict(totals.sums)
    for name, total in totals.sums.items():
        found[f"{name}_per_s"] = round((total - totals.sums_resumed[name]) / elapsed_s, 1) if elapsed_s > 0 else 0.0
    return found


def output_sha256(parts: list[dict[str, Any]]) -> str:
    """One hash over the rows' Arrow buffers, window by window in row order."""
    digest = hashlib.sha256()
    for part in parts:
        for window in part["window_sha256"]:
            digest.update(bytes.fromhex(window))
    return digest.hexdigest()


def _a_row_each(failures: list[dict[str, Any]], *, merged: bool) -> list[dict[str, Any]]:
    """In row order, each row once; a text whose parts are merged fails with the first of them that did."""
    found: dict[tuple[int, int | None], dict[str, Any]] = {}
    for failure in sorted(failures, key=lambda failure: (failure["row"], failure.get("part", 0))):
        found.setdefault((failure["row"], None if merged else failure.get("part")), failure)
    return [*found.values()]


def write_quarantine(store: Store, failures: list[dict[str, Any]]) -> None:
    """One line per failed row; no file where there is none."""
    if not failures:
        store.remove(QUARANTINE)
        return
    lines = [
        json.dumps({key: value for key, value in failure.items() if key != "window"}, ensure_ascii=True)
        for failure in failures
    ]
    store.replace(QUARANTINE, ("\n".join(lines) + "\n").encode("ascii"))


def _empty_part(work: JobWork, store: Store) -> dict[str, Any]:
    """An input without rows still gives a readable output with the right schema."""
    from fanfold.data.sink import open_sink
    from fanfold.job.assemble import output_schema
    from fanfold.job.prepare import HashingFile
    from fanfold.job.work import part_name

    temporary, name = "tmp/part-empty", part_name(0, work.output.format)
    with HashingFile(store.new_file(temporary)) as file, open_sink(work.output.format, file, output_schema(work)):
        pass
    store.seal(temporary)
    store.rename(temporary, name)
    entry = {
        "kind": "part",
        "part": 0,
        "first": 0,
        "last": -1,
        "name": name,
        "rows": 0,
        "bytes": file.num_bytes,
        "sha256": file.sha256,
        "window_sha256": [],
    }
    journal.append(store, [entry])
    return entry


def _publish_file(
    work: JobWork, store: Store, target: Path, parts: list[dict[str, Any]], files: list[dict[str, Any]]
) -> str:
    """All parts as one file, built beside the run folder's data and put in place by one rename. Its sha256.

    The log knows the file's hash before it is renamed, so that a run that died in between can tell. Parts that
    an earlier file holds already (appended input) are taken from there: `files` are all that were ever logged.
    """
    wanted = [[part["part"], part["sha256"]] for part in parts]
    current = hash_of(target) if target.exists() and files else None
    before = next((file for file in reversed(files) if file["sha256"] == current), None)
    if before is not None and before["parts"] == wanted:
        sha256 = str(current)
    else:
        names = [store.file(part["name"]) for part in parts]
        missing = [name for name in names if not name.exists()]
        if missing:
            held = len(missing)
            known = before is not None and before["parts"] == wanted[:held]
            if not known or missing != names[:held]:
                raise StorageError(
                    f"publishing {target}",
                    found=f"{missing[0]} is gone, and {target} is not what was published before",
                    allowed="parts and output as the run has written them",
                    do="start anew with --overwrite",
                )
            names = [target, *names[held:]]
        temporary = store.new_file("tmp/output")
        temporary.parent.mkdir(exist_ok=True)
        temporary.unlink(missing_ok=True)
        if len(names) == 1:
            shutil.copyfile(names[0], temporary)
        elif work.output.format == "parquet":
            _join_parquet(names, temporary)
        else:
            _join_lines(names, temporary, has_header=work.output.format == "csv")
        store.seal("tmp/output")
        sha256 = hash_of(temporary)
        journal.append(store, [{"kind": "file", "parts": wanted, "sha256": sha256}])
        store.rename("tmp/output", str(target))
    for part in parts:
        store.remove(part["name"])
    store.sync_folder("data")
    return sha256


def hash_of(path: Path) -> str:
    """sha256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _join_parquet(names: list[Path], target: Path) -> None:
    import pyarrow.parquet as pq

    schema = pq.read_schema(names[0])
    others = [field.name for field in schema if str(field.type).startswith("fixed_size_list") is False]
    with pq.ParquetWriter(
        target, schema, use_dictionary=others, write_statistics=others, compression="snappy"
    ) as writer:
        for name in names:
            with pq.ParquetFile(name) as part:
                for group in range(part.num_row_groups):
                    writer.write_table(part.read_row_group(group))


def _join_lines(names: list[Path], target: Path, *, has_header: bool) -> None:
    """Byte for byte; the header line of all parts but the first is left away."""
    import csv
    import io

    with target.open("wb") as joined:
        for number, name in enumerate(names):
            with name.open("rb") as part:
                if has_header and number:
                    text = io.TextIOWrapper(part, encoding="utf-8", newline="")
                    reader = csv.reader(text)
                    header = next(reader)
                    text.detach()
                    line = io.StringIO()
                    csv.writer(line, lineterminator="\n").writerow(header)
                    part.seek(len(line.getvalue().encode("utf-8")))
                shutil.copyfileobj(part, joined, 1 << 20)


def read_output(out: Path | str) -> Any:
    """The whole output as an Arrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(out, str):
        store = RunFolder(place=out).open_to_write()
        try:
            names = [f"data/{name}" for name in store.list("data") if name.endswith(".parquet")]
            return pa.concat_tables([pq.read_table(store.file(name), memory_map=False) for name in names])
        finally:
            store.close()
    if out.is_dir():
        parts = sorted((out / "data").glob("part-*.parquet"))
        return pa.concat_tables([pq.read_table(part) for part in parts])
    if out.suffix == ".parquet":
        return pq.read_table(out)
    if out.suffix == ".csv":
        import pyarrow.csv

        return pyarrow.csv.read_csv(out)
    import pyarrow.json

    return pyarrow.json.read_json(out)
