"""What to do next, as a pure state machine: events in, instructions out; no clock, no I/O.

A window is found, prepared (cut into pieces), computed lease by lease; when all windows of a part are
computed the part is assembled. Memory is held for open windows only; finished ones are a counter or a set.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fanfold.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LEASE_S = 1.0  # a lease is sized to take about this long: what a killed worker loses at the most
MAX_LEASE_PIECES = 256


@dataclass(frozen=True, slots=True)
class Load:
    """Load the model now, while there is nothing else to do."""


@dataclass(frozen=True, slots=True)
class Prepare:
    window: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Compute:
    """A lease: pieces first..last of one window."""

    window: int
    first: int
    last: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Assemble:
    """Windows first..last make up the part."""

    part: int
    first: int
    last: int
    attempt: int


Instruction = Load | Prepare | Compute | Assemble


@dataclass(slots=True)
class _Open:
    """A window between found and computed. `todo` holds half-open intervals of pieces, in order."""

    costs: Sequence[int] | None = None
    todo: deque[tuple[int, int]] = field(default_factory=deque)
    num_left: int = 0  # pieces not committed yet, leased ones included
    attempts: dict[int, int] = field(default_factory=dict)  # first piece of a lease -> last attempt given


class Schedule:
    """Decides who does what. Every lease that is out belongs to exactly one unit."""

    def __init__(
        self,
        *,
        num_units: int,
        windows_per_part: int = 1,
        look_ahead: int = 2,
        borders: Sequence[tuple[int, int]] = (),
        lease_s: float = LEASE_S,
    ) -> None:
        """`borders` are (window, part) where appended rows begin: that window begins that part, short ones before."""
        self.num_units = num_units
        self.windows_per_part = windows_per_part
        self.look_ahead = max(look_ahead, 1)
        self.lease_s = lease_s
        self._borders = [(0, 0), *borders]
        self._open: dict[int, _Open] = {}
        self._unprepared: deque[int] = deque()
        self._prepare_attempts: dict[int, int] = {}
        self._assembly_attempts: dict[int, int] = {}
        self._out: dict[str, Instruction] = {}  # unit -> what it is doing
        self._computed: set[int] = set()  # windows computed whose part is not assembled
        self._ready_parts: deque[int] = deque()
        self._parts_open: set[int] = set()
        self._num_windows: int | None = None
        self._seconds_per_cost: float | None = None
        self._todo_cost = 0
        self._damages = 0

    # -- events ---------------------------------------------------------------------------------------

    def window_found(self, window: int) -> None:
        """A new window stands in the input."""
        self._open[window] = _Open()
        self._parts_open.add(self.part_of(window))
        self._unprepared.append(window)

    def window_known(self, window: int, costs: Sequence[int], done: Iterable[tuple[int, int]]) -> None:
        """A window that an earlier run has prepared; pieces first..last of each pair in `done` are committed."""
        self._open[window] = _Open()
        self._parts_open.add(self.part_of(window))
        self._set_pieces(window, costs, done)

    def input_ended(self, num_windows: int) -> None:
        """There are no more windows than this."""
        self._num_windows = num_windows
        for part in sorted(self._parts_open):
            self._check_part(part)

    def prepared(self, unit: str, done: Prepare, costs: Sequence[int]) -> bool:
        """The window is cut into pieces of these costs; False where another attempt was first."""
        if not self._take_back(unit, done) or self._open[done.window].costs is not None:
            return False
        self._set_pieces(done.window, costs, ())
        return True

    def computed(self, unit: str, done: Compute, last: int, elapsed_s: float) -> bool:
        """Pieces done.first..last are there (`last` < done.last: stopped early); False: a late twin, ignore it."""
        if not self._take_back(unit, done):
            return False
        window = self._open[done.window]
        if last < done.last:
            self._give_up(window, last + 1, done.last, done.attempt)
        num_pieces = last + 1 - done.first
        if num_pieces <= 0:
            return False
        window.num_left -= num_pieces
        costs = window.costs or ()
        cost = sum(costs[done.first : last + 1])
        if cost and elapsed_s > 0:
            rate = elapsed_s / cost
            old = self._seconds_per_cost
            self._seconds_per_cost = rate if old is None else 0.5 * (old + rate)
        if window.num_left == 0:
            self._close(done.window)
        return True

    def assembled(self, unit: str, done: Assemble) -> bool:
        """The part is written; False where another attempt was first."""
        if not self._take_back(unit, done) or done.part not in self._parts_open:
            return False
        self._parts_open.discard(done.part)
        self._computed.difference_update(range(done.first, done.last + 1))
        return True

    def damaged(self, unit: str, window: int, costs: Sequence[int], done: Iterable[tuple[int, int]]) -> None:
        """The unit could not assemble: of this window only the pieces in `done` are there after all."""
        self._out.pop(unit, None)
        self._computed.discard(window)
        # A late twin of any lease before must not be taken for a new one: attempts begin far above theirs.
        self._damages += 1
        self._open[window] = _Open(attempts=dict.fromkeys(range(len(costs)), self._damages * 1000))
        self._set_pieces(window, costs, done)

    def isolate(self, window: int, piece: int) -> None:
        """The piece, which is in line, becomes a lease of its own from now on: it is suspected of killing units."""
        todo = self._open[window].todo
        for place, (start, stop) in enumerate(todo):
            if start <= piece < stop:
                parts = [(start, piece), (piece, piece + 1), (piece + 1, stop)]
                del todo[place]
                for part in reversed(parts):
                    if part[0] < part[1]:
                        todo.insert(place, part)
                return
        self._broken(f"window {window}: piece {piece} is not in line")

    def gave_up(self, unit: str) -> Instruction | None:
        """The unit failed or died: what it had goes back in line. The instruction, None if it had nothing."""
        lost = self._out.pop(unit, None)
        match lost:
            case Prepare():
                self._unprepared.appendleft(lost.window)
            case Compute():
                self._give_up(self._open[lost.window], lost.first, lost.last, lost.attempt)
            case Assemble():
                self._ready_parts.appendleft(lost.part)
            case _:
                pass
        return lost

    # -- decisions ------------------------------------------------------------------------------------

    def next_for(self, unit: str) -> Instruction | None:
        """What this idle unit does next; None: nothing at present."""
        if unit in self._out:
            raise InternalError(
                f"an instruction for {unit}",
                found=f"it still has {self._out[unit]}",
                allowed="one instruction at a time",
                do="report this",
            )
        chosen = self._choose()
        if chosen is not None:
            self._out[unit] = chosen
        return chosen

    def has(self, unit: str, instruction: Instruction) -> bool:
        """Whether the unit is at this very instruction: what a late twin tells is not."""
        return self._out.get(unit) == instruction

    @property
    def wants_window(self) -> bool:
        """Whether one more window should be looked for."""
        return self._num_windows is None and len(self._unprepared) < self.look_ahead

    @property
    def done(self) -> bool:
        """Every window of the input is computed and every part assembled."""
        return self._num_windows is not None and not self._open and not self._parts_open

    @property
    def busy(self) -> bool:
        """Whether any unit has an instruction."""
        return bool(self._out)

    @property
    def leases(self) -> list[Compute]:
        """Those that units have now."""
        return [out for out in self._out.values() if isinstance(out, Compute)]

    def validate_state(self) -> None:
        """Raise InternalError where a piece of an open window is neither in line, nor out, nor committed once."""
        for index, window in self._open.items():
            if window.costs is None:
                continue
            spans = list(window.todo)
            spans += [
                (out.first, out.last + 1)
                for out in self._out.values()
                if isinstance(out, Compute) and out.window == index
            ]
            seen: set[int] = set()
            for start, stop in spans:
                pieces = set(range(start, stop))
                if seen & pieces:
                    self._broken(f"window {index}: pieces {sorted(seen & pieces)} stand twice")
                seen |= pieces
            if len(seen) != window.num_left:
                self._broken(f"window {index}: {len(seen)} pieces in line or out, {window.num_left} left")
        cost = sum(
            sum((window.costs or ())[start:stop]) for window in self._open.values() for start, stop in window.todo
        )
        if cost != self._todo_cost:
            self._broken(f"cost in line is {cost}, the counter says {self._todo_cost}")

    # -- inside ---------------------------------------------------------------------------------------

    def _choose(self) -> Instruction | None:
        if self._ready_parts:
            part = self._ready_parts.popleft()
            first, last = self._windows_of(part)
            attempt = self._assembly_attempts[part] = self._assembly_attempts.get(part, 0) + 1
            return Assemble(part, first, last, attempt)
        if self._unprepared and self._num_windows_ahead() < self.look_ahead:
            window = self._unprepared.popleft()
            attempt = self._prepare_attempts[window] = self._prepare_attempts.get(window, 0) + 1
            return Prepare(window, attempt)
        for index, open_window in self._open.items():  # in the order in which they were found
            if open_window.todo:
                return self._lease(index, open_window)
        return None

    def _num_windows_ahead(self) -> int:
        being_prepared = sum(isinstance(out, Prepare) for out in self._out.values())
        return being_prepared + sum(bool(window.todo) for window in self._open.values())

    def _lease(self, index: int, window: _Open) -> Compute:
        start, stop = window.todo.popleft()
        costs = window.costs or ()
        budget = self._lease_cost()
        last, cost = start, costs[start]
        while last + 1 < stop and last - start + 1 < MAX_LEASE_PIECES and cost + costs[last + 1] <= budget:
            last += 1
            cost += costs[last]
        if last + 1 < stop:
            window.todo.appendleft((last + 1, stop))
        self._todo_cost -= cost
        attempt = 1 + max((window.attempts.get(piece, 0) for piece in range(start, last + 1)), default=0)
        window.attempts[start] = attempt
        return Compute(index, start, last, attempt)

    def _lease_cost(self) -> float:
        """About lease_s of work, but never more than half a unit's fair share of what is left in line."""
        share = self._todo_cost / (2 * self.num_units)
        if self._seconds_per_cost is None:
            return 0.0
        return min(share, self.lease_s / self._seconds_per_cost)

    def _set_pieces(self, index: int, costs: Sequence[int], done: Iterable[tuple[int, int]]) -> None:
        window = self._open[index]
        window.costs = costs
        window.num_left = len(costs)
        start = 0
        for first, last in sorted(done):
            if first < start or last >= len(costs):
                self._broken(f"window {index}: committed pieces {first}..{last} overlap or lie outside")
            if start < first:
                window.todo.append((start, first))
            window.num_left -= last + 1 - first
            start = last + 1
        if start < len(costs):
            window.todo.append((start, len(costs)))
        self._todo_cost += sum(sum(costs[a:b]) for a, b in window.todo)
        if window.num_left == 0:
            self._close(index)

    def _give_up(self, window: _Open, first: int, last: int, attempt: int) -> None:
        window.todo.appendleft((first, last + 1))
        window.todo = deque(sorted(window.todo))
        self._todo_cost += sum((window.costs or ())[first : last + 1])
        for piece in range(first, last + 1):  # attempts follow the piece, however it is leased next
            window.attempts[piece] = max(attempt, window.attempts.get(piece, 0))

    def _take_back(self, unit: str, done: Instruction) -> bool:
        if not self.has(unit, done):
            return False
        del self._out[unit]
        return True

    def _close(self, index: int) -> None:
        del self._open[index]
        self._computed.add(index)
        self._check_part(self.part_of(index))

    def _check_part(self, part: int) -> None:
        first, last = self._windows_of(part)
        closed = any(part < border for _, border in self._borders)
        full = last - first + 1 == self.windows_per_part or closed or self._num_windows is not None
        out = any(isinstance(o, Assemble) and o.part == part for o in self._out.values())
        if not full or out or part in self._ready_parts or first > last:
            return
        if all(window in self._computed for window in range(first, last + 1)):
            self._ready_parts.append(part)

    def part_of(self, window: int) -> int:
        """The part that the window belongs to."""
        first_window, first_part = next(border for border in reversed(self._borders) if border[0] <= window)
        return first_part + (window - first_window) // self.windows_per_part

    def _windows_of(self, part: int) -> tuple[int, int]:
        at = max(i for i, border in enumerate(self._borders) if border[1] <= part)
        first_window, first_part = self._borders[at]
        first = first_window + (part - first_part) * self.windows_per_part
        last = first + self.windows_per_part - 1
        if at + 1 < len(self._borders):
            last = min(last, self._borders[at + 1][0] - 1)
        if self._num_windows is not None:
            last = min(last, self._num_windows - 1)
        return first, last

    @staticmethod
    def _broken(found: str) -> None:
        raise InternalError("the schedule's state", found=found, allowed="every piece exactly once", do="report this")
