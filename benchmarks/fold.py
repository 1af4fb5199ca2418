"""`ff.fold` and `ff.map` beside what people pick today; all in one process, interleaved, medians and ratios.

scripts/bench fold                    everything (about 15 minutes)
scripts/bench fold numbers 1e6        the mean of exp(-x**2) over so many normal numbers
scripts/bench fold python             a function that holds the interpreter's lock
scripts/bench fold tail               10 ms an item, some of them far more
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np

import fanfold as ff

UNITS = 2


def interleaved(contenders, turns):
    """Median seconds of each, after one turn that does not count; they take turns."""
    found = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, call in contenders.items():
            begun_s = time.perf_counter()
            call()
            if turn:
                found[name].append(time.perf_counter() - begun_s)
    return {name: statistics.median(times) for name, times in found.items()}


def show(title, medians, mine="ff.fold", unit_s=1e-3, unit="ms"):
    print(f"\n{title}")
    for name, seconds in sorted(medians.items(), key=lambda pair: pair[1]):
        print(f"  {name:<34}{seconds / unit_s:>12,.3f} {unit}{seconds / medians[mine]:>10.2f} x {mine}")
    sys.stdout.flush()


# -- the article's example ----------------------------------------------------------------------------


def scalar(x):
    return math.exp(-(x**2))


def gauss(x):
    return np.exp(-(x**2))


def gauss_sum(x):
    return float(gauss(x).sum())


def article(x):
    with multiprocessing.get_context("fork").Pool() as pool:
        return sum(pool.map(scalar, x)) / len(x)


def numbers(count):
    import dask.array
    import joblib
    import mpire
    import numexpr

    numexpr.set_num_threads(UNITS)
    x = np.random.default_rng(0).standard_normal(count)
    mean = ff.Mean()
    threads = ThreadPoolExecutor(UNITS)
    chunked = dask.array.from_array(x, chunks=max(1, min(count // UNITS, 4_000_000)))
    blocks = np.array_split(x, max(1, min(count // 32_768, 100_000)))

    def pooled(pool):
        return sum(pool.map(gauss_sum, np.array_split(x, UNITS))) / count

    contenders = {
        "ff.fold": lambda: ff.fold(gauss, x, mean),
        "plain NumPy": lambda: np.exp(-(x**2)).mean(),
        "ff.fold, inline": lambda: ff.fold(gauss, x, mean, on="inline"),
        "ff.fold, threads:2": lambda: ff.fold(gauss, x, mean, on="threads:2"),
        "numexpr, sum": lambda: numexpr.evaluate("sum(exp(-x**2))", {"x": x}) / count,
        "numexpr, mean of its array": lambda: numexpr.evaluate("exp(-x**2)", {"x": x}).mean(),
        "dask.array": lambda: dask.array.exp(-(chunked**2)).mean().compute(),
        "futures, threads, 2 halves": lambda: pooled(threads),
        "joblib, threads, 2 halves": lambda: (
            sum(
                joblib.Parallel(UNITS, prefer="threads")(
                    joblib.delayed(gauss_sum)(half) for half in np.array_split(x, UNITS)
                )
            )
            / count
        ),
    }
    if count >= 100_000:
        contenders["futures, threads, 32,768 a task"] = lambda: sum(threads.map(gauss_sum, blocks)) / count
    pool = None
    if count <= 10_000_000:
        pool = mpire.WorkerPool(UNITS, keep_alive=True)
        contenders["mpire, 2 halves"] = lambda: pooled(pool)
        contenders["joblib, processes, 2 halves"] = lambda: (
            sum(joblib.Parallel(UNITS)(joblib.delayed(gauss_sum)(half) for half in np.array_split(x, UNITS))) / count
        )
    one_call = {"the article: Pool().map, scalars": lambda: article(x)} if count <= 1_000_000 else {}
    ff.fold(gauss, x, mean)  # the choice for this function is known from here on
    repeats = max(1, 200_000 // count)
    medians = interleaved(
        {name: (lambda call=call: [call() for _ in range(repeats)]) for name, call in contenders.items()},
        turns=7 if count > 10_000_000 else 15,
    )
    medians = {name: seconds / repeats for name, seconds in medians.items()}
    medians.update({name: statistics.median(_timed(call) for _ in range(3)) for name, call in one_call.items()})
    unit = {"unit_s": 1e-6, "unit": "us"} if count < 100_000 else {}
    show(f"mean of exp(-x**2), N = {count:,}: {ff.fold(gauss, x, mean, explain=True)}", medians, **unit)
    if count >= 10_000_000:
        bound_s = bandwidth_bound(x)
        print(f"  {'reading x once on two threads':<34}{bound_s * 1e3:>12,.3f} ms{bound_s / medians['ff.fold']:>10.2f}")
    if pool is not None:
        pool.terminate()
    threads.shutdown()


def _timed(call):
    begun_s = time.perf_counter()
    call()
    return time.perf_counter() - begun_s


def bandwidth_bound(x):
    """Seconds in which two threads read x, each a half, as fast as NumPy's maximum does."""
    halves = np.array_split(x, UNITS)

    def once():
        workers = [threading.Thread(target=half.max) for half in halves]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return min(_timed(once) for _ in range(5))


# -- a function that holds the interpreter's lock -----------------------------------------------------


def collatz(number):
    steps = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        steps += 1
    return steps


def python():
    import joblib
    import mpire

    once_s = _timed(lambda: [collatz(n) for n in range(1, 20_001)])
    rows = list(range(1, int(20_000 * 22 / once_s / 1.35)))  # 22 s or more: later numbers take longer
    expected = sum(collatz(n) for n in rows[:1000])
    chunk = -(-len(rows) // (8 * UNITS))

    def futures():
        with ProcessPoolExecutor(UNITS) as pool:
            return list(pool.map(collatz, rows, chunksize=chunk))

    def pool_of_mpire():
        with mpire.WorkerPool(UNITS) as pool:
            return pool.map(collatz, rows)

    contenders = {
        "serial": lambda: [collatz(n) for n in rows],
        "ff.map": lambda: ff.map(collatz, rows, each=True),
        "concurrent.futures": futures,
        "joblib": lambda: joblib.Parallel(UNITS)(joblib.delayed(collatz)(n) for n in rows),
        "mpire": pool_of_mpire,
    }
    folded = ff.map(collatz, rows, each=True, explain=True)
    assert sum(folded.value[:1000]) == expected
    found = {name: [] for name in contenders}
    for _ in range(3):
        for name, call in contenders.items():
            found[name].append(_timed(call))
    medians = {name: statistics.median(times) for name, times in found.items()}
    show(f"Collatz steps of {len(rows):,} numbers, pure Python: {folded}", medians, mine="ff.map", unit_s=1, unit="s")
    best = min(seconds for name, seconds in medians.items() if name not in ("serial", "ff.map"))
    print(
        f"  against serial {medians['serial'] / medians['ff.map']:.2f}; "
        f"the best of the others {best / medians['ff.map']:.2f}"
    )


# -- a heavy tail -------------------------------------------------------------------------------------


def busy(seconds):
    """Works for so long; says when, and where."""
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < seconds:
        pass
    return begun_s, time.monotonic(), os.getpid()


def idle_share(spans):
    """Of both units, in the second half of the time from the first item's begin to the last one's end."""
    begun_s, ended_s = min(span[0] for span in spans), max(span[1] for span in spans)
    half_s = (begun_s + ended_s) / 2
    worked_s = sum(max(0.0, stop - max(start, half_s)) for start, stop, _ in spans)
    return 1 - worked_s / (UNITS * (ended_s - half_s))


def tail():
    import joblib
    import mpire

    draw = np.random.default_rng(0)
    rows = draw.pareto(1.5, 2000) + 1
    rows = (rows * (0.010 / rows.mean())).clip(max=1.0).tolist()

    def futures():
        with ProcessPoolExecutor(UNITS) as pool:
            return list(pool.map(busy, rows))

    def pool_of_mpire():
        with mpire.WorkerPool(UNITS) as pool:
            return pool.map(busy, rows)

    contenders = {
        "ff.map": lambda: ff.map(busy, rows, each=True, on="cpu:2"),
        "concurrent.futures, one a task": futures,
        "joblib": lambda: joblib.Parallel(UNITS)(joblib.delayed(busy)(s) for s in rows),
        "mpire": pool_of_mpire,
    }
    print(f"\n{len(rows):,} items of 10 ms on average, {max(rows):.2f} s the longest, {sum(rows):.1f} s in all")
    found = {name: ([], []) for name in contenders}
    for _ in range(3):
        for name, call in contenders.items():
            begun_s = time.perf_counter()
            spans = call()
            found[name][0].append(time.perf_counter() - begun_s)
            found[name][1].append(idle_share(spans))
    for name, (times, shares) in found.items():
        print(
            f"  {name:<34}{statistics.median(times):>8.2f} s, idle in the second half "
            f"{100 * statistics.median(shares):.1f} % (most {100 * max(shares):.1f} %)"
        )
    sys.stdout.flush()


def main():
    what = sys.argv[1] if len(sys.argv) > 1 else "all"
    if what in ("all", "numbers"):
        for count in sys.argv[2:] or ("1e3", "1e6", "1e8"):
            numbers(int(float(count)))
    if what in ("all", "python"):
        python()
    if what in ("all", "tail"):
        tail()


if __name__ == "__main__":
    main()
