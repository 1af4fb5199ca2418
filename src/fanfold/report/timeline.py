"""What each unit did when: shares of time for the summary, a Chrome trace for the eye."""

from __future__ import annotations

import gzip
import json
import os
import time
from array import array
from typing import TYPE_CHECKING, Any

from fanfold.events import Batch, ProcessStarted, UnitDied, UnitReady, Work
from fanfold.machine.memory import pss_bytes

if TYPE_CHECKING:
    from fanfold.events import Event

MAX_TRACE_SPANS = 200_000
_MEMORY_EVERY_S = 1.0


class Timeline:
    """Collects stretches of work. About 30 bytes each; the trace file holds the first 200,000."""

    def __init__(self) -> None:
        self.start_s = time.monotonic()
        self.pids: dict[str, int] = {}
        self.peak_pss_bytes = 0
        self.num_deaths = 0
        self._spans: dict[str, array[float]] = {}  # unit -> start, elapsed, kind, start, ...
        self._kinds: list[str] = []
        self._details: list[tuple[str, str, float, float, str]] = []
        self._measured_s = 0.0
        self._last_s = self.start_s  # when the last stretch of work ended
        self.units_used: set[str] = set()

    def __call__(self, event: Event) -> None:
        match event:
            case Work():
                if event.kind not in self._kinds:
                    self._kinds.append(event.kind)
                kind = self._kinds.index(event.kind)
                self._last_s = max(self._last_s, event.at_s + event.elapsed_s)
                self._spans.setdefault(event.unit, array("d")).extend((event.at_s, event.elapsed_s, kind))
                if event.kind == "compute":
                    self.units_used.add(event.unit)
                if len(self._details) < MAX_TRACE_SPANS:
                    self._details.append((event.unit, event.kind, event.at_s, event.elapsed_s, event.detail))
                self._measure_memory()
            case Batch():
                self._measure_memory()
            case UnitReady():
                self.pids[event.unit] = event.pid
            case ProcessStarted():
                self.pids[event.name] = event.pid
            case UnitDied():
                self.num_deaths += 1
                self.pids.pop(event.unit, None)

    def _measure_memory(self) -> None:
        now_s = time.monotonic()
        if now_s - self._measured_s >= _MEMORY_EVERY_S:
            self._measured_s = now_s
            total = sum(pss_bytes(pid) for pid in {os.getpid(), *self.pids.values()})
            self.peak_pss_bytes = max(self.peak_pss_bytes, total)

    # -- figures --------------------------------------------------------------------------------------

    def seconds(self) -> dict[str, dict[str, float]]:
        """unit -> kind of work -> seconds."""
        totals: dict[str, dict[str, float]] = {}
        for unit, spans in self._spans.items():
            of_unit = totals.setdefault(unit, {})
            for i in range(0, len(spans), 3):
                kind = self._kinds[int(spans[i + 2])]
                of_unit[kind] = of_unit.get(kind, 0.0) + spans[i + 1]
        return totals

    def load_s(self) -> float:
        """The longest that a unit took to load the model."""
        return max((kinds.get("load", 0.0) for kinds in self.seconds().values()), default=0.0)

    def idle_share(self) -> float | None:
        """Share of the units' time without work, from the first computation's start to the last one's end."""
        compute = self._kinds.index("compute") if "compute" in self._kinds else None
        starts, ends = [], []
        for spans in self._spans.values():
            for i in range(0, len(spans), 3):
                if spans[i + 2] == compute:
                    starts.append(spans[i])
                    ends.append(spans[i] + spans[i + 1])
        if not starts:
            return None
        begin, end = min(starts), max(ends)
        busy = 0.0
        for spans in self._spans.values():
            for i in range(0, len(spans), 3):
                busy += max(0.0, min(end, spans[i] + spans[i + 1]) - max(begin, spans[i]))
        available = (end - begin) * max(1, len(self._spans))
        return max(0.0, 1 - busy / available) if available > 0 else 0.0

    def trace(self) -> bytes:
        """Chrome trace format, gzipped: opens in Perfetto and chrome://tracing; one track per unit."""
        units = {unit: number + 1 for number, unit in enumerate(sorted(self._spans))}
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "fanfold"}},
            *(
                {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": unit}}
                for unit, number in units.items()
            ),
        ]
        for unit, kind, start_s, elapsed_s, detail in self._details:
            events.append(
                {
                    "ph": "X",
                    "pid": 1,
                    "tid": units[unit],
                    "name": kind,
                    "cat": kind,
                    "ts": round((start_s - self.start_s) * 1e6),
                    "dur": max(1, round(elapsed_s * 1e6)),
                    "args": {"detail": detail},
                }
            )
        totals = {"seconds": self.seconds(), "elapsed_s": self._last_s - self.start_s}  # of all spans
        body = json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": totals}, separators=(",", ":"))
        return gzip.compress(body.encode("utf-8"), compresslevel=5, mtime=0)
