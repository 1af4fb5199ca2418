"""Local processes: one worker per unit, replaced when it dies, all gone when the parent is."""

from __future__ import annotations

import selectors
import time
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine.engine import Failure, work_event
from fanfold.engine.group import Group
from fanfold.engine.schedule import Compute
from fanfold.engine.supervisor import START_TIMEOUT_S, Process, Supervisor
from fanfold.engine.wire import Closed
from fanfold.errors import UnitLost
from fanfold.events import Batch, BatchBegun, ProcessStarted, UnitDied, UnitReady
from fanfold.machine.cgroup import read_memory_use, read_oom_kills
from fanfold.machine.memory import private_bytes
from fanfold.quantity import format_bytes

if TYPE_CHECKING:
    from fanfold.engine.engine import Agenda, Assignment, GroupHandle, Program, Work
    from fanfold.plan.plan import Unit

_IDLE_POLL_S = 0.01  # while a unit is idle and the input is still being scanned
_BUSY_POLL_S = 0.5
_MAX_EARLY_DEATHS = 3  # deaths in a row of a unit that never finished anything
_STOP_GRACE_S = 10.0
_WEIGH_EVERY_S = 0.5
_STOPPED_S = 0.5  # a wait that lasts so much longer than asked: this process did not run
TIMEOUT_BATCH_S = 300.0


class _Seat:
    """A unit's place: the process that fills it at present, and what it is doing."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.process: Process | None = None
        self.assignment: Assignment | None = None
        self.work: bytes | None = None  # what the process was last given
        self.early_deaths = 0
        self.told_to_stop = False
        self.heard_s = 0.0  # when the process last said something, or was given something
        self.weighed_s = 0.0
        self.begun_s: float | None = None  # when the present batch began
        self.verdict: str | None = None  # why the process was ended by us


class Local:
    """Units of this machine as worker processes. Workers stay warm between calls until `close`."""

    def __init__(
        self,
        units: tuple[Unit, ...],
        *,
        imports: tuple[str, ...] = (),
        threads: int = 1,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._supervisor = supervisor or Supervisor(imports=imports, threads=threads)
        self._seats = [_Seat(unit) for unit in units]
        self.imports = imports
        self.threads = threads
        self.timeout_batch_s = TIMEOUT_BATCH_S
        self.patient = True  # nobody asked for a time: slow batches earn patience
        self.memory_bytes: int | None = None
        self._slowest_s = 0.0
        self._oom_kills: int | None = None

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(seat.unit for seat in self._seats)

    def warm_up(self) -> None:
        """Begin the imports now; returns at once."""
        self._supervisor.warm_up()

    def resize(self, units: tuple[Unit, ...]) -> None:
        """Use these units from now on; processes of units that stay are kept."""
        kept = {seat.unit: seat for seat in self._seats}
        for seat in self._seats:
            if seat.unit not in units:
                self._dismiss(seat)
        self._seats = [kept.get(unit) or _Seat(unit) for unit in units]

    def limit(self, *, memory_bytes: int | None, timeout_batch_s: float | None) -> None:
        """What each unit may hold, and how long a batch may take; units with another limit are started anew."""
        self.timeout_batch_s = timeout_batch_s or TIMEOUT_BATCH_S
        self.patient = timeout_batch_s is None
        if memory_bytes != self.memory_bytes:
            self.memory_bytes = memory_bytes
            for seat in self._seats:
                self._dismiss(seat)

    def carry_out(self, work: Work, agenda: Agenda) -> None:
        self.carry_out_pickled(cloudpickle.dumps(work), agenda)

    def carry_out_pickled(self, body: bytes, agenda: Agenda) -> None:
        """As carry_out; units that were given this very object before are not sent it again."""
        self._oom_kills = read_oom_kills()
        self._slowest_s = 0.0
        try:
            for seat in self._seats:
                seat.early_deaths = 0
                seat.told_to_stop = False
                if seat.process is None:
                    self._fill(seat)
                elif seat.process.up and seat.process.pid is not None:  # warm from the job before
                    agenda.tell(UnitReady(at_s=time.monotonic(), unit=seat.unit.name, pid=seat.process.pid))
            zygote = self._supervisor.zygote_pid
            if zygote is not None:
                agenda.tell(ProcessStarted(at_s=time.monotonic(), name="zygote", pid=zygote))
            self._loop(body, agenda)
        except BaseException:
            self._abandon()
            raise

    def _loop(self, body: bytes, agenda: Agenda) -> None:
        stop_by_s: float | None = None
        while True:
            if agenda.stopping:
                stop_by_s = stop_by_s or time.monotonic() + _STOP_GRACE_S
                self._tell_to_stop()
                if time.monotonic() > stop_by_s:
                    self._abandon()
            elif not agenda.done:
                self._hand_out(body, agenda)
            running = any(seat.assignment for seat in self._seats)
            if not running and (agenda.done or agenda.stopping):
                return
            idle = any(seat.assignment is None for seat in self._seats)
            self._wait(_IDLE_POLL_S if idle and not agenda.done else _BUSY_POLL_S)
            self._collect(agenda)

    def _hand_out(self, body: bytes, agenda: Agenda) -> None:
        for seat in self._seats:
            process = seat.process
            if process is None or not process.up or seat.assignment is not None:
                continue
            assignment = agenda.next_for(seat.unit)
            if assignment is None:
                continue
            seat.assignment = assignment
            seat.heard_s = time.monotonic()
            try:
                if seat.work is not body:
                    process.channel.send(("work", body))
                    seat.work = body
                process.channel.send(("do", assignment))
            except Closed:
                pass  # its end is noticed when its channel is read

    def _wait(self, timeout_s: float) -> None:
        """Until a process says something; time that we were stopped ourselves (Ctrl-Z) is nobody's silence."""
        start_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for seat in self._seats:
                if seat.process is not None:
                    selector.register(seat.process.channel, selectors.EVENT_READ)
                    if seat.process.stderr.open:
                        selector.register(seat.process.stderr.fd, selectors.EVENT_READ)
            if self._supervisor.watched is not None:
                selector.register(self._supervisor.watched, selectors.EVENT_READ)
            selector.select(timeout_s)
        stopped_s = time.monotonic() - start_s - timeout_s
        if stopped_s > _STOPPED_S:
            for seat in self._seats:
                seat.heard_s += stopped_s

    def _collect(self, agenda: Agenda) -> None:
        """Read all that has arrived; results that arrived together are committed together."""
        self._supervisor.read_news()
        results: list[tuple[Unit, Assignment, Any]] = []
        failures: list[tuple[_Seat, Assignment, Failure]] = []
        dead: list[_Seat] = []
        for seat in self._seats:
            process = seat.process
            if process is None:
                continue
            process.stderr.read()
            try:
                messages = process.channel.drain()
            except Closed:
                dead.append(seat)
                continue
            if messages:
                seat.heard_s = time.monotonic()
            for message in messages:
                self._read(seat, message, agenda, results, failures)
            self._watch(seat, process)
        if results:
            agenda.finished(results)
        for seat, assignment, failure in failures:
            agenda.failed(seat.unit, assignment, failure)
        for seat in dead:
            self._replace(seat, agenda)

    def _watch(self, seat: _Seat, process: Process) -> None:
        """End a process that gives no sign of life, or holds more memory than it may."""
        now_s = time.monotonic()
        if not process.up:
            if now_s - process.started_s > START_TIMEOUT_S:
                seat.verdict = f"no sign of life for {START_TIMEOUT_S:.0f} s after its start"
                process.kill()
            return
        if seat.assignment is None:
            return
        patience_s = self._patience_s(seat)
        if now_s - seat.heard_s > patience_s:
            seat.verdict = f"no sign of life for {patience_s:.0f} s (--timeout-batch): killed"
            process.kill()
        elif self.memory_bytes is not None and now_s - seat.weighed_s > _WEIGH_EVERY_S and process.pid:
            seat.weighed_s = now_s
            held_bytes = private_bytes(process.pid)
            if held_bytes > self.memory_bytes:
                seat.verdict = (
                    f"out of memory: it held {format_bytes(held_bytes)} of its own, "
                    f"{format_bytes(self.memory_bytes)} are allowed (--memory-per-unit): killed"
                )
                process.kill()

    def _patience_s(self, seat: _Seat) -> float:
        """For a batch, the asked-for time or a multiple of the slowest so far; more for whatever has no beats."""
        assert seat.assignment is not None
        if not isinstance(seat.assignment.instruction, Compute):
            return self.timeout_batch_s * 10
        return max(self.timeout_batch_s, 20 * self._slowest_s) if self.patient else self.timeout_batch_s

    def _read(
        self,
        seat: _Seat,
        message: Any,
        agenda: Agenda,
        results: list[tuple[Unit, Assignment, Any]],
        failures: list[tuple[_Seat, Assignment, Failure]],
    ) -> None:
        name = seat.unit.name
        match message:
            case ("up", pid):
                assert seat.process is not None
                seat.process.up, seat.process.pid = True, pid
                agenda.tell(UnitReady(at_s=time.monotonic(), unit=name, pid=pid))
            case ("at", piece, batch):
                seat.begun_s = time.monotonic()
                agenda.tell(BatchBegun(at_s=time.monotonic(), unit=name, piece=piece, batch=batch))
            case ("beat", rows, tokens):
                if seat.begun_s is not None:
                    self._slowest_s = max(self._slowest_s, time.monotonic() - seat.begun_s)
                    seat.begun_s = None
                if rows:  # none: only a sign of life
                    agenda.tell(Batch(at_s=time.monotonic(), unit=name, rows=rows, tokens=tokens))
            case ("done" | "failed" as kind, outcome, spans):
                assignment, seat.assignment = seat.assignment, None
                assert assignment is not None
                for span in spans:
                    agenda.tell(work_event(name, span))
                if kind == "done":
                    seat.early_deaths = 0
                    results.append((seat.unit, assignment, outcome))
                else:
                    failures.append((seat, assignment, outcome))

    # -- processes ------------------------------------------------------------------------------------

    def _fill(self, seat: _Seat) -> None:
        seat.process = self._supervisor.start(seat.unit, memory_bytes=self.memory_bytes)
        seat.verdict = None
        seat.work = None

    def _replace(self, seat: _Seat, agenda: Agenda) -> None:
        process, assignment = seat.process, seat.assignment
        assert process is not None
        cause = self._supervisor.exit_cause(process)
        if seat.verdict is not None:
            cause, seat.verdict = seat.verdict, None
        elif "SIGKILL" in cause and self._oom_killed():
            cause = f"out of memory: {cause} by the system; {_memory_words()}"
        last_words = process.stderr.text()
        self._drop(seat)
        if assignment is None or not isinstance(assignment.instruction, Compute):
            seat.early_deaths += 1  # what a batch does to a unit is the agenda's to judge
        agenda.tell(UnitDied(at_s=time.monotonic(), unit=seat.unit.name, cause=cause))
        agenda.lost(seat.unit, assignment, cause + (f"\n{last_words}" if last_words else ""))
        if seat.early_deaths >= _MAX_EARLY_DEATHS:
            raise UnitLost(
                f"{seat.unit.name}: a worker that stays alive",
                found=f"{seat.early_deaths} deaths in a row without one result; the last: {cause}"
                + (f"; its last words:\n{last_words}" if last_words else ""),
                allowed=f"fewer than {_MAX_EARLY_DEATHS} deaths in a row",
                do="look at the last words; if it was killed, give it more memory or use fewer units (--on cpu:1)",
            )
        if not agenda.stopping:
            self._fill(seat)

    def _oom_killed(self) -> bool:
        """Whether the system has killed for memory since we last looked."""
        before, self._oom_kills = self._oom_kills, read_oom_kills()
        return before is not None and self._oom_kills is not None and self._oom_kills > before

    def _tell_to_stop(self) -> None:
        for seat in self._seats:
            if seat.assignment is not None and not seat.told_to_stop and seat.process is not None:
                seat.told_to_stop = True
                try:
                    seat.process.channel.send(("stop",))
                except Closed:
                    pass

    def _drop(self, seat: _Seat) -> None:
        if seat.process is not None:
            seat.process.channel.close()
            seat.process.stderr.close()
        seat.process = seat.assignment = seat.work = None

    def _dismiss(self, seat: _Seat) -> None:
        if seat.process is not None:
            seat.process.kill()
            if seat.process.popen is not None:
                seat.process.popen.wait()
        self._drop(seat)

    def _abandon(self) -> None:
        """End what is still running; idle workers stay warm."""
        for seat in self._seats:
            if seat.assignment is not None or (seat.process is not None and not seat.process.up):
                self._dismiss(seat)

    def start_group(self, program: Program, size: int) -> GroupHandle:
        return Group(self._supervisor, self._seats[0].unit, program, size)

    def forget(self) -> None:
        """In a forked child: no end of the parent's channels stays open here, no process is touched."""
        for seat in self._seats:
            self._drop(seat)
        self._supervisor.forget()

    def close(self) -> None:
        for seat in self._seats:
            self._dismiss(seat)
        self._supervisor.close()


def _memory_words() -> str:
    """What the control group holds and may hold, for a message."""
    use = read_memory_use()
    if use is None:
        return "the machine's memory was full"
    return f"the group held {format_bytes(use.usage_bytes)} ({use.file})"
