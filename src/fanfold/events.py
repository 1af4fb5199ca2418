"""What engines tell while they work; reports listen, nobody answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at `at_s` on the monotonic clock."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitReady(Event):
    """The unit takes assignments."""

    unit: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStarted(Event):
    """A process that serves all units, by what it is for."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDied(Event):
    unit: str
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Event):
    """One batch is computed: not yet durable, good enough for a progress bar."""

    unit: str
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBegun(Event):
    """The unit is about to compute this batch: what its death would be laid to."""

    unit: str
    piece: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Event):
    """A stretch of a unit's time, from `at_s` for `elapsed_s`: load, prepare, compute, write, assemble."""

    unit: str
    kind: str
    elapsed_s: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFound(Event):
    """The input has at least this many rows more; `scanned_share` of its bytes were looked at so far."""

    rows: int
    scanned_share: float | None  # None for a stream


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPrepared(Event):
    """The rows made of these records cost so many padded tokens."""

    records: int
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InputEnded(Event):
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Note(Event):
    """One line that a person should see."""

    text: str
