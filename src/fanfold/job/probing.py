"""The probe of this machine: rates, bandwidth, links and start-up, measured once in under ten seconds and kept.

What is timed runs where a job's work would: in processes forked from a zygote that has imported torch. The record is
kept in the user's cache, by machine and version of torch; `fanfold machine --probe` measures anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fanfold import extras
from fanfold.engine.group import Group
from fanfold.engine.supervisor import Supervisor
from fanfold.machine.measure import Measuring, copy_bytes_per_s, run_s
from fanfold.machine.memory import own_bytes, processor_s, pss_bytes
from fanfold.machine.rates import VERSION, Link, Point, Rates, from_record
from fanfold.parallel.shared import SharedGroup
from fanfold.parallel.shared_file import new_path, refusal
from fanfold.plan.plan import Unit

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.engine.wire import Channel
    from fanfold.machine.discover import Machine

BUDGET_S = 9.0  # of it, what the imports leave is for measuring
_LEAST_S = 2.5
_ALONE, _ON_ALL = 0.55, 0.3  # shares of the time left, for one thread, then for all of one process
_MOST_PROCESSES = 16  # that compute at once; beyond, the rate of so many stands for all
_ANSWER_S = 60.0
_IMPORTS = (
    "torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "fanfold.tasks.embed",
    "fanfold.job.operators",
    "fanfold.job.probing",
)
_SMALL_BYTES, _LARGE_BYTES = 256, 1 << 20


def rates_for(machine: Machine, *, measure: bool = True, anew: bool = False) -> Rates | None:
    """What was measured of this machine before; measured now where it was not, None if it may not be.

    Also None where torch or transformers is not installed: then nothing that a prediction is for can run.
    """
    if not (extras.has("torch") and extras.has("transformers")):
        return None
    path = cache_path(machine)
    found = None if anew else _read(path)
    if found is None and measure:
        found = measured(machine.cores)
        _write(path, found)
    return found


def cache_path(machine: Machine) -> Path:
    """Where the rates of this machine, as this process may use it, are kept."""
    version = metadata.version("torch")
    key = repr((VERSION, machine.cpu_name, machine.isa, machine.cores, machine.total_cores, version))
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "fanfold" / f"rates-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def measured(cores: int, budget_s: float = BUDGET_S) -> Rates:
    """Measure now, with up to 16 processes at once. Raises: UnitLost where one of them ends."""
    started_s = time.monotonic()
    size = max(2, min(cores, _MOST_PROCESSES))  # two even on one core: links have two ends
    path = None if refusal() else new_path()
    supervisor = Supervisor(imports=_IMPORTS, threads=1)
    try:
        group = Group(supervisor, Unit(name="probe"), partial(_rank, path), size)
        try:
            for rank in range(size):
                group.receive(rank, _ANSWER_S)  # the imports are over
            zygote = supervisor.zygote_pid
            import_s = processor_s(zygote) if zygote else 0.0
            unit_bytes = max(own_bytes(pid) for pid in group.pids if pid)
            zygote_bytes = sum(pss_bytes(pid) for pid in (zygote, *group.pids) if pid) - size * unit_bytes
            start = {"import_s": import_s, "zygote_bytes": zygote_bytes, "unit_bytes": unit_bytes}
            left_s = max(_LEAST_S, budget_s - (time.monotonic() - started_s))
            deadline_s = time.perf_counter() + left_s
            pipe = _pipe(group)
            busy = min(cores, size)
            for rank in range(size):
                group.send(rank, (cores, busy, deadline_s))
            return _collected(group, size, cores, start, pipe, started_s)
        finally:
            group.close()
    finally:
        supervisor.close()


def _collected(group: Group, size: int, cores: int, start: dict[str, Any], pipe: Link, started_s: float) -> Rates:
    """Serve the barriers until every rank has said what it found."""
    found: list[dict[str, Any]] = []
    while not found:
        said = [group.receive(rank, _ANSWER_S) for rank in range(size)]
        if all(kind == "at" for kind, _ in said):
            for rank in range(size):
                group.send(rank, "go")
        else:
            found = [body for _, body in said]
    together: list[Point] = []
    shared_by = [body["together"] for body in found if body["together"]]
    for alike in zip(*shared_by, strict=True):
        seconds = sum(point.seconds for point in alike) / len(alike)
        first = alike[0]
        together.append(Point(kind=first.kind, shape=first.shape, busy=first.busy, seconds=seconds))
    first_rank = found[0]
    copies = [body["copy_all"] for body in found if body["copy_all"]]
    links = {"pipe": pipe, **({"shared_all_reduce": first_rank["link"]} if first_rank["link"] else {})}
    return Rates(
        cores=cores,
        by=first_rank["by"],
        points=tuple(first_rank["alone"] + together),
        copy_bytes_per_s=first_rank["copy"],
        copy_all_bytes_per_s=sum(copies),
        issue_s=first_rank["issue_s"],
        own_share=first_rank["own_share"],
        **start,
        links=links,
        elapsed_s=time.monotonic() - started_s,
    )


def _rank(path: str | None, rank: int, size: int, channel: Channel) -> None:
    """One process of the group. Rank 0 measures alone while the others wait; then `busy` of them at once."""
    from fanfold.job.operators import TorchOperators
    from fanfold.machine.threads import hold_threads

    hold_threads(1)
    operators = TorchOperators()
    channel.send("here")
    while isinstance(message := channel.receive(), bytes):
        channel.send(message)  # there and back, for the pipe
    cores, busy, deadline_s = message

    def barrier(name: str) -> None:
        channel.send(("at", name))
        channel.receive()

    body: dict[str, Any] = dict.fromkeys(("together", "copy", "copy_all", "link"), None) | {"by": operators.name}
    if path is not None:
        body["link"] = _all_reduce(path, rank) if rank < 2 else None
    barrier("linked")
    measuring = Measuring(operators, deadline_s)
    if rank == 0:
        body["copy"] = copy_bytes_per_s(operators)
        body["issue_s"] = run_s(operators.smallest(), 0.02)
        before_s, cpu_s = time.perf_counter(), time.process_time()
        measuring.alone(_ALONE if cores > 1 else 1.0)
        body["own_share"] = min(1.0, (time.process_time() - cpu_s) / (time.perf_counter() - before_s))
        measuring.on_all(cores, _ON_ALL)
        body["alone"] = measuring.points
    barrier("alone")
    if busy > 1:
        together = Measuring(operators, deadline_s)
        together.together(busy, barrier)
        body["together"] = together.points
        barrier("copy")
    body["copy_all"] = copy_bytes_per_s(operators) if rank < busy else None
    channel.send(("found", body))
    channel.receive()  # until the group is closed


def _pipe(group: Group) -> Link:
    """What the parent and a worker say to each other: half of the time there and back."""

    def trip(num_bytes: int) -> Callable[[], None]:
        message = bytes(num_bytes)

        def run() -> None:
            group.send(0, message)
            group.receive(0, _ANSWER_S)

        return run

    small_s = run_s(trip(_SMALL_BYTES), 0.05, time.perf_counter) / 2
    large_s = run_s(trip(_LARGE_BYTES), 0.1, time.perf_counter) / 2
    return _link(small_s, large_s)


def _all_reduce(path: str, rank: int) -> Link:
    """Of ranks 0 and 1 over shared memory. Both call it as often, so counts are fixed."""
    with SharedGroup(path, rank, 2, _ANSWER_S) as group:

        def mean_s(num_bytes: int, count: int) -> float:
            array = np.zeros(num_bytes // 4, np.float32)
            group.all_reduce(array, "first")
            started_s = time.perf_counter()
            for _ in range(count):
                group.all_reduce(array, "probe")
            return (time.perf_counter() - started_s) / count

        small_s, large_s = mean_s(_SMALL_BYTES, 300), mean_s(_LARGE_BYTES, 8)
    return _link(small_s, large_s)


def _link(small_s: float, large_s: float) -> Link:
    return Link(start_s=small_s, bytes_per_s=_LARGE_BYTES / max(large_s - small_s, 1e-9))


def _read(path: Path) -> Rates | None:
    try:
        return from_record(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, of another version, or damaged: it is measured again


def _write(path: Path, rates: Rates) -> None:
    """Best effort: a cache that cannot be written costs time, never the job."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}.new")
        new.write_text(json.dumps(rates.record()))
        new.replace(path)
    except OSError:
        pass
