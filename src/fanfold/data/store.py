"""The verbs of every place that a run folder may be in: a disk or an object store.

`fanfold.testing.stores.StoreSuite` says what each of them promises. Bulk data goes through local files: what
`new_file` names is written by others and becomes the store's with `seal` or `place`, and `file` names a local
file that holds an object's bytes. On a disk these are the files themselves, and nothing is copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


class Store(Protocol):
    """A run folder, wherever it is. Names are relative to it, with / between their parts."""

    @property
    def shown(self) -> str:
        """What messages call the run folder."""

    def path(self, name: str) -> Path | str:
        """What messages call the name."""

    def make_folders(self, names: Iterable[str]) -> None: ...
    def write_temporary(self, name: str, data: bytes | memoryview) -> None: ...
    def put_if_absent(self, temporary: str, name: str) -> bool: ...

    def put_all_if_absent(self, pairs: Sequence[tuple[str, str]]) -> Sequence[bool]:
        """As `put_if_absent` of each (temporary, name), at once where that is faster."""

    def sync_folder(self, name: str) -> None: ...
    def replace(self, name: str, data: bytes) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def append(self, name: str, data: bytes) -> None: ...
    def truncate(self, name: str, size_bytes: int) -> None: ...
    def remove(self, *names: str) -> None: ...

    def remove_folder(self, name: str) -> None:
        """The folder and all in it are gone, or a log with all its segments."""

    def read(self, name: str) -> bytes | None: ...
    def list(self, folder: str) -> list[str]: ...

    def size_bytes(self, name: str) -> int | None:
        """How large what stands under the name is; None where there is nothing."""

    def claim(self, name: str) -> None: ...
    def close(self) -> None: ...

    # -- local files ----------------------------------------------------------------------------------

    @property
    def files(self) -> Path:
        """The local folder that `file` and `new_file` name files in."""

    def new_file(self, name: str) -> Path:
        """Where to write the file that is then sealed or placed under a name; its folder exists."""

    def seal(self, name: str) -> None:
        """What was written at `new_file` stands safely in the store."""

    def place(self, temporary: str, name: str) -> None:
        """What was written at `new_file(temporary)` stands under the name, whatever was there; not durable on a disk.

        For what can be made again, and is the same each time.
        """

    def file(self, name: str) -> Path:
        """A local file with the bytes under the name, valid until the next call; it may be missing."""

    def refresh(self, name: str) -> bool:
        """Whether `file` was a copy that had to be thrown away, so that asking again may give other bytes."""
