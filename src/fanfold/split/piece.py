"""How rows in memory are cut into pieces: by their number and size alone, never by the machine."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

from fanfold.errors import PlanError

PIECE_ROWS = 32_768
PIECE_BYTES = 256 * 1024  # what a core's own cache holds beside the temporaries of a function
_LIST_PIECES = 1024  # a long list is cut into about so many pieces: its rows may be costly
_GROWTH = 256  # a piece of a stream has one row for so many before it


class Place(NamedTuple):
    """Where a piece stands: its number, its first row and the first behind it, and how many pieces there are."""

    piece: int
    start: int
    stop: int
    num_pieces: int | None = None  # None: not known

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        of = "" if self.num_pieces is None else f" of {self.num_pieces}"
        return f"piece {self.piece}{of} (rows {self.start}-{self.stop - 1})"


@dataclass(frozen=True, slots=True)
class Cuts:
    """`num_rows` rows in `num_pieces` consecutive pieces; of `piece_rows` each, or else as equal as can be."""

    num_rows: int
    num_pieces: int
    piece_rows: int | None = None

    def bounds(self, piece: int) -> tuple[int, int]:
        """First row of the piece, and the first behind it."""
        if self.piece_rows is None:
            return piece * self.num_rows // self.num_pieces, (piece + 1) * self.num_rows // self.num_pieces
        start = piece * self.piece_rows
        return start, min(start + self.piece_rows, self.num_rows)

    def rows_from(self, piece: int) -> int:
        """The number of rows of this piece and all behind it; 0 behind the last."""
        return self.num_rows - self.bounds(piece)[0] if piece < self.num_pieces else 0


def cut_into(num_rows: int, pieces: int) -> Cuts:
    """As many pieces as asked for. Raises PlanError for fewer than 1 or more than there are rows."""
    if hasattr(pieces, "__index__") and not isinstance(pieces, bool):  # NumPy's ints too
        pieces = operator.index(pieces)
    if isinstance(pieces, bool) or not isinstance(pieces, int) or not 1 <= pieces <= max(num_rows, 1):
        raise PlanError(
            f"pieces={pieces!r}",
            found=f"{num_rows} row(s)",
            allowed=f"1 to {max(num_rows, 1)} pieces",
            do="leave pieces away, or ask for at most one a row",
        )
    return Cuts(num_rows, pieces if num_rows else 0)


def cut_array(num_rows: int, row_bytes: float) -> Cuts:
    """Pieces of 32,768 rows or 256 KiB, whichever is less; at least one row."""
    return _cut(num_rows, max(1, min(PIECE_ROWS, int(PIECE_BYTES // max(row_bytes, 1)))))


def cut_list(num_rows: int) -> Cuts:
    """About 1,024 pieces, of 32,768 rows at the most."""
    return _cut(num_rows, max(1, min(PIECE_ROWS, -(-num_rows // _LIST_PIECES))))


def _cut(num_rows: int, piece_rows: int) -> Cuts:
    return Cuts(num_rows, -(-num_rows // piece_rows), piece_rows)


def grown(num_rows_before: int, step: int = 1) -> int:
    """Rows of the next piece of data whose length is not known: more as there are more before, in steps.

    Of n rows about 256 (1 + ln(n / 256)) pieces are made, none of more than 32,768 rows.
    """
    return max(step, min(PIECE_ROWS, num_rows_before // _GROWTH) // step * step)
