"""Units on a Spark cluster: one per executor slot, each assignment a job of one task.

The driver asks the agenda for assignments and commits what comes back; executors read inputs and write outputs
themselves. What a unit does or suffers is in the task's result (`post`); Spark's own retries are for executors
and Python workers that are gone. Bulk data never crosses the driver.
"""

from __future__ import annotations

import functools
import importlib
import re
import time
import uuid
import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fanfold import extras
from fanfold.engine import post
from fanfold.engine.spark_java import START_S, JavaSide, check_java, is_alive_context, is_local, num_expected, reach
from fanfold.engine.spark_run import Run, here, reason_in, words_of
from fanfold.errors import FanfoldError, PlanError
from fanfold.events import UnitReady
from fanfold.plan.plan import Cluster, Executor, Unit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import NoReturn

    from fanfold.engine.engine import Agenda, GroupHandle, Program, Work

EXECUTORS_S = 25.0  # for the first executor of a standalone cluster
CONTAINERS_S = 180.0  # of YARN and Kubernetes, which start containers first
MORE_S = 30.0  # for the others that were asked for, once the first is there
SETTLED_S = 1.5  # no new executor for so long: that is all of them
_HOLD_S = 0.25


class Spark:
    """The slots of a cluster as units. Python workers keep their unit, and it its model, until `close`."""

    def __init__(
        self,
        master: str,
        *,
        imports: tuple[str, ...] = (),
        threads: int = 1,
        processes: int = 1,
        conf: Mapping[str, str] | None = None,
    ) -> None:
        """Connected, with at least one slot: a core for every thread of every process of a unit.

        `processes`: how many a unit starts on its executor, to split one model over them. Raises MissingExtra,
        PlanError: what is missing, what was tried.
        """
        self.master = master
        self.imports = imports
        self.threads, self.processes = threads, processes
        self.cores = threads * processes  # of a slot
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
        self._check_local(master)
        reach(master)
        try:
            self._java = JavaSide(
                master, imports=imports, threads=threads, cores=self.cores, conf=dict(conf or {}), stack=self._stack
            )
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
        return is_alive_context(self._context)

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
            if one.totalCores() and one.maxMemory():  # it tells its cores first, then its host and memory
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
        wanted = num_expected(self.master) or int(self._context.getConf().get("spark.executor.instances", "0"))
        patience_s = START_S if is_local(self.master) else CONTAINERS_S
        if self.master.startswith("spark://"):
            patience_s = EXECUTORS_S
        deadline_s = time.monotonic() + patience_s
        found: list[Executor] = []
        since_s = time.monotonic()
        while True:
            now = self._executors()
            if now and not found:
                deadline_s = min(deadline_s, time.monotonic() + MORE_S)
            if len(now) != len(found):
                found, since_s = now, time.monotonic()
            if found and (len(found) >= wanted > 0 or (not wanted and time.monotonic() - since_s > SETTLED_S)):
                break
            if time.monotonic() > deadline_s:
                if found:
                    break
                raise PlanError(
                    f"--on {self.master}",
                    found=f"no executor has come within {patience_s:.0f} s",
                    allowed="a cluster with at least one free executor",
                    do="look at the master's page: are there workers, with free cores and memory?",
                )
            time.sleep(0.05)
        slots = sum(executor.cores // self.cores for executor in found)
        if not slots:
            self._too_small(self.master, len(found), max(executor.cores for executor in found))
        return Cluster(master=self.master, slots=slots, executors=tuple(found), unsafe=self._unsafe())

    def _check_local(self, master: str) -> None:
        """Spark on this machine names its executors' cores; its own words on too few come late."""
        found = re.fullmatch(r"local-cluster\[\s*(\d+)\s*,\s*(\d+)\s*,.*\]|local\[(\d+)(?:,.*)?\]|local", master)
        if found is not None:
            count, cores = (int(found[1]), int(found[2])) if found[1] else (1, int(found[3] or 1))
            if cores < self.cores:
                self._too_small(master, count, cores)

    def _too_small(self, master: str, count: int, cores: int) -> NoReturn:
        why = "so many threads compute one unit's batch"
        if self.processes > 1:
            why = f"the {self.processes} processes that share one model run on one executor"
        raise PlanError(
            f"--on {master}",
            found=f"{count} executor(s) of {cores} core(s)",
            allowed=f"executors of at least {self.cores} core(s): {why}",
            do="give the executors more cores (spark.executor.cores)"
            + (", or split the model over fewer processes" if self.processes > 1 else ""),
        )

    def _unsafe(self) -> str:
        if is_local(self.master) or self._context.getConf().get("spark.authenticate", "false") == "true":
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
        words = words_of(error)
        failure = re.search(
            r"(?m)^\s*(?:\S*\.)?(PySparkRuntimeError|ModuleNotFoundError|ImportError|PlanError): (.*)", words
        )
        found = failure[0].strip() if failure else reason_in(words)
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
            agenda.tell(UnitReady(at_s=time.monotonic(), unit=place, pid=here(member.place)))
        Run(self.units, self._context, replace(self._orders, job=uuid.uuid4().hex), self._name_of).carry_out(
            work, agenda
        )

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


# -- on the executors and back ---------------------------------------------------------------------------


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
