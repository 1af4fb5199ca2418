"""How many units, and which: from what the user asked, what the machine allows and what the job holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fanfold.errors import PlanError
from fanfold.plan.layout import Layout, product_of
from fanfold.plan.plan import Plan, Unit, Where
from fanfold.quantity import format_bytes

if TYPE_CHECKING:
    from fanfold.machine.discover import Machine
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Cluster

ALLOWED = "inline, cpu, cpu:N, cuda, cuda:0,1, spark://HOST:PORT, yarn, k8s://..., local[N], local-cluster[N,CORES,MB]"
_SPARK_LOCAL = re.compile(
    r"local\[([1-9][0-9]{0,3}|\*)\]|local-cluster\[([1-9][0-9]{0,3}), ?([1-9][0-9]{0,3}), ?[1-9][0-9]{0,6}\]"
)
_SPARK_REMOTE = re.compile(r"spark://[^\s:,/]+:[0-9]{1,5}(,[^\s:,/]+:[0-9]{1,5})*|yarn|k8s://\S+")
OVERSUBSCRIPTION = 8  # an explicit cpu:N may ask for this many units per allowed core
# A worker forked from a zygote holds about 80 MB of its own; a 2,048-token batch at width 1,024 adds up to
# 190 MB (measured on a 2-core machine, docs/log.md).
UNIT_BYTES = 300_000_000
_BYTES_PER_TOKEN = 4  # of text, a rule of thumb; only decides whether a tiny job is worth a second unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the planner must know of a job."""

    weights_bytes: int
    input_bytes: int | None  # None: a stream
    unit_memory_bytes: int | None = None  # asked for; None: an equal share of what is allowed
    unit_bytes: int = 0  # what every unit holds for itself, beside weights and batches


def parse_where(text: str) -> Where:
    """`--on` in words the planner understands."""
    text = text.strip()
    if text in ("inline", "cpu", "cuda"):
        return Where(kind=text)
    if found := re.fullmatch(r"cpu:([0-9]{1,9})", text):
        return Where(kind="cpu", count=int(found[1]))
    if found := re.fullmatch(r"cuda:([0-9]{1,9}(?:,[0-9]{1,9})*)", text):
        return Where(kind="cuda", devices=tuple(int(number) for number in found[1].split(",")))
    if _SPARK_LOCAL.fullmatch(text) or _SPARK_REMOTE.fullmatch(text):
        return Where(kind="spark", master=text)
    if text.startswith("sc://"):
        raise PlanError(
            f"--on {text[:80]}",
            found="Spark Connect, which runs DataFrames only",
            allowed=ALLOWED,
            do="use fanfold.spark.embed(df, ...) with a Connect session, or --on spark://HOST:PORT",
        )
    raise PlanError(
        f"--on {text[:80]}",
        found="no such place to run",
        allowed=ALLOWED,
        do="leave --on away to use all allowed cores",
    )


def is_remote(where: Where) -> bool:
    """Whether units may be on machines that share nothing with this one but a file system."""
    return where.kind == "spark" and not _SPARK_LOCAL.fullmatch(where.master)


def check_slots(where: Where, machine: Machine) -> None:
    """PlanError where a Spark master of this machine would put too many units on its cores."""
    found = _SPARK_LOCAL.fullmatch(where.master) if where.kind == "spark" else None
    if found is None or found[1] == "*":
        return
    slots = int(found[1]) if found[1] else int(found[2]) * int(found[3])
    most = OVERSUBSCRIPTION * machine.cores
    if slots > most:
        raise PlanError(
            f"--on {where.master}",
            found=f"{slots} slots on {machine.cores} allowed core(s)",
            allowed=f"at most {most}",
            do=f"use local[{machine.cores}], or a cluster of more machines",
        )


def choose(where: Where, machine: Machine, job: Job, numerics: Numerics, cluster: Cluster | None = None) -> Plan:
    """The units for the job, with reasons; PlanError where the request cannot be met.

    On Spark `cluster` is what there is, and `machine` the smallest of its machines.
    """
    if cluster is not None:
        return _choose_spark(cluster, machine, job, numerics)
    if where.kind == "inline":
        reasons = ["inline: one unit in this process, as asked"]
        return _plan("inline", (Unit(name="inline"),), numerics, _share(machine, job, 1), reasons)
    if where.kind == "cuda":
        return _choose_cuda(where, machine, job, numerics)
    own = job.weights_bytes if numerics.compiled else 0  # a compiled library copies its weights in every process
    each = (job.unit_memory_bytes or UNIT_BYTES + job.unit_bytes) + own
    room = max(1, (machine.memory_bytes - job.weights_bytes) // each)
    if where.count is not None:
        return _asked_for(where.count, machine, job, room, numerics)
    reasons = [f"{machine.cores} core(s) allowed: {machine.cores_reason}"]
    count = machine.cores // (numerics.threads_per_unit * numerics.processes) or 1
    if room < count:
        count = room
        reasons.append(f"memory for {room}: {format_bytes(machine.memory_bytes)} allowed ({machine.memory_reason})")
    pieces = _expected_pieces(job, numerics)
    if pieces is not None and pieces < count:
        count = max(1, pieces)
        reasons.append(f"the input holds about {max(1, pieces)} piece(s) of work: more units would only load the model")
    reasons.append(f"data={count}: {_held(numerics)}")
    return _plan("local", _cpu_units(count), numerics, _share(machine, job, count), reasons)


def _held(numerics: Numerics) -> str:
    if numerics.layout == "whole":
        return "each unit holds the whole model and computes its own pieces"
    return (
        f"each unit is a group of {numerics.processes} processes that share one model ({numerics.layout}, as asked); "
        "fewer, whole units are faster where the model fits"
    )


def _share(machine: Machine, job: Job, count: int) -> int:
    """What one of `count` units may hold of its own: as asked, or an equal share of what the weights leave."""
    if job.unit_memory_bytes is not None:
        if job.unit_memory_bytes < job.unit_bytes:
            raise PlanError(
                f"--memory-per-unit {format_bytes(job.unit_memory_bytes)}",
                found=f"the cache of keys and values alone takes {format_bytes(job.unit_bytes)} a unit",
                allowed="more than the cache takes",
                do="ask for a smaller cache with --kv-memory, or allow more memory",
            )
        return job.unit_memory_bytes
    return max(UNIT_BYTES + job.unit_bytes, (machine.memory_bytes - job.weights_bytes) // count)


def _expected_pieces(job: Job, numerics: Numerics) -> int | None:
    if job.input_bytes is None:
        return None
    return -(-job.input_bytes // (_BYTES_PER_TOKEN * numerics.batch_tokens * numerics.piece_batches))


def _asked_for(count: int, machine: Machine, job: Job, room: int, numerics: Numerics) -> Plan:
    most = min(OVERSUBSCRIPTION * machine.cores, room)
    if count < 1 or count > most:
        raise PlanError(
            f"--on cpu:{count}",
            found=f"{machine.cores} allowed core(s), memory for {room} units",
            allowed=f"cpu:1 to cpu:{most}",
            do=f"leave the number away to use cpu:{min(machine.cores, room)}",
        )
    warnings = []
    if numerics.processes > 1:
        if count % numerics.processes:
            raise PlanError(
                f"--on cpu:{count} with --layout {numerics.layout}",
                found=f"{product_of(numerics.layout)} processes for one model; {count} are asked for, which leaves "
                f"{count % numerics.processes} over",
                allowed=f"a multiple of {numerics.processes}",
                do=f"use cpu:{count // numerics.processes * numerics.processes or numerics.processes}",
            )
        groups = count // numerics.processes
        if count > machine.cores:
            warnings.append(f"cpu:{count} is more than the {machine.cores} allowed core(s): processes will share cores")
        reasons = [f"data={groups}: {_held(numerics)}"]
        return _plan("local", _cpu_units(groups), numerics, _share(machine, job, groups), reasons, warnings)
    if count > machine.cores:
        warnings.append(f"cpu:{count} is more than the {machine.cores} allowed core(s): units will share cores")
    reasons = [f"data={count}: as asked"]
    return _plan("local", _cpu_units(count), numerics, _share(machine, job, count), reasons, warnings)


def _choose_cuda(where: Where, machine: Machine, job: Job, numerics: Numerics) -> Plan:
    present = [gpu.index for gpu in machine.gpus]
    wanted = list(where.devices) or present
    missing = [index for index in wanted if index not in present]
    if not present or missing or len(set(wanted)) != len(wanted):
        raise PlanError(
            "--on cuda" + (":" + ",".join(map(str, where.devices)) if where.devices else ""),
            found=f"GPUs {present}" if present else "no GPU with a working driver",
            allowed="each GPU of this machine once",
            do="leave --on away to use the CPU" if not present else f"choose among {present}",
        )
    units = tuple(Unit(name=f"cuda:{index}", device=f"cuda:{index}") for index in wanted)
    reasons = [f"data={len(units)}: one worker per GPU, as asked"]
    return _plan("local", units, numerics, _share(machine, job, len(units)), reasons)


def _choose_spark(cluster: Cluster, machine: Machine, job: Job, numerics: Numerics) -> Plan:
    executors, slots = len(cluster.executors), cluster.slots
    cores = numerics.threads_per_unit * numerics.processes
    reasons = [f"{executors} executor(s) with {slots} slot(s) of {cores} core(s)"]
    warnings = []
    if cluster.unsafe:
        warnings.append(cluster.unsafe)
    count = slots
    pieces = _expected_pieces(job, numerics)
    if pieces is not None and pieces < count:
        count = max(1, pieces)
        reasons.append(f"the input holds about {max(1, pieces)} piece(s) of work: more units would only load the model")
    by_host: dict[str, int] = {}
    for executor in cluster.executors:
        by_host[executor.host] = by_host.get(executor.host, 0) + executor.cores // cores
    whole = "each slot holds the whole model and computes its own pieces"
    reasons.append(f"data={count}: {whole if numerics.layout == 'whole' else _held(numerics)}")
    units = tuple(Unit(name=f"spark:{index}") for index in range(count))
    return _plan("spark", units, numerics, _share(machine, job, max(by_host.values(), default=1)), reasons, warnings)


def _cpu_units(count: int) -> tuple[Unit, ...]:
    return tuple(Unit(name=f"cpu:{index}") for index in range(count))


def _plan(
    engine: str,
    units: tuple[Unit, ...],
    numerics: Numerics,
    unit_memory_bytes: int,
    reasons: list[str],
    warnings: list[str] | None = None,
) -> Plan:
    return Plan(
        engine=engine,
        units=units,
        layout=Layout(data=len(units), split=numerics.layout),
        numerics=numerics,
        unit_memory_bytes=unit_memory_bytes,
        reasons=tuple(reasons),
        warnings=tuple(warnings or ()),
    )
