"""The only door for durable writes: after each verb returns, its effect survives a crash.

Names are relative to the store's root. `put_if_absent` publishes a finished temporary file under its name;
the first one wins, whoever comes later learns that the name is taken.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.errors import ResumeError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable

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

    # -- writing --------------------------------------------------------------------------------------

    def make_folders(self, names: Iterable[str]) -> None:
        """The folders exist."""
        with _storage_errors(self.root, "making the run folder"):
            for name in names:
                self.path(name).mkdir(parents=True, exist_ok=True)
            self._sync_folder(self.root)

    def write_temporary(self, name: str, data: bytes | memoryview) -> None:
        """The temporary file holds the bytes, safely on the disk."""
        path = self.path(name)
        with _storage_errors(path, f"writing {len(data):,} bytes"), path.open("wb") as file:
            file.write(data)
            file.flush()
            if self.sync:
                os.fsync(file.fileno())

    def seal(self, name: str) -> None:
        """A file that something else has written is safely on the disk."""
        if not self.sync:
            return
        path = self.path(name)
        with _storage_errors(path, "flushing"):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def put_if_absent(self, temporary: str, name: str) -> bool:
        """The sealed temporary file stands under its name; False where the name was taken (nothing changed)."""
        source, target = self.path(temporary), self.path(name)
        with _storage_errors(target, "publishing"):
            try:
                os.link(source, target)
            except FileExistsError:
                return False
            os.unlink(source)
        return True

    def sync_folder(self, name: str) -> None:
        """Names published in the folder survive a crash."""
        with _storage_errors(self.path(name), "flushing the folder"):
            self._sync_folder(self.path(name))

    def replace(self, name: str, data: bytes) -> None:
        """The name holds exactly these bytes, whatever it held before; never something in between."""
        temporary = f"{name}.{uuid.uuid4().hex[:8]}.tmp"
        self.write_temporary(temporary, data)
        self.rename(temporary, name)

    def rename(self, old: str, new: str) -> None:
        """The file stands under the new name only; what stood there is gone."""
        with _storage_errors(self.path(new), "renaming"):
            os.replace(self.path(old), self.path(new))
            self._sync_folder(self.path(new).parent)

    def append(self, name: str, data: bytes) -> None:
        """The bytes stand at the end of the file, safely on the disk."""
        path = self.path(name)
        with _storage_errors(path, f"appending {len(data):,} bytes"):
            fd = self._log_fds.get(name)
            if fd is None:
                new = not path.exists()
                fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                self._log_fds[name] = fd
                if new:
                    self._sync_folder(path.parent)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if self.sync:
                os.fsync(fd)

    def truncate(self, name: str, size_bytes: int) -> None:
        """The file ends there: used to drop a torn last line."""
        path = self.path(name)
        with _storage_errors(path, "truncating"), path.open("r+b") as file:
            file.truncate(size_bytes)
            if self.sync:
                os.fsync(file.fileno())

    def remove(self, name: str) -> None:
        """The name is gone; missing is fine."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            pass

    # -- reading --------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """The bytes under the name; None where there is none."""
        try:
            return self.path(name).read_bytes()
        except FileNotFoundError:
            return None

    def list(self, folder: str) -> list[str]:
        """Names in the folder, sorted; empty where there is none."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except FileNotFoundError:
            return []

    # -- one writer at a time -------------------------------------------------------------------------

    def claim(self, name: str) -> None:
        """This process alone writes here until `close`; ResumeError names the holder otherwise."""
        with _storage_errors(self.path(name), "locking the run folder"):
            fd = os.open(self.path(name), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 4096, 0).decode("utf-8", "replace").strip()
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise
            raise ResumeError(
                f"writing to {self.root}",
                found=f"another run holds it: {holder or 'holder unknown'}",
                allowed="one run per folder at a time",
                do="wait for that run to end, or use another output folder",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder_stamp()).encode() + b"\n", 0)
        self._claim_fd = fd

    def close(self) -> None:
        """Let go of the log files and of the claim."""
        for fd in self._log_fds.values():
            os.close(fd)
        self._log_fds.clear()
        if self._claim_fd is not None:
            os.close(self._claim_fd)
            self._claim_fd = None

    def _sync_folder(self, path: Path) -> None:
        if not self.sync:
            return
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def holder_stamp() -> dict[str, Any]:
    """Who this process is, so that a person can find it."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot_id = ""
    return {
        "host": socket.gethostname(),
        "boot_id": boot_id,
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


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
