"""The run folder: where a job's output, journal and records live, and what may be done to it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from fanfold.data.durable import PosixStore
from fanfold.errors import RequestError, ResumeError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

RUN, SUMMARY, SUCCESS, QUARANTINE, TRACE, CLAIM = (
    "run.json",
    "summary.json",
    "_SUCCESS",
    "quarantine.jsonl",
    "trace.json.gz",
    ".lock",
)
FOLDERS = ("data", "windows", "spool", "pieces", "tmp")
_OURS = {RUN, SUMMARY, SUCCESS, QUARANTINE, TRACE, CLAIM, "commits.log", *FOLDERS}
FILE_SUFFIXES = (".parquet", ".jsonl", ".csv")


class Output:
    """What `-o` names: a run folder, or one file with its run folder beside it."""

    def __init__(self, out: Path) -> None:
        out = out.absolute()
        self.file = out if out.suffix in FILE_SUFFIXES and not out.is_dir() else None
        self.folder = out.with_name(out.name + ".run") if self.file else out
        self.format = out.suffix[1:] if self.file else "parquet"

    @property
    def shown(self) -> Path:
        """What the user named."""
        return self.file or self.folder


def open_run(output: Output, *, overwrite: bool, sync: bool = True) -> tuple[PosixStore, dict[str, Any] | None]:
    """The claimed store and the run.json of the job it holds, None for a new one. Touches nothing foreign."""
    folder = output.folder
    found = _foreign(folder, overwrite)
    if found:
        raise ResumeError(
            f"output to {output.shown}",
            found=f"{folder} holds something else: {', '.join(found[:3])}",
            allowed="an empty or new folder, or one that a run of Fanfold has made",
            do="choose another output with -o; nothing was changed",
        )
    has_run = (folder / RUN).exists()
    if output.file is not None and output.file.exists() and not has_run and not overwrite:
        raise ResumeError(
            f"output to {output.file}",
            found="the file exists and no run of Fanfold stands beside it",
            allowed="a new file",
            do="choose another output with -o, or replace the file with --overwrite",
        )
    store = PosixStore(folder, sync=sync)
    try:
        store.make_folders(["."])
        store.claim(CLAIM)
    except StorageError as error:  # nothing was started
        raise RequestError(error.asked, found=error.found, allowed=error.allowed, do=error.do) from error
    try:
        if overwrite:
            _clear(store)
        store.make_folders(FOLDERS)
        for name in store.list("tmp"):  # of runs that have died; the folder is ours alone now
            store.remove(f"tmp/{name}")
        for name in store.list("."):
            if name.endswith(".tmp") and name.rsplit(".", 2)[0] in _OURS:
                store.remove(name)
        return store, read_json(store, RUN)
    except BaseException:
        store.close()
        raise


def read_json(store: PosixStore, name: str) -> dict[str, Any] | None:
    """The object in the file; None where there is no file; ResumeError where it is damaged."""
    data = store.read(name)
    if data is None:
        return None
    try:
        value = json.loads(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ResumeError(
            f"reading {store.path(name)}",
            found=f"it is damaged: {error}",
            allowed="a file that only Fanfold has written",
            do="start anew with --overwrite, or use another output folder",
        ) from None
    return value


def write_json(store: PosixStore, name: str, value: dict[str, Any]) -> None:
    """The file holds the object, readable by people."""
    store.replace(name, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n")


def _foreign(folder: Path, overwrite: bool) -> list[str]:
    """Names in the folder that no run has made; all of them where there is no run.json."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        return [f"{folder.name} (a file)"]
    try:
        names = sorted(path.name for path in folder.iterdir())
    except PermissionError:
        return [f"{folder.name} (it may not be read)"]
    if RUN in names:
        ours = _is_ours(folder / RUN)
        if ours is None:  # damaged: refused when it is read; replaced only in a folder that we have locked before
            ours = not overwrite or CLAIM in names
        return [] if ours else [f"{RUN} that Fanfold has not written"]
    # A run that was killed before run.json was written leaves only empty folders and its lock.
    return [
        name
        for name in names
        if name not in {CLAIM, *FOLDERS} or (name in FOLDERS and any((folder / name).iterdir()))
        if not (name.startswith(RUN) and name.endswith(".tmp"))
    ]


def _is_ours(path: Path) -> bool | None:
    """Whether a run of Fanfold has written this run.json; None where it is damaged and cannot say."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return {"fanfold_version", "fingerprint"} <= value.keys() if isinstance(value, dict) else None


def _clear(store: PosixStore) -> None:
    """Start anew: what a run has made is gone, _SUCCESS first; anything else stays."""
    store.remove(SUCCESS)
    store.sync_folder(".")  # a crash must never leave _SUCCESS beside half a folder
    for name in (SUMMARY, QUARANTINE, TRACE, "commits.log"):
        store.remove(name)
    for name in FOLDERS:
        shutil.rmtree(store.path(name), ignore_errors=True)
    store.sync_folder(".")  # without run.json, what is left would look like somebody else's
    store.remove(RUN)
