"""Seconds of one training step: layers into stages, stages into a pipeline, gradients and the optimiser after it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fanfold.planner.collectives import allreduce_s, gather_s, group
from fanfold.planner.constants import MEMORY_EFFICIENCY
from fanfold.planner.framework import CURRENT, Framework
from fanfold.planner.gemm import gemm_s
from fanfold.planner.layer import Run, Terms, layer_s
from fanfold.planner.methods import data, pipeline, zero

if TYPE_CHECKING:
    from fanfold.plan.model import Model
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained: sequences of `length` tokens, `global_batch` of them a step."""

    model: Model
    global_batch: int
    length: int
    precision: str = "bf16"
    framework: Framework = CURRENT
    frozen: bool = False  # only adapters are trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A predicted step; `terms` add up to `seconds`."""

    seconds: float
    terms: dict[str, float]
    micro_batches: int


def micro_batches(training: Training, degrees: Degrees) -> int:
    return max(1, math.ceil(training.global_batch / (degrees.data * degrees.micro_batch)))


def step(training: Training, cluster: Cluster, degrees: Degrees) -> Step:
    """One step: `micro_batches` through the pipeline, gradients summed, weights updated."""
    model, work = training.model, training.framework
    run = Run(
        cluster=cluster,
        degrees=degrees,
        framework=work,
        precision=training.precision,
        length=training.length,
        frozen=training.frozen,
    )
    m = micro_batches(training, degrees)
    p = degrees.pipeline
    ahead, back = _stack(model, run)
    per_stage = math.ceil(model.layers / p) / model.layers
    head_f, head_b = _head(model, run)
    table = _table_s(model, run)
    size = run.tokens * model.hidden * run.activation_bytes
    if run.spread > 1:
        border = pipeline.border_s(cluster, degrees, size / degrees.tensor, scatter_gather=False)
    else:
        border = pipeline.border_s(cluster, degrees, size, scatter_gather=work.scatter_gather)
    borders = 0.0
    if p > 1:
        borders = 2 * border * degrees.interleave * (0.15 if work.pipeline_overlap else 1.0)
    gathers_f = gathers_b = 0.0
    if degrees.zero >= 3:
        gathers_f, gathers_b = _zero3(model, run, ahead.total, back.total)
    layers = per_stage * (ahead.total + back.total + gathers_f + gathers_b)
    last = head_f.total + head_b.total
    stages = [layers + borders for _ in range(p)]
    stages[0] += table
    stages[-1] += last
    spare = math.ceil(model.layers / p) * p - model.layers  # stages with a layer less: the last, then the first
    if spare and p > 1:
        one = (ahead.total + back.total) / model.layers
        order = [p - 1, 0, *range(1, p - 1)]
        for index in order[: min(spare, p)]:
            stages[index] -= one
    busy, bubble = pipeline.step_s(stages, m, degrees.interleave)
    share = busy / (m * max(stages)) if max(stages) else 1.0
    exposed = _gradients(model, run, m, ahead.total * per_stage, back.total * per_stage, degrees)
    update = _update_s(model, run)
    both = ahead.plus(back).plus(head_f).plus(head_b) if p == 1 else ahead.plus(back)
    scale = m * share * (per_stage if p > 1 else 1.0)
    terms = {
        "matmul": both.matmul * scale,
        "attention": both.attention * scale,
        "memory": (both.memory + (table if p == 1 else 0.0)) * scale,
        "launch": both.launch * scale,
        "tensor": both.tensor * scale,
        "context": both.context * scale,
        "expert": both.expert * scale,
        "pipeline": borders * m,
        "bubble": bubble,
        "data": exposed + m * per_stage * (gathers_f + gathers_b),
        "optimizer": update,
    }
    seconds = busy + bubble + exposed + update
    terms["head"] = max(0.0, seconds - sum(terms.values())) if p > 1 else 0.0
    return Step(seconds=seconds, terms=terms, micro_batches=m)


def _stack(model: Model, run: Run) -> tuple[Terms, Terms]:
    """All layers, forward and backward, of one micro-batch on one tensor group."""
    ahead, back = Terms(), Terms()
    for block in model.blocks:
        forward, backward = layer_s(block.layer, run)
        ahead, back = ahead.plus(forward, block.count), back.plus(backward, block.count)
    return ahead, back


def _head(model: Model, run: Run) -> tuple[Terms, Terms]:
    """Logits and loss of one micro-batch: the last stage's extra work."""
    forward, backward = Terms(), Terms()
    head = model.head
    if head is None:
        return forward, backward
    device, t = run.cluster.accelerator, run.degrees.tensor
    kind = "bf16" if run.precision == "fp8" else run.precision
    n, out = run.tokens, max(1, head.outputs // t)
    forward.matmul = gemm_s(device, kind, n, head.inputs, out)
    backward.matmul = gemm_s(device, kind, n, out, head.inputs) + gemm_s(device, kind, head.inputs, n, out)
    rate = device.memory_bytes_per_s * MEMORY_EFFICIENCY
    passes = (10.0, 6.0) if run.framework.compiled else (22.0, 12.0)  # bytes a logit: 16 bits, and passes in 32
    forward.memory = n * out * passes[0] / rate
    backward.memory = n * out * passes[1] / rate
    if t > 1:
        of = group(run.cluster, t, 1)
        size = n * head.inputs * run.activation_bytes
        each = gather_s(run.cluster, of, size) if run.spread > 1 else allreduce_s(run.cluster, of, size)
        forward.tensor = 3 * allreduce_s(run.cluster, of, n * 4)
        backward.tensor = each
    return forward, backward


def _table_s(model: Model, run: Run) -> float:
    """Looking tokens up, and adding their gradients: memory only."""
    rate = run.cluster.accelerator.memory_bytes_per_s * MEMORY_EFFICIENCY
    size = run.tokens * model.hidden * run.activation_bytes
    table = model.vocab / run.degrees.tensor * model.hidden * run.activation_bytes
    seconds = 6 * size / rate + 2 * table / rate
    if run.degrees.tensor > 1:
        of = group(run.cluster, run.degrees.tensor, 1)
        seconds += allreduce_s(run.cluster, of, size) / (2 if run.spread > 1 else 1)
    return seconds


def params_per_device(model: Model, degrees: Degrees) -> tuple[float, float]:
    """(dense, expert) parameters of the fullest stage's device."""
    t, p = degrees.tensor, degrees.pipeline
    share = math.ceil(model.layers / p) / model.layers
    experts = sum(block.count * block.layer.expert_params for block in model.blocks)
    layers = sum(block.count * block.layer.params for block in model.blocks) - experts
    dense = share * layers / t
    ends = (model.embedding_params + model.head_params) / t
    if p > 1:
        ends = max(model.embedding_params, model.head.params if model.head else 0) / t
    return dense + ends, share * experts / (degrees.expert * degrees.expert_tensor)


def _gradients(model: Model, run: Run, m: int, ahead_s: float, back_s: float, degrees: Degrees) -> float:
    """Exposed seconds of summing gradients, and of gathering weights where the optimiser is in parts."""
    dense, sparse = params_per_device(model, degrees)
    copies = degrees.data * degrees.context
    work = run.framework
    if copies == 1 or degrees.zero >= 3 or run.frozen:
        return 0.0
    if degrees.zero == 0:
        whole = data.gradients_s(run.cluster, degrees, dense, work.gradient_bytes)
        hidden = 0.8 * back_s if work.data_overlap else 0.0
        exposed = max(whole - hidden, 0.05 * whole)
    else:
        reduce = zero.reduce_s(run.cluster, degrees, dense, work.gradient_bytes)
        gather = zero.weights_s(run.cluster, degrees, dense)
        if work.data_overlap:
            exposed = max(reduce - 0.8 * back_s, 0.05 * reduce) + max(gather - 0.8 * ahead_s, 0.05 * gather)
        else:
            exposed = reduce + gather
    if sparse:
        rest = max(1, copies * degrees.tensor // (degrees.expert * degrees.expert_tensor))
        if rest > 1:
            stride = degrees.tensor * degrees.expert
            of = group(run.cluster, rest, stride)
            whole = allreduce_s(run.cluster, of, sparse * work.gradient_bytes)
            exposed += max(whole - 0.8 * back_s, 0.05 * whole) if work.data_overlap else whole
    if model.tied and degrees.pipeline > 1:  # first and last stage share the token table
        of = group(run.cluster, 2, run.cluster.devices_per_node)
        exposed += allreduce_s(run.cluster, of, model.vocab * model.hidden / degrees.tensor * work.gradient_bytes)
    return exposed


def _zero3(model: Model, run: Run, ahead_s: float, back_s: float) -> tuple[float, float]:
    """Exposed seconds per micro-batch of gathering weights, forward and backward, and of reducing gradients."""
    degrees, work = run.degrees, run.framework
    dense, sparse = params_per_device(model, degrees)
    params = dense + sparse
    layers = math.ceil(model.layers / degrees.pipeline)  # a collective a layer: each pays the ring's start-up
    gather = layers * zero.weights_s(run.cluster, degrees, params / layers)
    reduce = 0.0 if run.frozen else layers * zero.reduce_s(run.cluster, degrees, params / layers, work.gradient_bytes)
    if not work.data_overlap:
        return gather, gather + reduce
    one = 1 / max(1, model.layers)
    return max(gather - ahead_s, one * gather), max(gather + reduce - back_s, one * (gather + reduce))


def _update_s(model: Model, run: Run) -> float:
    """Adam over this device's part: gradient, two moments and 32-bit weights read and written once."""
    degrees = run.degrees
    if run.frozen:
        return 0.0
    dense, sparse = params_per_device(model, degrees)
    parts = degrees.data * degrees.context if degrees.zero >= 1 else 1
    rate = run.cluster.accelerator.memory_bytes_per_s * MEMORY_EFFICIENCY
    passes = 30.0 + 8.0  # bytes a parameter: the update, and the norm of the gradients with scaling
    own = (dense + sparse) / parts * passes
    clear = (dense + sparse) * 8.0 / (parts if degrees.zero >= 2 else 1)  # gradients set to zero and copied
    return (own + clear) / rate
