"""Counts, sums and weighted means of numbers and of arrays of one shape.

Values: one per row by default, an array [rows, ...] (or a list) for each piece, summed over axis 0; or, where
that is declared (`of="pieces"`, `Weighted`), one per piece: int, float, complex (and NumPy scalars, taken as
these) or an array. All of one shape and dtype, joined element by element with operators and methods of the
array alone (NumPy, torch on the CPU). Results of one dimension less than one are Python numbers. Arrays of bool
and of ints below 64 bits are summed in int64, float16 and bfloat16 in float32.

The rows of a piece are summed in two parts: the leading bits of every value, which a plain sum adds without
rounding in any order, and what is left of them (Rump, Ogita & Oishi 2008, AccSum, algorithm 3.2, once), in blocks
of at most 32,768 rows where there is one number a row. The sum of a block of n rows is within
u |s| + 8 n^3 u^2 max|x|  of the exact one, before blocks and pieces join; where 4 n max|x| is beyond the largest
float, a plain sum is all there is.

Floats are summed with their rounding errors (two-sum: Knuth, TAOCP vol. 2, section 4.2.2, theorem B; carried
along as in Ogita, Rump & Oishi 2005, algorithm 4.4), so how the rows were cut shows at most in the last bit.
With u the unit roundoff (2^-53 for float64, 2^-24 for float32) and h the height of the tree of joins plus
one, a sum is within  u |s| + 3 (h u)^2 sum|x|  of the exact sum s of the values; two cuts within twice that.

NaN and infinity propagate: NaN if a value is NaN or if both infinities occur, else the infinity that occurs.
A partial sum beyond the largest float is infinite, as it is for `sum`. The sign of a zero is not kept.
"""

from __future__ import annotations

import functools
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fanfold.errors import DataError, PlanError
from fanfold.merge.rows import per_row

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

_BLOCK_ROWS = 32_768
_SMALL, _LARGE = 1e-200, 1e290  # sums of squares that neither underflow nor overflow on the way


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


class SumPart(NamedTuple):
    """A sum as `total + carry`, the carry holding what rounding took from it; total None: no pieces."""

    total: Any = None
    carry: Any = 0


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum over rows, or over pieces of one value each; a piece of no rows adds nothing, whatever it gave.

    Shapes: values [rows, ...] (`of="rows"`) or [...] (`of="pieces"`); parts and result those of one value. Ints stay
    ints and are exact; int and float pieces together make a float. Error bound, NaN policy and source: see the module.

    >>> merge = Sum()
    >>> parts = [merge.lift(values, len(values)) for values in ([1e16, 1.0], [-1e16])]
    >>> merge.finish(merge.join(parts[0], parts[1]))
    1.0
    """

    of: str = "rows"

    def __post_init__(self) -> None:
        _check_of("Sum", self.of)

    def empty(self) -> SumPart:
        """The sum of no pieces."""
        return SumPart()

    def lift(self, value: Any, rows: int) -> SumPart:
        """The part of one piece. Raises DataError if the value is no array of a value for each row, or no number."""
        if not rows:
            return SumPart()
        if self.of == "rows":
            return _sum_line(value) if _is_line(value, rows) else _sum_rows(per_row(value, rows, "sum over rows"))
        return SumPart(_summable(value))

    def join(self, left: SumPart, right: SumPart) -> SumPart:
        """Both sums. Raises DataError if shape or dtype differ, or if an int64 array would overflow."""
        (a, left_carry), (b, right_carry) = left, right
        if type(a) is float and type(b) is float:
            total = a + b
            moved = total - a
            error = (a - (total - moved)) + (b - moved)
            return SumPart(total, left_carry + right_carry + error if error - error == 0 else left_carry + right_carry)
        if type(a) is int and type(b) is int:
            return SumPart(a + b)
        if a is None or b is None:
            return right if a is None else left
        _check_alike(a, b)
        if _is_int(left.total) and _is_int(right.total):
            return SumPart(_add_ints(left.total, right.total))
        left, right = _float_part(left), _float_part(right)
        with _quiet(left.total):
            total, error = _two_sum(left.total, right.total)
            return SumPart(total, left.carry + right.carry + error)

    def finish(self, part: SumPart) -> Any:
        """The sum; the int 0 for no pieces."""
        if type(part.total) is float:
            return part.total + part.carry
        with _quiet(part.total):
            return 0 if part.total is None else part.total + part.carry


@dataclass(frozen=True, slots=True)
class Weighted:
    """What a piece computed, with a weight other than its number of rows: finite, not negative.

    A number weighs the piece's one value; an array [rows] weighs values of one per row.
    """

    value: Any
    w: Any


class MeanPart(NamedTuple):
    """The sum of weight times value, and the sum of the weights."""

    total: SumPart = SumPart()
    weight: SumPart = SumPart()


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean over rows; or of one value per piece, sum(w * value) / sum(w), w its rows, or `Weighted`'s.

    Shapes: values [rows, ...] (`of="rows"`) or [...] (`of="pieces"`, `Weighted`); the result's that of one value.
    A piece of weight 0 adds nothing, whatever its
    value is. Ints give the float nearest to the exact mean; arrays of ints are taken as float64.
    Error: within 8 u A of the exact weighted mean of the values, A = sum(w |value|) / sum(w), while no sum of
    w |value| overflows and h <= 1 / sqrt(3 u) (1 000 for float32); two cuts of the same lifted values differ
    by less. u, h, NaN policy and source: see the module.

    >>> merge = Mean(of="pieces")
    >>> merge.finish(merge.join(merge.lift(2.0, 30), merge.lift(5.0, 10)))
    2.75
    """

    of: str = "rows"

    def __post_init__(self) -> None:
        _check_of("Mean", self.of)

    def empty(self) -> MeanPart:
        """No pieces, no weight."""
        return MeanPart()

    def lift(self, value: Any, rows: int) -> MeanPart:
        """The part of one piece, or of a `Weighted`. Raises DataError for wrong lengths or a bad weight."""
        if self.of == "rows" and _is_line(value, rows):
            return MeanPart(_sum_line(value), SumPart(rows))
        weight = rows
        if isinstance(value, Weighted):
            value, weight = value.value, value.w
            if _num_weights(weight):
                return _weighted_rows(value, weight, rows)
        elif self.of == "rows" and rows:
            values = per_row(value, rows, "take the mean over rows")
            if _is_int(values) and len(values.shape) > 1:
                values = _cast(values, "float64")
            return MeanPart(_sum_rows(values), SumPart(rows))
        weight = _weight(weight)
        if not weight:
            return MeanPart()
        value = _summable(value)
        if _is_array(value) and _is_int(value):
            value = _cast(value, "float64")
        try:
            with _quiet(value):
                return MeanPart(SumPart(value * weight), SumPart(weight))
        except OverflowError:
            raise _too_large("weigh a value for the mean", f"value times weight {weight!r}") from None

    def join(self, left: MeanPart, right: MeanPart) -> MeanPart:
        """Both sums and both weights. Raises DataError if shape or dtype differ."""
        (a, left_weight), (b, right_weight) = left, right
        return MeanPart(_SUM.join(a, b), _SUM.join(left_weight, right_weight))

    def finish(self, part: MeanPart) -> Any:
        """The mean. Raises DataError for no weight at all: nothing has no mean."""
        weight = part.weight.total
        if type(weight) is int and weight and type(part.total.total) is float:
            return (part.total.total + part.total.carry) / weight
        weight = _SUM.finish(part.weight)
        if not weight:
            raise DataError(
                "take the mean",
                found="no rows, or no weight above 0",
                allowed="at least one row",
                do="check that the input is not empty, or count the rows before asking for their mean",
            )
        total = _SUM.finish(part.total)
        try:
            if math.isfinite(weight):
                with _quiet(total):
                    return total / weight
        except OverflowError:
            pass
        raise _too_large("take the mean", "a sum of weights, or a mean,")


def _check_of(name: str, of: str) -> None:
    if of not in ("rows", "pieces"):
        raise PlanError(
            f"{name}(of={of!r})",
            found="neither rows nor pieces",
            allowed='of="rows" (a value for each row, the default) or of="pieces" (one value for each piece)',
            do=f'write {name}() or {name}(of="pieces")',
        )


_SUM = Sum()  # of weights and of weighted values


def _cast(values: Any, dtype: str) -> Any:
    """An array of that dtype: float64, float32 or int64."""
    if hasattr(values, "astype"):
        return values.astype(dtype)
    return getattr(values, {"float64": "double", "float32": "float", "int64": "long"}[dtype])()


def _sum_rows(values: Any) -> SumPart:
    """The sum of an array [rows, ...] over axis 0, rows > 0, as total and carry; Python numbers for [rows]."""
    values = _summable(values)
    if _is_int(values):
        return SumPart(_sum_int_rows(values))
    dtype = _dtype(values)
    if dtype == "float32":
        values = _cast(values, "float64")
    if _is_line(values, len(values)):
        return _sum_line(values)
    if dtype.startswith(("complex", "clongdouble")):
        real, imag = _sum_float_rows(values.real), _sum_float_rows(values.imag)
        total, carry = real[0] + 1j * imag[0], real[1] + 1j * imag[1]
    else:
        total, carry = _sum_float_rows(values)
    if len(values.shape) == 1:
        return SumPart(total.item(), carry.item())
    if dtype == "float32":  # the dtype that the values have; the carry takes what it cannot hold
        narrow = _cast(total, "float32")
        left = _cast(narrow, "float64")
        with _quiet(total):
            rest = (total - left) + carry
        carry = _cast(rest, "float32")
        carry[(carry - carry) != 0] = 0
        return SumPart(narrow, carry)
    return SumPart(total, carry)


def _is_line(values: Any, rows: int) -> bool:
    """Whether this is a NumPy array [rows] of float64, rows > 0: what most functions give."""
    np = sys.modules.get("numpy")
    return (
        np is not None and type(values) is np.ndarray and values.dtype.char == "d" and values.shape == (rows,) != (0,)
    )


def _sum_line(values: Any) -> SumPart:
    """As _sum_float_rows, of a NumPy array [rows] of float64, with fewer and cheaper steps.

    sum|x| <= sqrt(n sum(x^2)), so four times the next power of two is enough for an exact sum of leading bits.
    """
    num_rows = len(values)
    if num_rows > _BLOCK_ROWS:
        part = SumPart()
        for start in range(0, num_rows, _BLOCK_ROWS):
            part = _SUM.join(part, _sum_line(values[start : start + _BLOCK_ROWS]))
        return part
    np = sys.modules["numpy"]
    squares = float(np.vdot(values, values))  # unlike dot, it warns of no overflow
    if not _SMALL < squares < _LARGE:  # NaN too
        total, carry = _sum_float_rows(values)
        return SumPart(float(total), float(carry))
    sigma = math.ldexp(4.0, (math.frexp(squares * num_rows)[1] + 1) // 2)
    ones = _ones()[:num_rows]
    leading = values + sigma
    leading -= sigma
    total = float(leading.dot(ones))
    leading -= values
    return SumPart(total, -float(leading.dot(ones)))


@functools.cache
def _ones() -> Any:
    """A product with these is NumPy's fastest sum."""
    return sys.modules["numpy"].ones(_BLOCK_ROWS)


def _sum_float_rows(values: Any) -> tuple[Any, Any]:
    """Leading bits and the rest, each summed: AccSum's extraction, which needs no order."""
    with _quiet(values):
        sigma = _abs_max(values) * (4.0 * values.shape[0])
        leading = (values + sigma) - sigma
        total = leading.sum(0)
        leading -= values
        carry = -leading.sum(0)
        bad = (total - total) != 0  # NaN or infinite, or too large to be cut in two
        if bad.any():
            plain = values.sum(0)
            if len(values.shape) == 1:
                return plain, _zero_like(plain)
            total[bad] = plain[bad]
            carry[bad] = 0
        return total, carry


def _zero_like(value: Any) -> Any:
    return type(value)(0.0) if type(value).__module__.startswith("numpy") else value.new_zeros(())


def _abs_max(values: Any) -> Any:
    """The largest magnitude of each column of an array [rows, ...], NaN where there is one."""
    if hasattr(values, "amax"):
        high, low = values.amax(0), -values.amin(0)
        return high.maximum(low)
    high, low = values.max(axis=0), -values.min(axis=0)
    if len(values.shape) == 1:
        return high if high >= low or high != high else low
    import numpy as np

    return np.maximum(high, low)


def _sum_int_rows(values: Any) -> Any:
    """Exact: a Python int for [rows]; an array, or DataError where it could overflow."""
    num_rows = values.shape[0]
    high, low = (0, 0) if 0 in values.shape else (values.max().item(), values.min().item())
    limit = 2**64 if _dtype(values).startswith("u") else 2**63
    if max(high, -low) * num_rows >= limit:
        if len(values.shape) == 1:
            return sum(values.tolist())
        raise _too_large("sum arrays of ints", f"a sum that may go beyond {_dtype(values)}")
    total = values.sum(0)
    return total.item() if len(values.shape) == 1 else total


def _num_weights(weight: Any) -> bool:
    """Whether the weight is one per row."""
    shape = getattr(weight, "shape", None)
    return bool(shape) if shape is not None else isinstance(weight, (list, tuple))


def _weighted_rows(value: Any, weight: Any, rows: int) -> MeanPart:
    if not rows:
        return MeanPart()
    values = per_row(value, rows, "take the weighted mean over rows")
    weights = per_row(weight, rows, "weigh rows for the mean")
    for name, given in (("values", values), ("weights", weights)):
        if not _dtype(given).startswith(("float", "bfloat", "int", "uint", "bool", "complex", "longdouble")):
            raise _bad_weight(f"{name} of {_dtype(given)}")
    if len(weights.shape) != 1 or not bool(((weights >= 0) & ((weights - weights) == 0)).all()):
        raise _bad_weight(f"weights of shape {tuple(weights.shape)}, or one that is NaN, infinite or negative")
    if not _dtype(values).startswith("complex"):
        values = _cast(values, "float64")
    weights = _cast(weights, "float64")
    used = weights > 0
    if not bool(used.any()):
        return MeanPart()
    values, weights = values[used], weights[used]
    with _quiet(values):
        products = values * weights.reshape(-1, *[1] * (len(values.shape) - 1))
    return MeanPart(_sum_rows(products), _sum_rows(weights))


def _two_sum(left: Any, right: Any) -> tuple[Any, Any]:
    """The rounded sum and its rounding error, 0 where the sum is not finite."""
    total = left + right
    moved = total - left
    error = (left - (total - moved)) + (right - moved)
    bad = (error - error) != 0  # NaN or infinite: a value is, or the sum overflowed
    if bad is False or bad is True or not _is_array(error):
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
        return _cast(value, "float32")
    if dtype.startswith(("int", "uint", "bool")):
        return _cast(value, "int64")
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
    raise _bad_weight(f"the weight {weight!r}"[:120])


def _bad_weight(found: str) -> DataError:
    return DataError(
        "weigh a value for the mean",
        found=found,
        allowed="one finite number, 0 or above, for a piece; or an array of such numbers, one for each row",
        do="give each piece one weight, or one for each row: Weighted(value, w)",
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
