"""What a machine was measured to do, and what any other shape is then expected to take.

A point is one operator at one shape: seconds of a run on `threads` threads while `busy` processes ran the same. What
lies between points is interpolated in the logarithms of the dimensions; what lies outside keeps the nearest rate.
Shapes: gemm (m, k, n); attention (rows, heads, length, head width); the others (tokens, width).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Shape: TypeAlias = tuple[int, ...]
VERSION = 2  # of the record; another one is measured again


def work(kind: str, shape: Shape) -> float:
    """What the time of an operator is in proportion to: FLOP, query-key products of a head, or numbers."""
    if kind == "gemm":
        return 2.0 * math.prod(shape)
    if kind == "attention":
        rows, heads, length, _ = shape
        return float(rows * heads * length * length)
    return float(math.prod(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement."""

    kind: str
    shape: Shape
    threads: int = 1
    busy: int = 1
    seconds: float

    @property
    def rate(self) -> float:
        """Work a second."""
        return work(self.kind, self.shape) / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Two processes that exchange bytes: `start_s` for an empty message, then `bytes_per_s`."""

    start_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """All that was measured. `busy` of a question: how many processes compute at the same time."""

    cores: int
    by: str
    points: tuple[Point, ...]
    copy_bytes_per_s: float  # one process; read plus written, as STREAM counts
    copy_all_bytes_per_s: float  # as many processes as cores, together
    issue_s: float  # the host's part of one operator
    own_share: float  # of a core that rank 0 had while it measured; below 1 where other programs ran
    zygote_bytes: int  # of the process that has imported it
    unit_bytes: int  # of a process forked from it: pages that it has written itself
    import_s: float  # of a processor, until units can be forked: torch and transformers imported
    links: Mapping[str, Link] = field(default_factory=dict)
    elapsed_s: float = 0.0

    def seconds(self, kind: str, shape: Shape, *, busy: int = 1, threads: int = 1) -> float:
        """Expected seconds of one run. ValueError where nothing of the kind was measured."""
        return work(kind, shape) / self.rate(kind, shape, busy=busy, threads=threads)

    def rate(self, kind: str, shape: Shape, *, busy: int = 1, threads: int = 1) -> float:
        """Work a second of one process."""
        alone = self._rate(kind, shape, threads=1, busy=1)
        if threads > 1:
            return alone * self._gain(kind, shape, threads, lambda point: (point.threads, point.busy == 1))
        return alone * self._gain(kind, shape, busy, lambda point: (point.busy, point.threads == 1))

    def _gain(self, kind: str, shape: Shape, wanted: int, read: Callable[[Point], tuple[int, bool]]) -> float:
        """The rate at `wanted` busy processes, or threads, over that of one alone: straight up to what was measured."""
        counts = {read(point)[0] for point in self.points if point.kind == kind and read(point)[1]} - {1}
        if wanted <= 1 or not counts:
            return 1.0
        count = max(counts)
        at = [p for p in self.points if p.kind == kind and read(p) == (count, True)]
        nearest = min(at, key=lambda point: _distance(point.shape, shape))
        alone = self._rate(kind, nearest.shape, threads=1, busy=1)
        share = (min(wanted, count) - 1) / (count - 1)
        return 1.0 + share * (nearest.rate / alone - 1.0)

    def _rate(self, kind: str, shape: Shape, *, threads: int, busy: int) -> float:
        found = {p.shape: p.rate for p in self.points if (p.kind, p.threads, p.busy) == (kind, threads, busy)}
        if not found:
            raise ValueError(f"no {kind} was measured")
        return math.exp(_between(kind, shape, {at: math.log(rate) for at, rate in found.items()}))

    def record(self) -> dict[str, Any]:
        """Plain values, as the cache and --json hold them."""
        return {"version": VERSION, **asdict(self), "links": {name: asdict(link) for name, link in self.links.items()}}


def from_record(record: dict[str, Any]) -> Rates:
    """The rates again. ValueError, KeyError or TypeError where the record is of another version or damaged."""
    if record["version"] != VERSION:
        raise ValueError(f"version {record['version']} of measured rates")
    points = tuple(Point(**{**point, "shape": tuple(point["shape"])}) for point in record["points"])
    if not points or any(not point.seconds > 0 for point in points):
        raise ValueError("a measurement without time")
    links = {name: Link(**link) for name, link in record["links"].items()}
    plain = {key: value for key, value in record.items() if key not in ("version", "points", "links")}
    return Rates(points=points, links=links, **plain)


def _axes(kind: str, shape: Shape) -> tuple[float, ...]:
    """The dimensions on which the rate depends, as logarithms."""
    if kind == "attention":
        return (math.log(shape[2]), math.log(shape[3]))
    return tuple(math.log(max(1, side)) for side in shape)


def _distance(left: Shape, right: Shape) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(left, right, strict=True))


def _between(kind: str, shape: Shape, found: dict[Shape, float]) -> float:
    """Multilinear between the corners of the cell around `shape`; corners that were not measured are left out."""
    asked = _axes(kind, shape)
    values = {_axes(kind, at): value for at, value in found.items()}
    sides = []
    for axis, place in enumerate(asked):
        ticks = sorted({at[axis] for at in values})
        low = max((tick for tick in ticks if tick <= place), default=ticks[0])
        high = min((tick for tick in ticks if tick >= place), default=ticks[-1])
        share = 0.0 if high == low else (place - low) / (high - low)
        sides.append(((low, 1.0 - share), (high, share)) if high != low else ((low, 1.0),))
    total = weights = 0.0
    for corner in itertools.product(*sides):
        at = tuple(tick for tick, _ in corner)
        weight = math.prod(share for _, share in corner)
        if at in values and weight > 0:
            total, weights = total + weight * values[at], weights + weight
    if weights > 0:
        return total / weights
    nearest = min(values, key=lambda at: sum(abs(a - b) for a, b in zip(at, asked, strict=True)))
    return values[nearest]
