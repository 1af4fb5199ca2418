"""Seconds of prefill and decode, and what a server makes of them under load.

A step's time is its products (weights read once, whatever the batch), the cache it reads, two all-reduces a layer,
and what the engine adds. Prefill goes before decode, as in-flight batching has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fanfold.planner.collectives import allreduce_s, group
from fanfold.planner.constants import (
    CACHE_EFFICIENCY,
    CONTEXT_BYTES,
    EAGER_LAYER_S,
    ENGINE_S,
    FLASH_CURRENT,
    FLASH_OTHER,
    KERNEL_S,
    LAYER_KERNELS,
    MEMORY_EFFICIENCY,
    MEMORY_FOR_CACHE,
    MOST_SEQUENCES,
    PREFILL_S,
)
from fanfold.planner.gemm import bytes_of, gemm_s, sustained_flop_per_s

if TYPE_CHECKING:
    from fanfold.plan.model import Model
    from fanfold.planner.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One model on one tensor group; replicas of it are the data degree."""

    model: Model
    precision: str = "bf16"
    cache_precision: str = "bf16"
    engine: str = "python"  # python, native or eager: ENGINE_S
    tensor: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of the server: so many requests at a time, or so many a second, or all there are."""

    input_tokens: int
    output_tokens: int
    concurrency: float | None = None  # None: as many as fit
    requests_per_s: float | None = None
    requests: int = 500  # in all; how long a queue can get


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What one replica does. `terms` are of one decode step."""

    ttft_s: float
    itl_s: float
    requests_per_s: float
    sequences: float  # decoded together
    terms: dict[str, float]


def weight_bytes(serving: Serving) -> float:
    """Of one device."""
    model = serving.model
    tables = model.embedding_params * 2.0
    rest = model.num_params - model.embedding_params
    return (tables + rest * bytes_of(serving.precision)) / serving.tensor


def cache_bytes_per_token(serving: Serving) -> float:
    """Of one device; heads that cannot be cut further are repeated."""
    model = serving.model
    cut = min(serving.tensor, max(1, model.kv_heads))
    return model.cache_per_token * bytes_of(serving.cache_precision) / cut


def most_sequences(serving: Serving, cluster: Cluster, tokens: float) -> float:
    """Sequences of so many tokens whose cache fits beside the weights; 0 where the weights do not."""
    room = (cluster.memory_bytes - CONTEXT_BYTES - weight_bytes(serving)) * MEMORY_FOR_CACHE
    if room <= 0:
        return 0.0
    each = cache_bytes_per_token(serving) * tokens
    return min(float(MOST_SEQUENCES), room / each if each else float(MOST_SEQUENCES))


@lru_cache(maxsize=50_000)
def products_s(serving: Serving, cluster: Cluster, rows: int) -> tuple[float, float, float]:
    """(products, other kernels, all-reduces) of `rows` tokens through all layers, the head left out."""
    device, t = cluster.accelerator, serving.tensor
    matmul = other = tensor = 0.0
    of = group(cluster, t, 1)
    rate = device.memory_bytes_per_s * MEMORY_EFFICIENCY
    for block in serving.model.blocks:
        layer = block.layer
        one = 0.0
        for linear in layer.linears:
            n, batch = rows, 1
            if linear.experts:
                met = linear.experts * (1 - (1 - linear.chosen / linear.experts) ** rows)
                batch = max(1, round(met))
                n = max(1, -(-rows * linear.chosen // batch))
            k = linear.inputs // t if linear.split == "row" else linear.inputs
            out = linear.outputs // t if linear.split == "column" else linear.outputs
            one += gemm_s(device, serving.precision, n, max(1, k), max(1, out), batch)
        width = layer.linears[0].inputs
        streams = rows * (10.0 * width + 3.0 * layer.ffn / t) * 2 / rate
        matmul += block.count * one
        other += block.count * (LAYER_KERNELS * KERNEL_S + streams)
        if t > 1:
            tensor += block.count * (len(layer.attention) + 1) * allreduce_s(cluster, of, rows * width * 2)
    return matmul, other, tensor


def head_s(serving: Serving, cluster: Cluster, rows: int) -> float:
    head = serving.model.head
    if head is None:
        return 0.0
    return gemm_s(cluster.accelerator, "bf16", rows, head.inputs, max(1, head.outputs // serving.tensor))


def prefill_s(serving: Serving, cluster: Cluster, sequences: int, length: int) -> float:
    """All tokens of `sequences` prompts of this length, once through the model."""
    device, t = cluster.accelerator, serving.tensor
    sequences, length = max(1, sequences), max(1, length)
    parts = products_s(serving, cluster, sequences * length)
    ahead = FLASH_CURRENT.get(device.architecture, FLASH_OTHER)[0]
    flops = 0.0
    for block in serving.model.blocks:
        for seen in block.layer.attention:
            width = seen.heads * (seen.head_dim + seen.value_dim)
            flops += block.count * 2.0 * sequences * length * seen.keys_seen(length) * width
    attention = flops / t / (sustained_flop_per_s(device, "bf16") * ahead)
    return sum(parts) + attention + head_s(serving, cluster, sequences)


def decode_terms(serving: Serving, cluster: Cluster, sequences: float, context: float) -> dict[str, float]:
    """Seconds of one step in which every sequence gets a token, by what takes them."""
    rows = max(1, round(sequences))
    matmul, other, tensor = products_s(serving, cluster, rows)
    rate = cluster.accelerator.memory_bytes_per_s * MEMORY_EFFICIENCY * CACHE_EFFICIENCY
    cache = sequences * context * cache_bytes_per_token(serving) / rate
    head = head_s(serving, cluster, rows)
    fixed, each = ENGINE_S[serving.engine]
    device = matmul + other + tensor + cache + head
    issue = serving.model.layers * EAGER_LAYER_S if serving.engine == "eager" else 0.0
    return {
        "matmul": matmul + head,
        "cache": cache,
        "other": other,
        "tensor": tensor,
        "engine": max(0.0, issue - device) + fixed + each * sequences,
    }


def decode_s(serving: Serving, cluster: Cluster, sequences: float, context: float) -> float:
    return sum(decode_terms(serving, cluster, sequences, context).values())


def batch_s(serving: Serving, cluster: Cluster, load: Load, sequences: int) -> float:
    """Seconds until all of a batch that arrives at once is done; in turns where its cache does not fit."""
    context = load.input_tokens + load.output_tokens / 2
    room = most_sequences(serving, cluster, load.input_tokens + load.output_tokens)
    together = min(float(sequences), max(1.0, room))
    first = PREFILL_S + prefill_s(serving, cluster, sequences, load.input_tokens)
    step = decode_s(serving, cluster, together, context)
    return first + max(0, load.output_tokens - 1) * step * sequences / together


def serve(serving: Serving, cluster: Cluster, load: Load) -> Served:
    """One replica under load, in its steady state, or over `load.requests` where more come than it can take."""
    context = load.input_tokens + load.output_tokens / 2
    room = max(1.0, most_sequences(serving, cluster, context))
    bulk = max(1, min(16, 8192 // max(1, load.input_tokens)))  # prompts that share a step
    alone = prefill_s(serving, cluster, 1, load.input_tokens)
    each = prefill_s(serving, cluster, bulk, load.input_tokens) / bulk
    outputs = max(1, load.output_tokens)
    if load.requests_per_s is not None:
        return _open(serving, cluster, load, room, alone, each, outputs, context)
    wanted = min(room, load.concurrency or room)
    step = decode_s(serving, cluster, wanted, context)
    # every request is one prefill that all others wait for, and `outputs` steps
    seconds = wanted * each + (outputs - 1) * step
    rate = wanted / seconds
    busy = min(0.95, rate * each)
    wait = 0.0 if load.concurrency is not None and load.concurrency <= 1 else busy * each / (2 * (1 - busy)) + step / 2
    itl = step + (wanted - 1) * each / outputs
    return Served(
        ttft_s=PREFILL_S + alone + wait,
        itl_s=itl,
        requests_per_s=rate,
        sequences=wanted,
        terms=decode_terms(serving, cluster, wanted, context),
    )


def _open(
    serving: Serving,
    cluster: Cluster,
    load: Load,
    room: float,
    alone: float,
    each: float,
    outputs: int,
    context: float,
) -> Served:
    """Requests come at their own rate, `load.requests` of them; a queue grows where that is more than can be served.

    Sequences decoded together follow from Little's law over the whole run: requests x residence / duration.
    """
    asked = float(load.requests_per_s or 0.0)
    n = load.requests
    arriving = n / asked if asked < math.inf else 0.0
    busy = asked * each if asked < math.inf else math.inf
    saturated = busy >= 0.97
    prefills = n * each
    sequences = step = 1.0
    itl = decode_s(serving, cluster, 1, context)
    for _ in range(40):
        residence = outputs * itl
        wanted = n * residence / (max(arriving, prefills) + residence)
        sequences = 0.5 * (sequences + min(room, max(1.0, wanted)))
        step = decode_s(serving, cluster, sequences, context)
        itl = step + (prefills / 2 / outputs if saturated else busy * step / (1 - busy))
    terms = decode_terms(serving, cluster, sequences, context)
    shared = step - terms["matmul"] if sequences > 1.5 else 0.0  # a prompt's step decodes the others, too
    if saturated:
        waiting = max(0.0, prefills - arriving) / 2
    else:
        waiting = busy * alone / (2 * (1 - busy)) + (step / 2 if sequences > 1.5 else 0.0)
    turns = max(0.0, n * outputs * step / room - max(arriving, prefills)) if sequences >= 0.99 * room else 0.0
    duration = max(arriving, prefills) + outputs * step + turns  # nothing comes between the last ones' tokens
    return Served(
        ttft_s=PREFILL_S + alone + waiting + shared + turns / 2,
        itl_s=itl,
        requests_per_s=n / duration if saturated or turns else asked,
        sequences=sequences,
        terms=terms,
    )
