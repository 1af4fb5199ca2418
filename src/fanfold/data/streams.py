"""Rows whose number is not known, those of a generator, piece by piece; a Stock."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING, Any

from fanfold.split.piece import Place, grown

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_LOOK_S = 0.002  # for so long pieces are looked for at a time
_MANY = 32  # and no more of them
_GUESS = 10.0  # a stream is taken for so many times what has come of it


class StreamRows:
    """Rows of an iterator, in lists; a unit is lent the list itself. Held until they are done, no longer."""

    kind = "stream"

    def __init__(self, rows: Iterable[Any]) -> None:
        self._rows = iter(rows)
        self._starts = [0]  # of each piece, and behind the last
        self._held: dict[int, list[Any]] = {}

    @property
    def num_known(self) -> int:
        return len(self._starts) - 1

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def more(self) -> bool:
        """Takes as many pieces from the iterator as come quickly, at least one."""
        before = self.num_known
        until_s = time.monotonic() + _LOOK_S
        while self.num_known - before < _MANY:
            rows = list(islice(self._rows, grown(self.num_rows)))
            if not rows:
                break
            self._held[self.num_known] = rows
            self._starts.append(self.num_rows + len(rows))
            if time.monotonic() > until_s:
                break
        return self.num_known > before

    def place(self, piece: int) -> Place:
        return Place(piece, self._starts[piece], self._starts[piece + 1])

    def rows_left(self, piece: int) -> float:
        return _GUESS * self._starts[piece]

    def lent(self, piece: int, to: str) -> Any:
        return self._held[piece]

    def read(self, piece: int, lent: Any) -> Any:
        return lent

    def forget(self, first: int, last: int) -> None:
        for piece in range(first, last + 1):
            del self._held[piece]

    def sent(self, path: Path | None) -> Lent:
        """What other processes need of it: nothing but what they are lent."""
        return Lent()


class Lent:
    """On a unit: pieces are what it was lent."""

    def opened(self) -> Lent:
        return self

    def read(self, piece: int, lent: Any) -> Any:
        return lent
