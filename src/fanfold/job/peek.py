"""`fanfold peek`: the first finished rows of a run, also while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fanfold.job.opened import open_existing
from fanfold.job.window import window_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fanfold.job.opened import OpenedRun


def peek(out: str | Path, *, rows: int = 5) -> list[dict[str, Any]]:
    """At most `rows` finished rows, the earliest of the input first: position and result columns.

    Looks at committed files only, so it may be called at any time. Raises InputError where there is no run.
    """
    opened = open_existing(out)
    found = list(_committed(opened))
    found.sort(key=lambda row: row["row"])
    return found[:rows] if found else _finished(opened, rows)


def _committed(opened: OpenedRun) -> Iterator[dict[str, Any]]:
    """Rows of leases whose windows are not assembled yet, and of parts."""
    for index, leases in opened.leases.items():
        first_row = window_of(opened.windows[index]).first_row
        for lease in leases:
            if not lease.get("name"):
                continue
            try:
                with pa.memory_map(str(opened.store.file(lease["name"]))) as mapped:
                    table = pa.ipc.open_stream(mapped).read_all()
                    records = table.to_pylist()
            except (OSError, pa.ArrowInvalid):  # assembled in the meantime
                continue
            failed = {(failure["offset"], failure.get("part")) for failure in lease["failed"]}
            for record in records:
                offset, part = record.pop("offset"), record.pop("part", None)
                record.pop("tokens", None)
                if (offset, part) not in failed:
                    yield {"row": first_row + offset, **({} if part is None else {"part": part}), **record}


def _finished(opened: OpenedRun, rows: int) -> list[dict[str, Any]]:
    """From the output itself."""
    columns = set(opened.run["task"]["columns"])
    prefix = opened.run["request"]["prefix"]
    names = [opened.output.file] if opened.output.file else [opened.store.file(part["name"]) for part in opened.parts]
    found: list[dict[str, Any]] = []
    for path in names:
        if path is None or len(found) >= rows or not path.exists():
            continue
        if path.suffix == ".parquet":
            records = next(pq.ParquetFile(path).iter_batches(batch_size=rows), None)
            taken = [] if records is None else records.to_pylist()
        else:
            taken = _text_rows(path, rows)
        for record in taken:
            place = {name: record[name] for name in ("row", "record", "part") if name in record}
            results = {name: value for name, value in record.items() if name.removeprefix(prefix) in columns}
            found.append({**place, **results})
    return found[:rows]


def _text_rows(path: Path, rows: int) -> list[dict[str, Any]]:
    import csv
    import itertools
    import json

    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(itertools.islice(csv.DictReader(file), rows))
        return [json.loads(line) for line in itertools.islice(file, rows)]


def peek_text(out: str | Path, *, rows: int = 5) -> str:
    """For a person: a row a paragraph, long values cut, nothing that a terminal would obey."""
    from fanfold.quantity import printable

    found = peek(out, rows=rows)
    if not found:
        return "no row is finished yet"
    lines = []
    for row in found:
        for name, value in row.items():
            shown = f"{len(value)} numbers" if isinstance(value, list) else str(value)
            lines.append(f"{name + ':':<20}{printable(shown[:400])}{' ...' if len(shown) > 400 else ''}")
        lines.append("")
    return "\n".join(lines[:-1])
