"""The suite every engine must pass. A test file of an engine only builds the engine:

class TestMine(EngineSuite):
    @pytest.fixture
    def engine(self):
        engine = Mine(...)
        yield engine
        engine.close()
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from fanfold.engine.engine import Assignment
from fanfold.engine.schedule import Compute, Load, Prepare, Schedule
from fanfold.events import UnitReady

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fanfold.engine.engine import Desk, Engine, Failure
    from fanfold.events import Event
    from fanfold.plan.plan import Unit


@dataclass(frozen=True)
class CountingWork:
    """Pieces whose value is a function of their number; some of them misbehave once."""

    imports: tuple[str, ...] = ()
    threads: int = 1
    seconds: float = 0.0
    raises: frozenset[int] = frozenset()
    dies_once: str = ""  # a path: the unit that makes this file dies

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        match assignment.instruction:
            case Load():
                return None
            case Prepare():
                return assignment.detail
            case Compute() as lease:
                return self._compute(lease, desk)
        raise AssertionError(assignment)

    def _compute(self, lease: Compute, desk: Desk) -> tuple[int, list[int], int]:
        values = []
        for piece in range(lease.first, lease.last + 1):
            if piece in self.raises:
                raise ValueError(f"piece {piece} is poison")
            if piece == 3 and self.dies_once:
                try:
                    os.close(os.open(self.dies_once, os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
                except FileExistsError:
                    pass
            time.sleep(self.seconds)
            values.append(piece * piece)
            desk.beat(1, 1)
            if desk.stopping():
                break
        return lease.first + len(values) - 1, values, os.getpid()


@dataclass
class CountingAgenda:
    """Windows of equal pieces, results collected in order: an agenda without files."""

    num_windows: int = 2
    num_pieces: int = 8
    units: int = 2
    found: dict[tuple[int, int], int] = field(default_factory=dict)
    doubled: list[tuple[int, int]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    stop_after: int | None = None
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = Schedule(num_units=self.units)
        for window in range(self.num_windows):
            self.schedule.window_found(window)
        self.schedule.input_ended(self.num_windows)
        self.loaded: set[str] = set()

    def next_for(self, unit: Unit) -> Assignment | None:
        instruction = self.schedule.next_for(unit.name)
        if instruction is None and unit.name not in self.loaded:
            self.loaded.add(unit.name)
            return Assignment(Load())
        while instruction is not None and not isinstance(instruction, Prepare | Compute):
            self.schedule.assembled(unit.name, instruction)  # type: ignore[arg-type]
            instruction = self.schedule.next_for(unit.name)
        return None if instruction is None else Assignment(instruction, self.num_pieces)

    @property
    def done(self) -> bool:
        return self.schedule.done

    @property
    def stopping(self) -> bool:
        return self.stop_after is not None and len(self.found) >= self.stop_after

    def finished(self, results: Sequence[tuple[Unit, Assignment, Any]]) -> None:
        for unit, assignment, result in results:
            match assignment.instruction:
                case Prepare() as prepare:
                    self.schedule.prepared(unit.name, prepare, (1,) * result)
                case Compute() as lease:
                    last, values, pid = result
                    self.pids.add(pid)
                    if self.schedule.computed(unit.name, lease, last, 0.01):
                        for piece, value in enumerate(values, lease.first):
                            key = (lease.window, piece)
                            if key in self.found:
                                self.doubled.append(key)
                            self.found[key] = value
        self.schedule.validate_state()

    def failed(self, unit: Unit, assignment: Assignment, failure: Failure) -> None:
        self.schedule.gave_up(unit.name)
        self.failures.append(failure)
        raise failure.error

    def lost(self, unit: Unit, assignment: Assignment | None, cause: str) -> None:
        self.loaded.discard(unit.name)
        self.schedule.gave_up(unit.name)
        self.deaths.append(cause)

    def tell(self, event: Event) -> None:
        self.events.append(event)

    @property
    def expected(self) -> dict[tuple[int, int], int]:
        return {(w, p): p * p for w in range(self.num_windows) for p in range(self.num_pieces)}


class EngineSuite:
    """Facts about any engine. `engine` is a fixture of the subclass; `forks` says whether a unit may be killed."""

    forks = True

    def test_every_piece_comes_back_once(self, engine: Engine) -> None:
        agenda = CountingAgenda(units=len(engine.units))
        engine.carry_out(CountingWork(), agenda)
        assert agenda.found == agenda.expected
        assert not agenda.doubled

    def test_a_second_job_finds_the_units_warm(self, engine: Engine) -> None:
        first, second = (CountingAgenda(units=len(engine.units)) for _ in range(2))
        engine.carry_out(CountingWork(), first)
        engine.carry_out(CountingWork(), second)
        assert second.found == second.expected
        ready = [event.pid for event in first.events if isinstance(event, UnitReady)]
        again = [event.pid for event in second.events if isinstance(event, UnitReady)]
        assert set(again) == set(ready)

    def test_an_exception_reaches_the_agenda_with_its_traceback(self, engine: Engine) -> None:
        agenda = CountingAgenda(units=len(engine.units), num_windows=1)
        with pytest.raises(ValueError, match="piece 5 is poison"):
            engine.carry_out(CountingWork(raises=frozenset({5})), agenda)
        assert "in _compute" in agenda.failures[0].traceback

    def test_the_engine_works_again_after_an_exception(self, engine: Engine) -> None:
        with pytest.raises(ValueError, match="piece 0 is poison"):
            engine.carry_out(CountingWork(raises=frozenset({0})), CountingAgenda(units=len(engine.units)))
        agenda = CountingAgenda(units=len(engine.units))
        engine.carry_out(CountingWork(), agenda)
        assert agenda.found == agenda.expected

    def test_a_stop_ends_running_pieces_and_starts_none(self, engine: Engine) -> None:
        agenda = CountingAgenda(units=len(engine.units), num_windows=1, num_pieces=500, stop_after=2)
        engine.carry_out(CountingWork(seconds=0.002), agenda)
        assert 2 <= len(agenda.found) < 500
        assert not agenda.schedule.busy

    def test_a_unit_that_dies_is_replaced_and_its_pieces_done_again(self, engine: Engine, tmp_path: Path) -> None:
        if not self.forks:
            return
        agenda = CountingAgenda(units=len(engine.units))
        engine.carry_out(CountingWork(dies_once=str(tmp_path / "died")), agenda)
        assert agenda.found == agenda.expected
        assert not agenda.doubled
        assert len(agenda.deaths) == 1
        assert agenda.deaths[0].startswith("killed by SIGKILL")
