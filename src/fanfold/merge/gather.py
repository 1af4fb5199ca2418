"""All rows of all pieces, one after the other, in piece order."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the pieces gave, in order: all that hold rows, or else the first that holds none."""

    blocks: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Concat:
    """The pieces' rows in piece order, as one value of the kind that the pieces gave. Exact.

    Kinds: list, tuple, NumPy array [n, ...] and torch tensor on the CPU (axis 0), Arrow array, chunked array and
    table, pandas and Polars frame and Series; record batches come back as one table. All pieces must be of one kind,
    and of one dtype and trailing shape, type or schema (metadata: the first piece's): nothing is converted, because
    what a conversion does to a value
    would depend on the cut. Strings of different fixed widths are the exception: the widest wins, no value
    changes. A piece that holds no rows is left out, whatever its kind; if all are, the first is the result.
    The number of rows that a piece gives need not be the number that it was given.

    Cost: parts hold references to the blocks; rows are copied once, in `finish` (Arrow tables not at all).
    """

    def empty(self) -> Blocks:
        """No pieces."""
        return Blocks()

    def lift(self, value: Any, rows: int) -> Blocks:
        """The part of one piece. Raises DataError if the value is not of a kind that can be concatenated."""
        _kind(value)
        return Blocks((value,))

    def join(self, left: Blocks, right: Blocks) -> Blocks:
        """The rows of both. Raises DataError if their kinds differ and both hold rows."""
        if not _holds_rows(right):
            return left if left.blocks else right
        if not _holds_rows(left):
            return right
        kinds = _kind(left.blocks[0]), _kind(right.blocks[0])
        if kinds[0] != kinds[1]:
            raise DataError(
                "concatenate the pieces",
                found=f"{_words(kinds[0])}, then {_words(kinds[1])}",
                allowed="one kind, dtype, trailing shape and schema for all pieces",
                do="make the function return the same kind for every piece, with .astype or .cast",
            )
        return Blocks(left.blocks + right.blocks)

    def finish(self, part: Blocks) -> Any:
        """All rows as one value. Raises DataError for no pieces: nothing says of which kind the result is."""
        if not part.blocks:
            raise DataError(
                "concatenate the pieces",
                found="no pieces",
                allowed="at least one piece; it may hold no rows",
                do="check that the input is not empty",
            )
        blocks, kind = part.blocks, _kind(part.blocks[0])[0]
        if kind == "list":
            return [row for block in blocks for row in block]
        if kind == "tuple":
            return tuple(row for block in blocks for row in block)
        if kind == "array":
            import numpy as np

            return np.concatenate(blocks)
        if kind == "tensor":
            return sys.modules["torch"].cat(blocks)
        if kind.startswith("pandas"):
            return sys.modules["pandas"].concat(blocks)
        if kind.startswith("polars"):
            return sys.modules["polars"].concat(blocks)
        return _concat_arrow(kind, blocks)


def _concat_arrow(kind: str, blocks: tuple[Any, ...]) -> Any:
    pa = sys.modules["pyarrow"]  # loaded, since the blocks are pyarrow's: merges import no Arrow
    if kind == "Arrow Table":
        return pa.concat_tables(blocks)
    if kind == "Arrow RecordBatch":
        return pa.concat_tables([pa.Table.from_batches([block]) for block in blocks])
    if kind == "Arrow ChunkedArray":
        return pa.chunked_array([chunk for block in blocks for chunk in block.chunks], type=blocks[0].type)
    try:
        return pa.concat_arrays(blocks)
    except ValueError as error:  # ArrowInvalid: more bytes than 32-bit offsets can count
        raise DataError(
            "concatenate Arrow arrays",
            found=str(error).splitlines()[0],
            allowed="what one array of this type can hold",
            do="return chunked arrays, or cast to the large_ type",
        ) from error


def _holds_rows(part: Blocks) -> bool:
    return bool(part.blocks) and len(part.blocks[0]) > 0


def _kind(value: Any) -> tuple[Any, ...]:
    """The kind, then what must also be the same for all pieces. Known without importing NumPy or Arrow."""
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    if cls in (list, tuple):
        return (cls.__name__,)
    if package == "numpy" and cls.__name__ in ("ndarray", "memmap") and value.ndim:
        dtype = value.dtype
        return ("array", dtype.kind if dtype.kind in "SU" else str(dtype), value.shape[1:])
    if package == "pyarrow":
        if cls.__name__ in ("Table", "RecordBatch"):
            return (f"Arrow {cls.__name__}", value.schema)
        if cls.__name__ == "ChunkedArray":
            return ("Arrow ChunkedArray", value.type)
        if cls.__name__.endswith("Array"):
            return ("Arrow Array", value.type)
    if package == "torch" and cls.__name__ == "Tensor" and value.ndim:
        return ("tensor", str(value.dtype), tuple(value.shape[1:]))
    if package in ("pandas", "polars") and cls.__name__ in ("DataFrame", "Series"):
        types = value.dtypes if cls.__name__ == "DataFrame" else value.dtype
        names = tuple(value.columns) if cls.__name__ == "DataFrame" else ()
        return (f"{package} {cls.__name__}", names, tuple(map(str, types)) if names else str(types))
    name = cls.__qualname__ if package == "builtins" else f"{package}.{cls.__qualname__}"
    raise DataError(
        "concatenate the pieces",
        found=f"a piece gave a {name}" + (" of no dimension" if getattr(value, "shape", None) == () else ""),
        allowed="list, tuple, array or tensor of one dimension or more, Arrow array or table, frame, Series",
        do="return one of these for each piece, for example [value] for a single value",
    )


def _words(kind: tuple[Any, ...]) -> str:
    name, *rest = kind
    return " ".join([name, *(" ".join(str(detail).split()) for detail in rest)])[:200]
