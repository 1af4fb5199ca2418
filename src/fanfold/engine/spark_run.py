"""One job of ours on a Spark cluster: each assignment is a Spark job of one task."""

from __future__ import annotations

import functools
import pickle
import queue
import re
import socket
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine import post
from fanfold.engine.schedule import Compute
from fanfold.engine.spark_java import is_alive_context
from fanfold.errors import FanfoldError, InternalError, UnitLost
from fanfold.events import BatchBegun, Note, UnitDied, UnitReady

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fanfold.engine.engine import Agenda, Assignment, Failure, Work
    from fanfold.plan.plan import Unit

_POLL_S = 0.02
_BUSY_POLL_S = 0.5
_STOP_GRACE_S = 10.0
_MAX_EARLY_DEATHS = 3


def here(place: post.Place) -> int:
    """The unit's process, where it is one of this machine."""
    return place.pid if place.host == socket.gethostname() else 0


@dataclass(frozen=True, slots=True)
class _Gone:
    """Instead of an outcome: Spark has given the task up."""

    error: BaseException


class Run:
    """One job of ours: a lane (thread) per unit submits Spark jobs of one task; the caller's thread does the rest."""

    def __init__(
        self, units: tuple[Unit, ...], context: Any, orders: post.Orders, name_of: Callable[[post.Place], str]
    ) -> None:
        self._units = {unit.name: unit for unit in units}
        self._context = context
        self._orders = orders
        self._name_of = name_of
        self._group = f"fanfold-{orders.job}"
        self._news: queue.SimpleQueue[tuple[str, post.Outcome | _Gone]] = queue.SimpleQueue()
        self._inboxes: dict[str, queue.SimpleQueue[Assignment | None]] = {}
        self._busy: dict[str, Assignment] = {}
        self._early_deaths: dict[str, int] = dict.fromkeys(self._units, 0)
        self._cancelled = False

    def carry_out(self, work: Work, agenda: Agenda) -> None:
        body = self._context.broadcast(cloudpickle.dumps(work))
        task = functools.partial(_do, self._orders, body)
        lanes = []
        for name in self._units:
            self._inboxes[name] = queue.SimpleQueue()
            lane = threading.Thread(target=self._lane, args=(name, task), name=name, daemon=True)
            lane.start()
            lanes.append(lane)
        try:
            self._loop(agenda)
        finally:
            if self._busy:
                self._cancel()
            for inbox in self._inboxes.values():
                inbox.put(None)
            deadline_s = time.monotonic() + _STOP_GRACE_S
            for lane in lanes:
                lane.join(max(0.0, deadline_s - time.monotonic()))
            self._wait_for_twins(deadline_s)
            try:
                body.destroy()
            except Exception:
                pass  # the cluster is gone; the first error says so

    def _loop(self, agenda: Agenda) -> None:
        stop_by_s: float | None = None
        while True:
            if agenda.stopping:
                stop_by_s = stop_by_s or time.monotonic() + _STOP_GRACE_S
                if time.monotonic() > stop_by_s:
                    self._cancel()
            elif not agenda.done:
                self._hand_out(agenda)
            if not self._busy and (agenda.done or agenda.stopping):
                return
            idle = len(self._busy) < len(self._units) and not agenda.done and not agenda.stopping
            try:
                arrived = [self._news.get(timeout=_POLL_S if idle else _BUSY_POLL_S)]
            except queue.Empty:
                continue
            while not self._news.empty():
                arrived.append(self._news.get())
            self._take(arrived, agenda)

    def _hand_out(self, agenda: Agenda) -> None:
        for name, unit in self._units.items():
            if name not in self._busy and (assignment := agenda.next_for(unit)) is not None:
                self._busy[name] = assignment
                self._inboxes[name].put(assignment)

    def _take(self, arrived: list[tuple[str, post.Outcome | _Gone]], agenda: Agenda) -> None:
        """Results that arrived together are committed together."""
        results: list[tuple[Unit, Assignment, Any]] = []
        failures: list[tuple[Unit, Assignment, Failure]] = []
        lost: list[tuple[Unit, Assignment, str, tuple[int, int] | None]] = []
        for name, outcome in arrived:
            unit, assignment = self._units[name], self._busy.pop(name)
            if isinstance(outcome, _Gone):
                lost.append((unit, assignment, self._cause(outcome.error), None))
                continue
            self._tell(outcome, agenda)
            if outcome.kind == "done":
                self._early_deaths[name] = 0
                results.append((unit, assignment, outcome.value))
            elif outcome.kind == "failed":
                failures.append((unit, assignment, outcome.value))
            else:
                lost.append((unit, assignment, outcome.value, outcome.at))
        if results:
            agenda.finished(results)
        for unit, assignment, failure in failures:
            agenda.failed(unit, assignment, failure)
        for unit, assignment, cause, at in lost:
            self._lose(unit, assignment, cause, at, agenda)

    def _tell(self, outcome: post.Outcome, agenda: Agenda) -> None:
        """The unit's events, on this machine's clock and under the name of the place where they happened."""
        place = self._name_of(outcome.place)
        shift_s = time.monotonic() - outcome.now_s
        for event in outcome.events:
            renamed: dict[str, Any] = {"unit": place} if hasattr(event, "unit") else {}
            agenda.tell(replace(event, at_s=event.at_s + shift_s, **renamed))
        if outcome.place.pid and outcome.kind == "done":
            agenda.tell(UnitReady(at_s=time.monotonic(), unit=place, pid=here(outcome.place)))
        if outcome.attempt:
            text = f"{place}: Spark gave it the work of a task that was lost (attempt {outcome.attempt + 1})"
            agenda.tell(Note(at_s=time.monotonic(), text=text))

    def _lose(self, unit: Unit, assignment: Assignment, cause: str, at: tuple[int, int] | None, agenda: Agenda) -> None:
        if at is not None:
            agenda.tell(BatchBegun(at_s=time.monotonic(), unit=unit.name, piece=at[0], batch=at[1]))
        if at is None or not isinstance(assignment.instruction, Compute):
            self._early_deaths[unit.name] += 1
        if at is None:  # else the unit's own events have said so
            agenda.tell(UnitDied(at_s=time.monotonic(), unit=unit.name, cause=cause.splitlines()[0]))
        agenda.lost(unit, assignment, cause)
        if self._early_deaths[unit.name] >= _MAX_EARLY_DEATHS and not agenda.stopping:
            raise UnitLost(
                f"{unit.name}: an executor that stays alive",
                found=f"{self._early_deaths[unit.name]} tasks were lost in a row without one result; the last: {cause}",
                allowed=f"fewer than {_MAX_EARLY_DEATHS} in a row",
                do="look at the executors' logs; give them more memory (spark.executor.memoryOverhead), or use fewer",
            )

    def _cause(self, error: BaseException) -> str:
        """Why Spark has given a task up, in one line and the words behind it; raises where the cluster is gone."""
        words = words_of(error)
        if self._cancelled:
            return "cancelled: a stop was requested"
        if not is_alive_context(self._context):
            raise UnitLost(
                f"a job on {self._context.master if self._context else 'Spark'}",
                found=f"the connection to Spark is gone: {reason_in(words)[:500]}",
                allowed="a driver and a master that live as long as the job",
                do="run the same command again to go on",
            )
        if isinstance(error, FanfoldError):
            raise error
        if "Fatal Python error: Segmentation fault" in words:
            return "killed by SIGSEGV\n" + words
        if "Python worker exited unexpectedly" in words:
            return f"its Python worker ended unexpectedly: {reason_in(words)}"
        if "PythonException" in words or "PySparkRuntimeError" in words:
            raise InternalError(
                "a task on Spark",
                found=reason_in(words)[:2000],
                allowed="tasks that return what became of their unit",
                do="report this",
            )
        return f"its executor was lost: {reason_in(words)}"

    def _cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            try:
                self._context.cancelJobGroup(self._group)
            except Exception:
                pass  # the cluster is gone, and its jobs with it

    def _wait_for_twins(self, deadline_s: float) -> None:
        """Until no executor has a task of ours any more: a twin that lost the race may still be writing."""
        try:
            while time.monotonic() < deadline_s:
                running = self._context._jsc.sc().taskScheduler().runningTasksByExecutors().valuesIterator()
                num_tasks = 0
                while running.hasNext():
                    num_tasks += running.next()
                if not num_tasks:
                    return
                time.sleep(0.05)
        except Exception:
            pass  # the cluster is gone

    def _lane(self, name: str, task: Callable[[Iterable[Assignment]], Iterator[bytes]]) -> None:
        inbox = self._inboxes[name]
        try:
            self._context.setJobGroup(self._group, f"fanfold {name}", interruptOnCancel=False)
        except Exception:
            pass  # the first job says what is wrong
        while (assignment := inbox.get()) is not None:
            outcome: post.Outcome | _Gone
            try:
                blob = cloudpickle.dumps(assignment)
                (answer,) = self._context.parallelize([blob], 1).mapPartitions(task).collect()
                outcome = pickle.loads(answer)
            except BaseException as error:
                outcome = _Gone(error)
            self._news.put((name, outcome))


# -- on the executors -----------------------------------------------------------------------------------


def _do(orders: post.Orders, body: Any, blobs: Iterable[bytes]) -> Iterator[bytes]:
    """A task: one assignment, pickled, in; what became of it out."""
    from pyspark import TaskContext

    context = TaskContext.get()
    for blob in blobs:
        outcome = post.carry(orders, body.value, pickle.loads(blob), context.attemptNumber() if context else 0)
        yield pickle.dumps(outcome, 5)


# -- Spark's words ---------------------------------------------------------------------------------------


def words_of(error: BaseException) -> str:
    """All that Spark says of an error."""
    java = getattr(error, "java_exception", None)
    if java is not None:
        try:
            return str(java.getMessage() or java.toString())
        except Exception:
            pass
    return str(error)


def reason_in(words: str) -> str:
    """The part of Spark's words that a person wants: what happened to the last attempt, without its Java stack."""
    words = words.partition("\nDriver stacktrace")[0]
    words = words.rpartition("most recent failure: ")[2]
    lines = [line for line in words.splitlines() if not re.match(r"\s+at [\w.$]+\(|\s+\.\.\. \d+ more", line)]
    return "\n".join(lines).strip() or "no reason was given"
