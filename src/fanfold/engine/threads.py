"""Units as threads of this process: no copies and no start-up, for work that lets go of the interpreter's lock."""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from fanfold.engine.engine import Assignment, Desk, Failure, work_event
from fanfold.errors import PlanError
from fanfold.events import Batch, UnitReady

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.engine.engine import Agenda, GroupHandle, Program, Work
    from fanfold.plan.plan import Unit

_POLL_S = 0.02


class Threads:
    """One thread per unit. The calling thread alone talks to the agenda."""

    def __init__(self, units: tuple[Unit, ...]) -> None:
        self._desks = {unit.name: Desk(unit) for unit in units}

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(desk.unit for desk in self._desks.values())

    def carry_out(self, work: Work, agenda: Agenda) -> None:
        news: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        inboxes: dict[str, queue.SimpleQueue[Assignment | None]] = {name: queue.SimpleQueue() for name in self._desks}
        busy: dict[str, Assignment] = {}
        abandoned = threading.Event()
        for name, desk in self._desks.items():
            desk.stopping = lambda: abandoned.is_set() or agenda.stopping
            desk.beat = _reporter(news, name)  # no `at`: a thread does not die alone, and each message costs a switch
            thread = threading.Thread(target=_work, args=(work, desk, inboxes[name], news), name=name, daemon=True)
            thread.start()
            agenda.tell(UnitReady(at_s=time.monotonic(), unit=name, pid=os.getpid()))
        try:
            while True:
                if not agenda.stopping and not agenda.done:
                    for name, desk in self._desks.items():
                        if name not in busy and (assignment := agenda.next_for(desk.unit)) is not None:
                            busy[name] = assignment
                            inboxes[name].put(assignment)
                if not busy and (agenda.done or agenda.stopping):
                    return
                idle = len(busy) < len(self._desks) and not agenda.done and not agenda.stopping
                try:
                    first = news.get(timeout=_POLL_S if idle else None)
                except queue.Empty:
                    continue  # the input is still being read
                self._read(first, busy, agenda)
                while not news.empty():
                    self._read(news.get(), busy, agenda)
        finally:
            abandoned.set()
            for inbox in inboxes.values():
                inbox.put(None)

    def _read(self, message: tuple[Any, ...], busy: dict[str, Assignment], agenda: Agenda) -> None:
        kind, name, *rest = message
        if kind == "beat":
            if rest[1]:
                agenda.tell(Batch(at_s=rest[0], unit=name, rows=rest[1], tokens=rest[2]))
            return
        unit = self._desks[name].unit
        assignment = busy.pop(name)
        outcome, spans = rest
        for span in spans:
            agenda.tell(work_event(name, span))
        if kind == "done":
            agenda.finished([(unit, assignment, outcome)])
        else:
            agenda.failed(unit, assignment, outcome)

    def start_group(self, program: Program, size: int) -> GroupHandle:
        raise PlanError(
            f"a group of {size} units on the engine threads",
            found="threads share one process",
            allowed="engines with processes: cpu, cuda",
            do=f"use --on cpu:{size}",
        )

    def close(self) -> None:
        for desk in self._desks.values():
            desk.clear()


def _reporter(news: queue.SimpleQueue[tuple[Any, ...]], name: str) -> Callable[[int, int], None]:
    return lambda rows, tokens: news.put(("beat", name, time.monotonic(), rows, tokens))


def _work(work: Work, desk: Desk, inbox: queue.SimpleQueue[Assignment | None], news: Any) -> None:
    name = desk.unit.name
    while (assignment := inbox.get()) is not None:
        try:
            result = work.carry_out(assignment, desk)
        except BaseException as error:
            news.put(("failed", name, Failure(error=error, traceback=traceback.format_exc()), desk.take_spans()))
        else:
            news.put(("done", name, result, desk.take_spans()))
