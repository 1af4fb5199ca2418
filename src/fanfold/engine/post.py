"""What stands in a Spark Python worker: it has one unit, gives it assignments, watches it, and reports.

The unit is a process of its own, forked from the Python worker (which Spark's daemon has forked, see
`_spark_daemon`) and kept between tasks with the model that it has loaded. So a unit that crashes, hangs or eats
memory is a result that the task returns, with the same words as on a local engine; a Spark task fails only where
the Python worker or its executor is gone.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.engine._worker import Hello, die_with_parent, num_threads, work_in_fork
from fanfold.engine.local import Local
from fanfold.engine.supervisor import Process, StderrTail, Supervisor, describe_exit
from fanfold.engine.wire import Channel, pair
from fanfold.errors import PlanError
from fanfold.events import BatchBegun, UnitReady
from fanfold.machine.discover import discover
from fanfold.plan.plan import Unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.engine.engine import Assignment, Failure
    from fanfold.events import Event

_HEAVY = ("torch", "transformers", "tokenizers")
_LIGHT = ("fanfold", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What must be the same on driver and executors for the same bytes: versions, and on all executors the CPU."""

    python: str
    packages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a unit is told once per job. expected: the driver's software; cpu: (vendor, isa) of the others."""

    job: str
    imports: tuple[str, ...]
    threads: int
    memory_bytes: int | None = None
    timeout_batch_s: float | None = None
    expected: Software | None = None
    cpu: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a unit is: its host, the executor (by its daemon's process), the Python worker, the unit's process."""

    host: str
    executor: int
    worker: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One slot as the roll call found it."""

    place: Place
    software: Software
    cpu_name: str
    cpu_vendor: str
    isa: str
    cores: int
    memory_bytes: int
    threads_before_fork: int
    seen: bool  # the driver's probe file, with its content
    why_not: str
    missing: tuple[str, ...]  # of the paths that the job needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of an assignment. value: the result (done), a Failure (failed) or the cause in words (lost)."""

    kind: str
    value: Any
    at: tuple[int, int] | None  # the batch that a lost unit was at
    events: tuple[Event, ...]
    now_s: float  # on the executor's monotonic clock
    place: Place
    attempt: int  # Spark's own, counted from 0


def software(imports: Sequence[str]) -> Software:
    """Of this process; the model libraries only where the job needs them."""
    names = [*_LIGHT, *(_HEAVY if "torch" in imports else ())]
    return Software(python=platform.python_version(), packages=tuple((name, _version(name)) for name in names))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def differences(driver: Software, executor: Software) -> list[str]:
    """What an executor has otherwise than the driver, in words."""
    found = []
    if driver.python.split(".")[:2] != executor.python.split(".")[:2]:
        found.append(f"Python {executor.python}, the driver has {driver.python}")
    theirs = dict(executor.packages)
    for name, ours in driver.packages:
        if theirs.get(name) != ours:
            found.append(f"{name} {theirs.get(name)}, the driver has {ours}")
    return found


def refuse_differences(host: str, found: Sequence[str]) -> None:
    """PlanError that names them, if there are any."""
    if found:
        raise PlanError(
            f"running on the executor on {host}",
            found="; ".join(found),
            allowed="the same Python and package versions on the driver and on every executor",
            do="install the same environment on all machines, and name its Python in PYSPARK_PYTHON",
        )


# -- the unit -----------------------------------------------------------------------------------------


class HereSupervisor(Supervisor):
    """Forks units from this very process, which has only imported; starts them one by one where it has threads."""

    def __init__(self, *, imports: tuple[str, ...], threads: int) -> None:
        super().__init__(imports=imports, threads=threads)
        self.threads_before_fork = 0
        self._children: list[Process] = []

    def start(self, unit: Unit, *, memory_bytes: int | None = None) -> Process:
        self.threads_before_fork = num_threads()
        if self.threads_before_fork > 1 or sys.platform != "linux":
            return super().start(unit, memory_bytes=memory_bytes)
        hello = Hello(
            role="worker", sys_path=tuple(sys.path), unit=unit, threads=self.threads, memory_bytes=memory_bytes
        )
        ours, theirs = pair()
        stderr_read, stderr_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            work_in_fork(lambda: _cut_ties({theirs.fileno(), stderr_write}), theirs.fileno(), stderr_write, hello)
        theirs.close()
        os.close(stderr_write)
        process = Process(unit=unit, channel=Channel(ours), stderr=StderrTail(stderr_read), pid=pid)
        self._children.append(process)
        return process

    def exit_cause(self, process: Process, wait_s: float = 1.0) -> str:
        if process not in self._children:
            return super().exit_cause(process, wait_s)
        deadline_s = time.monotonic() + wait_s
        while process.exit_code is None and time.monotonic() < deadline_s:
            self._reap()
            if process.exit_code is None:
                time.sleep(0.005)
        process.stderr.read()
        return describe_exit(process.exit_code)

    def read_news(self) -> None:
        super().read_news()
        self._reap()

    def _reap(self) -> None:
        for process in list(self._children):
            if process.exit_code is None and process.pid is not None:
                try:
                    ended, status = os.waitpid(process.pid, os.WNOHANG)
                except ChildProcessError:
                    ended, status = process.pid, 0
                if ended:
                    process.exit_code = os.waitstatus_to_exitcode(status)
        # those whose channel was closed by us are not asked for again
        self._children = [child for child in self._children if child.exit_code is None or child.channel.fileno() >= 0]

    def close(self) -> None:
        for process in self._children:
            process.kill()
        deadline_s = time.monotonic() + 2.0
        while self._children and time.monotonic() < deadline_s:
            self._reap()
            time.sleep(0.005)
        super().close()


def _cut_ties(keep: set[int]) -> None:
    """In the unit: whatever else the Python worker has open, Spark's sockets first, leads nowhere."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent()
    nothing_fd = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep and fd != nothing_fd:
            try:
                os.fstat(fd)
                os.dup2(nothing_fd, fd)  # not closed: objects that still name the number must not hit another file
            except OSError:
                pass  # it was the listing itself


class _Single:
    """An agenda of one assignment; without one it is done as soon as the unit is up."""

    stopping = False

    def __init__(self, assignment: Assignment | None) -> None:
        self.assignment = assignment
        self.outcome: tuple[str, Any] | None = None
        self.events: list[Event] = []
        self.at: tuple[int, int] | None = None
        self.pid = 0

    def next_for(self, unit: Unit) -> Assignment | None:
        given, self.assignment = self.assignment, None
        return given

    @property
    def done(self) -> bool:
        return self.outcome is not None

    def finished(self, results: Sequence[tuple[Unit, Assignment, Any]]) -> None:
        ((_, _, result),) = results
        self.outcome = ("done", result)

    def failed(self, unit: Unit, assignment: Assignment, failure: Failure) -> None:
        self.outcome = ("failed", failure)

    def lost(self, unit: Unit, assignment: Assignment | None, cause: str) -> None:
        if assignment is not None:
            self.outcome = ("lost", cause)

    def tell(self, event: Event) -> None:
        if isinstance(event, BatchBegun):
            self.at = (event.piece, event.batch)
        elif isinstance(event, UnitReady):
            self.pid = event.pid
        else:
            self.events.append(event)


class _RollCall(_Single):
    @property
    def done(self) -> bool:
        return self.pid > 0


@dataclass(slots=True)
class _Post:
    """The one of this Python worker."""

    orders: Orders
    supervisor: HereSupervisor
    local: Local
    body: bytes = b""
    job: str = ""


_post: _Post | None = None


def _post_for(orders: Orders) -> _Post:
    """The unit of this Python worker, warm where threads and imports are those of the job before."""
    global _post
    if _post is not None and (_post.orders.threads, _post.orders.imports) != (orders.threads, orders.imports):
        _post.local.close()
        _post = None
    if _post is None:
        if orders.expected is not None:
            found = differences(orders.expected, software(orders.imports))
            if orders.cpu is not None:
                machine = discover()
                if (machine.cpu_vendor, machine.isa) != orders.cpu:
                    found.append(f"a CPU {machine.cpu_vendor} {machine.isa}, the others have {' '.join(orders.cpu)}")
            refuse_differences(socket.gethostname(), found)
        supervisor = HereSupervisor(imports=orders.imports, threads=orders.threads)
        unit = Unit(name=f"spark:{socket.gethostname()}:{os.getpid()}")
        _post = _Post(
            orders=orders,
            supervisor=supervisor,
            local=Local((unit,), imports=orders.imports, threads=orders.threads, supervisor=supervisor),
        )
    _post.orders = orders
    _post.local.limit(memory_bytes=orders.memory_bytes, timeout_batch_s=orders.timeout_batch_s)
    return _post


def carry(orders: Orders, body: bytes, assignment: Assignment, attempt: int = 0) -> Outcome:
    """The assignment carried out by this Python worker's unit; whatever happens to the unit is in the outcome."""
    import traceback

    from fanfold.engine._worker import portable
    from fanfold.engine.engine import Failure

    agenda = _Single(assignment)
    try:
        post = _post_for(orders)
        if post.job != orders.job:
            post.job, post.body = orders.job, body
        post.local.carry_out_pickled(post.body, agenda)
        kind, value = agenda.outcome or ("lost", "ended without a result")
    except Exception as error:
        kind, value = "failed", Failure(error=portable(error), traceback=traceback.format_exc())
    return Outcome(
        kind=kind,
        value=value,
        at=agenda.at if kind == "lost" else None,
        events=tuple(agenda.events),
        now_s=time.monotonic(),
        place=_place(agenda.pid),
        attempt=attempt,
    )


def answer(orders: Orders, folder: str | None, token: str, needs: Sequence[str], hold_s: float) -> Member:
    """This slot's answer to the roll call: its unit is up; whether it sees the driver's probe file in `folder`."""
    start_s = time.monotonic()
    post = _post_for(orders)
    agenda = _RollCall(None)
    post.local.carry_out_pickled(post.body, agenda)
    machine = discover()
    seen, why_not = (True, "") if folder is None else _sees(Path(folder), token)
    time.sleep(max(0.0, hold_s - (time.monotonic() - start_s)))  # so that every slot answers for itself
    return Member(
        place=_place(agenda.pid),
        software=software(orders.imports),
        cpu_name=machine.cpu_name,
        cpu_vendor=machine.cpu_vendor,
        isa=machine.isa,
        cores=machine.cores,
        memory_bytes=machine.memory_bytes,
        threads_before_fork=post.supervisor.threads_before_fork,
        seen=seen,
        why_not=why_not,
        missing=tuple(path for path in needs if not os.path.exists(path)),
    )


def probe_name(token: str) -> str:
    return f".probe-{token}"


def _sees(folder: Path, token: str) -> tuple[bool, str]:
    """Whether the driver's file is here, and one of ours can be put beside it."""
    try:
        found = (folder / probe_name(token)).read_text()
        if found != token:
            return False, f"{folder} holds another file of that name"
        (folder / f"{probe_name(token)}-{socket.gethostname()}-{os.getpid()}").write_text(token)
    except OSError as error:
        return False, f"{type(error).__name__}: {error}"
    return True, ""


def _place(pid: int) -> Place:
    return Place(host=socket.gethostname(), executor=os.getppid(), worker=os.getpid(), pid=pid)
