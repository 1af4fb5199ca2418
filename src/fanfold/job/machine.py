"""`fanfold machine`: what there is, what is allowed, and how fast it is, measured once in under ten seconds."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fanfold.errors import RequestError
from fanfold.job import engines
from fanfold.job.probing import rates_for
from fanfold.machine.discover import discover
from fanfold.machine.measure import LARGE
from fanfold.machine.probe import numpy_matmul, numpy_threads, probe
from fanfold.machine.rates import work
from fanfold.planner.units import parse_where
from fanfold.quantity import format_bytes, format_rate

if TYPE_CHECKING:
    from fanfold.machine.discover import Machine

_MIN_SHM_BYTES = 64_000_000


def machine_record(*, measure: bool = True, anew: bool = False) -> dict[str, Any]:
    """Plain values for --json. Rates are those that were measured before; now where there are none, or `anew`."""
    machine = discover()
    record: dict[str, Any] = {
        "system": machine.system,
        "python": machine.python_version,
        "cpu": machine.cpu_name,
        "cpu_vendor": machine.cpu_vendor,
        "isa": machine.isa,
        "cores": machine.cores,
        "cores_reason": machine.cores_reason,
        "total_cores": machine.total_cores,
        "memory_bytes": machine.memory_bytes,
        "memory_reason": machine.memory_reason,
        "total_memory_bytes": machine.total_memory_bytes,
        "shm_free_bytes": machine.shm_free_bytes,
        "gpus": [{"index": gpu.index, "name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in machine.gpus],
    }
    if measure:
        record["probe"] = _probed(machine, anew)
    return record


def cluster_record(on: str) -> dict[str, Any]:
    """A Spark cluster as plain values: its executors, what their Python sees, and what is unsafe about it."""
    where = parse_where(on)
    if where.kind != "spark":
        raise RequestError(
            f"fanfold machine --on {on}",
            found="a place on this machine",
            allowed="spark://HOST:PORT, yarn, k8s://..., local[N], local-cluster[N,CORES,MB]",
            do="leave --on away to see this machine",
        )
    with engines.hold():
        spark = engines.spark_for(where.master, imports=(), threads=1)
        members = spark.roll_call()
    hosts = {member.place.host: member for member in members}
    return {
        "master": where.master,
        "slots": spark.cluster.slots,
        "executors": [asdict(executor) for executor in spark.cluster.executors],
        "hosts": [
            {
                "host": host,
                "cpu": member.cpu_name,
                "cpu_vendor": member.cpu_vendor,
                "isa": member.isa,
                "cores": member.cores,
                "memory_bytes": member.memory_bytes,
                "python": member.software.python,
                "packages": dict(member.software.packages),
            }
            for host, member in sorted(hosts.items())
        ],
        "warnings": [spark.cluster.unsafe] if spark.cluster.unsafe else [],
    }


def cluster_text(record: dict[str, Any]) -> str:
    """The record for a person."""
    lines = [f"spark:    {record['master']}, {len(record['executors'])} executor(s), {record['slots']} slot(s)"]
    for executor in record["executors"]:
        memory = format_bytes(executor["memory_bytes"])
        lines.append(
            f"executor: {executor['name']} on {executor['host']}, {executor['cores']} core(s), {memory} for Java"
        )
    for host in record["hosts"]:
        versions = ", ".join(f"{name} {number}" for name, number in host["packages"].items())
        lines.append(f"host:     {host['host']}: {host['cpu']} ({host['isa']}), {host['cores']} core(s) allowed, ")
        lines[-1] += f"{format_bytes(host['memory_bytes'])}; Python {host['python']}, {versions}"
    lines += [f"warning: {warning}" for warning in record["warnings"]]
    return "\n".join(lines)


def machine_text(record: dict[str, Any]) -> str:
    """The record for a person."""
    lines = [
        f"system:   {record['system']}, Python {record['python']}",
        f"cpu:      {record['cpu']} ({record['isa']})",
        f"cores:    {record['cores']} allowed ({record['cores_reason']})",
        f"memory:   {format_bytes(record['memory_bytes'])} allowed ({record['memory_reason']})",
    ]
    for gpu in record["gpus"]:
        lines.append(f"gpu {gpu['index']}:    {gpu['name']}, {format_bytes(gpu['memory_bytes'])}")
    if not record["gpus"]:
        lines.append("gpus:     none with a working driver")
    shm = record["shm_free_bytes"]
    if shm is None or shm < _MIN_SHM_BYTES:
        found = "missing" if shm is None else f"only {format_bytes(shm)} free"
        lines.append(f"/dev/shm: {found}; Fanfold does not need it, libraries that use it may crash")
    else:
        lines.append(f"/dev/shm: {format_bytes(shm)} free")
    if "probe" in record:
        measured = record["probe"]
        lines += [
            f"gemm:     {format_rate(measured['gemm_one_thread_flop_per_s'], 'FLOP')} on one thread, "
            f"{format_rate(measured['gemm_all_cores_flop_per_s'], 'FLOP')} on {record['cores']} "
            f"(float32, {measured['by']})",
            f"copy:     {format_rate(measured['copy_bytes_per_s'], 'B')} on one thread (bytes read and written)",
            *_detail_lines(measured, record["cores"]),
        ]
    return "\n".join(lines)


def _detail_lines(measured: dict[str, Any], cores: int) -> list[str]:
    """Of the whole probe, where torch is there: bandwidth of all, skinny products, links, imports."""
    if "points" not in measured:
        return []
    gemms = [p for p in measured["points"] if p["kind"] == "gemm" and p["threads"] == p["busy"] == 1]
    alone = {tuple(p["shape"]): work("gemm", p["shape"]) / p["seconds"] for p in gemms}
    shown = [min(alone, key=lambda shape: alone[shape]), max(alone, key=lambda shape: alone[shape])]
    return [
        f"          {format_rate(measured['copy_all_bytes_per_s'], 'B')} by {cores} at once",
        f"shapes:   {len(alone)} products, from "
        + " to ".join(f"{format_rate(alone[shape], 'FLOP')} ({'x'.join(map(str, shape))})" for shape in shown),
        *(
            f"{name.split('_')[0] + ':':<9} {link['start_s'] * 1e6:.0f} us and {format_rate(link['bytes_per_s'], 'B')} "
            f"between two processes ({name.replace('_', ' ')})"
            for name, link in measured["links"].items()
        ),
        f"imports:  {measured['import_s']:.1f} s of a processor until units can start",
        f"measured: in {measured['elapsed_s']:.1f} s, with {measured['own_share']:.0%} of a core; others had the rest",
    ]


def _probed(machine: Machine, anew: bool) -> dict[str, Any]:
    """The probe's record; without torch a short one, of numpy's product."""
    rates = rates_for(machine, anew=anew)
    if rates is None:
        found = probe(numpy_matmul, threads=numpy_threads, cores=machine.cores)
        return {
            "by": "numpy",
            "gemm_one_thread_flop_per_s": found.gemm_one_flop_per_s,
            "gemm_all_cores_flop_per_s": found.gemm_all_flop_per_s,
            "copy_bytes_per_s": found.copy_bytes_per_s,
            "elapsed_s": found.elapsed_s,
        }
    return {
        "gemm_one_thread_flop_per_s": rates.rate("gemm", LARGE),
        "gemm_all_cores_flop_per_s": rates.rate("gemm", LARGE, threads=machine.cores),
        **rates.record(),
    }
