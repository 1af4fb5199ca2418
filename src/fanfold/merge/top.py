"""The k greatest, or least, values and the rows in which they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError, PlanError
from fanfold.merge.extremes import check_alike
from fanfold.merge.rows import numpy_rows


@dataclass(frozen=True, slots=True)
class Top:
    """The best first: values and their rows, counted over all pieces; fewer than k where there are fewer rows."""

    values: Any
    indices: Any


@dataclass(frozen=True, slots=True)
class TopPart:
    """The best so far, the number of rows seen, and what was asked for; values None: no rows."""

    k: int
    largest: bool
    values: Any = None
    indices: Any = None
    rows: int = 0


@dataclass(frozen=True, slots=True)
class TopK:
    """The k best rows by value, the best first; equal values in row order, NaN behind all others. Exact.

    Shapes: values [rows] of numbers -> `Top` of arrays [min(k, rows)].
    """

    k: int
    largest: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise PlanError(f"TopK({self.k!r})", found="no number of rows", allowed="k >= 1", do="write ff.TopK(10)")

    def empty(self) -> TopPart:
        """No rows."""
        return TopPart(self.k, self.largest)

    def lift(self, value: Any, rows: int) -> TopPart:
        """The best of one piece. Raises DataError unless there is one number for each row."""
        if not rows:
            return self.empty()
        import numpy as np

        values = numpy_rows(value, rows, "find the top rows")
        if values.ndim != 1 or values.dtype.kind not in "biuf":
            raise DataError(
                "find the top rows",
                found=f"{values.dtype} of shape {values.shape}",
                allowed="one real number for each row",
                do="return an array [rows] of scores",
            )
        return self._best(values, np.arange(rows), rows)

    def join(self, left: TopPart, right: TopPart) -> TopPart:
        """The best of both. Raises DataError where a part was made for another k or order, or dtypes differ."""
        for part in (left, right):
            if (part.k, part.largest) != (self.k, self.largest):
                raise DataError(
                    "find the top rows",
                    found=f"a part made by TopK({part.k}, largest={part.largest})",
                    allowed=f"parts made by TopK({self.k}, largest={self.largest})",
                    do="join parts of one merge only",
                )
        if left.values is None or right.values is None:
            return right if left.values is None else left
        import numpy as np

        check_alike("find the top rows", left.values[0], right.values[0])
        values = np.concatenate([left.values, right.values])
        indices = np.concatenate([left.indices, right.indices + left.rows])
        return self._best(values, indices, left.rows + right.rows)

    def finish(self, part: TopPart) -> Top:
        """Values and rows, the best first; empty for no rows."""
        import numpy as np

        if part.values is None:
            return Top(np.empty(0), np.empty(0, np.int64))
        return Top(part.values, part.indices)

    def _best(self, values: Any, indices: Any, rows: int) -> TopPart:
        import numpy as np

        ranked = values if values.dtype.kind != "b" else values.astype(np.int8)
        if len(ranked) > 4 * self.k:  # what is worse than the k-th can be left out before sorting
            regular = ranked[ranked == ranked]
            if len(regular) >= self.k:
                at = len(regular) - self.k if self.largest else self.k - 1
                border = np.partition(regular, at)[at]
                kept = ranked >= border if self.largest else ranked <= border
                values, indices, ranked = values[kept], indices[kept], ranked[kept]
        if self.largest:  # a stable sort of the reverse, reversed, is stable; NaN goes to the front, so to the end
            order = len(ranked) - 1 - np.argsort(ranked[::-1], kind="stable")[::-1]
            nan = ranked[order] != ranked[order]
            order = np.concatenate([order[~nan], order[nan]])
        else:
            order = np.argsort(ranked, kind="stable")
        best = order[: self.k]
        return TopPart(self.k, self.largest, values[best], indices[best], rows)
