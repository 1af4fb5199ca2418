"""Every state that a crash may leave on the disk: record what a job does to a folder, then take it back in part.

    with recording(folder) as record:
        run_job(...)                                 # in this process: on="inline"
    for state in crash_states(record):
        state.materialise(folder)
        run_job(...)                                 # must end as if nothing had happened

What is promised to survive is what was flushed. The model, after SQLite's crash tests and ALICE (Pillai 2014):

- A file's bytes are safe once the file was flushed; until then any block of them may be missing or zero.
- A name (created, linked, renamed, removed) is safe once its folder was flushed; until then each change may be
  lost on its own, whatever came after it. Changes of one and the same name keep their order, and a rename is one
  change: both is true of every file system with a journal.
- Flushing a file does not save its name, and flushing a folder does not save its own name in the folder above.

`PosixStore`'s primitives are not all that writes: parts, prepared windows and joined files are written by others
and sealed or renamed later. So the folder is looked at before and after each primitive, and whatever changed in
between was written, not flushed, by somebody else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.data.durable import PosixStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BLOCKS = (512, 4096)
RECENT = 5  # the newest changes, each of which is lost alone and kept alone

_PRIMITIVES = ("_create", "_append", "_cut", "_link", "_rename", "_rename_if_absent", "_unlink", "_make_folder")


@dataclass(frozen=True, slots=True)
class Wrote:
    """The file holds these bytes. Files are numbered: one may have several names, or none."""

    file: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """The name, which was free, stands for the file: created or linked."""

    name: str
    file: int


@dataclass(frozen=True, slots=True)
class Unnamed:
    """The name of a file is gone."""

    name: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The file stands under the new name only; what stood there is gone."""

    old: str
    new: str


@dataclass(frozen=True, slots=True)
class MadeFolder:
    name: str


@dataclass(frozen=True, slots=True)
class RemovedFolder:
    """The folder and all in it are gone."""

    name: str


@dataclass(frozen=True, slots=True)
class FlushedFile:
    file: int


@dataclass(frozen=True, slots=True)
class FlushedFolder:
    name: str


NameStep = Named | Unnamed | Moved | MadeFolder | RemovedFolder
Step = Wrote | NameStep | FlushedFile | FlushedFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashState:
    """What stands in the folder after a crash. `files` maps names to numbers: a number twice is a hard link."""

    folders: frozenset[str]
    files: dict[str, int]
    data: dict[int, bytes]
    why: str  # which crash: for the message of a failing test

    @property
    def key(self) -> str:
        """Equal for states that no program can tell apart."""
        first: dict[int, str] = {}
        digest = hashlib.sha256(repr(sorted(self.folders)).encode())
        for name, number in sorted(self.files.items()):
            alias = first.setdefault(number, name)
            digest.update(f"|{name}={alias}|".encode())
            if alias == name:
                digest.update(_sha256(self.data[number]))
        return digest.hexdigest()

    def materialise(self, folder: Path) -> None:
        """The folder holds exactly this state."""
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for name in sorted(self.folders):
            (folder / name).mkdir(exist_ok=True)
        first: dict[int, Path] = {}
        for name, number in sorted(self.files.items()):
            path = folder / name
            if number in first:
                os.link(first[number], path)
            else:
                path.write_bytes(self.data[number])
                first[number] = path


@dataclass(slots=True)
class Record:
    """What was done to the folder, in order. All that stood there at the start is safe."""

    folder: Path
    start: CrashState
    steps: list[Step] = field(default_factory=list)


@contextmanager
def recording(folder: Path) -> Iterator[Record]:
    """Everything that this process does below the folder until the end of the block is in the record.

    Every `PosixStore` is listened to, whoever makes it. The work must be done in this process (on="inline").
    """
    folder = folder.absolute()
    watcher = _Watcher(folder)
    real = {name: getattr(PosixStore, name) for name in (*_PRIMITIVES, "_flush_fd")}
    try:
        for name in _PRIMITIVES:
            setattr(PosixStore, name, _watched(real[name], watcher))
        PosixStore._flush_fd = _flush_watched(real["_flush_fd"], watcher)  # type: ignore[method-assign]
        yield watcher.record
        watcher.look()
    finally:
        for name, function in real.items():
            setattr(PosixStore, name, function)
        watcher.close()


def _watched(real: Callable[..., Any], watcher: _Watcher) -> Callable[..., Any]:
    @wraps(real)
    def primitive(*arguments: Any) -> Any:
        watcher.look()
        try:
            return real(*arguments)
        finally:
            watcher.look()

    return primitive


def _flush_watched(real: Callable[..., Any], watcher: _Watcher) -> Callable[..., Any]:
    @wraps(real)
    def flush(store: PosixStore, fd: int, path: Path) -> None:
        watcher.look()
        real(store, fd, path)
        if store.sync:
            watcher.flushed(path)

    return flush


class _Watcher:
    """Compares the folder with what it was, and writes down what changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[int, int] = {}  # inode -> our number
        self._held: list[int] = []  # open files: their inodes are not given to others
        self._data: dict[int, bytes] = {}
        self._folders, self._files = self._walk()
        for name, number in self._files.items():
            self._data[number] = (folder / name).read_bytes()
        start = CrashState(
            folders=frozenset(self._folders), files=dict(self._files), data=dict(self._data), why="before all"
        )
        self.record = Record(folder, start)

    def look(self) -> None:
        """The record holds all that has happened by now."""
        folders, files = self._walk()
        steps = self.record.steps
        steps += [MadeFolder(name) for name in sorted(folders - self._folders)]
        before = self._files
        gone = {name: number for name, number in before.items() if name not in files}
        for name, number in sorted(files.items()):
            if before.get(name) == number:
                continue
            old = next((old for old, moved in gone.items() if moved == number), None)
            if old is not None:
                del gone[old]
                steps.append(Moved(old, name))
                continue
            if name in before:
                steps.append(Unnamed(name))
            steps.append(Named(name, number))
        for name, number in files.items():
            data = (self._folder / name).read_bytes()
            if self._data.get(number) != data:
                self._data[number] = data
                steps.append(Wrote(number, data))
        steps += [Unnamed(name) for name in sorted(gone)]
        steps += [RemovedFolder(name) for name in sorted(self._folders - folders, reverse=True)]
        self._folders, self._files = folders, files

    def flushed(self, path: Path) -> None:
        if path.absolute() != self._folder and self._folder not in path.absolute().parents:
            return
        name = os.path.relpath(path.absolute(), self._folder)
        if path.is_dir():
            self.record.steps.append(FlushedFolder(name))
        elif name in self._files:
            self.record.steps.append(FlushedFile(self._files[name]))

    def close(self) -> None:
        for fd in self._held:
            os.close(fd)

    def _walk(self) -> tuple[set[str], dict[str, int]]:
        folders: set[str] = set()
        files: dict[str, int] = {}
        for root, names, found in os.walk(self._folder):
            inside = os.path.relpath(root, self._folder)
            at = "" if inside == "." else inside + "/"
            folders.update(at + name for name in names)
            for name in found:
                inode = os.stat(os.path.join(root, name)).st_ino
                if inode not in self._numbers:
                    self._held.append(os.open(os.path.join(root, name), os.O_RDONLY))
                    self._numbers[inode] = len(self._numbers)
                files[at + name] = self._numbers[inode]
        return folders, files


# -- states -----------------------------------------------------------------------------------------------


def crash_states(record: Record, *, recent: int = RECENT, since: int = 0) -> list[CrashState]:
    """Every different state that a crash at any moment of the record may leave, each once; moments from `since` on.

    A crash comes after each step (the last included). What was flushed by then is there. Exhaustive in all
    combinations would be exponential, so of the rest

    - names: all changes kept; none; none of one folder; each of the `recent` newest ones lost or kept alone. Older
      ones had their turn at an earlier step, when they were the newest: what comes later in the record only adds
      to what is kept. What depends on a lost change (a name of its folder, the same name again) is lost with it.
    - bytes: all files alike get everything, nothing, the first block of 512 and of 4096 bytes, all but the last
      block, everything with its last block zero, all zeros in the right length; and, with all names kept, each
      of the `recent` files written last gets each of these alone.
    - a name lost or kept alone is combined with everything and nothing of the bytes only.

    Blocks holding other files' old bytes are not made up: no checksum here treats them unlike zeros.
    """
    found: dict[str, CrashState] = {}
    safe: set[int] = set()  # positions of the changes of names that survive
    for moment in range(len(record.steps) + 1):
        if moment:
            safe |= _saved(record.steps, moment - 1, safe)
        for state in _states_at(record, moment, safe, recent) if moment >= since else ():
            found.setdefault(state.key, state)
    return list(found.values())


def _states_at(record: Record, moment: int, safe: set[int], recent: int) -> Iterator[CrashState]:
    steps = record.steps[:moment]
    names = [(at, step) for at, step in enumerate(steps) if isinstance(step, NameStep)]
    pending = [at for at, _ in names if at not in safe]
    contents = _contents(record.start.data, steps)
    loose = {number: choices for number, choices in contents.items() if len(choices) > 1}
    said = f"crash after step {moment} ({_shown(steps[-1]) if steps else 'before the first'})"

    def state(lost: set[int], chosen: dict[int, bytes], why: str) -> CrashState:
        kept = [step for at, step in names if at not in lost]
        folders, files = _apply(record.start, kept)
        data = {number: choices["everything"] for number, choices in contents.items()} | chosen
        used = {number: data[number] for number in set(files.values())}
        return CrashState(folders=frozenset(folders), files=files, data=used, why=f"{said}: {why}")

    everywhere = sorted({choice for choices in loose.values() for choice in choices})
    for how, lost in (("every name kept", set()), ("no unflushed name kept", set(pending))):
        yield state(lost, {}, how)
        for choice in everywhere:
            chosen = {number: choices.get(choice, choices["everything"]) for number, choices in loose.items()}
            yield state(lost, chosen, f"{how}; {choice} of the unflushed bytes")
    for folder in sorted({_folder_of(name) for at in pending for name in _names(steps[at])}):
        within = [at for at in pending if folder in map(_folder_of, _names(steps[at]))]
        lost = set().union(*(_dependents(steps, at) for at in within))
        yield state(lost - safe, {}, f"no unflushed name in {folder} kept")
    nothing = {number: choices["nothing"] for number, choices in loose.items()}
    for at in pending[max(0, len(pending) - recent) :]:
        alone = set(pending) - _needed(steps, at)
        for how, lost in (("lost", _dependents(steps, at) - safe), ("alone kept", alone)):
            for chosen in ({}, nothing):
                bytes_kept = "all bytes" if chosen is not nothing else "no unflushed bytes"
                yield state(lost, chosen, f"{_shown(steps[at])} {how}; {bytes_kept}")
    for number in list(loose)[max(0, len(loose) - recent) :]:
        for choice, data in loose[number].items():
            yield state(set(), {number: data}, f"file {number} has {choice} of its unflushed bytes")


def _saved(steps: Sequence[Step], at: int, safe: set[int]) -> set[int]:
    """Positions of the changes of names that this step, if it flushes a folder, makes survive."""
    flush = steps[at]
    saved: set[int] = set()
    if isinstance(flush, FlushedFolder):
        for earlier in range(at):
            change = steps[earlier]
            if earlier not in safe and isinstance(change, NameStep) and flush.name in map(_folder_of, _names(change)):
                saved |= _needed(steps, earlier)
    return saved


def _needed(steps: Sequence[Step], at: int) -> set[int]:
    """The change itself and those of the same names before it, without which it could not have been made."""
    needed = {at}
    wanted = set(_names(steps[at]))
    for earlier in range(at - 1, -1, -1):
        change = steps[earlier]
        if isinstance(change, NameStep) and wanted.intersection(_names(change)):
            needed.add(earlier)
            wanted.update(_names(change))
    return needed


def _dependents(steps: Sequence[Step], at: int) -> set[int]:
    """The change itself and those behind it that could not have been made without it."""
    lost = {at}
    touched = set(_names(steps[at]))
    for later in range(at + 1, len(steps)):
        change = steps[later]
        if isinstance(change, NameStep) and touched.intersection(_names(change)):
            lost.add(later)
            touched.update(_names(change))
    return lost


def _contents(start: dict[int, bytes], steps: Sequence[Step]) -> dict[int, dict[str, bytes]]:
    """Per file what it may hold: choice -> bytes; only "everything" where all is flushed. Last written last."""
    base = dict(start)
    now = dict(start)
    for step in steps:
        if isinstance(step, Wrote):
            base.setdefault(step.file, b"")
            now.pop(step.file, None)
            now[step.file] = step.data
        elif isinstance(step, FlushedFile) and step.file in now:
            base[step.file] = now[step.file]
        elif isinstance(step, Named):
            base.setdefault(step.file, b"")
            now.setdefault(step.file, b"")
    return {number: _torn(base[number], data) for number, data in now.items()}


def _torn(base: bytes, data: bytes) -> dict[str, bytes]:
    if base == data:
        return {"everything": data}
    choices = {"everything": data, "nothing": base}
    begin = len(base) if data.startswith(base) else 0  # appended, or written anew after a truncation
    if len(data) <= begin:
        return choices
    for block in BLOCKS:
        borders = range((begin // block + 1) * block, len(data), block)
        if borders:
            choices[f"the first block of {block} bytes"] = data[: borders[0]]
            choices[f"all but the last block of {block} bytes"] = data[: borders[-1]]
    last = max(begin, (len(data) - 1) // BLOCKS[0] * BLOCKS[0])
    choices["all, the last block zero,"] = data[:last] + bytes(len(data) - last)
    choices["the length, but only zeros,"] = data[:begin] + bytes(len(data) - begin)
    return choices


def _apply(start: CrashState, steps: Sequence[NameStep]) -> tuple[set[str], dict[str, int]]:
    """The tree that these changes of names make of the start."""
    folders, files = set(start.folders), dict(start.files)
    for step in steps:
        match step:
            case Named(name, number):
                files[name] = number
            case Unnamed(name):
                files.pop(name, None)
            case Moved(old, new):
                if old in files:
                    files[new] = files.pop(old)
            case MadeFolder(name):
                folders.add(name)
            case RemovedFolder(gone):
                folders = {name for name in folders if name != gone and not name.startswith(gone + "/")}
                files = {name: number for name, number in files.items() if not name.startswith(gone + "/")}
    folders = {name for name in folders if _stands(name, folders)}
    return folders, {name: number for name, number in files.items() if _stands(name, folders)}


def _stands(name: str, folders: set[str]) -> bool:
    """Whether every folder above the name is there."""
    return all(str(parent) in folders for parent in Path(name).parents if str(parent) != ".")


def _names(step: Step) -> tuple[str, ...]:
    match step:
        case Moved(old, new):
            return (old, new)
        case Named(name, _) | Unnamed(name) | MadeFolder(name) | RemovedFolder(name):
            return (name,)
    return ()


@lru_cache(maxsize=1024)
def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _folder_of(name: str) -> str:
    return os.path.dirname(name) or "."


def _shown(step: Step) -> str:
    match step:
        case Wrote(file, data):
            return f"wrote {len(data)} bytes to file {file}"
        case Moved(old, new):
            return f"renamed {old} to {new}"
        case Named(name, file):
            return f"named file {file} {name}"
        case FlushedFile(file):
            return f"flushed file {file}"
    words = {Unnamed: "removed", MadeFolder: "made folder", RemovedFolder: "removed folder"}
    return f"{words.get(type(step), 'flushed folder')} {step.name}"
