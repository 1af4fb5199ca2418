"""The log of what is committed: one checksummed line per fact, appended and flushed, read back on resume.

A line is `<crc32 in 8 hex digits> <json>`. A torn or damaged line at the end is what a crash leaves: it is
dropped, and the work it stood for is done again. A damaged line in the middle is not, and is refused.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

from fanfold.errors import ResumeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fanfold.data.store import Store

NAME = "commits.log"


def encode(entry: dict[str, Any]) -> bytes:
    """One line with its checksum."""
    body = json.dumps(entry, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> dict[str, Any] | None:
    """The entry, or None where the checksum does not hold."""
    if len(line) < 10 or line[8:9] != b" ":
        return None
    body = line[9:]
    try:
        if line[:8] != b"%08x" % zlib.crc32(body):
            return None
        entry = json.loads(body)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def append(store: Store, entries: Iterable[dict[str, Any]]) -> None:
    """The entries are in the log, safely on the disk; together they cost one flush."""
    store.append(NAME, b"".join(encode(entry) for entry in entries))


def load(store: Store, *, repair: bool = True) -> list[dict[str, Any]]:
    """All entries in order; a torn end is cut off the file, or only left out where `repair` is False."""
    data = store.read(NAME)
    if data is None:
        return []
    entries: list[dict[str, Any]] = []
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        entry = decode(data[start:end]) if end >= 0 else None
        if entry is None:
            if _any_good_line(data, end):
                raise ResumeError(
                    f"reading {store.path(NAME)}",
                    found=f"a damaged line at byte {start}, with good lines behind it",
                    allowed="a log that only Fanfold has written",
                    do="restore the file from a backup, or start anew with --overwrite",
                )
            if repair:
                store.truncate(NAME, start)
            break
        entries.append(entry)
        start = end + 1
    return entries


def _any_good_line(data: bytes, end: int) -> bool:
    return end >= 0 and any(decode(line) is not None for line in data[end + 1 :].split(b"\n"))
