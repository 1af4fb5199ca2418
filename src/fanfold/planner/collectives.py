"""Seconds of collectives: alpha-beta, within a node and across nodes, whose network cards a node's groups share.

M bytes is what one device holds: of the whole vector for an all-reduce, of the gathered one for an all-gather.
Source: Thakur, Rabenseifner and Gropp 2005; bus bandwidth as nccl-tests defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fanfold.planner.constants import ALPHA_ACROSS_S, ALPHA_WITHIN_S

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """`size` devices, of which `per_node` stand in one node."""

    size: int
    per_node: int

    @property
    def nodes(self) -> int:
        return max(1, math.ceil(self.size / self.per_node))


def group(cluster: Cluster, size: int, stride: int) -> Group:
    """A group of `size` devices whose ranks are `stride` apart, nodes filled in rank order."""
    per_node = max(1, min(size, cluster.devices_per_node // max(stride, 1)))
    return Group(size=size, per_node=per_node)


def bus_bytes_per_s(cluster: Cluster, of: Group) -> float:
    """Bus bandwidth of a ring over the group.

    Across nodes the group has its members' shares of the cards, all that stand in one node together.
    """
    link = cluster.link_allreduce_bytes_per_s
    if cluster.accelerator.mesh and of.per_node < cluster.devices_per_node:
        link *= max(1, of.per_node - 1) / max(1, cluster.devices_per_node - 1)  # a pair sees one link of seven
    if of.nodes == 1:
        return link
    return min(link, of.per_node * cluster.network_rate)


def allreduce_s(cluster: Cluster, of: Group, num_bytes: float) -> float:
    """Sum of `num_bytes` on every member: ring within a node, ring or tree of nodes across, the quicker."""
    if of.size <= 1 or num_bytes <= 0:
        return 0.0
    rate = bus_bytes_per_s(cluster, of)
    within, nodes = of.per_node, of.nodes
    steps = 2 * (within - 1) * ALPHA_WITHIN_S * _ring_share(within)
    ring = 2 * (of.size - 1) / of.size * num_bytes / rate + 2 * (nodes - 1) * ALPHA_ACROSS_S
    tree = 2 * num_bytes / rate + 2 * math.log2(max(nodes, 1)) * ALPHA_ACROSS_S
    return steps + (min(ring, tree) if nodes > 1 else 2 * (of.size - 1) / of.size * num_bytes / rate)


def _ring_share(within: int) -> float:
    """NCCL's start-up within a node is one kernel, not one per step: the published 10 us stand for eight devices."""
    return 1 / max(1, 2 * (within - 1))


def gather_s(cluster: Cluster, of: Group, num_bytes: float) -> float:
    """All-gather to, or reduce-scatter from, `num_bytes` on every member: rings only, one hop a node."""
    if of.size <= 1 or num_bytes <= 0:
        return 0.0
    rate = bus_bytes_per_s(cluster, of)
    start = ALPHA_WITHIN_S + ((of.nodes - 1) * (ALPHA_ACROSS_S - ALPHA_WITHIN_S) if of.nodes > 1 else 0.0)
    return start + (of.size - 1) / of.size * num_bytes / rate


def alltoall_s(cluster: Cluster, of: Group, num_bytes: float) -> float:
    """Each member sends `num_bytes` in equal parts to all; what leaves the node goes over its own card."""
    if of.size <= 1 or num_bytes <= 0:
        return 0.0
    inside = of.per_node / of.size
    link = cluster.accelerator.link_bytes_per_s * 0.75
    away = (1 - inside) * num_bytes / cluster.network_rate if of.nodes > 1 else 0.0
    near = (inside - 1 / of.size) * num_bytes / link
    alpha = ALPHA_WITHIN_S + (ALPHA_ACROSS_S if of.nodes > 1 else 0.0)
    return alpha + max(away, near)


def send_s(cluster: Cluster, num_bytes: float, *, across: bool) -> float:
    """One device to one other."""
    if across:
        return ALPHA_ACROSS_S + num_bytes / cluster.network_rate
    rate = cluster.accelerator.link_bytes_per_s * (1 / 7 if cluster.accelerator.mesh else 1)
    return ALPHA_WITHIN_S + num_bytes / (0.75 * rate)
