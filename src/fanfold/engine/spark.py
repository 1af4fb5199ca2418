"""Units on a Spark cluster: one per executor slot, each assignment a job of one task.

The driver asks the agenda for assignments and commits what comes back; executors read inputs and write outputs
themselves. What a unit does or suffers is in the task's result (`post`); Spark's own retries are for executors
and Python workers that are gone. Bulk data never crosses the driver.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold import extras
from fanfold.data.scratch import scratch_folder
from fanfold.engine import post
from fanfold.engine.schedule import Compute
from fanfold.engine.supervisor import child_environment
from fanfold.errors import FanfoldError, InternalError, PlanError, UnitLost, cause_line
from fanfold.events import BatchBegun, Note, UnitDied, UnitReady
from fanfold.plan.plan import Cluster, Executor, Unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from fanfold.engine.engine import Agenda, Assignment, Failure, GroupHandle, Program, Work

LEAST_JAVA = 17
REACH_S = 5.0  # for a connection to a master's port
START_S = 120.0  # for the Java side, once the master's port has answered
EXECUTORS_S = 25.0  # for the first executor of a cluster
SETTLED_S = 1.5  # no new executor for so long: that is all of them
_HOLD_S = 0.25
_POLL_S = 0.02
_BUSY_POLL_S = 0.5
_STOP_GRACE_S = 10.0
_MAX_EARLY_DEATHS = 3
_CLOSE_S = 20.0
_MOST_SOCKET_FOLDER = 60  # the name of a socket has 107 bytes, Spark adds 42
_LOCAL = re.compile(r"local(\[.*\])?|local-cluster\[.*\]")


class Spark:
    """The slots of a cluster as units. Python workers keep their unit, and it its model, until `close`."""

    def __init__(
        self,
        master: str,
        *,
        imports: tuple[str, ...] = (),
        threads: int = 1,
        conf: Mapping[str, str] | None = None,
    ) -> None:
        """Connected, with at least one slot. Raises MissingExtra, PlanError: what is missing, what was tried."""
        self.master = master
        self.imports = imports
        self.threads = threads
        self._stack = ExitStack()
        self._orders = post.Orders(job="", imports=imports, threads=threads)
        self._members: tuple[post.Member, ...] = ()
        self._fresh = False  # whether the roll call was taken just now
        self._places: dict[tuple[str, int], list[int]] = {}  # executor -> its Python workers, in order of appearance
        self._units: tuple[Unit, ...] = ()
        self._context: Any = None
        with warnings.catch_warnings():  # pyspark imports its pandas part, and that complains of pandas 3
            warnings.simplefilter("ignore", FutureWarning)
            extras.need("pyspark", extra="spark", purpose=f"--on {master}")
            if extras.has("pyspark.testing.utils"):  # its conversion of values to Java imports this, sooner or later
                importlib.import_module("pyspark.testing.utils")
        check_java(master)
        reach(master)
        try:
            self._java = _Java(master, imports=imports, threads=threads, conf=dict(conf or {}), stack=self._stack)
            self._context = self._java.context
            self.cluster = self._wait_for_executors()
        except BaseException:
            self.close()
            raise
        self.resize(tuple(Unit(name=f"spark:{index}") for index in range(self.cluster.slots)))

    # -- what there is --------------------------------------------------------------------------------

    @property
    def units(self) -> tuple[Unit, ...]:
        return self._units

    @property
    def is_alive(self) -> bool:
        """Whether the connection still stands."""
        return _is_alive(self._context)

    def resize(self, units: tuple[Unit, ...]) -> None:
        """Use so many slots from now on."""
        self._units = units

    def limit(self, *, memory_bytes: int | None, timeout_batch_s: float | None) -> None:
        """What each unit may hold, and how long a batch may take."""
        self._orders = replace(self._orders, memory_bytes=memory_bytes, timeout_batch_s=timeout_batch_s)

    def _executors(self) -> list[Executor]:
        """Those that are registered now; for local masters the driver is the one executor."""
        listed = self._context._jsc.sc().statusStore().executorList(True)
        found = []
        for index in range(listed.size()):
            one = listed.apply(index)
            if one.totalCores():
                found.append(
                    Executor(
                        name=str(one.id()),
                        host=str(one.hostPort()).rpartition(":")[0],
                        cores=int(one.totalCores()),
                        memory_bytes=int(one.maxMemory()),
                    )
                )
        return found

    def _wait_for_executors(self) -> Cluster:
        wanted = _num_expected(self.master) or int(self._context.getConf().get("spark.executor.instances", "0"))
        deadline_s = time.monotonic() + (START_S if _is_local(self.master) else EXECUTORS_S)
        found: list[Executor] = []
        since_s = time.monotonic()
        while True:
            now = self._executors()
            if len(now) != len(found):
                found, since_s = now, time.monotonic()
            if found and (len(found) >= wanted > 0 or (not wanted and time.monotonic() - since_s > SETTLED_S)):
                break
            if time.monotonic() > deadline_s:
                if found:
                    break
                raise PlanError(
                    f"--on {self.master}",
                    found=f"no executor has come within {EXECUTORS_S:.0f} s",
                    allowed="a cluster with at least one free executor",
                    do="look at the master's page: are there workers, with free cores and memory?",
                )
            time.sleep(0.05)
        slots = sum(executor.cores // self.threads for executor in found)
        if not slots:
            raise PlanError(
                f"--on {self.master}",
                found=f"{len(found)} executor(s) of {max(executor.cores for executor in found)} core(s)",
                allowed=f"executors of at least {self.threads} core(s): so many threads compute one unit's batch",
                do="give the executors more cores (spark.executor.cores)",
            )
        return Cluster(master=self.master, slots=slots, executors=tuple(found), unsafe=self._unsafe())

    def _unsafe(self) -> str:
        if _is_local(self.master) or self._context.getConf().get("spark.authenticate", "false") == "true":
            return ""
        return (
            f"spark.authenticate is off on {self.master}: whoever reaches the driver's or an executor's port "
            "can run code there (docs/spark.md)"
        )

    # -- roll call ------------------------------------------------------------------------------------

    def roll_call(self, folder: Path | None = None, needs: tuple[str, ...] = ()) -> tuple[post.Member, ...]:
        """Every slot answers, in one small job: software, CPU, and whether it sees `folder` and the paths it needs.

        Raises: PlanError where they differ from the driver or from each other, or do not share the folder.
        """
        token = uuid.uuid4().hex
        if folder is not None:
            (folder / post.probe_name(token)).write_text(token)
        try:
            task = functools.partial(_answer, self._orders, None if folder is None else str(folder), token, needs)
            count = max(1, self.cluster.slots)
            members = tuple(self._context.parallelize(range(count), count).mapPartitions(task).collect())
            if folder is not None:
                members = tuple(_checked_back(member, folder, token) for member in members)
        except Exception as error:
            raise self._no_answer(error) from None
        finally:
            if folder is not None:
                for left in folder.glob(f"{post.probe_name(token)}*"):
                    left.unlink(missing_ok=True)
        check_members(self.master, post.software(self.imports), members, folder)
        self._members, self._fresh = members, True
        first = members[0]
        self._orders = replace(self._orders, expected=post.software(self.imports), cpu=(first.cpu_vendor, first.isa))
        return members

    def _no_answer(self, error: Exception) -> FanfoldError:
        """What kept the executors' Python from answering, as far as Spark's words tell."""
        words = _words(error)
        failure = re.search(
            r"(?m)^\s*(?:\S*\.)?(PySparkRuntimeError|ModuleNotFoundError|ImportError|PlanError): (.*)", words
        )
        found = failure[0].strip() if failure else _reason(words)
        return PlanError(
            f"--on {self.master}",
            found=f"the executors' Python does not answer: {found[:600]}",
            allowed="executors with the driver's Python and packages, Fanfold among them",
            do="install the same environment on all machines, and name its Python in PYSPARK_PYTHON "
            f"(now {self._context.pythonExec})",
        )

    # -- carrying out ---------------------------------------------------------------------------------

    def carry_out(self, work: Work, agenda: Agenda) -> None:
        if not self._fresh:
            self.roll_call()
        self._fresh = False
        for member in self._members:
            place = self._name_of(member.place)
            agenda.tell(UnitReady(at_s=time.monotonic(), unit=place, pid=_here(member.place)))
        _Run(self, self._context, replace(self._orders, job=uuid.uuid4().hex), self._name_of).carry_out(work, agenda)

    def _name_of(self, place: post.Place) -> str:
        """spark:EXECUTOR.SLOT, numbered in the order in which they appear."""
        key = (place.host, place.executor)
        workers = self._places.setdefault(key, [])
        if place.worker not in workers:
            workers.append(place.worker)
        return f"spark:{[*self._places].index(key)}.{workers.index(place.worker)}"

    def start_group(self, program: Program, size: int) -> GroupHandle:
        raise PlanError(
            f"a group of {size} units on Spark",
            found="the units of a Spark cluster are independent of each other",
            allowed="engines of one machine: cpu, cuda",
            do=f"use --on cpu:{size}",
        )

    def close(self) -> None:
        """The context is stopped and its Java process gone; twice is fine."""
        self._context = None
        self._stack.close()

    def kill(self) -> None:
        """At once: the Java process is killed, what it had started ends with it."""
        self._java.kill()


def check_members(master: str, ours: post.Software, members: tuple[post.Member, ...], folder: Path | None) -> None:
    """PlanError where slots differ from the driver or from each other, or do not see what they must."""
    for member in members:
        post.refuse_differences(member.place.host, post.differences(ours, member.software))
    blind = [member for member in members if not member.seen]
    if blind:
        hosts = sorted({member.place.host for member in blind})
        raise PlanError(
            f"output to {folder}",
            found=f"{len(blind)} of {len(members)} slots do not share it with the driver "
            f"(on {', '.join(hosts[:3])}): {blind[0].why_not}",
            allowed="a folder that driver and executors see under the same path",
            do="use a shared file system, mounted at the same place on all machines",
        )
    for member in members:
        if member.missing:
            raise PlanError(
                f"--on {master}",
                found=f"{', '.join(member.missing)} is not there on {member.place.host}",
                allowed="a model folder that all executors see under the same path",
                do="put the model on the shared file system and name that path with --model",
            )
    cpus = sorted({(member.cpu_vendor, member.isa) for member in members})
    if len(cpus) > 1:
        raise PlanError(
            f"--on {master}",
            found="executors with different CPUs: " + ", ".join(" ".join(cpu) for cpu in cpus),
            allowed="one vendor and instruction set: others may give other bytes",
            do="restrict the job to machines of one kind (node labels, a node selector, another queue)",
        )


def _here(place: post.Place) -> int:
    """The unit's process, where it is one of this machine."""
    return place.pid if place.host == socket.gethostname() else 0


@dataclass(frozen=True, slots=True)
class _Gone:
    """Instead of an outcome: Spark has given the task up."""

    error: BaseException


class _Run:
    """One job of ours: a lane (thread) per unit submits Spark jobs of one task; the caller's thread does the rest."""

    def __init__(self, engine: Spark, context: Any, orders: post.Orders, name_of: Callable[[post.Place], str]) -> None:
        self._units = {unit.name: unit for unit in engine.units}
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
            agenda.tell(UnitReady(at_s=time.monotonic(), unit=place, pid=_here(outcome.place)))
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
        words = _words(error)
        if self._cancelled:
            return "cancelled: a stop was requested"
        if not _is_alive(self._context):
            raise UnitLost(
                f"a job on {self._context.master if self._context else 'Spark'}",
                found=f"the connection to Spark is gone: {_reason(words)[:500]}",
                allowed="a driver and a master that live as long as the job",
                do="run the same command again to go on",
            )
        if isinstance(error, FanfoldError):
            raise error
        if "Fatal Python error: Segmentation fault" in words:
            return "killed by SIGSEGV\n" + words
        if "Python worker exited unexpectedly" in words:
            return f"its Python worker ended unexpectedly: {_reason(words)}"
        if "PythonException" in words or "PySparkRuntimeError" in words:
            raise InternalError(
                "a task on Spark",
                found=_reason(words)[:2000],
                allowed="tasks that return what became of their unit",
                do="report this",
            )
        return f"its executor was lost: {_reason(words)}"

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


# -- on the executors ---------------------------------------------------------------------------------


def _do(orders: post.Orders, body: Any, blobs: Iterable[bytes]) -> Iterator[bytes]:
    """A task: one assignment, pickled, in; what became of it out."""
    from pyspark import TaskContext

    context = TaskContext.get()
    for blob in blobs:
        outcome = post.carry(orders, body.value, pickle.loads(blob), context.attemptNumber() if context else 0)
        yield pickle.dumps(outcome, 5)


def _answer(
    orders: post.Orders, folder: str | None, token: str, needs: tuple[str, ...], rows: Iterable[int]
) -> Iterator[post.Member]:
    for _ in rows:
        yield post.answer(orders, folder, token, needs, _HOLD_S)


def _checked_back(member: post.Member, folder: Path, token: str) -> post.Member:
    """The driver sees the executor's file, too: else it is another folder with the same file in it."""
    answer = folder / f"{post.probe_name(token)}-{member.place.host}-{member.place.worker}"
    if member.seen and not answer.exists():
        return replace(member, seen=False, why_not=f"what it wrote into {folder} is not there for the driver")
    return member


# -- the Java side ------------------------------------------------------------------------------------


class _Java:
    """A Java process of our own with a SparkContext in it; everything it needs is undone when `stack` closes."""

    def __init__(
        self, master: str, *, imports: tuple[str, ...], threads: int, conf: dict[str, str], stack: ExitStack
    ) -> None:
        from pyspark import SparkContext

        if SparkContext._active_spark_context is not None:
            raise PlanError(
                f"--on {master}",
                found="this process has a SparkContext already",
                allowed="one per process: Fanfold needs its own, with its own Python workers",
                do="use fanfold.spark.embed(df, ...) with your session, or stop it first",
            )
        self.context: Any = None
        self._gateway: Any = None
        folder = stack.enter_context(scratch_folder())
        self._log = folder / "java.log"
        settings = {**settings_for(master, imports=imports, threads=threads, folder=folder), **conf}
        stack.callback(self.stop)
        done = threading.Event()
        errors: list[BaseException] = []

        def start() -> None:  # not in the main thread: there pyspark would take SIGINT for itself
            try:
                self._start(master, settings, folder)
            except BaseException as error:
                errors.append(error)
            done.set()

        threading.Thread(target=start, name="fanfold-spark", daemon=True).start()
        if not done.wait(START_S) or errors:
            words = self._last_words()
            found = f"no answer within {START_S:.0f} s" if not errors else cause_line(errors[0])
            raise PlanError(
                f"--on {master}",
                found=f"Spark did not start: {found}" + (f"; its last words:\n{words}" if words else ""),
                allowed="a master that takes this application",
                do="look at the last words; is it a Spark master, of pyspark's own version?",
            ) from (errors[0] if errors else None)

    def _start(self, master: str, settings: dict[str, str], folder: Path) -> None:
        from pyspark import SparkConf, SparkContext
        from pyspark.java_gateway import launch_gateway

        conf = SparkConf(loadDefaults=False)
        for key, value in settings.items():
            conf.set(key, value)
        variables = {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}
        if _is_local(master):
            variables["SPARK_LOCAL_IP"] = "127.0.0.1"
        if master.startswith("local-cluster"):
            variables["SPARK_HOME"] = str(_spark_home(folder))
        with self._log.open("wb") as log, _environment(variables):
            if SparkContext._gateway is None:  # else the caller had a context before: its Java process is used
                self._gateway = launch_gateway(conf, popen_kwargs={"stdout": log, "stderr": log})
            self.context = SparkContext(conf=conf, gateway=self._gateway)

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        told = [line for line in lines if not re.search(r"\bWARN\b|^Using Spark's|^Setting|^To adjust|^\s+at ", line)]
        return "\n".join(told[-12:])

    def stop(self) -> None:
        from pyspark import SparkContext

        context, self.context = self.context, None
        gateway, self._gateway = self._gateway, None
        if context is not None:
            stopper = threading.Thread(target=_quietly, args=(context.stop,), daemon=True)
            stopper.start()
            stopper.join(_CLOSE_S)
        if gateway is not None:
            _quietly(gateway.shutdown)
            process = gateway.proc
            if process is not None:
                _quietly(process.stdin.close)  # its end is what the Java side waits for
                try:
                    process.wait(_CLOSE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            with SparkContext._lock:
                SparkContext._gateway = SparkContext._jvm = None
                SparkContext._active_spark_context = None

    def kill(self) -> None:
        if self._gateway is not None and self._gateway.proc is not None:
            self._gateway.proc.kill()


def settings_for(master: str, *, imports: tuple[str, ...], threads: int, folder: Path) -> dict[str, str]:
    """Spark's configuration for a context of ours. Executors' Python gets the environment of a local worker."""
    variables = child_environment(threads, {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    variables["FANFOLD_IMPORTS"] = ",".join(imports)
    settings = {
        "spark.master": master,
        "spark.app.name": "fanfold",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "WARN",
        "spark.task.cpus": str(threads),
        "spark.python.worker.reuse": "true",
        "spark.python.use.daemon": "true",
        "spark.python.daemon.module": "fanfold.engine._spark_daemon",
        "spark.python.worker.faulthandler.enabled": "true",
        # Spark 4.1 and newer; over TCP each task waits some 40 ms for acknowledgements (docs/log.md).
        "spark.python.unix.domain.socket.enabled": "true",
        **{f"spark.executorEnv.{name}": value for name, value in variables.items()},
    }
    if _is_local(master):
        settings |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.local.dir": str(folder / "spark"),
        }
        if len(str(folder)) < _MOST_SOCKET_FOLDER:
            settings["spark.python.unix.domain.socket.dir"] = str(folder)
    return settings


def _spark_home(folder: Path) -> Path:
    """Spark's folder by links, but writable: a local cluster writes its executors' logs into SPARK_HOME/work."""
    from pyspark.find_spark_home import _find_spark_home

    real, home = Path(_find_spark_home()), folder / "home"
    home.mkdir()
    for entry in real.iterdir():
        if entry.name != "work":
            (home / entry.name).symlink_to(entry)
    return home


class _environment:
    """These variables are set for a while: what the Java process is started with."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_java(master: str) -> None:
    """PlanError unless a Java that Spark runs on can be started."""
    home = os.environ.get("JAVA_HOME")
    program = f"{home}/bin/java" if home else shutil.which("java")
    do = f"install Java {LEAST_JAVA}, for example: apt-get install openjdk-{LEAST_JAVA}-jre-headless"
    if home:
        do += "; or unset JAVA_HOME"
    allowed = f"Java {LEAST_JAVA} or newer"
    if program is None:
        raise PlanError(f"--on {master}", found="no Java: no JAVA_HOME, none on the PATH", allowed=allowed, do=do)
    try:
        told = subprocess.run([program, "-version"], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PlanError(
            f"--on {master}", found=f"{program} does not run: {cause_line(error)}", allowed=allowed, do=do
        ) from None
    text = (told.stderr + told.stdout).decode(errors="replace")
    number = re.search(r'version "(?:1\.)?(\d+)', text)
    if number is None or int(number[1]) < LEAST_JAVA:
        first = text.strip().splitlines()[0] if text.strip() else "nothing"
        raise PlanError(f"--on {master}", found=f"{program} says: {first}", allowed=allowed, do=do)


def reach(master: str, timeout_s: float = REACH_S) -> None:
    """PlanError where the master's port takes no connection; says what was tried."""
    addresses = _addresses(master)
    tried = []
    for host, port in addresses:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
        except OSError as error:
            tried.append(f"{host}:{port}: {error}")
        else:
            return
    if addresses:
        raise PlanError(
            f"--on {master}",
            found="the master cannot be reached; tried " + "; ".join(tried),
            allowed="a master that takes connections from this machine",
            do="check host and port (the master's log names them), and that no firewall is between",
        )
    if master == "yarn" and not (os.environ.get("HADOOP_CONF_DIR") or os.environ.get("YARN_CONF_DIR")):
        raise PlanError(
            "--on yarn",
            found="neither HADOOP_CONF_DIR nor YARN_CONF_DIR is set",
            allowed="a folder with the cluster's configuration in one of them",
            do="export HADOOP_CONF_DIR=/etc/hadoop/conf (or where your cluster keeps it)",
        )


def _addresses(master: str) -> list[tuple[str, int]]:
    if master.startswith("spark://"):
        parts = [part.rpartition(":") for part in master.removeprefix("spark://").split(",")]
        return [(host, int(port)) for host, _, port in parts]
    if master.startswith("k8s://"):
        from urllib.parse import urlsplit

        text = master.removeprefix("k8s://")
        found = urlsplit(text if "://" in text else f"https://{text}")
        return [(found.hostname or "", found.port or (80 if found.scheme == "http" else 443))]
    return []


def _is_local(master: str) -> bool:
    return _LOCAL.fullmatch(master) is not None


def _num_expected(master: str) -> int:
    """Executors that a local master brings; 0: not known."""
    if found := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,.*\]", master):
        return int(found[1])
    return 1 if _is_local(master) else 0


def _is_alive(context: Any) -> bool:
    try:
        return context is not None and not context._jsc.sc().isStopped()
    except Exception:
        return False


def _words(error: BaseException) -> str:
    """All that Spark says of an error."""
    java = getattr(error, "java_exception", None)
    if java is not None:
        try:
            return str(java.getMessage() or java.toString())
        except Exception:
            pass
    return str(error)


def _reason(words: str) -> str:
    """The part of Spark's words that a person wants: what happened to the last attempt, without its Java stack."""
    words = words.partition("\nDriver stacktrace")[0]
    words = words.rpartition("most recent failure: ")[2]
    lines = [line for line in words.splitlines() if not re.match(r"\s+at [\w.$]+\(|\s+\.\.\. \d+ more", line)]
    return "\n".join(lines).strip() or "no reason was given"


def _quietly(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:
        pass  # it is being shut down anyway
