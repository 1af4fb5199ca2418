"""Seconds of a matrix product: tiles in whole waves, a depth that is paid to fill, and the memory it reads."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from fanfold.planner.constants import (
    FILL_DEPTH,
    FP8_EFFICIENCY,
    KERNEL_S,
    MATMUL_EFFICIENCY,
    MATMUL_EFFICIENCY_OTHER,
    MEMORY_EFFICIENCY,
    SPLIT_DEPTHS,
    TILES,
    VECTOR_EFFICIENCY,
    VECTOR_ROWS,
)

if TYPE_CHECKING:
    from fanfold.planner.cluster import Accelerator

_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1, "fp4": 0.5, "int4": 0.5,
          "q8": 1.0625, "q4": 0.5625}  # fmt: skip  # blocks of 32 weights and a scale: computed in 16 bits


def bytes_of(precision: str) -> float:
    return _BYTES[precision]


def sustained_flop_per_s(device: Accelerator, precision: str) -> float:
    """What large matrix products reach of the datasheet's peak."""
    efficiency = MATMUL_EFFICIENCY.get(device.architecture, MATMUL_EFFICIENCY_OTHER)
    if precision in ("fp8", "int8", "fp4") and device.has(precision):
        efficiency *= FP8_EFFICIENCY
    return device.peak(precision) * efficiency * device.clock_share


@lru_cache(maxsize=100_000)
def gemm_s(device: Accelerator, precision: str, m: int, k: int, n: int, batch: int = 1) -> float:
    """Seconds of `batch` products [m, k] x [k, n] on one device.

    The quickest of a few tile shapes: tiles fill the device in waves, and a wave that is not full takes as long.
    """
    if not (m and k and n and batch):
        return 0.0
    rate = sustained_flop_per_s(device, precision)
    per_unit = rate / device.units
    best = math.inf
    for rows, columns, share in TILES:
        tiles = math.ceil(m / rows) * math.ceil(n / columns) * batch
        for cut in SPLIT_DEPTHS:
            if cut > 1 and (k // cut < 512 or tiles * cut > 2 * device.units):
                break
            waves = math.ceil(tiles * cut / device.units)
            depth = k / cut + FILL_DEPTH
            extra = (cut - 1) * 4 * m * n * batch * 2 / device.memory_bytes_per_s if cut > 1 else 0.0
            best = min(best, waves * 2 * rows * columns * depth / (per_unit * share) + extra)
    if m <= VECTOR_ROWS:
        best = min(best, 2 * m * k * n * batch / (VECTOR_EFFICIENCY * device.peak("fp16")))
    size = bytes_of(precision)
    moved = batch * (size * (m * k + k * n) + max(size, 2) * m * n)
    return max(best, moved / (device.memory_bytes_per_s * MEMORY_EFFICIENCY)) + KERNEL_S
