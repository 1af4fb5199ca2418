"""`--threads`: how many a unit has. Threads are numerics: decided once, before work, and recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fanfold.errors import InputError, PlanError, RequestError
from fanfold.job.machine import machine_record
from fanfold.job.opened import open_existing
from fanfold.planner.threads import Rates, Step, recommend

if TYPE_CHECKING:
    from fanfold.data.folder import Output
    from fanfold.machine.discover import Machine
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Where
    from fanfold.tasks.task import Task

_STEP_ROWS = 64  # sequences that a unit decodes at a time (tasks/decode.py)


def with_threads(
    asked: str, numerics: Numerics, where: Where, machine: Machine, task: Task, output: Output
) -> tuple[Numerics, list[str]]:
    """The numerics with --threads as asked, and why; a job that goes on keeps what it was begun with under `auto`."""
    if asked == "auto":
        stored = _stored(output)
        if stored is not None:
            return replace(numerics, threads_per_unit=stored), [f"{stored} thread(s) a unit, as when the job was begun"]
        if where.kind not in ("inline", "cpu"):
            return numerics, []
        chosen, reasons = recommended(where, machine, task, numerics)
        return replace(numerics, threads_per_unit=chosen), reasons
    if not asked.isdecimal() or not 1 <= int(asked) <= machine.cores:
        raise RequestError(
            f"--threads {asked}",
            found=f"{machine.cores} allowed core(s)",
            allowed=f"auto, or 1 to {machine.cores} threads a unit",
            do="leave it away for one thread a unit",
        )
    if where.kind == "cpu" and where.count is not None and where.count * int(asked) > machine.cores > 1 < int(asked):
        raise PlanError(
            f"--on cpu:{where.count} --threads {asked}",
            found=f"{where.count * int(asked)} threads on {machine.cores} allowed core(s)",
            allowed="no more threads than cores",
            do=f"use --on cpu:{max(1, machine.cores // int(asked))}",
        )
    return replace(numerics, threads_per_unit=int(asked)), []


def recommended(where: Where, machine: Machine, task: Task, numerics: Numerics) -> tuple[int, list[str]]:
    """Threads a unit, from a measurement of two seconds; and why."""
    probe = machine_record(measure=True)["probe"]
    rates = Rates(
        cores=machine.cores,
        gemm_one_flop_per_s=probe["gemm_one_thread_flop_per_s"],
        gemm_all_flop_per_s=probe["gemm_all_cores_flop_per_s"],
        copy_bytes_per_s=probe["copy_bytes_per_s"],
    )
    step = Step(
        weights_bytes=task.weights_bytes,
        own_bytes=task.unit_bytes,
        rows=_STEP_ROWS if numerics.order == "dealt" else numerics.batch_tokens,
        flops_per_row=task.flops_per_token,
    )
    units = 1 if where.kind == "inline" else where.count
    option, reasons = recommend(rates, step, units=units)
    return option.threads, reasons


def _stored(output: Output) -> int | None:
    try:
        run = open_existing(output.shown).run
    except InputError:
        return None
    return int(run["plan"]["numerics"]["threads_per_unit"])
