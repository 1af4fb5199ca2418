"""Objects in other stores that fsspec reaches: those whose exclusive create is one step on the store's side.

fsspec's own `pipe_file(mode="create")` looks first and writes then, which two writers may do at once. So only
file systems that are known to send a condition are accepted, and all others refused: nothing is promised there.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError

if TYPE_CHECKING:
    from fanfold.data.objects import Blob

# memory: within this process, under a lock of ours. gs: gcsfs sends ifGenerationMatch=0 for mode="create".
EXCLUSIVE = ("memory", "gs")
_lock = threading.Lock()


class FsspecObjects:
    """Implements data.objects.Objects for the file system of an accepted scheme. `top`: the bucket."""

    def __init__(self, scheme: str, top: str) -> None:
        if scheme not in EXCLUSIVE:
            raise PlanError(
                f"output to {scheme}://{top}",
                found="this store cannot keep two writers apart: its file system has no exclusive create known to "
                "be a single step",
                allowed="a folder, s3:// (and stores that speak its language), gs://, or memory:// within one process",
                do="write to a folder, or to one of these stores",
            )
        from fsspec.core import url_to_fs

        try:
            self._fs, self._top = url_to_fs(f"{scheme}://{top}")
        except ImportError as error:
            raise PlanError(
                f"output to {scheme}://{top}",
                found=str(error),
                allowed="a store whose package for fsspec is installed",
                do="pip install gcsfs",
            ) from None

    def get(self, name: str) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return data

    def put(self, name: str, data: Blob) -> None:
        self._fs.pipe_file(self._path(name), bytes(data))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with _lock:
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def list(self, prefix: str) -> list[str]:
        self._fs.invalidate_cache()  # others write there too
        top = self._fs._strip_protocol(self._path(""))
        folder = self._path(prefix)
        try:
            found = self._fs.find(folder)
        except FileNotFoundError:
            return []
        names = (path.removeprefix(top).lstrip("/") for path in found)
        return sorted(name for name in names if name.startswith(prefix))

    def size_bytes(self, name: str) -> int | None:
        self._fs.invalidate_cache()
        try:
            info: dict[str, Any] = self._fs.info(self._path(name))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def delete(self, *names: str) -> None:
        for name in names:
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                pass

    def _path(self, name: str) -> str:
        return f"{self._top.rstrip('/')}/{name}"
