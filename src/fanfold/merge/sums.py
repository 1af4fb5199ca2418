"""Counts, sums and weighted means of numbers and of arrays of one shape.

Values: int, float, complex (and NumPy scalars, taken as these), or arrays, one per piece, all of one shape
and dtype, joined element by element with operators and methods of the array alone (NumPy, torch on the CPU).
Arrays of bool and of ints below 64 bits are summed in int64, float16 and bfloat16 in float32.

Floats are summed with their rounding errors (two-sum: Knuth, TAOCP vol. 2, section 4.2.2, theorem B; carried
along as in Ogita, Rump & Oishi 2005, algorithm 4.4), so how the rows were cut shows at most in the last bit.
With u the unit roundoff (2^-53 for float64, 2^-24 for float32) and h the height of the tree of joins plus
one, a sum is within  u |s| + 3 (h u)^2 sum|x|  of the exact sum s of the values; two cuts within twice that.

NaN and infinity propagate: NaN if a value is NaN or if both infinities occur, else the infinity that occurs.
A partial sum beyond the largest float is infinite, as it is for `sum`. The sign of a zero is not kept.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.errors import DataError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


@dataclass(frozen=True, slots=True)
class Count:
    """The number of rows. Exact; the values are not looked at."""

    def empty(self) -> int:
        """No rows."""
        return 0

    def lift(self, value: Any, rows: int) -> int:
        """The piece's rows."""
        return rows

    def join(self, left: int, right: int) -> int:
        """Rows of both."""
        return left + right

    def finish(self, part: int) -> int:
        """All rows; 0 for none."""
        return part


@dataclass(frozen=True, slots=True)
class SumPart:
    """A sum as `total + carry`, the carry holding what rounding took from it; total None: no pieces."""

    total: Any = None
    carry: Any = 0


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum over pieces of one value each; a piece of no rows adds nothing, whatever its value is.

    Shapes: values, parts and result all have the shape of one value. Ints stay ints and are exact; int and
    float pieces together make a float. Error bound, NaN policy and source: see the module.

    >>> merge = Sum()
    >>> parts = [merge.lift(value, 1) for value in (1e16, 1.0, -1e16)]
    >>> merge.finish(merge.join(merge.join(parts[0], parts[1]), parts[2]))
    1.0
    """

    def empty(self) -> SumPart:
        """The sum of no pieces."""
        return SumPart()

    def lift(self, value: Any, rows: int) -> SumPart:
        """The part of a piece whose own sum is `value`. Raises DataError if that is no number or array."""
        return SumPart(_summable(value)) if rows else SumPart()

    def join(self, left: SumPart, right: SumPart) -> SumPart:
        """Both sums. Raises DataError if shape or dtype differ, or if an int64 array would overflow."""
        if left.total is None or right.total is None:
            return right if left.total is None else left
        _check_alike(left.total, right.total)
        if _is_int(left.total) and _is_int(right.total):
            return SumPart(_add_ints(left.total, right.total))
        left, right = _float_part(left), _float_part(right)
        with _quiet(left.total):
            total, error = _two_sum(left.total, right.total)
            return SumPart(total, left.carry + right.carry + error)

    def finish(self, part: SumPart) -> Any:
        """The sum; the int 0 for no pieces."""
        with _quiet(part.total):
            return 0 if part.total is None else part.total + part.carry


@dataclass(frozen=True, slots=True)
class Weighted:
    """What a piece computed, with a weight other than its number of rows: finite, not negative."""

    value: Any
    w: float


@dataclass(frozen=True, slots=True)
class MeanPart:
    """The sum of weight times value, and the sum of the weights."""

    total: SumPart = SumPart()
    weight: SumPart = SumPart()


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over pieces of one value each, sum(w * value) / sum(w); w: rows of the piece, or `Weighted`'s.

    Shapes: values and result have the shape of one value. A piece of weight 0 adds nothing, whatever its
    value is. Ints give the float nearest to the exact mean; arrays of ints are taken as float64.
    Error: within 8 u A of the exact weighted mean of the values, A = sum(w |value|) / sum(w), while no sum of
    w |value| overflows and h <= 1 / sqrt(3 u) (1 000 for float32); two cuts of the same lifted values differ
    by less. u, h, NaN policy and source: see the module.

    >>> merge = Mean()
    >>> merge.finish(merge.join(merge.lift(2.0, 30), merge.lift(5.0, 10)))
    2.75
    """

    def empty(self) -> MeanPart:
        """No pieces, no weight."""
        return MeanPart()

    def lift(self, value: Any, rows: int) -> MeanPart:
        """The part of a piece with mean `value`, or of a `Weighted`. Raises DataError for a bad weight."""
        weight = rows
        if isinstance(value, Weighted):
            value, weight = value.value, value.w
        weight = _weight(weight)
        if not weight:
            return MeanPart()
        value = _summable(value)
        if _is_array(value) and _is_int(value):
            value = value.astype("float64") if hasattr(value, "astype") else value.double()
        try:
            with _quiet(value):
                return MeanPart(SumPart(value * weight), SumPart(weight))
        except OverflowError:
            raise _too_large("weigh a value for the mean", f"value times weight {weight!r}") from None

    def join(self, left: MeanPart, right: MeanPart) -> MeanPart:
        """Both sums and both weights. Raises DataError if shape or dtype differ."""
        join = Sum().join
        return MeanPart(join(left.total, right.total), join(left.weight, right.weight))

    def finish(self, part: MeanPart) -> Any:
        """The mean. Raises DataError for no weight at all: nothing has no mean."""
        weight = Sum().finish(part.weight)
        if not weight:
            raise DataError(
                "take the mean",
                found="no rows, or no weight above 0",
                allowed="at least one row",
                do="check that the input is not empty, or count the rows before asking for their mean",
            )
        total = Sum().finish(part.total)
        try:
            if math.isfinite(weight):
                with _quiet(total):
                    return total / weight
        except OverflowError:
            pass
        raise _too_large("take the mean", "a sum of weights, or a mean,")


def _two_sum(left: Any, right: Any) -> tuple[Any, Any]:
    """The rounded sum and its rounding error, 0 where the sum is not finite."""
    total = left + right
    moved = total - left
    error = (left - (total - moved)) + (right - moved)
    bad = (error - error) != 0  # NaN or infinite: a value is, or the sum overflowed
    if not _is_array(error):
        return total, 0.0 if bad else error
    if bad.any():
        error[bad] = 0
    return total, error


def _add_ints(left: Any, right: Any) -> Any:
    total = left + right
    if not _is_array(total):
        return total
    wrapped = total < left if _dtype(total).startswith("u") else ((left ^ total) & (right ^ total)) < 0
    if wrapped.any():
        raise _too_large("sum arrays of ints", f"a sum beyond {_dtype(total)}")
    return total


def _float_part(part: SumPart) -> SumPart:
    """The same sum with a float total; the carry takes what does not fit."""
    if not isinstance(part.total, int):
        return part
    try:
        total = float(part.total)
    except OverflowError:
        raise _too_large("sum ints and floats together", "an int") from None
    return SumPart(total, float(part.total - int(total)))


def _summable(value: Any) -> Any:
    """The value as a Python number, or as an array wide enough to be summed."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return int(value)
    dtype = _dtype(value)
    if isinstance(value, (int, float, complex)) or dtype == "uint64":
        return value
    if dtype in ("float16", "bfloat16"):
        return value.astype("float32") if hasattr(value, "astype") else value.float()
    if dtype.startswith(("int", "uint", "bool")):
        return value.astype("int64") if hasattr(value, "astype") else value.long()
    if dtype.startswith(("float", "complex", "longdouble", "clongdouble")):
        return value
    raise DataError(
        "sum the values of all pieces",
        found=f"a piece gave a {type(value).__name__}" + (f" of {dtype}" if dtype else ""),
        allowed="int, float, complex, or an array of these",
        do="return a number or an array for each piece, for example numpy.asarray(value)",
    )


def _check_alike(left: Any, right: Any) -> None:
    def kind(value: Any) -> str:
        return f"{_dtype(value)} of shape {tuple(value.shape)}" if _is_array(value) else "a number"

    if kind(left) != kind(right):
        raise DataError(
            "sum the values of all pieces",
            found=f"{kind(left)}, then {kind(right)}",
            allowed="one shape and one dtype for all pieces",
            do="make the function return the same shape and dtype for every piece",
        )


def _weight(weight: Any) -> Any:
    if getattr(weight, "shape", None) == () and hasattr(weight, "item"):
        weight = weight.item()
    try:
        if isinstance(weight, (int, float)) and weight >= 0 and math.isfinite(weight):
            return weight
    except OverflowError:  # an int beyond the largest float
        pass
    raise DataError(
        "weigh a value for the mean",
        found=f"the weight {weight!r}"[:120],
        allowed="one finite number, 0 or above",
        do="give each piece one weight: Weighted(value, w)",
    )


def _too_large(asked: str, what: str) -> DataError:
    return DataError(
        asked,
        found=f"{what} too large for its type",
        allowed="sums within the range of the type",
        do="scale the values down, or return float64 values",
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and value.shape != ()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) or _dtype(value).startswith(("int", "uint"))


def _dtype(value: Any) -> str:
    """The dtype's plain name (float32 for NumPy and for torch), "" for what has none."""
    dtype = getattr(value, "dtype", None)
    return "" if dtype is None else str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def _quiet(value: Any) -> AbstractContextManager[Any]:
    """No warning from NumPy where infinities meet: they propagate on purpose."""
    if not type(value).__module__.startswith("numpy"):
        return nullcontext()
    import numpy as np

    return np.errstate(over="ignore", invalid="ignore")
