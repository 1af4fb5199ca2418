"""Expert parallelism: tokens go to the devices of their experts, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.planner.collectives import alltoall_s, group

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


def exchange_s(cluster: Cluster, degrees: Degrees, tokens: int, hidden: int, chosen: int, num_bytes: int = 2) -> float:
    """Two all-to-alls of one layer, one way (forward or backward): there and back.

    A tensor group shares the tokens: each device sends its part, `chosen` copies of every token.
    """
    e = degrees.expert
    if e == 1:
        return 0.0
    stride = degrees.tensor if e <= degrees.data * degrees.context else 1
    size = tokens * chosen * hidden * num_bytes / degrees.tensor
    return 2 * alltoall_s(cluster, group(cluster, e, stride), size)
