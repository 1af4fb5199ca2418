"""Quantiles within a stated relative error, from counts of values in buckets that grow by a constant factor.

DDSketch (Masson, Rim & Lee 2019, VLDB 12(12), section 2): bucket k holds (g^(k-1), g^k], g = (1 + e) / (1 - e), so its
middle 2 g^k / (g + 1) is within e of each of its values, relative to the value. Counts are ints: the result is the
same, bit for bit, on any cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError, PlanError
from fanfold.merge.extremes import no_rows
from fanfold.merge.rows import real_rows

_SMALLEST = 1e-300  # magnitudes below count as 0


@dataclass(frozen=True, slots=True)
class SketchPart:
    """Keys in order and their counts (int64): negative values, then positive; zeros, NaN, infinities; min and max."""

    error: float
    negative: Any = None
    num_negative: Any = None
    positive: Any = None
    num_positive: Any = None
    zeros: int = 0
    nans: int = 0
    low: float = math.inf
    high: float = -math.inf


@dataclass(frozen=True, slots=True)
class Quantiles:
    """The value of rank floor(q (n - 1)) among all values in order, within `error` of it, relative to it.

    Shapes: values [rows, ...], all elements counted -> a float for one q, an array for several. The least and the
    greatest value are exact. NaN where a value is NaN. Magnitudes below 1e-300 are taken as 0; infinities have a
    bucket of their own and come out as they are.
    Memory: at most 1,400 / error buckets of 16 bytes each sign. Source: see the module.
    """

    q: Any
    error: float = 0.001

    def __post_init__(self) -> None:
        wanted = self.q if isinstance(self.q, Sequence) else (self.q,)
        good = all(isinstance(q, (int, float)) and not isinstance(q, bool) and 0 <= q <= 1 for q in wanted)
        if not good or not wanted or not 1e-6 <= self.error <= 0.5:
            raise PlanError(
                f"Quantiles({self.q!r}, error={self.error!r})",
                found="a q outside 0 to 1, or an error outside 1e-6 to 0.5",
                allowed="q, or several, from 0 to 1; a relative error from 1e-6 to 0.5",
                do="write for example ff.Quantiles(0.99) or ff.Quantiles((0.5, 0.99))",
            )
        if isinstance(self.q, Sequence):
            object.__setattr__(self, "q", tuple(self.q))

    def empty(self) -> SketchPart:
        """No values."""
        return SketchPart(self.error)

    def lift(self, value: Any, rows: int) -> SketchPart:
        """The counts of one piece. Raises DataError unless there are real numbers, axis 0 the rows."""
        if not rows:
            return self.empty()
        import numpy as np

        values = real_rows(value, rows, "find quantiles over rows").astype(np.float64).reshape(-1)
        regular = values[values == values]
        if not len(regular):
            return SketchPart(self.error, nans=len(values))
        above, below = regular[regular >= _SMALLEST], -regular[regular <= -_SMALLEST]
        return SketchPart(
            self.error,
            *self._counts(below),
            *self._counts(above),
            zeros=len(regular) - len(above) - len(below),
            nans=len(values) - len(regular),
            low=float(regular.min()),
            high=float(regular.max()),
        )

    def join(self, left: SketchPart, right: SketchPart) -> SketchPart:
        """All counts. Raises DataError where a part was made with another error."""
        for part in (left, right):
            if part.error != self.error:
                raise DataError(
                    "find quantiles over rows",
                    found=f"a part made with error={part.error}",
                    allowed=f"parts made with error={self.error}",
                    do="join parts of one merge only",
                )
        return SketchPart(
            self.error,
            *_add(left.negative, left.num_negative, right.negative, right.num_negative),
            *_add(left.positive, left.num_positive, right.positive, right.num_positive),
            zeros=left.zeros + right.zeros,
            nans=left.nans + right.nans,
            low=min(left.low, right.low),
            high=max(left.high, right.high),
        )

    def finish(self, part: SketchPart) -> Any:
        """The quantiles. Raises DataError for no values."""
        import numpy as np

        middles, counts = [np.zeros(1)], [np.array([part.zeros])]
        if part.negative is not None:
            middles.insert(0, -self._middle(part.negative[::-1]))
            counts.insert(0, part.num_negative[::-1])
        if part.positive is not None:
            middles.append(self._middle(part.positive))
            counts.append(part.num_positive)
        ends = np.cumsum(np.concatenate(counts))
        total = int(ends[-1])
        if not total and not part.nans:
            raise no_rows("find quantiles over rows")
        buckets = np.concatenate(middles)
        found = [math.nan if part.nans else self._at(q, total, ends, buckets, part) for q in self._wanted()]
        return np.array(found) if isinstance(self.q, tuple) else found[0]

    def _wanted(self) -> tuple[float, ...]:
        return self.q if isinstance(self.q, tuple) else (self.q,)

    def _at(self, q: float, total: int, ends: Any, middles: Any, part: SketchPart) -> float:
        rank = math.floor(q * (total - 1))
        if rank in (0, total - 1):
            return part.low if rank == 0 else part.high
        return min(max(float(middles[ends.searchsorted(rank, side="right")]), part.low), part.high)

    def _counts(self, magnitudes: Any) -> tuple[Any, Any]:
        if not len(magnitudes):
            return None, None
        import numpy as np

        finite = np.minimum(magnitudes, np.finfo(np.float64).max)
        keys = np.ceil(np.log(finite) / self._log_growth()).astype(np.int64)
        keys[np.isinf(magnitudes)] = np.iinfo(np.int64).max
        found, counts = np.unique(keys, return_counts=True)
        return found, counts.astype(np.int64)

    def _middle(self, keys: Any) -> Any:
        import numpy as np

        endless = keys == np.iinfo(np.int64).max
        power = np.where(endless, 0, keys) * self._log_growth()
        middle = np.exp(power + math.log(2.0 / (math.exp(self._log_growth()) + 1.0)))
        return np.where(endless, np.inf, middle)

    def _log_growth(self) -> float:
        return math.log((1 + self.error) / (1 - self.error))


def _add(left: Any, num_left: Any, right: Any, num_right: Any) -> tuple[Any, Any]:
    if left is None or right is None:
        return (right, num_right) if left is None else (left, num_left)
    import numpy as np

    keys, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, places, np.concatenate([num_left, num_right]))
    return keys, counts
