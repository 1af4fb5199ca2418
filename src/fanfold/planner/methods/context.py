"""Context parallelism: a sequence cut over devices, keys and values going round (ring attention)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.planner.collectives import group, send_s

if TYPE_CHECKING:
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
