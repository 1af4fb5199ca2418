"""ZeRO: optimiser state (1), gradients (2) and weights (3) in parts over the data group (Rajbhandari 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.planner.collectives import gather_s, group

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


def reduce_s(cluster: Cluster, degrees: Degrees, params: float, gradient_bytes: float) -> float:
    """Reduce-scatter of the gradients."""
    copies = degrees.data * degrees.context
    return gather_s(cluster, group(cluster, copies, degrees.tensor), params * gradient_bytes)


def weights_s(cluster: Cluster, degrees: Degrees, params: float, weight_bytes: float = 2) -> float:
    """All-gather of the weights: once a step in stages 1 and 2, twice a micro-batch in stage 3."""
    return reduce_s(cluster, degrees, params, weight_bytes)
