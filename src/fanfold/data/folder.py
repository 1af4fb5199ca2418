"""The run folder: where a job's output, journal and records live, and what may be done to it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fanfold.data.objects import PROBE
from fanfold.data.run_folder import RunFolder, local_path, remote_place
from fanfold.data.scratch import scratch_folder
from fanfold.errors import InternalError, RequestError, ResumeError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fanfold.data.store import Store

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
    """What `-o` names: a run folder on a disk or in an object store, or one file with its run folder beside it."""

    def __init__(self, out: str | Path) -> None:
        path = local_path(out)
        self.file = path if path is not None and path.suffix in FILE_SUFFIXES and not path.is_dir() else None
        self.format = self.file.suffix[1:] if self.file else "parquet"
        self.local = path.with_name(path.name + ".run") if path is not None and self.file else path
        self.place = remote_place(str(out)) if self.local is None else str(self.local)

    @property
    def shown(self) -> Path | str:
        """What the user named."""
        return self.file or self.folder

    @property
    def folder(self) -> Path | str:
        """The run folder: a path, or a URL."""
        return self.local or self.place

    @contextmanager
    def local_files(self) -> Iterator[Path | None]:
        """A folder for the local files of a run folder in an object store; None where it is on a disk itself."""
        if self.local is not None:
            yield None
            return
        with scratch_folder() as folder:
            yield folder

    def spool(self, scratch: Path | None) -> Path:
        """Where windows of streamed inputs are kept: beside the output, or with the local files."""
        return (self.local or scratch or _nowhere()) / "spool"


def open_run(
    output: Output, *, overwrite: bool, sync: bool = True, scratch: Path | None = None
) -> tuple[Store, dict[str, Any] | None]:
    """The claimed store and the run.json of the job it holds, None for a new one. Touches nothing foreign."""
    try:
        store = RunFolder(place=output.place, sync=sync, scratch=scratch).open_to_write()
        found = _foreign(output.local, overwrite) if output.local is not None else _foreign_objects(store, overwrite)
        if found:
            raise ResumeError(
                f"output to {output.shown}",
                found=f"{output.folder} holds something else: {', '.join(found[:3])}",
                allowed="an empty or new folder, or one that a run of Fanfold has made",
                do="choose another output with -o; nothing was changed",
            )
        if output.file is not None and output.file.exists() and store.read(RUN) is None and not overwrite:
            raise ResumeError(
                f"output to {output.file}",
                found="the file exists and no run of Fanfold stands beside it",
                allowed="a new file",
                do="choose another output with -o, or replace the file with --overwrite",
            )
        store.make_folders(["."])
        store.claim(CLAIM)
    except StorageError as error:  # nothing was started
        raise RequestError(error.asked, found=error.found, allowed=error.allowed, do=error.do) from error
    try:
        if overwrite:
            _clear(store)
        store.make_folders(FOLDERS)
        # Of runs that have died; the folder is ours alone now.
        store.remove(*(f"tmp/{name}" for name in store.list("tmp")))
        for name in store.list("."):
            if name.startswith(PROBE) or (name.endswith(".tmp") and name.rsplit(".", 2)[0] in _OURS):
                store.remove(name)
        return store, read_json(store, RUN)
    except BaseException:
        store.close()
        raise


def read_json(store: Store, name: str) -> dict[str, Any] | None:
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


def write_json(store: Store, name: str, value: dict[str, Any]) -> None:
    """The file holds the object, readable by people."""
    store.replace(name, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n")


def _nowhere() -> Path:
    raise InternalError(
        "a folder for spooled input",
        found="neither an output folder nor a local one",
        allowed="one of them",
        do="report this",
    )


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


def _foreign_objects(store: Store, overwrite: bool) -> list[str]:
    """As `_foreign`, of a prefix in an object store: there are no empty folders, and a claim is a folder."""
    names = store.list(".")
    if RUN in names:
        ours = _says_ours(store.read(RUN))
        if ours is None:
            ours = not overwrite or CLAIM in names
        return [] if ours else [f"{RUN} that Fanfold has not written"]
    return [name for name in names if name != CLAIM and not name.startswith(PROBE)]


def _is_ours(path: Path) -> bool | None:
    """Whether a run of Fanfold has written this run.json; None where it is damaged and cannot say."""
    try:
        return _says_ours(path.read_bytes())
    except OSError:
        return None


def _says_ours(data: bytes | None) -> bool | None:
    try:
        value = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    return {"fanfold_version", "fingerprint"} <= value.keys() if isinstance(value, dict) else None


def _clear(store: Store) -> None:
    """Start anew: what a run has made is gone, _SUCCESS first; anything else stays."""
    store.remove(SUCCESS)
    store.sync_folder(".")  # a crash must never leave _SUCCESS beside half a folder
    store.remove(SUMMARY, QUARANTINE, TRACE, "commits.log")
    for name in ("commits.log", *FOLDERS):  # in an object store, a log is a folder of segments
        store.remove_folder(name)
    store.sync_folder(".")  # without run.json, what is left would look like somebody else's
    store.remove(RUN)
