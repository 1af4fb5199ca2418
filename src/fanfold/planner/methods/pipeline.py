"""Pipeline parallelism: stages of layers, micro-batches in 1F1B order, interleaved or not (Narayanan 2021)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.planner.collectives import gather_s, group, send_s

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


def step_s(stages_s: list[float], micro_batches: int, interleave: int = 1) -> tuple[float, float]:
    """(busy, bubble) of a step whose stages take `stages_s` each, forward and backward of one micro-batch.

    The slowest stage sets the pace; filling and draining take the others once, in v-ths when interleaved.
    """
    slowest = max(stages_s)
    busy = micro_batches * slowest
    return busy, (sum(stages_s) - slowest) / interleave


def border_s(cluster: Cluster, degrees: Degrees, num_bytes: float, *, scatter_gather: bool) -> float:
    """Sending one micro-batch's activations to the next stage, one way.

    With scatter-gather each device of a tensor group sends its part, and they gather within the node.
    """
    t = degrees.tensor
    stride = t * degrees.context * degrees.data
    across = stride >= cluster.devices_per_node or cluster.devices > cluster.devices_per_node * degrees.pipeline
    if scatter_gather and t > 1:
        return send_s(cluster, num_bytes / t, across=across) + gather_s(cluster, group(cluster, t, 1), num_bytes)
    return send_s(cluster, num_bytes, across=across)
