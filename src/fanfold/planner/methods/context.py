"""Context parallelism: a sequence cut over units. What attention moves in each of its three variants, and how long.

`parallel/context.py` does it and `parallel/comm.py` counts what is really called; a test compares the two.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fanfold.planner.collectives import group, send_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


def ring_s(cluster: Cluster, degrees: Degrees, tokens: int, cache_width: int, num_bytes: int = 2) -> float:
    """Seconds of one pass of all keys and values round the ring, of one layer and micro-batch.

    Each of c - 1 steps moves the keys and values of `tokens` tokens, cut over the tensor group.
    """
    c, t = degrees.context, degrees.tensor
    if c == 1:
        return 0.0
    across = group(cluster, c, t).nodes > 1
    return (c - 1) * send_s(cluster, tokens * cache_width * num_bytes / t, across=across)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One unit's part in the attention of a model whose sequence is cut.

    tokens[r]: positions of unit r; heads[r]: query and key-value heads that unit r works on where heads are exchanged.
    """

    rank: int
    layers: int
    rows: int
    tokens: Sequence[int]
    num_kv: int
    head_size: int
    num_bytes: int
    heads: Sequence[tuple[int, int]] = ()


@dataclass(slots=True)
class Moved:
    """Calls and bytes by kind. Bytes: of the whole tensor in an all_reduce or all_gather, else those that leave."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int, times: int = 1) -> None:
        self.calls[kind] += times
        self.bytes[kind] += num_bytes * times


def moved(
    method: Literal["allgather", "ulysses", "ring"], at: Attention, *, backward: bool, parameters: Sequence[int] = ()
) -> Moved:
    """All layers' attention of one step. parameters: numbers in each of those whose gradients are summed over units.

    allgather: keys and values of all positions once; backward each position's gradients go where it lies.
    ulysses: two exchanges, of queries, keys and values, and of outputs; the same backward.
    ring: c - 1 shifts of keys and values; backward c, with the sums of their gradients, the last of those alone.
    """
    found = Moved()
    rank, ways, every = at.rank, len(at.tokens), sum(at.tokens)
    cell = at.rows * at.head_size * at.num_bytes  # one head of one position
    mine, others = at.tokens[rank], every - at.tokens[rank]
    if method == "allgather":
        found.add("all_gather", 2 * at.num_kv * every * cell, at.layers)
        if backward:
            found.add("all_to_all", 2 * at.num_kv * others * cell, at.layers)
    elif method == "ulysses":
        queries = sum(q for r, (q, _) in enumerate(at.heads) if r != rank)
        keys = sum(kv for r, (_, kv) in enumerate(at.heads) if r != rank)
        own_queries, own_keys = at.heads[rank]
        for _ in range(2 if backward else 1):
            found.add("all_to_all", (queries + 2 * keys) * mine * cell, at.layers)
            found.add("all_to_all", own_queries * others * cell, at.layers)
        if backward:  # the gradient of outputs comes as queries do, those of keys and values go as outputs do
            found.bytes["all_to_all"] += 2 * (own_keys * others - keys * mine) * cell * at.layers
    else:
        for step in range(ways):
            share = 2 * at.num_kv * at.tokens[(rank - step) % ways] * cell
            if step < ways - 1:
                found.add("shift", share, at.layers)
            if backward:
                found.add("shift", share * (2 if step < ways - 1 else 1), at.layers)
    if backward:
        for numbers in parameters:
            found.add("all_reduce", numbers * at.num_bytes)
    return found
