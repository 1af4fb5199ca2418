"""One job from request to result: the only place where all floors meet."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fanfold import __version__
from fanfold.data import journal
from fanfold.data.durable import storage_error
from fanfold.data.folder import QUARANTINE, RUN, SUCCESS, SUMMARY, Output, open_run, read_json, write_json
from fanfold.data.opening import open_source
from fanfold.data.run_folder import RunFolder
from fanfold.data.spool import SpoolSource
from fanfold.data.urls import is_url
from fanfold.engine.local import Local
from fanfold.engine.schedule import LEASE_S, Schedule
from fanfold.errors import DataError, PlanError, RequestError, ResumeError, Stopped
from fanfold.job import engines
from fanfold.job.agenda import JobAgenda
from fanfold.job.compiling import compile_for, compiled_as_asked, decide, expected_flops
from fanfold.job.fingerprint import check_same, fingerprint
from fanfold.job.finish import finish
from fanfold.job.log import borders, open_windows, settle
from fanfold.job.predicting import predict_job, why_not
from fanfold.job.probing import rates_for
from fanfold.job.reopen import accept_inputs, mend, reopen_failed
from fanfold.job.threads import recommended, with_threads
from fanfold.job.work import JobWork, OutputRules, place_names, unit_imports
from fanfold.machine.discover import discover
from fanfold.machine.threads import held_threads
from fanfold.plan.numerics import Numerics, windows_per_part
from fanfold.planner.units import Job, check_slots, choose, is_remote, parse_where
from fanfold.report.timeline import Timeline
from fanfold.tasks.embed import Embed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fanfold.data.source import Source
    from fanfold.data.store import Store
    from fanfold.events import Event
    from fanfold.job.request import Request
    from fanfold.machine.discover import Machine
    from fanfold.plan.plan import Cluster, Plan, Where
    from fanfold.tasks.task import Task

_WORTH_MEASURING_FLOPS = 1e14  # about a quarter of an hour of one core: then the probe's ten seconds are small
_SCAN_AHEAD = 64  # windows; a spooled input is held on disk, so fewer
_SPOOL_AHEAD = 3
_SPARK_LEASE_S = 4.0  # a lease is a Spark job, which costs some 50 ms (docs/log.md)
_UNITS_PER_WINDOW = 8  # a window holds some 60 pieces; while units compute it, the next ones are prepared


class Display(Protocol):
    """What shows a running job to a person."""

    def __call__(self, event: Event) -> None: ...

    def start(self, rows_done: int) -> None: ...

    def say(self, text: str) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A finished job."""

    out: Path | str
    folder: Path | str
    summary: dict[str, Any] = field(repr=False)
    plan: dict[str, Any] = field(repr=False)

    @property
    def exit_code(self) -> int:
        """0: all rows; 3: some rows failed."""
        return 3 if self.summary.get("rows_failed") else 0

    @property
    def report(self) -> str:
        """What `fanfold show` prints."""
        from fanfold.job.show import show

        return show(self.folder)

    def table(self) -> Any:
        """The whole output as an Arrow table, rows in input order."""
        from fanfold.job.finish import read_output

        return read_output(self.out)


def run_job(task: Task, request: Request, display: Display | None = None, *, signals: bool = False) -> Run:
    """Carry the job out, or go on with it, or say that it is finished.

    With `signals`, SIGINT, SIGTERM and SIGHUP stop it: running batches end and are committed, then Stopped.
    """
    output = Output(request.out)
    with output.local_files() as scratch:
        return _run_job(task, request, output, scratch, display, signals=signals)


def _run_job(
    task: Task, request: Request, output: Output, scratch: Path | None, display: Display | None, *, signals: bool
) -> Run:
    where = parse_where(request.on)
    request.check()
    _check_inputs_outside(request, output)
    _check_place(output, where.kind)
    machine = discover()
    numerics = _numerics(task, where.kind)
    if numerics.layout != "whole" and (where.kind == "cuda" or request.compile != "off"):
        raise PlanError(
            f"--layout {numerics.layout} with --on {request.on}, --compile {request.compile}",
            found="one model over several units runs on cores, as it is",
            allowed="--on cpu, cpu:N, inline or a Spark master, without --compile",
            do="leave one of them away",
        )
    thread_reasons: list[str] = []
    if request.threads != "1":
        numerics, thread_reasons = with_threads(request.threads, numerics, where, machine, task, output)
    elif request.dry_run and numerics.order == "dealt" and where.kind in ("inline", "cpu"):
        thread_reasons = recommended(where, machine, task, numerics)[1] + ["applied with --threads auto"]
    if request.compile == "on":
        numerics = compiled_as_asked(task, numerics)
    check_slots(where, machine)
    if where.kind not in ("inline", "spark") and not request.dry_run:
        engines.warm_up(unit_imports(task), numerics.threads_per_unit)
    say = display.say if display else _nobody
    source = open_source(
        request.inputs,
        column=task.reading(request.column),
        id_column=request.id,
        keep=request.keep,
        form="json" if output.format == "jsonl" else "typed",
        spool=output.spool(scratch),
        limit=request.limit,
        stdin=request.stdin,
        reserved=result_names(task, request.prefix),
    )
    cluster = None
    if where.kind == "spark":
        if numerics.compiled and is_remote(where):
            raise _uncompiled(where)
        if output.local is None and is_remote(where) and isinstance(source, SpoolSource):
            raise _spooled_here(where)
        cluster, machine = _cluster(where, machine, task, numerics, None if request.dry_run else output.local, say)
    plan = choose(where, machine, _job(task, source, request, numerics), numerics, cluster)
    plan = replace(plan, reasons=(*plan.reasons, *thread_reasons))
    prediction, expected = _prediction(task, source, plan, machine, request)
    plan = replace(plan, reasons=(*plan.reasons, *expected))
    for key, value in task.shown.items():
        say(f"{key + ':':<9}{value}")
    _say_plan(plan, say)
    if request.dry_run:
        return Run(out=output.shown, folder=output.folder, summary={}, plan=plan.record())
    store, stored = open_run(output, overwrite=request.overwrite, sync=request.sync, scratch=scratch)
    try:
        if request.compile == "auto" and not is_remote(where):
            plan, why = decide(task, source, plan, stored, say)
            say(f"{'':<9}- {why}")
            plan = replace(plan, reasons=(*plan.reasons, why))
        wanted = fingerprint(
            source=source,
            task=task,
            request=request,
            numerics=plan.numerics,
            format_name=output.format,
            machine=machine,
        )
        entries = journal.load(store)
        schema = str(source.kept_schema)
        if stored is not None:
            stored, appended = accept_inputs(source, store, stored, wanted, entries, append=request.allow_append)
            if appended:
                entries = journal.load(store)
            check_same(stored["fingerprint"], wanted, str(output.shown))
            check_same({"kept columns": stored.get("kept_schema")}, {"kept columns": schema}, str(output.shown))
        entries = mend(store, output, entries)
        finished = _finished(store, output, entries)
        if finished is not None and not (request.retry_failed and finished.get("rows_failed")):
            say(f"already finished: {output.shown} (nothing to do; --overwrite starts anew)")
            return _result(output, finished, (stored or {}).get("plan", {}), store)
        if plan.numerics.compiled:
            compile_for(task, plan, say)
        record = _run_record(plan, wanted, machine, task, request, output)
        record["prediction"] = prediction if stored is None else stored.get("prediction")
        write_json(store, RUN, {**record, "kept_schema": schema})
        work = JobWork(
            task=task,
            source=source,
            numerics=plan.numerics,
            output=OutputRules(
                format=output.format,
                prefix=request.prefix,
                failed_as_null=request.on_error == "null",
                too_long=request.too_long,
            ),
            folder=RunFolder(place=output.place, sync=request.sync, scratch=scratch),
        )
        if finished is not None:
            again = reopen_failed(work, store, output, entries)
            say(f"trying {again:,} failed row(s) once more" if again else "no failed row would fare better this time")
            if not again:
                return _result(output, finished, plan.record(), store)
            entries = journal.load(store)
        return _carry_out(work, plan, request, store, output, entries, display, signals=signals)
    finally:
        store.close()


def _prediction(
    task: Task, source: Source, plan: Plan, machine: Machine, request: Request
) -> tuple[dict[str, Any] | None, list[str]]:
    """run.json's `prediction`, and what to say of it. Rates that were measured before; now where it is worth it."""
    if not request.sync:  # data in memory: a few rows must not wait for a sample of themselves
        return None, []
    reason = why_not(task, source, plan)
    if reason is not None or not isinstance(task, Embed):
        return None, []
    rates = rates_for(machine, measure=expected_flops(task, source) > _WORTH_MEASURING_FLOPS)
    if rates is None:
        return None, ["no expectation yet: fanfold machine --probe measures this machine, once, in 10 seconds"]
    found = predict_job(task, source, plan, rates)
    return (None, []) if found is None else (found.record(), found.reasons)


def _carry_out(
    work: JobWork,
    plan: Plan,
    request: Request,
    store: Store,
    output: Output,
    entries: list[dict[str, Any]],
    display: Display | None,
    *,
    signals: bool,
) -> Run:
    timeline = Timeline()
    listeners: list[Callable[[Event], None]] = [timeline, *([display] if display else [])]

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    numerics = work.numerics
    num_units = len(plan.units)
    settled = settle(entries)
    agenda = JobAgenda(
        source=work.source,
        store=store,
        schedule=Schedule(
            num_units=num_units,
            windows_per_part=numerics.windows_per_part,
            look_ahead=max(2, num_units // _UNITS_PER_WINDOW),
            borders=borders(settled),
            lease_s=_SPARK_LEASE_S if plan.engine == "spark" else LEASE_S,
        ),
        suffix=work.output.format,
        on_error=request.on_error,
        max_failures=request.failure_limit,
        tell=tell,
    )
    agenda.restore(settled)
    resumed = agenda.totals.rows_resumed
    if display is not None:
        if resumed:
            display.say(f"going on: {resumed:,} rows were computed before")
        display.start(agenda.totals.rows_computed + len(agenda.totals.failures))
    spooled = work.source.total_bytes is None or any(file.path.endswith((".gz", ".zst")) for file in work.source.files)
    agenda.start(numerics.window_rows, _SPOOL_AHEAD if spooled else _SCAN_AHEAD)
    try:
        with _stop_on_signals(agenda, display) if signals else _nothing():
            _run_engine(work, plan, agenda, request)
        if agenda.stopping and not agenda.done:
            raise Stopped(
                f"the job in {output.shown}",
                found=f"a request to stop; {agenda.totals.rows_computed:,} rows are committed",
                allowed="stopping at any time",
                do="run the same command again to go on",
            )
        try:
            summary = finish(work, plan, store, output, agenda.totals, timeline)
        except OSError as error:  # copying and joining parts
            raise storage_error(Path(output.shown), "writing the output", error) from error
    finally:
        agenda.close()
        if display is not None:
            display.stop()
    return _result(output, summary, plan.record(), store)


def _result(output: Output, summary: dict[str, Any], plan: dict[str, Any], store: Store) -> Run:
    """The finished run; DataError where not one of its rows succeeded."""
    if summary.get("rows_in") and not summary.get("rows_ok"):
        first = (store.read(QUARANTINE) or b"{}").splitlines()[0]
        failure = json.loads(first)
        raise DataError(
            f"the job in {output.shown}",
            found=f"none of {summary['rows_in']:,} rows succeeded; the first: "
            f"{failure.get('error')}: {failure.get('message')}",
            allowed="at least one row without an error",
            do=f"look at {store.path(QUARANTINE)}; is --column right?",
        )
    return Run(out=output.shown, folder=output.folder, summary=summary, plan=plan)


def _run_engine(work: JobWork, plan: Plan, agenda: JobAgenda, request: Request) -> None:
    if work.source.total_bytes == 0:  # not one row: nothing is worth starting a unit for
        while not agenda.done:
            time.sleep(0.001)
        return
    if plan.engine == "inline":
        engine = engines.engine_for("inline", imports=(), threads=1)
        with held_threads(work.threads):
            engine.carry_out(work, agenda)
        return
    memory_bytes = plan.unit_memory_bytes + work.task.weights_bytes
    with engines.hold():
        if plan.engine == "spark":
            master, processes = parse_where(request.on).master, work.numerics.processes
            spark = engines.spark_for(master, imports=work.imports, threads=work.threads, processes=processes)
            spark.limit(memory_bytes=memory_bytes, timeout_batch_s=request.timeout_batch_s)
            spark.resize(plan.units)
            spark.carry_out(work, agenda)
            engines.touch()
            return
        local = engines.engine_for("local", imports=work.imports, threads=work.threads)
        assert isinstance(local, Local)
        local.limit(memory_bytes=memory_bytes, timeout_batch_s=request.timeout_batch_s)
        local.resize(plan.units)
        local.carry_out(work, agenda)
        engines.touch()


def _cluster(
    where: Where, machine: Machine, task: Task, numerics: Numerics, folder: Path | None, say: Callable[[str], None]
) -> tuple[Cluster, Machine]:
    """The Spark cluster, checked by a roll call before anything is written, and the smallest of its machines."""
    say(f"spark:   connecting to {where.master}")
    with engines.hold():
        threads, processes = numerics.threads_per_unit, numerics.processes
        spark = engines.spark_for(where.master, imports=unit_imports(task), threads=threads, processes=processes)
        made = _made_folders(folder) if folder is not None else []
        named = [task.reference] if isinstance(task.reference, str) else task.reference
        needs = tuple(filter(os.path.isabs, named))
        try:
            members = spark.roll_call(folder, needs)
        finally:
            for path in made:  # the job makes them again; after a refusal nothing is left
                path.rmdir()
    least = min(members, key=lambda member: member.memory_bytes)
    machine = replace(
        machine,
        cpu_name=least.cpu_name,
        cpu_vendor=least.cpu_vendor,
        isa=least.isa,
        cores=least.cores,
        memory_bytes=least.memory_bytes,
    )
    return spark.cluster, machine


def _spooled_here(where: Where) -> PlanError:
    return PlanError(
        f"a compressed or streamed input with --on {where.master} and an output in an object store",
        found="its windows would be kept on this machine, where executors do not see them",
        allowed="uncompressed files or Parquet; or an output folder that all machines share",
        do="unpack the input, or write into a shared folder",
    )


def _made_folders(folder: Path) -> list[Path]:
    """The folder exists; which of it and its parents had to be made, innermost first."""
    missing = []
    path = folder
    while not path.exists():
        missing.append(path)
        path = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        stored = storage_error(folder, "making the run folder", error)
        raise RequestError(stored.asked, found=stored.found, allowed=stored.allowed, do=stored.do) from error
    return missing


def _uncompiled(where: Where) -> PlanError:
    return PlanError(
        f"--compile on with --on {where.master}",
        found="compiled code is made on this machine, for this machine",
        allowed="--compile on where all units are on one machine",
        do="leave --compile away",
    )


def _numerics(task: Task, kind: str) -> Numerics:
    numerics = Numerics(dtype=task.dtype, device="cuda" if kind == "cuda" else "cpu", **task.numerics)
    width = sum(column.bytes_per_row for column in task.columns)
    return replace(numerics, windows_per_part=windows_per_part(numerics.window_rows, width))


def _job(task: Task, source: Source, request: Request, numerics: Numerics) -> Job:
    dealt = numerics.order == "dealt"  # what a row costs is not seen in its bytes: the most of it is its answer
    return Job(
        weights_bytes=task.weights_bytes,
        input_bytes=None if dealt else source.total_bytes,
        unit_memory_bytes=request.unit_memory_bytes,
        unit_bytes=task.unit_bytes,
    )


def _check_inputs_outside(request: Request, output: Output) -> None:
    """An output file that is also an input would be read while it is replaced."""
    for name in request.inputs:
        if name != "-" and not is_url(name) and Path(name).absolute() == output.shown:
            raise RequestError(
                f"output to {output.shown}",
                found="the same file is an input",
                allowed="an output that is not an input",
                do="choose another output with -o",
            )


def _check_place(output: Output, kind: str) -> None:
    if output.place.startswith("memory://") and kind != "inline":
        raise RequestError(
            f"output to {output.shown} with --on {kind}",
            found="a store in this process's memory, which other processes cannot see",
            allowed="memory:// with --on inline",
            do="use --on inline, or write to a folder or an object store",
        )


def result_names(task: Task, prefix: str) -> list[str]:
    """The names of the columns that the job adds."""
    return [prefix + name for name in (*place_names(task), *(column.name for column in task.columns))]


def _finished(store: Store, output: Output, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The summary of a finished job whose output is still there."""
    if store.read(SUCCESS) is None:
        return None
    summary = read_json(store, SUMMARY)
    records_gone = summary is None or (summary["rows_failed"] and store.read(QUARANTINE) is None)
    if records_gone or open_windows(entries):  # the latter: a run that opened it again died before it could say so
        store.remove(SUCCESS)
        store.sync_folder(".")
        return None
    if output.file is not None and not output.file.exists():
        raise ResumeError(
            f"the finished job in {store.shown}",
            found=f"{output.file} is gone",
            allowed="a finished job's output stays where it was written",
            do="start anew with --overwrite",
        )
    return summary


def _run_record(
    plan: Plan, wanted: dict[str, Any], machine: Machine, task: Task, request: Request, output: Output
) -> dict[str, Any]:
    return {
        "fanfold_version": __version__,
        "level": plan.numerics.level,
        "plan": plan.record(),
        "fingerprint": wanted,
        "request": {
            "inputs": list(request.inputs),
            "out": str(output.shown),
            "on": request.on,
            **request.record,
        },
        "task": {
            "name": task.name,
            "columns": [column.name for column in task.columns],
            **task.shown,
            "reference": task.reference,
            "options": task.options,
            "flops_per_token": task.flops_per_token,
        },
        "machine": {"cpu": machine.cpu_name, "cores": machine.cores, "memory_bytes": machine.memory_bytes},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _say_plan(plan: Plan, say: Callable[[str], None]) -> None:
    say(f"{'plan:':<9}{plan.layout} on {', '.join(unit.name for unit in plan.units)}")
    for reason in plan.reasons:
        say(f"{'':<9}- {reason}")
    for warning in plan.warnings:
        say(f"warning: {warning}")


@contextmanager
def _stop_on_signals(agenda: JobAgenda, display: Display | None) -> Iterator[None]:
    """Once: end the running batches and stop. Twice: leave at once with 130."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            if display is not None:
                display.stop()  # the terminal gets its cursor back
            engines.kill()
            os._exit(130)
        agenda.request_stop()
        if display is not None:
            name = signal.Signals(number).name
            display.say(f"{name}: finishing the running batches (again: stop at once)")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _nobody(text: str) -> None:
    return None
