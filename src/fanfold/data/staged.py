"""An object store whose bulk data goes through local files: written here and put as a whole, fetched and kept here.

Every process has its own folder under `scratch`. Fetched copies are thrown away, the oldest first, beyond
KEEP_BYTES; what is mapped stays readable. What a copy holds is checked by its readers, by hash.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import OrderedDict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from fanfold.data.durable import storage_error
from fanfold.data.heartbeat import Heartbeat
from fanfold.data.objects import ObjectStore
from fanfold.data.scratch import scratch_folder

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.data.objects import Objects

KEEP_BYTES = 1 << 30


class StagedStore(ObjectStore):
    """Implements data.store.Store. `scratch` None, or not on this machine: a folder of its own, gone with `close`."""

    def __init__(self, objects: Objects, root: str = "", *, scratch: Path | None = None, **options: Any) -> None:
        super().__init__(objects, root, **options)
        self._scratch = scratch
        self._files: Path | None = None
        self._copies: OrderedDict[str, int] = OrderedDict()  # name -> bytes, the oldest first
        self._ends = ExitStack()
        weakref.finalize(self, self._ends.close)  # at the end of the process at the latest

    def claim(self, name: str) -> None:
        """As ObjectStore's, with a heartbeat until `close`."""
        super().claim(name)
        self._ends.enter_context(Heartbeat(self.beat, self.expires_s / 8))

    def close(self) -> None:
        self._ends.close()
        self._files = None
        self._copies.clear()
        super().close()

    @property
    def files(self) -> Path:
        if self._files is None:
            if self._scratch is not None and self._scratch.is_dir():
                self._files = self._scratch / f"files-{os.getpid()}"
            else:
                self._files = self._ends.enter_context(scratch_folder()) / "files"
        return self._files

    def new_file(self, name: str) -> Path:
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seal(self, name: str) -> None:
        """What was written at `new_file` is the store's; without such a file, the object is there already."""
        path = self.files / name
        if path.exists():
            self._put_file(path, name)
            path.unlink()
        else:
            super().seal(name)

    def place(self, temporary: str, name: str) -> None:
        path, target = self.files / temporary, self.new_file(name)
        self._put_file(path, name)
        os.replace(path, target)
        self._keep(name, target.stat().st_size)

    def file(self, name: str) -> Path:
        path = self.new_file(name)
        if name in self._copies and path.exists():
            self._copies.move_to_end(name)
            return path
        path.unlink(missing_ok=True)
        data = self.read(name)
        if data is not None:
            try:
                path.write_bytes(data)
            except OSError as error:
                raise storage_error(path, f"keeping a copy of {len(data):,} bytes", error) from error
            self._keep(name, len(data))
        return path

    def refresh(self, name: str) -> bool:
        if self._copies.pop(name, None) is None:
            return False
        (self.files / name).unlink(missing_ok=True)
        return True

    def remove(self, *names: str) -> None:
        for name in names:
            self.refresh(name)
        super().remove(*names)

    def _keep(self, name: str, num_bytes: int) -> None:
        self._copies.pop(name, None)
        self._copies[name] = num_bytes
        while sum(self._copies.values()) > KEEP_BYTES and len(self._copies) > 1:
            self.refresh(next(iter(self._copies)))

    def _put_file(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if not num_bytes:
                self.replace(name, b"")
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

                def put(key: str) -> None:
                    mapped.seek(0)
                    self._objects.put(key, mapped)

                self._ask(name, f"writing {num_bytes:,} bytes", put)
