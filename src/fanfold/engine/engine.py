"""What an engine is: two verbs. It carries independent pieces out, or starts a group that holds one model."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fanfold import events

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.engine.schedule import Instruction
    from fanfold.events import Event
    from fanfold.plan.plan import Unit


LOADING = (-1, -1)  # said to `Desk.at` before the model is loaded


@dataclass(frozen=True, slots=True)
class Assignment:
    """An instruction and what its doer must know beyond the numbers."""

    instruction: Instruction
    detail: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An exception on a unit, as it reaches the parent."""

    error: BaseException
    traceback: str


class Desk:
    """What work finds on the unit that does it: who it is, what is loaded, how to report.

    `cache` outlives one piece of work and one job: a warm unit keeps its model there. What must be ended before it is
    forgotten, processes say, is called from `ends`.
    """

    def __init__(
        self,
        unit: Unit,
        *,
        beat: Callable[[int, int], None] = lambda rows, tokens: None,
        at: Callable[[int, int], None] = lambda piece, batch: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.unit = unit
        self.cache: dict[str, Any] = {}
        self.ends: list[Callable[[], None]] = []
        self.beat = beat  # one batch is computed: rows, tokens; (0, 0) only says that the unit is alive
        self.at = at  # the batch that begins now: what a death would be laid to
        self.stopping = stopping  # whether to end at the next piece
        self.spans: list[Span] = []

    def timed(self, kind: str, detail: str = "") -> Timer:
        """Context manager that records how long a stretch of work took."""
        return Timer(self, kind, detail)

    def clear(self) -> None:
        """Nothing is kept any more."""
        while self.ends:
            self.ends.pop()()
        self.cache.clear()

    def take_spans(self) -> tuple[Span, ...]:
        """The stretches recorded since the last call."""
        spans, self.spans = tuple(self.spans), []
        return spans


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a unit's time on the monotonic clock."""

    kind: str
    start_s: float
    elapsed_s: float
    detail: str = ""


@dataclass(slots=True)
class Timer:
    desk: Desk
    kind: str
    detail: str
    start_s: float = field(default=0.0)

    def __enter__(self) -> Timer:
        self.start_s = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed_s = time.monotonic() - self.start_s
        self.desk.spans.append(Span(self.kind, self.start_s, elapsed_s, self.detail))


def work_event(unit: str, span: Span) -> events.Work:
    """The span as an event of the unit."""
    return events.Work(at_s=span.start_s, unit=unit, kind=span.kind, elapsed_s=span.elapsed_s, detail=span.detail)


class Work(Protocol):
    """What a job ships to the units: it knows the task, the source and the sink; the engine knows none of them."""

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules that every unit needs, imported once before units are made."""

    @property
    def threads(self) -> int:
        """Threads a unit may run."""

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        """Do it, on this unit; the result travels back to the agenda."""


class Agenda(Protocol):
    """The job's side of a run: what is next, and what becomes of results. All calls come from one thread."""

    def next_for(self, unit: Unit) -> Assignment | None:
        """What this idle unit does next; None: nothing at present."""

    @property
    def done(self) -> bool:
        """Nothing is left to do or to wait for."""

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested: running pieces end, nothing new begins."""

    def finished(self, results: Sequence[tuple[Unit, Assignment, Any]]) -> None:
        """Results that arrived together; they are committed together."""

    def failed(self, unit: Unit, assignment: Assignment, failure: Failure) -> None:
        """An exception came out of the work. Raises where the job must end."""

    def lost(self, unit: Unit, assignment: Assignment | None, cause: str) -> None:
        """The unit died; it is replaced unless this raises."""

    def tell(self, event: Event) -> None:
        """Something happened that a report may want."""


class GroupHandle(Protocol):
    """A live program over several units. It dies as a whole."""

    @property
    def size(self) -> int: ...

    def send(self, rank: int, message: Any) -> None: ...

    def receive(self, rank: int, timeout_s: float) -> Any:
        """The rank's next message; UnitLost with the first cause if any rank died or was silent too long."""

    def close(self) -> None: ...


class Program(Protocol):
    """What each unit of a group runs."""

    def __call__(self, rank: int, size: int, channel: Any) -> None: ...


class Engine(Protocol):
    """Where work is done."""

    @property
    def units(self) -> tuple[Unit, ...]: ...

    def carry_out(self, work: Work, agenda: Agenda) -> None:
        """Returns when the agenda is done or, after a stop, when the running pieces have ended."""

    def start_group(self, program: Program, size: int) -> GroupHandle: ...

    def close(self) -> None: ...
