"""Folders for data that dies with its process; what a killed process has left is removed by the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # not a POSIX system; refused with a message before any folder is made
    fcntl = None  # type: ignore[assignment]

_PREFIX = "fanfold-"
_OWNER = ".owner"  # locked while its process lives, locked before it gets this name


@contextmanager
def scratch_folder(root: Path | None = None) -> Iterator[Path]:
    """A folder of our own under `root` (default: the system's temporary one), gone at the end."""
    root = root or Path(tempfile.gettempdir())
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    fd = os.open(folder / "new", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.rename(folder / "new", folder / _OWNER)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _sweep(root: Path) -> None:
    """Remove folders of ours whose owner is dead: nobody holds the lock."""
    for owner in root.glob(f"{_PREFIX}*/{_OWNER}"):
        try:
            if owner.stat().st_uid != os.getuid():
                continue
            fd = os.open(owner, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(fd)
