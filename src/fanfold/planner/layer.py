"""Seconds of one transformer layer on one device, forward and backward, term by term.

Legend: n tokens of a micro-batch on this device, b sequences, s length, t tensor degree, c context degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fanfold.planner.collectives import allreduce_s, gather_s, group
from fanfold.planner.constants import (
    FLASH_1_SHARE,
    FLASH_2,
    FLASH_BACKWARD_FLOPS,
    FLASH_CURRENT,
    FLASH_OTHER,
    HOST_BACKWARD_S,
    HOST_CHECKPOINT_S,
    HOST_COLLECTIVE_S,
    HOST_FORWARD_S,
    MEMORY_EFFICIENCY,
    SELECTIVE_SHARE,
)
from fanfold.planner.gemm import gemm_s, sustained_flop_per_s
from fanfold.planner.methods import context, expert

if TYPE_CHECKING:
    from fanfold.plan.model import Attention, Layer, Linear
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees
    from fanfold.planner.framework import Framework


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all layers of a run share."""

    cluster: Cluster
    degrees: Degrees
    framework: Framework
    precision: str  # of the products: bf16, fp16, fp8, tf32, fp32
    length: int
    frozen: bool = False  # weights without gradients: adapters are trained

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one device, whose tensor group shares them."""
        return max(1, self.degrees.micro_batch * self.length // self.degrees.context)

    @property
    def activation_bytes(self) -> int:
        return 4 if self.precision in ("fp32", "tf32") else 2

    @property
    def spread(self) -> int:
        """Ways in which the tokens between products are cut: the tensor degree under sequence parallelism."""
        on = self.degrees.sequence_parallel and self.framework.sequence_parallel
        return self.degrees.tensor if on else 1


@dataclass(slots=True, kw_only=True)
class Terms:
    """Seconds by what takes them."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    launch: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.memory + self.tensor + self.context + self.expert + self.launch

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.memory + self.launch

    def plus(self, other: Terms, times: float = 1.0) -> Terms:
        names = ("matmul", "attention", "memory", "tensor", "context", "expert", "launch")
        return Terms(**{name: getattr(self, name) + times * getattr(other, name) for name in names})


@lru_cache(maxsize=50_000)
def layer_s(layer: Layer, run: Run) -> tuple[Terms, Terms]:
    """(forward, backward) of one layer and one micro-batch, recomputation inside backward."""
    forward, backward = Terms(), Terms()
    for linear in layer.linears:
        _product(linear, run, forward, backward)
    for seen in layer.attention:
        _attention(seen, run, forward, backward)
    _between(layer, run, forward, backward)
    _tensor(layer, run, forward, backward)
    if layer.experts:
        for terms in (forward, backward):
            terms.expert += expert.exchange_s(run.cluster, run.degrees, run.tokens, _hidden(layer), layer.chosen)
    _host(layer, run, forward, backward)
    recompute = run.degrees.recompute
    if recompute == "full":
        backward = backward.plus(forward, run.degrees.recompute_share)
    elif recompute == "selective" and not run.framework.flash:
        backward.attention += forward.attention
    elif recompute == "selective" and run.framework.name == "PyTorch FSDP":
        backward.matmul += SELECTIVE_SHARE * forward.matmul
        backward.memory += forward.memory
    return forward, backward


def _hidden(layer: Layer) -> int:
    return layer.linears[0].inputs


def _product(linear: Linear, run: Run, forward: Terms, backward: Terms) -> None:
    degrees, device = run.degrees, run.cluster.accelerator
    n, batch = run.tokens, 1
    cut = degrees.tensor if linear.split != "none" else 1
    if linear.experts:
        cut = degrees.expert_tensor
        batch = max(1, linear.experts // degrees.expert)
        n = max(1, n * linear.chosen * cut // (degrees.tensor * batch))
    elif linear.split == "none":
        n = max(1, n // run.spread)
    k = linear.inputs // cut if linear.split == "row" else linear.inputs
    out = linear.outputs // cut if linear.split == "column" else linear.outputs
    k, out = max(1, k), max(1, out)
    kind = run.precision
    forward.matmul += gemm_s(device, kind, n, k, out, batch)
    backward.matmul += gemm_s(device, kind, n, out, k, batch)
    if not run.frozen:
        backward.matmul += gemm_s(device, kind, k, n, out, batch)
    rate = device.memory_bytes_per_s * MEMORY_EFFICIENCY
    if kind == "fp8":  # read in 16 bits, written in 8, and once more transposed for the weights' gradient
        forward.memory += batch * n * k * (4 if linear.split == "row" else 2) / rate  # a norm writes 8 bits itself
        backward.memory += batch * n * out * 4 / rate
    if linear.bias and not run.framework.compiled:
        backward.memory += batch * n * out * run.activation_bytes / rate


def _attention(seen: Attention, run: Run, forward: Terms, backward: Terms) -> None:
    degrees, device, work = run.degrees, run.cluster.accelerator, run.framework
    heads = max(1, seen.heads // degrees.tensor)
    b, s = degrees.micro_batch, run.length
    queries = max(1, s // degrees.context)
    kind = "bf16" if run.precision == "fp8" else run.precision
    if not work.flash:
        qk = gemm_s(device, kind, queries, seen.head_dim, s, b * heads)
        av = gemm_s(device, kind, queries, s, seen.value_dim, b * heads)
        scores = b * heads * queries * s * run.activation_bytes
        rate = device.memory_bytes_per_s * MEMORY_EFFICIENCY
        passes = (5.5, 6.5) if work.dropout else (3.0, 4.0)
        forward.attention += qk + av + passes[0] * scores / rate
        backward.attention += 2 * (qk + av) + passes[1] * scores / rate
        return
    keys = seen.keys_seen(s)
    flops = 2.0 * b * heads * queries * keys * (seen.head_dim + seen.value_dim)
    ahead, back = (FLASH_CURRENT if work.flash > 2 else FLASH_2).get(device.architecture, FLASH_OTHER)
    share = _head_share((seen.head_dim + seen.value_dim) / 2) * (FLASH_1_SHARE if work.flash == 1 else 1.0)
    sustained = sustained_flop_per_s(device, kind) * share
    forward.attention += flops / (sustained * ahead)
    backward.attention += FLASH_BACKWARD_FLOPS * flops / (sustained * back)
    if degrees.context > 1:
        ring = context.ring_s(run.cluster, degrees, run.tokens, seen.cache_width)
        forward.context += max(0.0, ring - flops / (sustained * ahead))
        backward.context += max(0.0, 2 * ring - FLASH_BACKWARD_FLOPS * flops / (sustained * back))


def _head_share(width: float) -> float:
    """Of a head of 128: the exponentials of a score cost the same whatever the width, odd widths are padded."""
    padded = -(-width // 32) * 32
    return min(1.15, 1.25 * width / (padded + 32))


def _between(layer: Layer, run: Run, forward: Terms, backward: Terms) -> None:
    """Norms, activations, residuals: what streams through memory."""
    work = run.framework
    hidden = _hidden(layer) * run.tokens / run.spread * run.activation_bytes
    wide = layer.ffn * run.tokens / run.degrees.tensor * run.activation_bytes
    residuals = len(layer.attention) + 1
    if work.compiled:  # norm, residual and activation each in one pass with their neighbours
        ahead = 4.0 * residuals * hidden + (3.0 if layer.gated else 2.0) * wide
        back = 5.0 * residuals * hidden + (5.0 if layer.gated else 3.0) * wide
    elif work.fused:
        mask = 0.5 if work.dropout else 0.0
        ahead = (2.0 * layer.norms + (3.0 + mask) * residuals) * hidden + (3.0 if layer.gated else 2.0) * wide
        back = (4.0 * layer.norms + (3.0 + 2.0 * mask) * residuals) * hidden + (5.0 if layer.gated else 3.0) * wide
    else:
        # operator by operator: a norm of roots is nine operators in 32 bits, positions are seven
        norm = (18.0, 24.0) if layer.gated else (2.0, 4.0)
        ahead = (norm[0] * layer.norms + 3.0 * residuals) * hidden + (5.0 if layer.gated else 2.0) * wide
        back = (norm[1] * layer.norms + 3.0 * residuals) * hidden + (8.0 if layer.gated else 3.0) * wide
    heads = sum(seen.heads * seen.head_dim + seen.cache_width for seen in layer.attention)
    eager = not work.fused and not work.compiled and layer.gated
    copies = (9.0 if eager else 2.0) * heads * run.tokens / run.degrees.tensor * run.activation_bytes
    if layer.experts:  # tokens are sorted by expert, and back
        copies += 4.0 * layer.chosen * hidden / max(1, run.degrees.tensor // run.spread)
    rate = run.cluster.accelerator.memory_bytes_per_s * MEMORY_EFFICIENCY
    forward.memory += (ahead + copies) / rate
    backward.memory += (back + copies) / rate


def _tensor(layer: Layer, run: Run, forward: Terms, backward: Terms) -> None:
    """Two all-reduces each way, or as many pairs of all-gather and reduce-scatter; part of it behind products."""
    t = run.degrees.tensor
    if t == 1:
        return
    of = group(run.cluster, t, 1)
    size = run.tokens * _hidden(layer) * run.activation_bytes
    pairs = len(layer.attention) + 1
    each = 2 * gather_s(run.cluster, of, size) if run.spread > 1 else allreduce_s(run.cluster, of, size)
    ahead, back = run.framework.tensor_hidden
    forward.tensor += pairs * each * (1 - ahead)
    again = 0.5 * pairs * each if run.spread > 1 else 0.0  # the input is gathered again for the weights' gradient
    backward.tensor += (pairs * each + again) * (1 - back)


def _host(layer: Layer, run: Run, forward: Terms, backward: Terms) -> None:
    """What the host needs to issue the kernels, where the device is done sooner."""
    parts = (1 + len(layer.attention)) / 2 * (3.0 if layer.experts else 1.0)
    again = 1.0 if run.degrees.recompute == "full" else 0.0
    calls = (len(layer.attention) + 1) * HOST_COLLECTIVE_S if run.degrees.tensor > 1 else 0.0
    ahead = parts * HOST_FORWARD_S + calls
    forward.launch += max(0.0, ahead * run.framework.host - forward.total)
    busy = backward.total + again * forward.total
    issue = parts * (HOST_BACKWARD_S + again * HOST_CHECKPOINT_S) + calls + again * ahead
    backward.launch += max(0.0, issue * run.framework.host - busy)
