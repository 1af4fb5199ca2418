"""The mean of exp(-x**2) over normal numbers: a pool over single numbers, and the same by split, compute, merge.

python examples/article.py [N]
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time

import numpy as np

import fanfold as ff


def f(x):
    return math.exp(-(x**2))


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    x = np.random.default_rng(0).standard_normal(n)

    start_s = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool() as pool:
        pooled = sum(pool.map(f, x)) / n
    pool_s = time.perf_counter() - start_s

    start_s = time.perf_counter()
    folded = ff.fold(lambda x: np.exp(-(x**2)), x, ff.Mean(), explain=True)
    fold_s = time.perf_counter() - start_s

    print(f"exact, for endless x: {1 / math.sqrt(3):.6f}")
    print(f"Pool.map over numbers: {pooled:.15f} in {pool_s:.2f} s")
    print(f"ff.fold:               {folded.value:.15f} in {fold_s:.4f} s, {pool_s / fold_s:.0f} times as fast")
    print(folded)


if __name__ == "__main__":
    main()
