"""What carries a function over data in memory: the calling thread, threads or processes; from what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fanfold.errors import PlanError
from fanfold.planner.units import OVERSUBSCRIPTION, parse_where

Reach = Literal["here", "host", "cluster"]
ALLOWED = "auto, inline, threads, threads:N, cpu, cpu:N, spark://HOST:PORT, yarn, k8s://..., local[N]"
_SPARK = ("spark://", "yarn", "k8s://", "local", "sc://")
_HAND_OVER_S = 60e-6  # to start a thread and hand a lease to it (docs/log.md)
_PIPE_BYTES_PER_S = 6e8  # pickled, written, read (docs/log.md)
_WORTH_IT = 0.9  # another carrier must be at least so much faster than the simpler one


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the first pieces have shown of a function."""

    row_s: float  # seconds for a row, on one thread
    thread_speedup: float  # two threads against one
    bytes_per_row: float  # that would cross a pipe, both ways
    portable: bool  # whether function and data can be sent to another process
    start_s: float  # what worker processes would take to be there


@dataclass(frozen=True, slots=True)
class Carrier:
    """The choice and the reason."""

    kind: str  # inline, threads, cpu, spark
    count: int  # 0: as many as there are slots
    reason: str
    master: str = ""

    @property
    def reach(self) -> Reach:
        """Where its units are: in this process, on this machine, anywhere."""
        places: dict[str, Reach] = {"cpu": "host", "spark": "cluster"}
        return places.get(self.kind, "here")

    @property
    def shown(self) -> str:
        """As `on` names it."""
        return self.master or (self.kind if self.kind == "inline" else f"{self.kind}:{self.count}")


def parse_on(text: str, cores: int) -> Carrier | None:
    """`on` as asked for; None for auto. Raises PlanError for what is no place, or too many units."""
    found = re.fullmatch(r"(auto|inline|threads|cpu)(?::([0-9]{1,9}))?", text) if isinstance(text, str) else None
    if isinstance(text, str) and text.startswith(_SPARK):
        return Carrier("spark", 0, "as asked", parse_where(text).master)
    if found is None or (found[2] and found[1] in ("auto", "inline")):
        raise PlanError(f"on={text!r}", found="no such place to run", allowed=ALLOWED, do="leave on away")
    if found[1] == "auto":
        return None
    count = 1 if found[1] == "inline" else int(found[2]) if found[2] else cores
    if not 1 <= count <= OVERSUBSCRIPTION * cores:
        raise PlanError(
            f"on={text!r}",
            found=f"{cores} allowed core(s)",
            allowed=f"{found[1]}:1 to {found[1]}:{OVERSUBSCRIPTION * cores}",
            do=f"leave the number away to use {found[1]}:{cores}",
        )
    return Carrier(found[1], count, "as asked")


def choose_carrier(measured: Measured, rows_left: float, cores: int) -> Carrier:
    """The carrier with the shortest predicted time; the simplest one where others gain less than a tenth."""
    alone_s = measured.row_s * rows_left
    serial = min(1.0, max(0.0, 2 / max(measured.thread_speedup, 0.5) - 1))
    threads_s = cores * _HAND_OVER_S + alone_s * (serial + (1 - serial) / cores)
    cpu_s = measured.start_s + measured.bytes_per_row * rows_left / _PIPE_BYTES_PER_S + alone_s / cores
    said = f"inline {_time(alone_s)}, threads {_time(threads_s)} (two are {measured.thread_speedup:.2f} times as fast)"
    said += f", processes {_time(cpu_s)}" if measured.portable else ", processes: it cannot be sent to them"
    best = Carrier("inline", 1, f"inline: predicted {said}")
    best_s = alone_s
    if cores > 1 and threads_s < _WORTH_IT * best_s:
        best, best_s = Carrier("threads", cores, f"threads:{cores}: predicted {said}"), threads_s
    if cores > 1 and measured.portable and cpu_s < _WORTH_IT * best_s:
        best = Carrier("cpu", cores, f"cpu:{cores}: predicted {said}")
    return best


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
