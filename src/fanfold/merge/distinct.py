"""The number of distinct values, by HyperLogLog.

Flajolet, Fusy, Gandouet & Meunier 2007; the sketch is that of Apache DataSketches (package `datasketches`, extra
`sketch`). 2^lg_k registers give a relative standard error of 1.04 / sqrt(2^lg_k) whatever the number of values is.
DataSketches' estimate for a stream seen in one go (HIP) is a little better, but depends on the order of values and
on the cut; so every part goes through a union, whose estimate is a function of the registers alone. A sketch of
few values holds their hashes instead, up to a number that depends on the cut too: from 2^lg_k / 16 values on,
registers are made of them at the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fanfold import extras
from fanfold.errors import DataError, PlanError
from fanfold.merge.rows import numpy_rows

_KINDS = {"b": "bools", "i": "ints", "u": "ints", "f": "floats", "S": "bytes", "U": "strings"}
_FEWEST, _MOST = 7, 21  # lg_k that the package has


@dataclass(frozen=True, slots=True)
class DistinctPart:
    """The sketch in DataSketches' own bytes, its lg_k, and the kind of the values; sketch None: no values."""

    lg_k: int
    kind: str = ""
    sketch: bytes | None = None


@dataclass(frozen=True, slots=True)
class Distinct:
    """How many different values there are, an int; the same on any cut. `error`: its relative standard error.

    Shapes: values [rows, ...] of bools, ints, floats, strings or bytes, all elements counted. 1 and 1.0 are of
    different kinds: all pieces must be of one. Floats count as float64; NaN is one value; -0.0 equals 0.0.
    Error: off by at most `error` in 68 of 100 cases, by three times that in 99.7;
    not at all, but for a collision of hashes of 26 bits or so, below 2^lg_k / 16 values (1,024 for the default).
    Memory: 2^lg_k bytes a part; 16 KiB for the default. Source: see the module.
    """

    error: float = 0.01

    def __post_init__(self) -> None:
        good = isinstance(self.error, (int, float)) and _least_error(_MOST) <= self.error < 1
        if not good:
            raise PlanError(
                f"Distinct(error={self.error!r:.60})",
                found="an error that no sketch has",
                allowed=f"a relative standard error from {_least_error(_MOST):.5f} to 1",
                do="write ff.Distinct(error=0.01)",
            )

    @property
    def lg_k(self) -> int:
        """The logarithm of the number of registers: the fewest that hold the error."""
        return next(lg_k for lg_k in range(_FEWEST, _MOST + 1) if _least_error(lg_k) <= self.error)

    def empty(self) -> DistinctPart:
        """No values."""
        return DistinctPart(self.lg_k)

    def lift(self, value: Any, rows: int) -> DistinctPart:
        """Of one piece. Raises DataError unless axis 0 is the rows and the values can be counted."""
        if not rows:
            return self.empty()
        import numpy as np

        values = numpy_rows(value, rows, "count distinct values")
        if values.dtype.kind not in _KINDS:
            raise DataError(
                "count distinct values",
                found=f"values of {values.dtype}",
                allowed="bools, ints, floats, strings or bytes",
                do="return values of one of these kinds",
            )
        if values.dtype.kind == "f":
            values = values.astype(np.float64) + 0.0  # -0.0 becomes 0.0
        if not values.size:
            return self.empty()
        sketch = _sketches().hll_sketch(self.lg_k, _sketches().tgt_hll_type.HLL_8)
        for one in np.unique(values).tolist():
            sketch.update(_hashable(one))
        return self._part(_KINDS[values.dtype.kind], sketch, sketch)

    def join(self, left: DistinctPart, right: DistinctPart) -> DistinctPart:
        """Of both. Raises DataError where a part was made for another error, or kinds differ."""
        for part in (left, right):
            if part.lg_k != self.lg_k:
                raise DataError(
                    "count distinct values",
                    found=f"a part with 2^{part.lg_k} registers",
                    allowed=f"parts made by Distinct(error={self.error}), with 2^{self.lg_k} registers",
                    do="join parts of one merge only",
                )
        if left.sketch is None or right.sketch is None:
            return right if left.sketch is None else left
        if left.kind != right.kind:
            raise DataError(
                "count distinct values",
                found=f"{left.kind}, then {right.kind}",
                allowed="values of one kind in all pieces: bools, ints, floats, strings or bytes",
                do="make the function return the same kind for every piece, with .astype",
            )
        return self._part(left.kind, _opened(left.sketch), _opened(right.sketch))

    def finish(self, part: DistinctPart) -> int:
        """The estimate; 0 for no values."""
        if part.sketch is None:
            return 0
        sketch = _opened(part.sketch)
        few: float = sketch.get_estimate()
        if few < 2**self.lg_k / 16:
            return round(few)
        seed = _sketches().hll_sketch(self.lg_k, _sketches().tgt_hll_type.HLL_8, True)  # has registers from the start
        seed.update("a value that is none of a piece's")
        many: float = self._union(seed, sketch).get_estimate()
        return round(many) - 1

    def _part(self, kind: str, left: Any, right: Any) -> DistinctPart:
        return DistinctPart(self.lg_k, kind, self._union(left, right).serialize_compact())

    def _union(self, left: Any, right: Any) -> Any:
        """The sketch of both, with the union's estimate: made twice, since one of few hashes keeps HIP's."""
        for _ in range(2):
            union = _sketches().hll_union(self.lg_k)
            union.update(left)
            union.update(right)
            left = right = union.get_result(_sketches().tgt_hll_type.HLL_8)
        return left


def _least_error(lg_k: int) -> float:
    """The relative standard error of a union's estimate: what DataSketches states for it."""
    return math.sqrt(3 * math.log(2) - 1) / math.sqrt(2**lg_k)


def _hashable(value: Any) -> Any:
    """What the sketch hashes: texts get a letter before them, since it leaves empty ones out."""
    if isinstance(value, bytes):
        return "b" + value.decode("latin-1")
    if isinstance(value, str):
        return "s" + value.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
    if isinstance(value, int) and value >= 2**63:  # beyond the sketch's own ints
        return f"u{value}"
    return value


def _opened(sketch: bytes) -> Any:
    try:
        return _sketches().hll_sketch.deserialize(sketch)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise DataError(
            "count distinct values",
            found=f"a part whose sketch cannot be read: {str(error)[:80]}",
            allowed="parts made by Distinct",
            do="make the part again",
        ) from error


def _sketches() -> Any:
    return extras.need("datasketches", extra="sketch", purpose="counting distinct values")
