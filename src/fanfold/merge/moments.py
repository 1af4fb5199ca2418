"""Mean, variance, skewness and kurtosis over rows in one pass over the pieces.

Values: one per row, [rows, ...]; each trailing element apart, in float64. Within a piece the moments are taken
about its own mean; pieces join by the formulas of Chan, Golub & LeVeque 1983 and Pebay 2008 (SAND2008-6212,
equations 1.1 to 1.6). Means are kept with their rounding error, so that what values have in common costs no digits:
the moments of 1e8 + x are those of x to the digits that 1e8 + x left of it.

Error: within 1e-12 of the exact moment of the values, relative to the moment of their distances from the mean
without signs; two cuts within twice that (tested). NaN and infinities give the mean that `Mean` gives (NaN if
there is one or if both infinities occur, else the infinity) and NaN for the higher moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fanfold.merge.extremes import check_alike, no_rows
from fanfold.merge.rows import real_rows


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of all rows: `variance` divides by n; `kurtosis` is the excess over the normal one; NaN where undefined."""

    count: int
    mean: Any
    variance: Any
    skewness: Any
    kurtosis: Any

    @property
    def sample_variance(self) -> Any:
        """Divided by n - 1; NaN for one row."""
        return self.variance * (self.count / (self.count - 1) if self.count > 1 else math.nan)


@dataclass(frozen=True, slots=True)
class MomentsPart:
    """The rows' number, their mean as `mean + rest`, the sums of powers 2, 3, 4 of what they differ from it.

    The rest is what rounding took from the mean. mean None: no rows.
    """

    count: int = 0
    mean: Any = None
    rest: Any = 0.0
    m2: Any = 0.0
    m3: Any = 0.0
    m4: Any = 0.0


@dataclass(frozen=True, slots=True)
class Moments:
    """The first four moments over rows. Shapes, error bound, NaN policy and source: see the module."""

    def empty(self) -> MomentsPart:
        """No rows."""
        return MomentsPart()

    def lift(self, value: Any, rows: int) -> MomentsPart:
        """Of one piece. Raises DataError unless there are real numbers, axis 0 the rows."""
        if not rows:
            return MomentsPart()
        import numpy as np

        values = real_rows(value, rows, "take moments over rows").astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = values.mean(axis=0)
            apart = values - mean
            rest = apart.mean(axis=0)
            apart = apart - rest
            square = apart * apart
            sums = square.sum(axis=0), (square * apart).sum(axis=0), (square * square).sum(axis=0)
            return MomentsPart(rows, *_two_sum(mean, rest, mean), *sums)

    def join(self, left: MomentsPart, right: MomentsPart) -> MomentsPart:
        """Of both. Raises DataError if shapes differ."""
        if left.mean is None or right.mean is None:
            return right if left.mean is None else left
        import numpy as np

        check_alike("take moments over rows", left.mean, right.mean)
        a, b = left.count, right.count
        n = a + b
        with np.errstate(invalid="ignore", over="ignore"):
            d = (right.mean - left.mean) + (right.rest - left.rest)
            d_n = d / n
            m2 = left.m2 + right.m2 + d * d_n * a * b
            m3 = left.m3 + right.m3 + d * d_n**2 * a * b * (a - b) + 3 * d_n * (a * right.m2 - b * left.m2)
            m4 = (
                left.m4
                + right.m4
                + d * d_n**3 * a * b * (a * a - a * b + b * b)
                + 6 * d_n**2 * (a * a * right.m2 + b * b * left.m2)
                + 4 * d_n * (a * right.m3 - b * left.m3)
            )
            plain = left.mean * (a / n) + right.mean * (b / n)
            return MomentsPart(n, *_two_sum(left.mean, left.rest + d_n * b, plain), m2, m3, m4)

    def finish(self, part: MomentsPart) -> Statistics:
        """The statistics. Raises DataError for no rows."""
        if part.mean is None:
            raise no_rows("take moments over rows")
        import numpy as np

        n = part.count
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = part.m2 / n
            skewness = (part.m3 / n) / variance**1.5
            kurtosis = (part.m4 / n) / variance**2 - 3.0
        return Statistics(n, part.mean, variance, skewness, kurtosis)


def _two_sum(left: Any, right: Any, plain: Any) -> tuple[Any, Any]:
    """The rounded sum and its rounding error (Knuth); where that is not finite, the plain value and 0."""
    import numpy as np

    total = left + right
    moved = total - left
    error = (left - (total - moved)) + (right - moved)
    good = np.isfinite(error)
    return np.where(good, total, plain)[()], np.where(good, error, 0.0)[()]
