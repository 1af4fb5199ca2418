"""How fast this machine multiplies and copies, measured: the two numbers that a prediction starts from.

What multiplies, and how its threads are set, is the caller's: `probe` takes both as callables, so the rate is
that of the library which will do the work, and this module imports none of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

# (m, k, n) -> a function that multiplies prepared float32 matrices [m, k] x [k, n] once and waits for it.
Matmul: TypeAlias = Callable[[int, int, int], Callable[[], object]]
# n -> a context in which the product runs on n threads; the count from before holds again afterwards.
Threads: TypeAlias = Callable[[int], AbstractContextManager[object]]
Clock: TypeAlias = Callable[[], float]

_SIDES = (256, 512, 1024, 2048)  # of square products; the largest that can be repeated within the budget
_COPY_BUFFER_BYTES = 64 * 2**20  # above the last-level cache that one core of common servers can fill
_FEWEST_RUNS, _MOST_RUNS = 3, 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measured rates, medians of repeated runs; `side` is that of the square product measured."""

    gemm_one_flop_per_s: float
    gemm_all_flop_per_s: float
    copy_bytes_per_s: float  # read plus written, as STREAM counts
    cores: int
    side: int
    elapsed_s: float


def probe(
    matmul: Matmul,
    *,
    threads: Threads,
    cores: int,
    budget_s: float = 2.0,
    clock: Clock = time.perf_counter,
) -> Probe:
    """Rates of a float32 product on one thread and on `cores` threads, and of a memory copy on one thread.

    Takes about `budget_s`, a third each; on a very slow machine more, as each is run at least three times.
    With one core both product rates are one measurement.
    """
    started_s = clock()
    share_s = budget_s / 3
    with threads(1):
        side = _side(matmul, share_s, clock)
        one_flop_per_s = 2 * side**3 / median_run_s(matmul(side, side, side), share_s, clock)
    all_flop_per_s = one_flop_per_s
    if cores > 1:
        with threads(cores):
            all_flop_per_s = 2 * side**3 / median_run_s(matmul(side, side, side), share_s, clock)
    copy_bytes_per_s = 2 * _COPY_BUFFER_BYTES / median_run_s(_copy(_COPY_BUFFER_BYTES), share_s, clock)
    return Probe(
        gemm_one_flop_per_s=one_flop_per_s,
        gemm_all_flop_per_s=all_flop_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        cores=cores,
        side=side,
        elapsed_s=clock() - started_s,
    )


def numpy_matmul(m: int, k: int, n: int) -> Callable[[], object]:
    """A product of random float32 matrices in numpy, for machines without torch."""
    import numpy as np

    random = np.random.default_rng(0)  # zeros would be faster than real weights on some CPUs
    left_MK = random.standard_normal((m, k), dtype=np.float32)
    right_KN = random.standard_normal((k, n), dtype=np.float32)
    out_MN = np.empty((m, n), dtype=np.float32)
    return lambda: np.matmul(left_MK, right_KN, out=out_MN)


def numpy_threads(count: int) -> AbstractContextManager[object]:
    """A context in which numpy's BLAS uses `count` threads."""
    import numpy  # noqa: F401  threadpoolctl finds only libraries that are loaded
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(limits=count, user_api="blas")
    return limits


def median_run_s(run: Callable[[], object], budget_s: float, clock: Clock = time.perf_counter) -> float:
    """Median seconds of one run, after one that is not counted; 3 to 15 runs, until the budget is used up."""
    run()
    started_s = clock()
    runs_s: list[float] = []
    while len(runs_s) < _FEWEST_RUNS or (len(runs_s) < _MOST_RUNS and clock() - started_s < budget_s):
        before_s = clock()
        run()
        runs_s.append(max(clock() - before_s, 1e-9))
    return statistics.median(runs_s)


def _side(matmul: Matmul, share_s: float, clock: Clock) -> int:
    """The largest side of which the least number of runs fits the budget, judged by a run of the smallest."""
    smallest = matmul(_SIDES[0], _SIDES[0], _SIDES[0])
    smallest()
    before_s = clock()
    smallest()
    flop_per_s = 2 * _SIDES[0] ** 3 / max(clock() - before_s, 1e-9)
    runs = _FEWEST_RUNS + 2
    return max((side for side in _SIDES if runs * 2 * side**3 <= share_s * flop_per_s), default=_SIDES[0])


def _copy(buffer_bytes: int) -> Callable[[], object]:
    import numpy as np

    source = np.ones(buffer_bytes // 8, dtype=np.float64)
    target = np.zeros_like(source)
    return lambda: np.copyto(target, source)
