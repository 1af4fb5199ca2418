"""Measures what `machine/rates.py` holds, within a time that is given. What computes is the caller's.

Operators on one thread are timed in processor time: what other programs take of the cores meanwhile does not count.
The deadline, operators on several threads, and links are on the wall's clock.

Every process of a group calls `measure_rank` with the same deadline; rank 0 measures alone first, the others wait;
then all run the same operators at the same time, as units of a job do.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from fanfold.machine.rates import Point

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from fanfold.machine.probe import Clock
    from fanfold.machine.rates import Shape

# Products of 17 GFLOP at the most; skinny ones of one row and of eight are among them.
SIDES = (256, 1024, 4096)
ROWS = (1, 8, 64, 512, 2048)
MOST_FLOP = 2 * 512 * 4096 * 4096
ATTENTION = tuple((max(1, 2048 // length), 4, length, width) for width in (32, 64) for length in (16, 64, 256, 512))
ELEMENTWISE = ("gelu", "gelu_tanh", "silu", "relu", "layer_norm", "add")
WIDE = ((2048, 384), (2048, 3072))  # tokens and width of what is computed number by number
BUSY_GEMMS = tuple((rows, k, n) for rows, k, n in (
    (64, 1024, 1024), (2048, 256, 1024), (2048, 1024, 256), (512, 1024, 4096), (512, 4096, 1024), (2048, 1024, 1024)
))  # fmt: skip
LARGE = (2048, 1024, 1024)  # the shape whose rate stands for "large products"
COPY_BYTES = 64 * 2**20
_RUNS, _FEWEST = 6, 3
_SHORT_S = 0.004  # runs shorter than this are repeated to last so long


class Operators(Protocol):
    """What multiplies and computes. Each call gives a function that runs the prepared operator once and waits."""

    @property
    def name(self) -> str: ...

    def operator(self, kind: str, shape: Shape) -> Callable[[], object]: ...

    def copy(self, num_bytes: int) -> Callable[[], object]: ...

    def smallest(self) -> Callable[[], object]: ...

    def threads(self, count: int) -> AbstractContextManager[object]: ...


def core_shapes() -> list[tuple[str, Shape]]:
    """What is measured first, and again while all cores compute: most of a transformer's time."""
    found: list[tuple[str, Shape]] = [("gemm", shape) for shape in BUSY_GEMMS]
    found += [("attention", ATTENTION[index]) for index in (1, 2, 5, 6)]
    return found + [(kind, WIDE[-1]) for kind in ELEMENTWISE]


def all_shapes() -> list[tuple[str, Shape]]:
    """What is measured alone: products from the smallest to the largest, skinny ones among them."""
    gemms = [(m, k, n) for m in ROWS for k in SIDES for n in SIDES if 2 * m * k * n <= MOST_FLOP]
    gemms.sort(key=lambda shape: shape[0] * shape[1] * shape[2])
    found: list[tuple[str, Shape]] = [(kind, shape) for kind in ELEMENTWISE for shape in WIDE]
    return found + [("attention", shape) for shape in ATTENTION] + [("gemm", shape) for shape in gemms]


def run_s(run: Callable[[], object], left_s: float, clock: Clock = time.process_time) -> float:
    """The least seconds of a run after one that is not counted; two to five samples, fewer where time is short.

    Whatever else the machine does can only add to it.
    """
    run()
    before_s = clock()
    run()
    first_s = max(clock() - before_s, 1e-9)
    times = max(1, round(_SHORT_S / first_s)) if first_s < _SHORT_S else 1
    samples = [first_s] if times == 1 else []
    started_s = clock()
    while len(samples) < _FEWEST or (len(samples) < _RUNS and clock() - started_s < left_s):
        before_s = clock()
        for _ in range(times):
            run()
        samples.append(max((clock() - before_s) / times, 1e-9))
    return min(samples)


class Measuring:
    """Points one after the other, until the deadline; what would not fit any more is left out."""

    def __init__(
        self,
        operators: Operators,
        deadline_s: float,
        *,
        clock: Clock = time.process_time,
        wall: Clock = time.perf_counter,
    ) -> None:
        self.operators, self.deadline_s, self.clock, self.wall = operators, deadline_s, clock, wall
        self.points: list[Point] = []

    def alone(self, share: float = 1.0) -> None:
        """One thread, the most telling shapes first, within that share of the time that is left."""
        until_s = self._until_s(share)
        first = core_shapes()
        with self.operators.threads(1):
            for kind, shape in [*first, *(one for one in all_shapes() if one not in first)]:
                self._point(kind, shape, until_s)

    def on_all(self, cores: int, share: float = 1.0) -> None:
        """Products on all cores of one process."""
        until_s = self._until_s(share)
        if cores > 1:
            with self.operators.threads(cores):
                for shape in BUSY_GEMMS:
                    self._point("gemm", shape, until_s, threads=cores)

    def together(self, busy: int, barrier: Callable[[str], object]) -> None:
        """The same operators in `busy` processes at once; every process must call this.

        Which of them still fit the time is decided from their number alone, so that all processes do the same.
        """
        planned = core_shapes()
        with self.operators.threads(1):
            for number, (kind, shape) in enumerate(planned):
                run = self.operators.operator(kind, shape)
                run()
                barrier(f"{kind} {number}")
                share_s = max(0.02, (self.deadline_s - self.wall()) / (len(planned) - number))
                seconds = self._for(run, min(share_s, 0.12))
                self.points.append(Point(kind=kind, shape=shape, busy=busy, seconds=seconds))

    def _for(self, run: Callable[[], object], seconds: float) -> float:
        """Mean seconds of a run over about that time, one at the least: the others run as long."""
        until_s, started_s, count = self.wall() + seconds, self.clock(), 0
        while not count or self.wall() < until_s:
            run()
            count += 1
        return max((self.clock() - started_s) / count, 1e-9)

    def _until_s(self, share: float) -> float:
        now_s = self.wall()
        return now_s + share * (self.deadline_s - now_s)

    def _point(self, kind: str, shape: Shape, until_s: float, threads: int = 1) -> None:
        """Measured if it is expected to end in time: a product takes as long as the last one of its kind, per FLOP."""
        known = [point for point in self.points if point.kind == kind]
        if known:
            expected = Point(kind=kind, shape=shape, seconds=1.0).rate / known[-1].rate
            if self.wall() + (_FEWEST + 1) * expected > until_s:
                return
        clock = self.clock if threads == 1 else self.wall
        seconds = run_s(self.operators.operator(kind, shape), 0.02, clock)
        self.points.append(Point(kind=kind, shape=shape, threads=threads, seconds=seconds))


def copy_bytes_per_s(operators: Operators, clock: Clock = time.process_time) -> float:
    """Bytes read and written a second by a copy larger than the caches."""
    return 2 * COPY_BYTES / run_s(operators.copy(COPY_BYTES), 0.05, clock)
