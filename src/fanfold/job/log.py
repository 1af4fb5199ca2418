"""What the log says in the end: entries that later ones have superseded are taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Entry = dict[str, Any]


def settle(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that hold.

    `drop` takes windows out as if they had never been found, `lost` a lease whose file was damaged. `reopen`
    takes parts out; their windows' results are in rescued files, but for the pieces to be computed again.
    """
    kept: list[Entry] = []
    for entry in entries:
        match entry["kind"]:
            case "drop":
                gone = set(entry["windows"])
                kept = [old for old in kept if not _concerns(old, gone)]
            case "lost":
                key = ("lease", entry["window"], entry["first"])
                kept = [old for old in kept if (old["kind"], old.get("window"), old.get("first")) != key]
            case "reopen":
                for part in entry["parts"]:
                    kept = _reopen(kept, part)
                kept.append(entry)
            case _:
                kept.append(entry)
    return kept


def _concerns(entry: Entry, windows: set[int]) -> bool:
    if entry["kind"] == "part":
        return not windows.isdisjoint(range(entry["first"], entry["last"] + 1))
    return entry.get("window") in windows


def open_windows(entries: Sequence[Entry]) -> set[int]:
    """Windows that are in no part yet."""
    found = {entry["window"] for entry in entries if entry["kind"] == "window"}
    for entry in entries:
        if entry["kind"] == "part":
            found.difference_update(range(entry["first"], entry["last"] + 1))
    return found


def borders(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """(window, part) where appended rows begin; those behind a later one are of windows that were dropped."""
    found: list[tuple[int, int]] = []
    for entry in entries:
        if entry["kind"] == "append":
            found = [border for border in found if border[0] < entry["first_window"]]
            found.append((entry["first_window"], entry["first_part"]))
    return found


def _reopen(entries: list[Entry], reopen: Entry) -> list[Entry]:
    rescued = {window["window"]: window for window in reopen["windows"]}
    rows = {entry["window"]: entry["rows"] for entry in entries if entry["kind"] == "window"}
    kept: list[Entry] = []
    for entry in entries:
        if entry["kind"] == "part" and entry["part"] == reopen["part"]:
            continue
        if entry["kind"] == "rescue" and entry["window"] in rescued:
            continue
        if entry["kind"] == "lease" and entry["window"] in rescued:
            kept += _without(entry, set(rescued[entry["window"]]["pieces"]), rows[entry["window"]])
        else:
            kept.append(entry)
    kept += [
        {"kind": "rescue", "window": index, "name": window["name"], "sha256": window["sha256"]}
        for index, window in rescued.items()
        if window["name"] is not None
    ]
    return kept


def _without(lease: Entry, pieces: set[int], rows: Sequence[int]) -> list[Entry]:
    """The lease without these pieces, its file gone; nothing where all of it is to be computed again."""
    runs: list[list[int]] = []
    for piece in range(lease["first"], lease["last"] + 1):
        if piece in pieces:
            continue
        if runs and runs[-1][-1] == piece - 1:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    share = 1 / max(1, sum(rows[lease["first"] : lease["last"] + 1]))
    found = []
    for run in runs:
        num_rows = sum(rows[run[0] : run[-1] + 1])
        found.append(
            {
                **lease,
                "first": run[0],
                "last": run[-1],
                "rows": num_rows,
                "tokens": round(lease["tokens"] * num_rows * share),
                "padded_tokens": round(lease["padded_tokens"] * num_rows * share),
                "sums": {name: round(total * num_rows * share) for name, total in lease.get("sums", {}).items()},
                "name": None,
                "sha256": None,
                "failed": [failure for failure in lease["failed"] if failure["piece"] in run],
            }
        )
    return found
