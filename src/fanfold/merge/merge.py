"""What a merge is, and the one tree in which every merge folds.

The fixed tree. For n parts p0 ... p(n-1) it is a function of n alone:

    tree of 1 part      the part itself
    tree of n parts     join(tree of the first k, tree of the other n - k),
                        k the largest power of two below n

so seven parts are ((p0 p1)(p2 p3)) ((p4 p5) p6), and the height is ceil(log2 n). Every aligned block of parts
[i * 2^k, (i + 1) * 2^k) is a subtree whatever n is. That is what lets a stream fold with O(log n) parts in
memory (a binary counter), and lets parts that arrive out of order join as soon as their neighbour is there.
Source of the tree: RFC 6962, section 2.1 (Merkle trees over a log that grows).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from fanfold.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable

Part = TypeVar("Part")
Result_co = TypeVar("Result_co", covariant=True)
_NOTHING: Any = object()


class Merge(Protocol[Part, Result_co]):
    """An associative way to join results, with an identity.

    Laws (`fanfold.testing.laws` runs them): `join` is associative within the tolerance that the merge states,
    `empty()` is its identity on both sides, and a part survives pickling, and `codec`. `join` need not be commutative:
    parts are always joined in piece order. A part may be kept, joined again or sent to another process, so
    `join` returns a new part and changes neither of the two; `lift` may keep the value that it was given.
    """

    def empty(self) -> Part:
        """The part of no pieces."""

    def lift(self, value: Any, rows: int) -> Part:
        """The part of one piece: what was computed from it, and the number of its rows."""

    def join(self, left: Part, right: Part) -> Part:
        """The part of both; all pieces of `left` come before those of `right`."""

    def finish(self, part: Part) -> Result_co:
        """The result for all pieces in the part. Raises DataError where no pieces have no result."""


def fold(merge: Merge[Part, Any], parts: Iterable[Part]) -> Part:
    """All parts joined in their order, in the fixed tree; `empty()` where there are none.

    Cost: n - 1 joins, at most log2(n) + 1 parts held at a time; `parts` may be a generator.
    """
    ordered = OrderedFold(merge)
    num_pieces = 0
    for part in parts:
        ordered.add(num_pieces, part)
        num_pieces += 1
    return ordered.part(num_pieces)


class OrderedFold(Generic[Part]):
    """The part that `fold` gives, bit for bit, from parts that arrive in any order with their piece index.

    Two complete neighbouring subtrees are joined at once; all else waits. Parts held: log2(n) + 1 when they
    arrive in order; otherwise one for each maximal aligned block of pieces that have arrived.
    """

    def __init__(self, merge: Merge[Part, Any]) -> None:
        self._merge = merge
        self._waiting: dict[tuple[int, int], Part] = {}  # (level k, i): pieces [i * 2^k, (i + 1) * 2^k)
        self._num_levels = 0

    @property
    def num_waiting(self) -> int:
        """How many parts are held now."""
        return len(self._waiting)

    def add(self, index: int, part: Part) -> None:
        """Takes the part of piece `index`, counted from 0. Raises InternalError if that piece came before."""
        if index < 0 or self._holds(index):
            raise InternalError(
                f"take the part of piece {index} into the fold",
                found="a negative piece index" if index < 0 else "a part of this piece came before",
                allowed="every piece once, counted from 0",
                do="report this: the engine must drop the late twin of a committed piece",
            )
        self.add_block(0, index, part)

    def blocks(self) -> list[tuple[int, int, Part]]:
        """The parts held now, as (level, index, part): what `add_block` of another fold of the pieces takes."""
        return [(level, index, part) for (level, index), part in self._waiting.items()]

    def add_block(self, level: int, index: int, part: Part) -> None:
        """Takes the part of pieces [index * 2^level, (index + 1) * 2^level), joined in the fixed tree."""
        waiting, join = self._waiting, self._merge.join
        while (neighbour := waiting.pop((level, index ^ 1), _NOTHING)) is not _NOTHING:
            part = join(neighbour, part) if index & 1 else join(part, neighbour)
            level, index = level + 1, index >> 1
        waiting[level, index] = part
        self._num_levels = max(self._num_levels, level + 1)

    def part(self, num_pieces: int) -> Part:
        """The part of pieces 0 ... num_pieces - 1. Raises InternalError unless exactly these came."""
        blocks = _blocks(num_pieces)
        if set(blocks) != self._waiting.keys():
            missing = [index for index in range(num_pieces) if not self._holds(index)]
            raise InternalError(
                f"fold {num_pieces} pieces",
                found=f"{len(missing)} did not come, the first is piece {missing[0]}"
                if missing
                else f"parts of pieces beyond {num_pieces - 1}",
                allowed="every piece once",
                do="report this: the engine must not fold before all pieces are committed",
            )
        if not blocks:
            return self._merge.empty()
        part = self._waiting[blocks[-1]]
        for block in reversed(blocks[:-1]):
            part = self._merge.join(self._waiting[block], part)
        return part

    def _holds(self, index: int) -> bool:
        return any((level, index >> level) in self._waiting for level in range(self._num_levels))


def _blocks(num_pieces: int) -> list[tuple[int, int]]:
    """The maximal aligned blocks (level, index) that make up pieces 0 ... num_pieces - 1, in order."""
    blocks = []
    stop = num_pieces
    while stop > 0:
        level = (stop & -stop).bit_length() - 1
        blocks.append((level, (stop >> level) - 1))
        stop -= 1 << level
    return blocks[::-1]
