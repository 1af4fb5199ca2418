"""A function over pieces, on a unit: parts of results, and errors that name the piece."""

from __future__ import annotations

import pickle
import sys
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine.schedule import Compute
from fanfold.errors import FanfoldError, PieceFailed, PlanError, cause_line
from fanfold.merge.merge import OrderedFold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.engine.engine import Assignment, Desk
    from fanfold.split.piece import Place


@dataclass(frozen=True, slots=True)
class EachRow:
    """A function of one row as a function of pieces."""

    f: Any

    def __call__(self, piece: Any) -> list[Any]:
        return [self.f(row) for row in _rows_of(piece)]


def _rows_of(piece: Any) -> Any:
    """The rows of a piece one by one: of tables and frames as dicts, as `to_pylist` gives them."""
    if hasattr(piece, "to_pylist"):  # Arrow
        return piece.to_pylist()
    if hasattr(piece, "iter_rows"):  # a Polars frame
        return piece.iter_rows(named=True)
    if hasattr(piece, "columns") and hasattr(piece, "to_dict"):  # a pandas frame
        return piece.to_dict("records")
    return piece


def made(f: Any) -> Callable[[Any], Any]:
    """What a unit calls with pieces: for a class whose objects are called, a model say, one object of it."""
    if isinstance(f, EachRow):
        return EachRow(made(f.f))
    if isinstance(f, type) and any("__call__" in vars(kind) for kind in f.__mro__):
        try:
            return f()  # type: ignore[no-any-return]
        except Exception as error:
            raise PieceFailed(
                f"making an object of {f.__qualname__}, once per unit",
                found=cause_line(error),
                allowed="a class that is made without arguments",
                do="give its __init__ defaults, or pass a function that holds what it needs",
            ) from error
    return f  # type: ignore[no-any-return]


def code_of(f: Any) -> Any:
    """The code that runs when f, or an object of f, is called; None for what is not written in Python."""
    if isinstance(f, EachRow):
        return code_of(f.f)
    if not hasattr(f, "__code__"):
        f = (f if isinstance(f, type) else type(f)).__call__
    return getattr(f, "__code__", None)


def compute_piece(call: Callable[[Any], Any], value: Any, merge: Any, place: Place) -> Any:
    """The part of one piece; PieceFailed names it, the user's own error is its cause."""
    before = _version(value)
    try:
        result = call(value)
    except Exception as error:
        # the traceback begins in the user's function
        own = error.__traceback__.tb_next if error.__traceback__ else None
        raise _failed(place, error) from error.with_traceback(own)
    if before is not None and value._version != before:
        raise _written(place)
    if _is_kept(result, value):
        result = result.copy()
    try:
        return merge.lift(result, place.rows)
    except FanfoldError as error:
        raise _at(place, error) from None
    except Exception as error:
        raise _failed(place, error, f"{type(merge).__name__}.lift over") from error


def _version(value: Any) -> int | None:
    """Of a tensor: changes when it is written to, for no view of it is read-only. None for all else."""
    try:
        return getattr(value, "_version", None)
    except RuntimeError:  # made in inference mode
        return None


def _is_kept(result: Any, value: Any) -> bool:
    """Whether the function holds on to the array that it gave, and may write to it for the next piece."""
    np = sys.modules.get("numpy")
    if np is None or type(result) is not np.ndarray:
        return False
    root = result if result.base is None else result.base
    if type(root) is not np.ndarray or root is value or root is getattr(value, "base", None):
        return False
    known = 4 if root is result else 3  # names here and in the caller, the call's own, the view
    return sys.getrefcount(root) > known


def add_block(parts: OrderedFold[Any], level: int, index: int, part: Any, place: Place) -> None:
    """As OrderedFold.add_block; parts that do not go together are an error that names the piece."""
    try:
        parts.add_block(level, index, part)
    except FanfoldError as error:
        raise _at(place, error) from None
    except Exception as error:
        raise _failed(place, error, "joining the parts up to") from error


def _at(place: Place, error: FanfoldError) -> FanfoldError:
    return type(error)(f"{error.asked}, {place}", found=error.found, allowed=error.allowed, do=error.do)


def _failed(place: Place, error: BaseException, what: str = "the function over") -> PieceFailed:
    do = "repair the function, or the rows; the error above is its own"
    if "read-only" in cause_line(error):
        do = "change a copy: x = x.copy(); a piece is shared by all units and cannot be written to"
    return PieceFailed(
        f"{what} {place}",
        found=cause_line(error),
        allowed="a function that returns for every piece",
        do=do,
    )


def _written(place: Place) -> PieceFailed:
    return PieceFailed(
        f"the function over {place}",
        found="it wrote to the tensor that it was given",
        allowed="functions that leave their input as it is: other units read it at the same time",
        do="change a copy: x = x.clone()",
    )


@dataclass(frozen=True, slots=True)
class Lent:
    """What a unit must know of a lease: where its pieces stand, and what is lent of each."""

    places: tuple[Place, ...]
    items: Sequence[Any] | bytes  # pickled on its way to another process


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceWork:
    """Leases of pieces on a unit: f over each piece, parts joined as far as the fixed tree allows."""

    f: Any
    read: Callable[[int, Any], Any]  # a piece from its number and what is lent of it
    merge: Any
    imports: tuple[str, ...] = ()
    threads: int = 1

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        """The last piece of the lease that was computed, blocks for the fold, and seconds."""
        lease, lent = assignment.instruction, assignment.detail
        assert isinstance(lease, Compute)
        call = desk.cache.get("fold call")
        if call is None:
            call = desk.cache["fold call"] = made(self.f)
        parts: OrderedFold[Any] = OrderedFold(self.merge)
        begun_s = time.perf_counter()
        last = lease.first
        for last, place, item in zip(range(lease.first, lease.last + 1), lent.places, lent.items, strict=True):
            desk.at(last, 0)
            part = compute_piece(call, self.read(place.piece, item), self.merge, place)
            add_block(parts, 0, place.piece, part, place)
            if desk.stopping():
                break
        return last, parts.blocks(), time.perf_counter() - begun_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedWork:
    """PieceWork as it travels to a process: opened there once."""

    body: bytes  # function and merge
    source: Any  # opened there, it reads pieces
    token: int
    file: str  # where the function was written
    imports: tuple[str, ...] = ()
    threads: int = 1

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        lent = assignment.detail
        try:
            if desk.cache.get("fold token") != self.token:
                desk.cache.pop("fold call", None)  # of the call before
                desk.cache.update({"fold token": self.token, "fold": pickle.loads(self.body)})
            f, merge = desk.cache["fold"]
            try:
                lent = replace(lent, items=pickle.loads(lent.items))
            except Exception as error:
                raise _failed(lent.places[0], error, "unpickling rows from") from error
            # opened for this lease: what is mapped is not held longer
            work = PieceWork(f=f, read=self.source.opened().read, merge=merge)
            result = work.carry_out(replace(assignment, detail=lent), desk)
            try:
                return cloudpickle.dumps(result, 5)
            except Exception as error:
                raise PlanError(
                    f"results of the function over {lent.places[0]} in another process",
                    found=f"they cannot be sent back: {cause_line(error)}",
                    allowed="results that can be pickled",
                    do="return numbers, arrays, texts; or use on='threads'",
                ) from error
        except FanfoldError as error:
            cause = error.__cause__
            return Broken(error, None if cause is None else _by_value(cause), _shown(cause, self.file))


def _by_value(error: BaseException) -> bytes:
    """The error pickled, its class by value where need be; one that says the same where that cannot be."""
    try:
        body: bytes = cloudpickle.dumps(error)
        pickle.loads(body)
    except Exception:
        return pickle.dumps(RuntimeError(cause_line(error)))
    return body


def _shown(error: BaseException | None, file: str) -> str:
    """The traceback in words. Code that travelled by value has lost its file: it is the function's own."""
    if error is None:
        return ""
    frames = [
        traceback.FrameSummary(file if frame.filename.startswith("<") else frame.filename, frame.lineno, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    return "".join([*lines, *traceback.format_exception_only(error)])


@dataclass(frozen=True, slots=True)
class Broken:
    """A failure on its way to the parent: the error, the user's own, and where that was raised."""

    error: FanfoldError
    cause: bytes | None  # pickled
    traceback: str

    def raised(self) -> FanfoldError:
        """The error with the user's own as its cause, its traceback printed above it."""
        if self.cause is not None:
            try:
                cause = pickle.loads(self.cause)
            except Exception:
                cause = RuntimeError(self.error.found)
            cause.__cause__ = _RemoteTraceback(self.traceback)
            self.error.__cause__ = cause
        return self.error


class _RemoteTraceback(Exception):
    """Where an error was raised in another process, in words; printed above the error."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])
