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


def collectives(
    *, layers: int, tokens: int, hidden: int, chosen: int, num_bytes: int, backward: bool
) -> tuple[int, int]:
    """Sums over the units of a step whose tokens are on all of them: how many, and their bytes (`parallel/experts.py`).

    Of each of `layers` layers of experts, the outputs forward; back, the gradients of the hidden states and of the
    `chosen` weights of every token.
    """
    states, weights = tokens * hidden * num_bytes, tokens * chosen * num_bytes
    return layers * (3 if backward else 1), layers * (states + (states + weights if backward else 0))
