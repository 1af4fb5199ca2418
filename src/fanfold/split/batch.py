"""Token-budget batches of rows sorted by length, and the pieces made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Positions [start, stop) of a cut's order; every row is padded to `length` tokens."""

    start: int
    stop: int
    length: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def padded_tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A window's rows in the order of computation, and where its batches and pieces end."""

    order: tuple[int, ...]  # row offsets within the window
    pieces: tuple[tuple[Batch, ...], ...]
    true_costs: tuple[int, ...] | None = None  # of pieces whose rows are not padded

    @property
    def costs(self) -> tuple[int, ...]:
        """Padded tokens of each piece: what it costs, up to a factor."""
        if self.true_costs is not None:
            return self.true_costs
        return tuple(sum(batch.padded_tokens for batch in piece) for piece in self.pieces)

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each piece."""
        return tuple(sum(batch.rows for batch in piece) for piece in self.pieces)


def cut(offsets: Sequence[int], lengths: Sequence[int], *, batch_tokens: int, piece_batches: int = 1) -> Cut:
    """Rows sorted by falling length (ties by offset), batched under the budget, batches grouped into pieces.

    A batch is as many rows as fit `batch_tokens` at the length of its longest row, one at the least.
    Depends on the arguments alone.
    """
    if len(offsets) != len(lengths):
        raise ValueError(f"{len(offsets)} offsets, {len(lengths)} lengths")
    ranked = sorted(range(len(offsets)), key=lambda i: (-lengths[i], offsets[i]))
    batches: list[Batch] = []
    start = 0
    while start < len(ranked):
        length = max(1, lengths[ranked[start]])
        stop = min(len(ranked), start + max(1, batch_tokens // length))
        batches.append(Batch(start=start, stop=stop, length=length))
        start = stop
    pieces = [tuple(batches[i : i + piece_batches]) for i in range(0, len(batches), piece_batches)]
    return Cut(order=tuple(offsets[i] for i in ranked), pieces=tuple(pieces))


def deal(offsets: Sequence[int], costs: Sequence[int], *, piece_cost: int) -> Cut:
    """Pieces of one batch each that cost about the same and hold rows of all kinds, dealt out by falling cost.

    There are as many as `piece_cost` asks for, rounded up to a multiple of 2, from 4 on of 4, so that few units
    have equal shares of a small job; two where halves are still a sixth of `piece_cost`. Depends on the arguments
    alone.
    """
    ranked = sorted(range(len(offsets)), key=lambda i: (-costs[i], offsets[i]))
    total = sum(costs)
    count = max(-(-total // piece_cost), 2 if total >= piece_cost // 3 else 1)
    step = 1 if count < 2 else 2 if count < 4 else 4
    count = min(len(ranked), -(-count // step) * step)
    dealt: list[list[int]] = [[] for _ in range(count)]
    for place, i in enumerate(ranked):  # there and back again
        turn, at = divmod(place, count)
        dealt[at if turn % 2 == 0 else count - 1 - at].append(i)
    order = [i for hand in dealt for i in hand]
    pieces, start = [], 0
    for hand in dealt:
        longest = max(costs[i] for i in hand)
        pieces.append((Batch(start=start, stop=start + len(hand), length=longest),))
        start += len(hand)
    return Cut(
        order=tuple(offsets[i] for i in order),
        pieces=tuple(pieces),
        true_costs=tuple(sum(costs[i] for i in hand) for hand in dealt),
    )
