"""Values of one per row: what most merges take from a piece."""

from __future__ import annotations

from typing import Any

from fanfold.errors import DataError


def per_row(value: Any, rows: int, asked: str) -> Any:
    """The value as an array [rows, ...]: NumPy and torch arrays as they are, the rest as NumPy sees it.

    Lists, Series and Arrow arrays become NumPy arrays. Raises DataError where axis 0 is not the piece's rows.
    """
    if hasattr(value, "filled") and hasattr(value, "mask"):
        raise DataError(
            asked,
            found="a piece gave a masked array",
            allowed="arrays of plain values",
            do="fill it, value.filled(0), or weigh what is masked by 0: Weighted(value.filled(0), ~value.mask)",
        )
    if not (hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "reshape")) or _is_series(value):
        value = _as_numpy(value, asked)
    if len(value.shape) == 0 or value.shape[0] != rows:
        raise _lengths(value, rows, asked)
    return value


def numpy_rows(value: Any, rows: int, asked: str) -> Any:
    """The value as a NumPy array [rows, ...], torch tensors too. Raises DataError where axis 0 is not the rows."""
    import numpy as np

    value = per_row(value, rows, asked)
    if hasattr(value, "detach"):  # NumPy takes neither a tensor that wants a gradient nor bfloat16
        value = value.detach()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    return np.asarray(value)


def real_rows(value: Any, rows: int, asked: str) -> Any:
    """The value as a NumPy array [rows, ...] of real numbers. Raises DataError for others, as `numpy_rows` does."""
    values = numpy_rows(value, rows, asked)
    if values.dtype.kind not in "biuf":
        raise DataError(
            asked,
            found=f"values of {values.dtype}",
            allowed="real numbers",
            do="return floats or ints from the function",
        )
    return values


def _is_series(value: Any) -> bool:
    """Whether this is a Series of Polars, which looks like an array."""
    return type(value).__module__.partition(".")[0] == "polars"


def _as_numpy(value: Any, asked: str) -> Any:
    import numpy as np

    if hasattr(value, "to_numpy"):  # Series, Arrow arrays
        try:
            value = value.to_numpy(zero_copy_only=False)
        except TypeError:
            value = value.to_numpy()
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        array = None
    if array is None or array.dtype.hasobject:
        raise DataError(
            asked,
            found=f"a piece gave a {type(value).__name__} that is no array of numbers or strings",
            allowed="an array, or a list of numbers, strings or lists of equal length: one value for each row",
            do="return numpy.asarray(...) of one dtype from the function",
        )
    return array


def _lengths(value: Any, rows: int, asked: str) -> DataError:
    shape = tuple(value.shape)
    found = f"an array of shape {shape}" if shape else f"a single {type(value).__name__}"
    return DataError(
        asked,
        found=f"a piece of {rows} row(s) gave {found}",
        allowed=f"one value for each row: axis 0 of length {rows}",
        do='return a value for each row; a value for each piece is declared: Mean(of="pieces"), Sum(of="pieces"), '
        "or Weighted(value, w)",
    )
