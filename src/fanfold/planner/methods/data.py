"""Data parallelism: equal copies, whose gradients are summed once a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.planner.collectives import allreduce_s, group

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


def gradients_s(cluster: Cluster, degrees: Degrees, params: float, gradient_bytes: int) -> float:
    """All-reduce of the gradients of `params` parameters over the copies (context ranks are copies, too)."""
    copies = degrees.data * degrees.context
    return allreduce_s(cluster, group(cluster, copies, degrees.tensor), params * gradient_bytes)
