"""A function over pieces, on a unit: parts of results, and errors that name the piece."""

from __future__ import annotations

import pickle
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine._worker import portable
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
        return [self.f(row) for row in piece]


def made(f: Any) -> Callable[[Any], Any]:
    """What a unit calls with pieces: for a class whose objects are called, a model say, one object of it."""
    if isinstance(f, EachRow):
        return EachRow(made(f.f))
    if isinstance(f, type) and any("__call__" in vars(kind) for kind in f.__mro__):
        return f()  # type: ignore[no-any-return]
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
    before = getattr(
        value, "_version", None
    )  # a tensor's changes when it is written to; torch knows no read-only views
    try:
        result = call(value)
    except Exception as error:
        # the traceback begins in the user's function
        own = error.__traceback__.tb_next if error.__traceback__ else None
        raise _failed(place, error) from error.with_traceback(own)
    if before is not None and value._version != before:
        raise _written(place)
    try:
        return merge.lift(result, place.rows)
    except FanfoldError as error:
        raise _at(place, error) from None


def add_block(parts: OrderedFold[Any], level: int, index: int, part: Any, place: Place) -> None:
    """As OrderedFold.add_block; parts that do not go together are an error that names the piece."""
    try:
        parts.add_block(level, index, part)
    except FanfoldError as error:
        raise _at(place, error) from None


def _at(place: Place, error: FanfoldError) -> FanfoldError:
    return type(error)(f"{error.asked}, {place}", found=error.found, allowed=error.allowed, do=error.do)


def _failed(place: Place, error: BaseException) -> PieceFailed:
    do = "repair the function, or the rows; the error above is its own"
    if "read-only" in str(error):
        do = "change a copy: x = x.copy(); a piece is shared by all units and cannot be written to"
    return PieceFailed(
        f"the function over {place}",
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
        if desk.cache.get("fold token") != self.token:
            f, merge = pickle.loads(self.body)
            work = PieceWork(f=f, read=self.source.opened().read, merge=merge)
            desk.cache.pop("fold call", None)  # of the call before
            desk.cache.update({"fold token": self.token, "fold work": work})
        lent = replace(assignment.detail, items=pickle.loads(assignment.detail.items))
        try:
            result = desk.cache["fold work"].carry_out(replace(assignment, detail=lent), desk)
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
            return Broken(error, portable(cause) if cause else None, _shown(cause, self.file))


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
    cause: BaseException | None
    traceback: str

    def raised(self) -> FanfoldError:
        """The error with the user's own as its cause, its traceback printed above it."""
        if self.cause is not None:
            self.cause.__cause__ = _RemoteTraceback(self.traceback)
            self.error.__cause__ = self.cause
        return self.error


class _RemoteTraceback(Exception):
    """Where an error was raised in another process, in words; printed above the error."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])
