"""Data piece by piece: what a function over pieces is given, of every kind of data in memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from fanfold.errors import PlanError
from fanfold.split.piece import PIECE_BYTES, PIECE_ROWS, Cuts, Place, cut_array, cut_into, cut_list

if TYPE_CHECKING:
    from pathlib import Path


class Stock(Protocol):
    """Pieces in order, as the parent finds them; a unit reads them with what it is lent of each.

    `kind` is what the data is: array, tensor, list, tuple, arrow, pandas, polars, stream, files.
    """

    @property
    def kind(self) -> str: ...

    @property
    def num_known(self) -> int:
        """Pieces found so far."""

    @property
    def num_rows(self) -> int:
        """Rows found so far."""

    def more(self) -> bool:
        """Finds pieces behind the known ones; False: there are none."""

    def place(self, piece: int) -> Place:
        """Where the piece stands."""

    def rows_left(self, piece: int) -> float:
        """Rows of this piece and all behind it, as far as they are known, or else guessed."""

    def lent(self, piece: int, to: str) -> Any:
        """What a unit needs of the piece beside the stock itself (`to`: here) or what was sent (host, cluster)."""

    def read(self, piece: int, lent: Any) -> Any:
        """The piece, on a unit."""

    def forget(self, first: int, last: int) -> None:
        """These pieces are done."""

    def sent(self, path: Path | None) -> Any:
        """What goes to other processes once: `opened()` there, it reads pieces. An array is written to the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Rows in memory and where they are cut; a Stock."""

    data: Any
    kind: str
    cuts: Cuts

    @property
    def num_known(self) -> int:
        return self.cuts.num_pieces

    @property
    def num_rows(self) -> int:
        return self.cuts.num_rows

    def more(self) -> bool:
        return False

    def place(self, piece: int) -> Place:
        return Place(piece, *self.cuts.bounds(piece), self.cuts.num_pieces)

    def rows_left(self, piece: int) -> float:
        return self.cuts.rows_from(piece)

    def lent(self, piece: int, to: str) -> Any:
        mapped = to == "host" and self.kind in ("array", "tensor")
        return None if to == "here" or mapped else self._take(piece)

    def read(self, piece: int, lent: Any) -> Any:
        if lent is None:
            return self._take(piece)
        if self.kind == "array":
            lent.setflags(write=False)  # as a view of the whole would be
        return lent

    def forget(self, first: int, last: int) -> None:
        pass

    def _take(self, piece: int) -> Any:
        """The rows of the piece, of the kind of the whole: an array as a read-only view, a frame as a copy."""
        start, stop = self.cuts.bounds(piece)
        if self.kind == "array":
            view = self.data[start:stop]
            view.setflags(write=False)
            return view
        if self.kind == "arrow" or self.kind == "polars":
            return self.data.slice(start, stop - start)
        if self.kind == "pandas":
            return self.data.iloc[start:stop].copy()
        return self.data[start:stop]

    def sent(self, path: Path | None) -> Pieces:
        """The same pieces for other processes: numbers in a file that they map, all else lent piece by piece."""
        return replace(self, data=None if path is None else MappedArray.of(self.data, path))

    def opened(self) -> Pieces:
        """In another process: what was sent there, mapped."""
        return replace(self, data=self.data.open()) if isinstance(self.data, MappedArray) else self


@dataclass(frozen=True, slots=True)
class MappedArray:
    """An array or a tensor in a file, opened by whoever takes rows of it."""

    path: str
    offset: int
    dtype: Any  # NumPy's
    shape: tuple[int, ...]
    tensor: str = ""  # the name of torch's dtype, where it is a tensor

    @classmethod
    def of(cls, data: Any, path: Path) -> MappedArray:
        import numpy as np

        array, tensor = data, ""
        if hasattr(data, "untyped_storage"):
            torch = sys.modules["torch"]
            tensor = str(data.dtype).removeprefix("torch.")
            array = data.detach().contiguous()
            array = (array.view(torch.int16) if tensor == "bfloat16" else array).numpy()
        elif (
            type(data) is np.memmap
            and data.filename
            and data.mode != "c"  # what was written to it stands in this process alone
            and data.flags.c_contiguous
            and type(data.base) is not np.memmap
        ):
            return cls(str(data.filename), int(data.offset), data.dtype, data.shape)
        with open(path, "wb") as file:
            if array.flags.c_contiguous:
                file.write(array.reshape(-1).view(np.uint8).data)
            else:
                rows = max(1, (1 << 24) // max(1, array[:1].nbytes))
                for start in range(0, len(array), rows):
                    file.write(np.ascontiguousarray(array[start : start + rows]).tobytes())
        return cls(str(path), 0, array.dtype, array.shape, tensor)

    def open(self) -> Any:
        import numpy as np

        if 0 in self.shape:
            array = np.empty(self.shape, self.dtype)
        elif self.tensor:  # torch knows no read-only memory: what is written stays in this process
            array = np.memmap(self.path, self.dtype, "c", self.offset, self.shape).view(np.ndarray)
        else:
            array = np.memmap(self.path, self.dtype, "r", self.offset, self.shape).view(np.ndarray)
        if not self.tensor:
            return array
        torch = sys.modules["torch"]  # what units of a tensor are made with
        whole = torch.from_numpy(array)
        return whole.view(torch.bfloat16) if self.tensor == "bfloat16" else whole


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


def whole_piece(x: Any) -> Any:
    """A read-only view of a NumPy array that makes up one piece; None for all else."""
    np = sys.modules.get("numpy")
    if np is None or type(x) is not np.ndarray or not x.shape or not 0 < len(x) <= PIECE_ROWS:
        return None
    if (x.nbytes > PIECE_BYTES and len(x) > 1) or x.dtype.hasobject:
        return None
    view = x[:]
    view.setflags(write=False)
    return view


def _look(x: Any) -> tuple[str, int, int]:
    """Kind, rows and bytes, without importing what x does not come from."""
    cls = type(x)
    package = cls.__module__.partition(".")[0]
    np = sys.modules.get("numpy")
    if np is not None and isinstance(x, np.ndarray):
        if cls is not np.ndarray and cls is not np.memmap:
            raise _unknown(f"a {cls.__module__}.{cls.__qualname__}, whose own rules a piece would not keep")
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
        "split data",
        found=found,
        allowed="NumPy array, list, tuple, range, generator, Arrow table or array, pandas or Polars frame, torch CPU "
        "tensor, or a path or glob of files",
        do="make it one of these, for example list(x)",
    )
