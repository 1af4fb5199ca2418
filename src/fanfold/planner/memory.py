"""Bytes that training holds on the fullest device: states, activations, what is there for a moment, the runtime.

Activations are counted tensor by tensor as Korthikanti 2022 (section 4) does; the buffer of one matrix's gradient
is what that count leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fanfold.planner.constants import ALLOCATOR_SLACK, CONTEXT_BYTES
from fanfold.planner.training import Training, micro_batches, params_per_device

if TYPE_CHECKING:
    from fanfold.plan.model import Layer, Model
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    runtime: float  # CUDA and NCCL contexts, allocator slack

    @property
    def allocated(self) -> float:
        """What the framework itself has allocated at its peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient

    @property
    def total(self) -> float:
        return self.allocated + self.runtime

    def record(self) -> dict[str, float]:
        names = ("weights", "gradients", "optimizer", "activations", "transient", "runtime")
        return {name: float(getattr(self, name)) for name in names}


def memory(training: Training, cluster: Cluster, degrees: Degrees) -> Memory:
    """Of the fullest device; see docs/planning.md for the formulas."""
    model, work = training.model, training.framework
    dense, sparse = params_per_device(model, degrees)
    copies = degrees.data * degrees.context
    wide = training.precision in ("fp32", "tf32")
    grad_bytes = 4.0 if wide else float(work.gradient_bytes)
    rest = max(1.0, copies * degrees.tensor / (degrees.expert * degrees.expert_tensor))  # copies of an expert

    def over(stage: int, num_bytes: float) -> float:
        if degrees.zero < stage:
            return (dense + sparse) * num_bytes
        return dense * num_bytes / copies + sparse * num_bytes / rest

    if training.frozen:
        grad_bytes = 0.0
    weights = over(3, 4.0 if wide else 2.0)
    gradients = over(2, grad_bytes)
    optimizer = 0.0 if training.frozen else over(1, 8.0 if wide else 12.0)
    transient = _weight_gradient(model, degrees)
    if degrees.zero >= 3:  # two gathered layers at a time, one in use and one on its way
        biggest = max(block.layer.params - block.layer.expert_params for block in model.blocks) / degrees.tensor
        transient += 2 * biggest * (4.0 if wide else 2.0)
    activations = _activations(training, degrees)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        runtime=CONTEXT_BYTES + ALLOCATOR_SLACK * (activations + transient),
    )


def _weight_gradient(model: Model, degrees: Degrees) -> float:
    layer = max((block.layer for block in model.blocks), key=lambda one: one.ffn)
    return 2.0 * (3 if layer.gated else 2) * layer.ffn * model.hidden / degrees.tensor


def layer_bytes(layer: Layer, training: Training, degrees: Degrees) -> float:
    """What backward needs of one layer and one micro-batch, without recomputation of all of it."""
    work = training.framework
    tokens = degrees.micro_batch * training.length / degrees.context
    t = degrees.tensor
    spread = t if degrees.sequence_parallel and work.sequence_parallel else 1
    wide = 2.0 if training.precision in ("fp32", "tf32") else 1.0
    hidden = layer.linears[0].inputs
    border = (2.0 * layer.norms + 2.0 * (len(layer.attention) + 1)) * hidden
    inner = 0.0
    for seen in layer.attention:
        width, keys = seen.heads * seen.head_dim, seen.kv_heads * (seen.head_dim + seen.value_dim)
        inner += 2.0 * (width + keys) + 2.0 * seen.heads * seen.value_dim
        if work.flash:
            inner += 4.0 * seen.heads + (2.0 * width if layer.gated else 0.0)
        elif degrees.recompute == "none":
            inner += 5.0 * seen.heads * training.length if work.dropout else 4.0 * seen.heads * training.length
    inner += (6.0 if layer.gated else 4.0) * layer.ffn
    if not work.fused:
        inner += 2.0 * layer.ffn if layer.gated else 0.0
    masks = 2.0 * hidden if work.dropout else 0.0
    return wide * tokens * ((border + masks) / spread + inner / t)


def _activations(training: Training, degrees: Degrees) -> float:
    model, work = training.model, training.framework
    m, p, v = micro_batches(training, degrees), degrees.pipeline, degrees.interleave
    tokens = degrees.micro_batch * training.length / degrees.context
    spread = degrees.tensor if degrees.sequence_parallel and work.sequence_parallel else 1
    wide = 2.0 if training.precision in ("fp32", "tf32") else 1.0
    each = sum(block.count * layer_bytes(block.layer, training, degrees) for block in model.blocks) / model.layers
    layers = math.ceil(model.layers / p)
    kept = 2.0 * wide * tokens * model.hidden / spread
    in_flight = float(min(m, p))
    if v > 1:
        in_flight *= 1 + (p - 1) / (p * v)
    if degrees.recompute == "full":
        first = in_flight * layers * _kept(degrees, kept, each) + each
    else:
        first = in_flight * layers * each
    if model.head is None:
        return first
    logits = tokens * model.vocab / degrees.tensor * (2.0 if work.compiled else 6.0)
    table = 2.0 * tokens * model.hidden
    if p == 1:
        return first + logits + table
    last = (1 + (v > 1)) * layers * (_kept(degrees, kept, each) if degrees.recompute == "full" else each) + logits
    return max(first + table, last)


def _kept(degrees: Degrees, kept: float, each: float) -> float:
    """Bytes that a layer leaves until backward, where a share of the layers is recomputed."""
    return degrees.recompute_share * kept + (1 - degrees.recompute_share) * each


def just_enough(training: Training, cluster: Cluster, degrees: Degrees) -> Degrees:
    """The layout with as few layers recomputed as fit, where all of them would fit and none would not."""
    none = memory(training, cluster, replace(degrees, recompute="none")).total
    full = memory(training, cluster, replace(degrees, recompute="full", recompute_share=1.0)).total
    if none <= cluster.memory_bytes:
        return replace(degrees, recompute="none", recompute_share=1.0)
    if full >= cluster.memory_bytes or none <= full:
        return replace(degrees, recompute="full", recompute_share=1.0)
    layers = max(1, math.ceil(training.model.layers / degrees.pipeline))
    share = math.ceil(layers * (none - cluster.memory_bytes) / (none - full)) / layers
    return replace(degrees, recompute="full", recompute_share=min(1.0, share))


def fits(training: Training, cluster: Cluster, degrees: Degrees) -> bool:
    return memory(training, cluster, degrees).total <= cluster.memory_bytes
