"""Rows of files, piece by piece, found as the files are read; a Stock."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from fanfold.data.filerows import STEP_ROWS
from fanfold.data.opening import open_rows
from fanfold.split.piece import Place, grown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fanfold.data.filerows import FileRows
    from fanfold.data.source import Window

_MANY = 32  # pieces looked for at a time


class FilePieces:
    """Rows of files, in lists or Arrow tables; a unit is lent the place and reads there itself."""

    kind = "files"

    def __init__(self, inputs: Sequence[str], spool: Path) -> None:
        self._files = open_rows(inputs, spool)
        self._windows: Iterator[Window] = self._files.windows()
        self._starts = [0]
        self._places: dict[int, tuple[Window, ...]] = {}
        self._last: Window | None = None

    @property
    def num_known(self) -> int:
        return len(self._starts) - 1

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def more(self) -> bool:
        """Looks for record boundaries, some pieces ahead."""
        before = self.num_known
        while self.num_known - before < _MANY:
            windows = tuple(islice(self._windows, grown(self.num_rows, STEP_ROWS) // STEP_ROWS))
            if not windows:
                break
            self._places[self.num_known], self._last = windows, windows[-1]
            self._starts.append(self.num_rows + sum(window.num_rows for window in windows))
        return self.num_known > before

    def place(self, piece: int) -> Place:
        return Place(piece, self._starts[piece], self._starts[piece + 1])

    def rows_left(self, piece: int) -> float:
        share = self._files.share_before(self._last) if self._last is not None else 1.0
        return max(self.num_rows, self.num_rows / share) - self._starts[piece]

    def lent(self, piece: int, to: str) -> Any:
        place = self._places[piece]
        return self._files.read(piece, place) if to == "cluster" and self._files.is_spooled else place

    def read(self, piece: int, lent: Any) -> Any:
        return self._files.read(piece, lent)

    def forget(self, first: int, last: int) -> None:
        for piece in range(first, last + 1):
            for window in self._places.pop(piece):
                self._files.release(window)

    def sent(self, path: Path | None) -> FileRows:
        """What other processes need of it: where the files are."""
        return self._files
