"""Least and greatest values, and where the greatest stands. Exact on any cut.

Values: one per row, [rows, ...]; each trailing element apart. NaN propagates, as in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError
from fanfold.merge.rows import numpy_rows


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the greatest value."""

    min: Any
    max: Any


@dataclass(frozen=True, slots=True)
class RangePart:
    """Both so far; None: no rows."""

    min: Any = None
    max: Any = None


@dataclass(frozen=True, slots=True)
class MinMax:
    """The least and the greatest value over rows, numbers or strings; NaN where there is one."""

    def empty(self) -> RangePart:
        """No rows."""
        return RangePart()

    def lift(self, value: Any, rows: int) -> RangePart:
        """Of one piece. Raises DataError if axis 0 is not the rows."""
        if not rows:
            return RangePart()
        import numpy as np

        values = numpy_rows(value, rows, "take least and greatest value over rows")
        if values.dtype.kind in "SU":  # NumPy knows where the least string stands, but no minimum of strings
            least, greatest = values.argmin(axis=0), values.argmax(axis=0)
            ends = [np.take_along_axis(values, np.expand_dims(at, 0), axis=0)[0] for at in (least, greatest)]
            return RangePart(*ends)
        return RangePart(values.min(axis=0), values.max(axis=0))

    def join(self, left: RangePart, right: RangePart) -> RangePart:
        """Of both. Raises DataError if shapes or dtypes differ."""
        if left.min is None or right.min is None:
            return right if left.min is None else left
        import numpy as np

        check_alike("take least and greatest value over rows", left.min, right.min)
        if left.min.dtype.kind in "SU":
            return RangePart(
                np.where(right.min < left.min, right.min, left.min)[()],
                np.where(right.max > left.max, right.max, left.max)[()],
            )
        return RangePart(np.minimum(left.min, right.min), np.maximum(left.max, right.max))

    def finish(self, part: RangePart) -> Range:
        """Both. Raises DataError for no rows."""
        if part.min is None:
            raise no_rows("take least and greatest value over rows")
        return Range(part.min, part.max)


@dataclass(frozen=True, slots=True)
class Extreme:
    """The greatest value, and the row in which it stands first, counted over all pieces."""

    index: Any
    value: Any


@dataclass(frozen=True, slots=True)
class ExtremePart:
    """The greatest so far, its row, and the number of rows seen; value None: no rows."""

    index: Any = 0
    value: Any = None
    rows: int = 0


@dataclass(frozen=True, slots=True)
class ArgMax:
    """Where the greatest value stands: the first row of equal ones; the first NaN where there is one."""

    def empty(self) -> ExtremePart:
        """No rows."""
        return ExtremePart()

    def lift(self, value: Any, rows: int) -> ExtremePart:
        """Of one piece. Raises DataError if axis 0 is not the rows."""
        if not rows:
            return ExtremePart()
        import numpy as np

        values = numpy_rows(value, rows, "find the greatest value over rows")
        index = values.argmax(axis=0)
        return ExtremePart(index, np.take_along_axis(values, np.expand_dims(index, 0), axis=0)[0], rows)

    def join(self, left: ExtremePart, right: ExtremePart) -> ExtremePart:
        """Of both; rows of the right one count on from the left. DataError if shapes or dtypes differ."""
        if left.value is None or right.value is None:
            return right if left.value is None else left
        import numpy as np

        check_alike("find the greatest value over rows", left.value, right.value)
        later = (left.value == left.value) & ((right.value > left.value) | (right.value != right.value))
        return ExtremePart(
            np.where(later, right.index + left.rows, left.index)[()],
            np.where(later, right.value, left.value)[()],
            left.rows + right.rows,
        )

    def finish(self, part: ExtremePart) -> Extreme:
        """Row and value. Raises DataError for no rows."""
        if part.value is None:
            raise no_rows("find the greatest value over rows")
        return Extreme(part.index, part.value)


def check_alike(asked: str, left: Any, right: Any) -> None:
    """Raises DataError unless shape and dtype are the same."""
    kinds = [f"{value.dtype} of shape {value.shape}" for value in (left, right)]
    text = left.dtype.kind in "SU" and left.dtype.kind == right.dtype.kind  # of any width
    if left.shape != right.shape or (left.dtype != right.dtype and not text):
        raise DataError(
            asked,
            found=f"{kinds[0]}, then {kinds[1]}",
            allowed="one shape and one dtype for all pieces",
            do="make the function return the same shape and dtype for every piece",
        )


def no_rows(asked: str) -> DataError:
    """The error for a result that no rows have."""
    return DataError(asked, found="no rows", allowed="at least one row", do="check that the input is not empty")
