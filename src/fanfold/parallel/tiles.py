"""Which queries see which keys, as tiles of positions: what nobody sees is left out, no mask of a whole sequence made.

Shapes: B rows, Q queries and K keys of a tile, S positions of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Pattern = Literal["full", "causal", "other"]
MASK_ROWS = 1024  # queries, and keys on the diagonal, of a tile that needs a mask
TILE_ROWS = 4096  # queries of any tile
BIASED_PAIRS = 1 << 20  # queries times keys of a tile whose scores have a bias of their own


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys by their place in the tensors at hand, and by their positions in the sequence."""

    rows: slice
    columns: slice
    queries: range
    keys: range
    causal: bool  # queries and keys are the same positions, and each sees those up to itself


@dataclass
class Bias:
    """A learned bias of scores by the distance of query and key: T5's.

    table: [buckets, N], one column a head of this unit. bucket: key position less query position -> bucket, of int64
    tensors. grad: as the table, for one backward.
    """

    table: torch.Tensor
    bucket: Callable[[torch.Tensor], torch.Tensor]
    grad: torch.Tensor | None = None

    def of(self, tile: Tile) -> torch.Tensor:
        """[1, N, Q, K]"""
        return self.table.detach()[self._buckets(tile)].permute(2, 0, 1)[None]

    def for_backward(self) -> Bias:
        return Bias(self.table, self.bucket, torch.zeros_like(self.table))

    def add_gradient(self, tile: Tile, scores: torch.Tensor) -> None:
        """`scores`: the gradient of scores, [B, N, Q, K]."""
        assert self.grad is not None
        flat = scores.sum(0).flatten(1).T.to(self.grad.dtype)
        self.grad.index_add_(0, self._buckets(tile).flatten(), flat)

    def _buckets(self, tile: Tile) -> torch.Tensor:
        q = torch.arange(tile.queries.start, tile.queries.stop)[:, None]
        return self.bucket(torch.arange(tile.keys.start, tile.keys.stop)[None, :] - q)


@dataclass
class Mask:
    """What a model's own code asked for, and what tells a query's keys. It stands where a mask tensor would.

    function: of (row, head, query, key) as index tensors that broadcast. seen: [B, S], False for padding; None: all.
    """

    run: Any  # which cut of the sequence this is for
    pattern: Pattern
    function: Callable[..., torch.Tensor]
    seen: torch.Tensor | None
    held: dict[Any, list[Tile]] = field(default_factory=dict)

    def tiles(self, queries: list[range], keys: list[range], bias: Bias | None = None) -> list[Tile]:
        """Together they hold every pair that counts once. Runs of positions lie side by side in the tensors."""
        key = (tuple(queries), tuple(keys), bias is None)
        if key not in self.held:
            step = TILE_ROWS if self.seen is None and self.pattern != "other" else MASK_ROWS
            if bias is not None:
                step = min(step, max(1, BIASED_PAIRS // max(map(len, keys))))
            self.held[key] = list(self._tiles(queries, keys, step))
        return self.held[key]

    def of_token(self, position: int, keys: torch.Tensor) -> torch.Tensor | None:
        """Which of the keys at these positions the token at `position`, behind all of them, sees: [B or 1, 1, 1, K]."""
        seen = None if self.seen is None else self.seen[:, None, None, keys]
        if self.pattern != "other":
            return seen
        rows = torch.arange(1 if self.seen is None else self.seen.shape[0])[:, None, None, None]
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
        found = self.function(rows, zero, zero + position, keys[None, None, None, :])
        return found if seen is None else found & seen

    def bias(
        self, tile: Tile, dtype: torch.dtype, *, complete: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """To add to scores, [B, 1, Q or 1, K] of 0 and -inf, and which queries see no key, [B, 1, Q or 1].

        `complete`: also where the kernel would make a causal mask itself.
        """
        visible = self._visible(tile, complete=complete)
        if visible is None:
            return None, None
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
        return bias, ~visible.any(-1)

    def _visible(self, tile: Tile, *, complete: bool = False) -> torch.Tensor | None:
        keys = slice(tile.keys.start, tile.keys.stop)
        seen = None if self.seen is None else self.seen[:, None, None, keys]
        if seen is not None and bool(seen.all()):
            seen = None
        if self.pattern == "full" or (self.pattern == "causal" and not tile.causal):
            return seen
        if self.pattern == "causal" and seen is None and not complete:
            return None  # the kernel's own
        q = torch.arange(tile.queries.start, tile.queries.stop)[None, None, :, None]
        k = torch.arange(tile.keys.start, tile.keys.stop)[None, None, None, :]
        rows = torch.arange(1 if self.seen is None else self.seen.shape[0])[:, None, None, None]
        found = self.function(rows, torch.zeros(1, 1, 1, 1, dtype=torch.int64), q, k)
        found = found.expand(found.shape[0], 1, len(tile.queries), len(tile.keys))
        return found if seen is None else found & seen

    def by_kernel(self, tile: Tile) -> bool:
        """Whether the kernel makes the causal mask of this tile itself."""
        return tile.causal and (self.seen is None or bool(self.seen[:, tile.keys.start : tile.keys.stop].all()))

    # -- cutting --------------------------------------------------------------------------------------

    def _tiles(self, queries: list[range], keys: list[range], step: int) -> Iterator[Tile]:
        ends = {end for run in (*queries, *keys) for end in (run.start, run.stop)}
        for rows, q in _placed(queries, ends if self.pattern == "causal" else set(), step):
            for columns, k in _placed(keys, {q.start, q.stop} if self.pattern == "causal" else set(), None):
                if self.pattern == "causal" and q != k and q.start < k.stop:
                    continue  # all of them come later
                tile = Tile(rows, columns, q, k, self.pattern == "causal" and q == k)
                if self.pattern == "other" and not bool(self._seen_at_all(tile)):
                    continue
                yield tile

    def _seen_at_all(self, tile: Tile) -> bool:
        visible = self._visible(tile)
        return visible is None or bool(visible.any())


def _placed(runs: list[range], ends: set[int], step: int | None) -> Iterator[tuple[slice, range]]:
    """The runs cut at `ends` and after `step` positions, each with its place in the tensor."""
    place = 0
    for run in runs:
        cuts = {end for end in ends if run.start < end < run.stop}
        if step is not None:
            cuts |= set(range(run.start + step, run.stop, step))
        bounds = [run.start, *sorted(cuts), run.stop]
        for start, stop in pairwise(bounds):
            yield slice(place + start - run.start, place + stop - run.start), range(start, stop)
        place += len(run)
