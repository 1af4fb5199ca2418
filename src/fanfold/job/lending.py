"""The agenda of `fold`: lends pieces of a stock to units and takes parts back."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine.engine import Assignment
from fanfold.engine.schedule import Compute, Schedule
from fanfold.errors import PieceFailed, PlanError, cause_line
from fanfold.events import BatchBegun, Event
from fanfold.job.piecework import Broken, Lent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.data.pieces import Stock
    from fanfold.engine.engine import Failure
    from fanfold.plan.plan import Unit
    from fanfold.planner.carrier import Reach
    from fanfold.split.piece import Place

_MAX_DEATHS = 2  # of the units that computed one piece
_MAX_EARLY_DEATHS = 3
_ONE_PART = 1 << 60  # windows: parts are a job's matter, nothing is assembled here


@dataclass
class Lending:
    """Pieces from `first` on, up to `stop` (None: all there are), as windows of a schedule; blocks go to `take`,
    with the place of their lease's first piece.

    Of several leases that fail the first in the order of the data is raised, whichever unit is faster: after a failure
    only what stands before it goes on."""

    stock: Stock
    take: Callable[[int, int, Any, Place], None]
    first: int
    num_units: int
    stop: int | None = None
    to: Reach = "here"  # where the units are
    _at: dict[str, int] = field(default_factory=dict)  # unit -> the piece that it is at
    _deaths: dict[int, int] = field(default_factory=dict)
    _firsts: dict[int, int] = field(default_factory=dict)  # open window -> its first piece
    _early_deaths: int = 0
    _failure: tuple[int, BaseException] | None = None  # first piece of the lowest lease that failed, and why
    _num_left: int = 0
    _num_windows: int = 0
    _ended: bool = False

    def __post_init__(self) -> None:
        self._schedule = Schedule(num_units=self.num_units, windows_per_part=_ONE_PART)
        self._next = self.first  # the first piece that stands in no window yet

    def use(self, num_units: int) -> None:
        """There are so many units, as has turned out."""
        self._schedule.num_units = num_units

    def _look_further(self) -> bool:
        """Makes a window of pieces that are known now, or of the next ones found."""
        if self._ended:
            return False
        while True:
            known = self.stock.num_known if self.stop is None else min(self.stop, self.stock.num_known)
            if self._next < known:
                break
            if known == self.stop or not self.stock.more():
                self._ended = True
                return False
        costs = [max(1, self.stock.place(piece).rows) for piece in range(self._next, known)]
        self._firsts[self._num_windows] = self._next
        self._schedule.window_known(self._num_windows, costs, ())
        self._num_windows += 1
        self._num_left += known - self._next
        self._next = known
        return True

    def next_for(self, unit: Unit) -> Assignment | None:
        instruction = self._schedule.next_for(unit.name)
        if instruction is None and self._failure is None and self._look_further():
            instruction = self._schedule.next_for(unit.name)
        if not isinstance(instruction, Compute):
            return None
        first = self._first_of(instruction)
        if self._failure is not None and first >= self._failure[0]:
            self._schedule.gave_up(unit.name)  # what was lost would have been in line before it
            if all(self._first_of(lease) > self._failure[0] for lease in self._schedule.leases):
                raise self._failure[1]
            return None
        self._at.pop(unit.name, None)  # of the lease before
        pieces = range(first, first + instruction.last + 1 - instruction.first)
        items: Sequence[Any] | bytes = [self.stock.lent(piece, self.to) for piece in pieces]
        if self.to != "here":
            try:
                items = cloudpickle.dumps(items)
            except Exception as error:
                raise PlanError(
                    "pieces for other processes",
                    found=f"rows that cannot be sent to another process: {cause_line(error)}",
                    allowed="data that can be pickled",
                    do="use on='threads', or pass what the rows are made from",
                ) from error
        return Assignment(instruction, Lent(tuple(map(self.stock.place, pieces)), items))

    @property
    def done(self) -> bool:
        return not self._num_left and not self._look_further()

    @property
    def stopping(self) -> bool:
        return False

    def finished(self, results: Sequence[tuple[Unit, Assignment, Any]]) -> None:
        for unit, assignment, result in results:
            if isinstance(result, Broken):
                self._fails(unit, assignment, result.raised())
                continue
            lease = assignment.instruction
            assert isinstance(lease, Compute)
            last, blocks, elapsed_s = result if self.to == "here" else pickle.loads(result)
            if self._schedule.computed(unit.name, lease, last, elapsed_s):
                self._num_left -= last + 1 - lease.first
                first = self._firsts[lease.window]
                self.stock.forget(first + lease.first, first + last)
                for level, index, part in blocks:
                    self.take(level, index, part, assignment.detail.places[0])

    def failed(self, unit: Unit, assignment: Assignment, failure: Failure) -> None:
        self._fails(unit, assignment, failure.error)

    def _fails(self, unit: Unit, assignment: Assignment, error: BaseException) -> None:
        assert isinstance(assignment.instruction, Compute)
        first = self._first_of(assignment.instruction)
        self._schedule.gave_up(unit.name)
        if self._failure is None or first < self._failure[0]:
            self._failure = first, error

    def _first_of(self, lease: Compute) -> int:
        """Its first piece among all."""
        return self._firsts[lease.window] + lease.first

    def lost(self, unit: Unit, assignment: Assignment | None, cause: str) -> None:
        self._schedule.gave_up(unit.name)
        at = self._at.pop(unit.name, None)
        if assignment is None:
            return
        lease = assignment.instruction
        assert isinstance(lease, Compute)
        if at is None:
            self._early_deaths += 1
            if self._early_deaths >= _MAX_EARLY_DEATHS:
                raise PieceFailed(
                    f"the function over {assignment.detail.places[0]}",
                    found=f"{self._early_deaths} processes died before their first piece; the last: {cause}",
                    allowed="a function and rows that reach another process",
                    do="is it the class that is made there, or a row that is unpickled? try on='inline'",
                )
            return
        piece = self._firsts[lease.window] + at
        self._deaths[piece] = self._deaths.get(piece, 0) + 1
        if self._deaths[piece] >= _MAX_DEATHS:
            raise PieceFailed(
                f"the function over {self.stock.place(piece)}",
                found=f"{self._deaths[piece]} processes died computing it; the last: {cause}",
                allowed="a function that returns",
                do="run the piece alone with on='inline' under a debugger, or give it less data",
            )
        self._schedule.isolate(lease.window, at)

    def tell(self, event: Event) -> None:
        if isinstance(event, BatchBegun):
            self._at[event.unit] = event.piece
