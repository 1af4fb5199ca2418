"""Counts of values between given edges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.errors import DataError, PlanError
from fanfold.merge.rows import real_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Bins:
    """counts [len(edges) - 1] int64; how many values lie below the first edge, above the last, or are NaN."""

    counts: Any
    edges: Any
    below: int
    above: int
    nan: int


@dataclass(frozen=True, slots=True)
class HistogramPart:
    """Counts, and the edges that they were made with; counts None: no values."""

    edges: tuple[float, ...]
    counts: Any = None
    below: int = 0
    above: int = 0
    nan: int = 0


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each bin [edge, next edge); the last bin holds its upper edge too, as in NumPy. Exact.

    Shapes: values [rows, ...], all elements counted -> `Bins`. NaN is counted apart.
    """

    edges: Sequence[float]

    def __post_init__(self) -> None:
        try:
            edges = tuple(float(edge) for edge in self.edges)
            good = len(edges) > 1 and all(map(math.isfinite, edges)) and all(map(float.__lt__, edges, edges[1:]))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise PlanError(
                f"Histogram({self.edges!r:.80})",
                found="edges that do not rise, or fewer than two",
                allowed="at least two finite numbers, each above the one before",
                do="write for example ff.Histogram(numpy.linspace(0, 1, 11))",
            )
        object.__setattr__(self, "edges", edges)

    def empty(self) -> HistogramPart:
        """No values."""
        return HistogramPart(tuple(self.edges))

    def lift(self, value: Any, rows: int) -> HistogramPart:
        """The counts of one piece. Raises DataError unless there are real numbers, axis 0 the rows."""
        if not rows:
            return self.empty()
        import numpy as np

        values = real_rows(value, rows, "count values in bins").reshape(-1)
        edges = np.array(self.edges)
        places = np.searchsorted(edges, values[values == values], side="right")
        places[values[values == values] == edges[-1]] -= 1
        counts = np.bincount(places, minlength=len(edges) + 1).astype(np.int64)
        nan = int((values != values).sum())
        return HistogramPart(tuple(self.edges), counts[1:-1], int(counts[0]), int(counts[-1]), nan)

    def join(self, left: HistogramPart, right: HistogramPart) -> HistogramPart:
        """All counts. Raises DataError where a part was made with other edges."""
        for part in (left, right):
            if part.edges != self.edges:
                raise DataError(
                    "count values in bins",
                    found=f"a part with {len(part.edges)} edges from {part.edges[0]} to {part.edges[-1]}",
                    allowed="parts made with the edges of this merge",
                    do="join parts of one merge only",
                )
        if left.counts is None or right.counts is None:
            return right if left.counts is None else left
        return HistogramPart(
            left.edges,
            left.counts + right.counts,
            left.below + right.below,
            left.above + right.above,
            left.nan + right.nan,
        )

    def finish(self, part: HistogramPart) -> Bins:
        """The bins; all 0 for no values."""
        import numpy as np

        counts = np.zeros(len(self.edges) - 1, np.int64) if part.counts is None else part.counts
        return Bins(counts, np.array(self.edges), part.below, part.above, part.nan)
