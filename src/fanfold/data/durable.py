"""The only door for durable writes: after each verb returns, its effect survives a crash.

Names are relative to the store's root. `put_if_absent` publishes a finished temporary file under its name;
the first one wins, whoever comes later learns that the name is taken.

What touches the disk goes through a handful of primitives (`_create`, `_flush`, `_link`, ...), so that
`fanfold.testing.crash` can record them and rebuild every state that a crash may leave.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from typing import TYPE_CHECKING

from fanfold.data.holder import holder_stamp
from fanfold.errors import ResumeError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system; refused with a message before any store is opened
    fcntl = None  # type: ignore[assignment]


class PosixStore:
    """A folder on a file system with atomic link and rename."""

    def __init__(self, root: Path, *, sync: bool = True) -> None:
        self.root = root
        self.sync = sync  # False only for folders that die with the process
        self._log_fds: dict[str, int] = {}
        self._claim_fd: int | None = None

    def path(self, name: str) -> Path:
        return self.root / name

    @property
    def shown(self) -> str:
        return str(self.root)

    # -- writing --------------------------------------------------------------------------------------

    def make_folders(self, names: Iterable[str]) -> None:
        """The folders exist, and so does the store's own."""
        with _storage_errors(self.root, "making the run folder"):
            new = not self.root.exists()
            self.root.mkdir(parents=True, exist_ok=True)
            for name in names:
                self._make_folder(self.path(name))
            self._flush(self.root)
            if new:
                self._flush(self.root.parent)

    def write_temporary(self, name: str, data: bytes | memoryview) -> None:
        """The temporary file holds the bytes, safely on the disk."""
        path = self.path(name)
        with _storage_errors(path, f"writing {len(data):,} bytes"):
            self._create(path, data)
            self._flush(path)

    def seal(self, name: str) -> None:
        """A file that something else has written is safely on the disk."""
        with _storage_errors(self.path(name), "flushing"):
            self._flush(self.path(name))

    def put_if_absent(self, temporary: str, name: str) -> bool:
        """The sealed temporary file stands under its name; False where the name was taken (nothing changed).

        Durable once `sync_folder` has returned. Where the file system has no hard links, renameat2 does it.
        """
        source, target = self.path(temporary), self.path(name)
        with _storage_errors(target, "publishing"):
            try:
                self._link(source, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                    raise
                try:
                    self._rename_if_absent(source, target)
                except FileExistsError:
                    return False
                return True
            self._unlink(source)
        return True

    def put_all_if_absent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """As `put_if_absent` of each (temporary, name)."""
        return [self.put_if_absent(temporary, name) for temporary, name in pairs]

    def sync_folder(self, name: str) -> None:
        """Names published in the folder survive a crash."""
        with _storage_errors(self.path(name), "flushing the folder"):
            self._flush(self.path(name))

    def replace(self, name: str, data: bytes) -> None:
        """The name holds exactly these bytes, whatever it held before; never something in between."""
        temporary = f"{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self.write_temporary(temporary, data)
            self.rename(temporary, name)
        except StorageError:
            try:
                self.path(temporary).unlink(missing_ok=True)
            except OSError:
                pass  # the first error says what is wrong
            raise

    def rename(self, old: str, new: str) -> None:
        """The file stands under the new name only; what stood there is gone."""
        with _storage_errors(self.path(new), "renaming"):
            self._rename(self.path(old), self.path(new))
            self._flush(self.path(new).parent)

    def append(self, name: str, data: bytes) -> None:
        """The bytes stand at the end of the file, safely on the disk; after an error none of them do."""
        path = self.path(name)
        with _storage_errors(path, f"appending {len(data):,} bytes"):
            fd = self._log_fds.get(name)
            if fd is None:
                new = not path.exists()
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                self._log_fds[name] = fd
                if new:
                    self._flush(path.parent)
            size_bytes = os.fstat(fd).st_size
            try:
                self._append(fd, path, data)
                self._flush_fd(fd, path)
            except OSError:
                self._cut(fd, path, size_bytes)  # half a line must never get a good one behind it
                raise

    def truncate(self, name: str, size_bytes: int) -> None:
        """The file ends there: used to drop a torn last line."""
        path = self.path(name)
        with _storage_errors(path, "truncating"):
            fd = os.open(path, os.O_WRONLY)
            try:
                self._cut(fd, path, size_bytes)
                self._flush_fd(fd, path)
            finally:
                os.close(fd)

    def remove(self, *names: str) -> None:
        """The names are gone; missing is fine."""
        for name in names:
            with _storage_errors(self.path(name), "removing"):
                try:
                    self._unlink(self.path(name))
                except FileNotFoundError:
                    pass

    def remove_folder(self, name: str) -> None:
        """The folder and all in it are gone; not durable, and what cannot be removed stays."""
        shutil.rmtree(self.path(name), ignore_errors=True)

    # -- reading --------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """The bytes under the name; None where there is none."""
        with _storage_errors(self.path(name), "reading"):
            try:
                return self.path(name).read_bytes()
            except FileNotFoundError:
                return None

    def list(self, folder: str) -> list[str]:
        """Names in the folder, sorted; empty where there is none."""
        with _storage_errors(self.path(folder), "listing"):
            try:
                return sorted(os.listdir(self.path(folder)))
            except FileNotFoundError:
                return []

    def size_bytes(self, name: str) -> int | None:
        """How large the file is; None where there is none."""
        with _storage_errors(self.path(name), "reading"):
            try:
                return self.path(name).stat().st_size
            except FileNotFoundError:
                return None

    # -- files that others read and write: here the files themselves ----------------------------------

    @property
    def files(self) -> Path:
        return self.root

    def new_file(self, name: str) -> Path:
        return self.path(name)

    def place(self, temporary: str, name: str) -> None:
        """The file stands under its name, whatever was there; for what can be made again, so it is not flushed."""
        os.replace(self.path(temporary), self.path(name))

    def file(self, name: str) -> Path:
        return self.path(name)

    def refresh(self, name: str) -> bool:
        return False  # it is no copy

    # -- one writer at a time -------------------------------------------------------------------------

    def claim(self, name: str) -> None:
        """This process alone writes here until `close`; ResumeError names the holder otherwise."""
        with _storage_errors(self.path(name), "locking the run folder"):
            fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT, 0o644)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                        raise
                    raise self._held_by(os.pread(fd, 4096, 0)) from None
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(holder_stamp()).encode() + b"\n", 0)
            except BaseException:
                os.close(fd)
                raise
        self._claim_fd = fd

    def _held_by(self, stamp: bytes) -> ResumeError:
        holder = stamp.decode("utf-8", "replace").strip()
        return ResumeError(
            f"writing to {self.root}",
            found=f"another run holds it: {holder or 'holder unknown'}",
            allowed="one run per folder at a time",
            do="wait for that run to end, or use another output folder",
        )

    def close(self) -> None:
        """Let go of the log files and of the claim."""
        for fd in self._log_fds.values():
            os.close(fd)
        self._log_fds.clear()
        if self._claim_fd is not None:
            os.close(self._claim_fd)
            self._claim_fd = None

    # -- primitives: all that touches the disk --------------------------------------------------------

    def _make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def _create(self, path: Path, data: bytes | memoryview) -> None:
        with path.open("wb") as file:
            file.write(data)

    def _append(self, fd: int, path: Path, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def _cut(self, fd: int, path: Path, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def _link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def _rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def _rename_if_absent(self, source: Path, target: Path) -> None:
        rename_noreplace(source, target)

    def _unlink(self, path: Path) -> None:
        os.unlink(path)

    def _flush(self, path: Path) -> None:
        """A file's bytes, or a folder's names."""
        if not self.sync:
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            self._flush_fd(fd, path)
        finally:
            os.close(fd)

    def _flush_fd(self, fd: int, path: Path) -> None:
        if self.sync:
            os.fsync(fd)


def rename_noreplace(source: Path, target: Path) -> None:
    """renameat2 with RENAME_NOREPLACE (Linux 3.15): for file systems without hard links. FileExistsError if taken."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        raise OSError(errno.ENOTSUP, "neither hard links nor renameat2 on this file system", str(target))
    at_cwd, no_replace = -100, 1
    if library.renameat2(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), no_replace) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


class _storage_errors:
    """Turns OSError into StorageError with the path, the need and what is free."""

    def __init__(self, path: Path, doing: str) -> None:
        self.path = path
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(self.path, self.doing, error) from error


def storage_error(path: Path, doing: str, error: OSError) -> StorageError:
    """A StorageError that says what was needed and what there is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{doing} to {path}",
            found=f"disk full: {_free_bytes(path)} bytes are free",
            allowed="room for the whole result",
            do="make room, then run the same command again: it goes on where it stopped",
        )
    return StorageError(
        f"{doing}: {path}",
        found=f"{type(error).__name__}: {error.strerror or error}",
        allowed="a folder on a disk that this user may write to",
        do="check the permissions and the disk, or choose another output with -o",
    )


def _free_bytes(path: Path) -> str:
    for folder in (path, *path.parents):
        try:
            usage = os.statvfs(folder)
        except OSError:
            continue
        return f"{usage.f_bavail * usage.f_frsize:,}"
    return "an unknown number of"
