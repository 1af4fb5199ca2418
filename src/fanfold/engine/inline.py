"""The reference engine: one unit, this process, one thing after the other."""

from __future__ import annotations

import os
import time
import traceback
from typing import TYPE_CHECKING

from fanfold.engine.engine import Desk, Failure, work_event
from fanfold.errors import PlanError
from fanfold.events import Batch, UnitReady
from fanfold.plan.plan import Unit

if TYPE_CHECKING:
    from fanfold.engine.engine import Agenda, GroupHandle, Program, Work

_POLL_S = 0.02


class Inline:
    """Carries everything out in the calling thread."""

    def __init__(self, unit: Unit | None = None) -> None:
        self._unit = unit or Unit(name="inline")
        self._desk = Desk(self._unit)

    @property
    def units(self) -> tuple[Unit, ...]:
        return (self._unit,)

    def carry_out(self, work: Work, agenda: Agenda) -> None:
        desk = self._desk
        desk.stopping = lambda: agenda.stopping
        desk.beat = lambda rows, tokens: self._beat(agenda, rows, tokens)
        agenda.tell(UnitReady(at_s=time.monotonic(), unit=self._unit.name, pid=os.getpid()))
        while not agenda.done and not agenda.stopping:
            assignment = agenda.next_for(self._unit)
            if assignment is None:
                time.sleep(_POLL_S)  # the input is still being scanned
                continue
            try:
                result = work.carry_out(assignment, desk)
            except Exception as error:
                self._tell_spans(agenda)
                agenda.failed(self._unit, assignment, Failure(error=error, traceback=traceback.format_exc()))
            else:
                self._tell_spans(agenda)
                agenda.finished([(self._unit, assignment, result)])

    def _beat(self, agenda: Agenda, rows: int, tokens: int) -> None:
        if rows:  # none: only a sign of life
            agenda.tell(Batch(at_s=time.monotonic(), unit=self._unit.name, rows=rows, tokens=tokens))

    def _tell_spans(self, agenda: Agenda) -> None:
        for span in self._desk.take_spans():
            agenda.tell(work_event(self._unit.name, span))

    def start_group(self, program: Program, size: int) -> GroupHandle:
        raise PlanError(
            f"a group of {size} units on the engine inline",
            found="inline has one unit, the calling process",
            allowed="engines with processes: cpu, cuda",
            do=f"use --on cpu:{size}",
        )

    def close(self) -> None:
        self._desk.clear()
