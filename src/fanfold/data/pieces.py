"""Data in memory, piece by piece: what a function over pieces is given, of every kind of data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.split.piece import Cuts, cut_array, cut_into, cut_list

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Rows in memory and where they are cut. `kind`: array, tensor, list, tuple, arrow, pandas, polars."""

    data: Any
    kind: str
    cuts: Cuts

    def take(self, piece: int) -> Any:
        """The rows of the piece, of the kind of the whole: an array as a read-only view, a frame as a copy."""
        start, stop = self.cuts.bounds(piece)
        if self.kind == "array":
            view = self.data[start:stop]
            view.flags.writeable = False
            return view
        if self.kind == "arrow" or self.kind == "polars":
            return self.data.slice(start, stop - start)
        if self.kind == "pandas":
            return self.data.iloc[start:stop].copy()
        return self.data[start:stop]

    def rows(self, piece: int) -> int:
        """The number of rows of the piece."""
        start, stop = self.cuts.bounds(piece)
        return stop - start

    def version(self) -> int:
        """A number that changes when a tensor is written to; torch knows no read-only views."""
        return self.data._version if self.kind == "tensor" else 0

    def mapped(self, path: Path) -> Pieces:
        """The same array where other processes can map it: its own file, or a copy at the path."""
        return replace(self, data=MappedArray.of(self.data, path))

    def opened(self) -> Pieces:
        """In another process: the array mapped there; other data is not here, it comes piece by piece."""
        return replace(self, data=self.data.open()) if isinstance(self.data, MappedArray) else self


@dataclass(frozen=True, slots=True)
class MappedArray:
    """An array in a file, opened by whoever takes rows of it."""

    path: str
    offset: int
    dtype: Any
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: Any, path: Path) -> MappedArray:
        import numpy as np

        if (
            type(array) is np.memmap
            and array.filename
            and array.mode != "c"  # what was written to it stands in this process alone
            and array.flags.c_contiguous
            and type(array.base) is not np.memmap
        ):
            return cls(str(array.filename), int(array.offset), array.dtype, array.shape)
        with open(path, "wb") as file:
            if array.flags.c_contiguous:
                file.write(array.reshape(-1).view(np.uint8).data)
            else:
                rows = max(1, (1 << 24) // max(1, array[:1].nbytes))
                for start in range(0, len(array), rows):
                    file.write(np.ascontiguousarray(array[start : start + rows]).tobytes())
        return cls(str(path), 0, array.dtype, array.shape)

    def open(self) -> Any:
        import numpy as np

        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape).view(np.ndarray)


def pieces_of(x: Any, pieces: int | None) -> Pieces:
    """The data cut by its own size, or into as many pieces as asked. Raises PlanError for a kind unknown here."""
    kind, num_rows, num_bytes = _look(x)
    if pieces is not None:
        cuts = cut_into(num_rows, pieces)
    elif kind in ("array", "tensor"):
        cuts = cut_array(num_rows, num_bytes / max(1, num_rows))
    else:
        cuts = cut_list(num_rows)
    return Pieces(data=x, kind=kind, cuts=cuts)


def _look(x: Any) -> tuple[str, int, int]:
    """Kind, rows and bytes, without importing what x does not come from."""
    cls = type(x)
    package = cls.__module__.partition(".")[0]
    np = sys.modules.get("numpy")
    if np is not None and isinstance(x, np.ndarray):
        if not x.ndim:
            raise _unknown("an array of no dimension")
        if x.dtype.hasobject:
            raise _unknown("an array of Python objects")
        return "array", len(x), x.nbytes
    if package == "torch" and hasattr(x, "untyped_storage"):
        if x.device.type != "cpu" or not x.dim():
            raise _unknown(f"a tensor of shape {tuple(x.shape)} on {x.device}")
        return "tensor", len(x), x.nbytes
    if package in ("pandas", "polars") and cls.__name__ in ("DataFrame", "Series"):
        return package, len(x), 0
    if package == "pyarrow" and hasattr(x, "slice"):
        return "arrow", len(x), 0
    if cls in (list, tuple):
        return cls.__name__, len(x), 0
    raise _unknown(f"a {cls.__module__}.{cls.__qualname__}")


def _unknown(found: str) -> PlanError:
    return PlanError(
        "split data in memory",
        found=found,
        allowed="NumPy array, list, tuple, generator, Arrow table or array, pandas or Polars frame, torch CPU tensor",
        do="make it one of these, for example list(x)",
    )
