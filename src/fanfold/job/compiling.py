"""Whether the model is compiled for a job: decided once, before work, from the job alone, and recorded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fanfold.engine.local import Local
from fanfold.errors import FanfoldError, PlanError, UnitLost
from fanfold.job import engines
from fanfold.job.work import unit_imports
from fanfold.machine.threads import held_threads
from fanfold.tasks.compiled import check_compiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.data.source import Source
    from fanfold.engine.wire import Channel
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Plan
    from fanfold.tasks.task import Task

# Compiling a small BERT took 20 s; it gave a factor of 1.9 where MKL does not use a CPU's AVX-512 (AMD). Elsewhere
# little is known, so it begins where half the gain would pay: at about two minutes of one core.
WORTH_FLOPS = 1e13
_BYTES_PER_TOKEN = 4  # of text, a rule of thumb
_TIMEOUT_S = 3600.0


def expected_flops(task: Task, source: Source) -> float:
    """Of the whole job, by the size of its input; 0 where that is not known."""
    return task.flops_per_token * (source.total_bytes or 0) / _BYTES_PER_TOKEN


def compiled_as_asked(task: Task, numerics: Numerics) -> Numerics:
    """`--compile on`: PlanError where it is known at once that it cannot be."""
    if numerics.device != "cpu":
        raise PlanError(
            "--compile on", found=f"units on {numerics.device}", allowed="CPU units", do="leave --compile away"
        )
    compiled = replace(numerics, compiled=True)
    if not task.compiled_for(compiled):
        check_compiler()
    return compiled


def decide(
    task: Task, source: Source, plan: Plan, stored: dict[str, Any] | None, say: Callable[[str], None]
) -> tuple[Plan, str]:
    """`--compile auto`: the plan and why. A job that goes on keeps what it was begun with."""
    numerics = plan.numerics
    if stored is not None:
        compiled = bool(stored["fingerprint"]["numerics"]["compiled"])
        return _with(plan, compiled), f"{'compiled' if compiled else 'not compiled'}, as when the job was begun"
    flops = expected_flops(task, source)
    if numerics.device != "cpu" or flops < WORTH_FLOPS:
        return plan, f"not compiled: about {flops:.0e} FLOP; it pays from {WORTH_FLOPS:.0e} on, on a CPU"
    wanted = _with(plan, True)
    try:
        compile_for(task, wanted, say)
    except PlanError as error:
        return plan, f"not compiled: {error.found}"
    return wanted, f"compiled: about {flops:.0e} FLOP; it pays from {WORTH_FLOPS:.0e} on"


def _with(plan: Plan, compiled: bool) -> Plan:
    return replace(plan, numerics=replace(plan.numerics, compiled=compiled))


def compile_for(task: Task, plan: Plan, say: Callable[[str], None]) -> None:
    """What the plan's units will load is there; made in a process of its own, whose memory is then free again."""
    numerics = plan.numerics
    if task.compiled_for(numerics):
        return
    say("compiling the model, once for this machine (about half a minute for a small one)")
    if plan.engine == "inline":
        with held_threads(numerics.threads_per_unit):
            task.compile(numerics)
        return
    with engines.hold():
        local = engines.engine_for("local", imports=unit_imports(task), threads=numerics.threads_per_unit)
        assert isinstance(local, Local)
        local.resize(plan.units)
        group = local.start_group(partial(_compile, task, numerics), 1)
        try:
            error = group.receive(0, _TIMEOUT_S)
        except UnitLost as lost:
            raise PlanError(
                "--compile on", found=f"the compiling process ended: {lost.found}", allowed=lost.allowed, do=lost.do
            ) from lost
        finally:
            group.close()
    if error is not None:
        raise error


def _compile(task: Task, numerics: Numerics, rank: int, size: int, channel: Channel) -> None:
    from fanfold.machine.threads import hold_threads

    hold_threads(numerics.threads_per_unit)
    try:
        task.compile(numerics)
    except FanfoldError as error:
        channel.send(error)
    else:
        channel.send(None)
