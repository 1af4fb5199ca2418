"""The verbs: one entry each. What is common to all of them is here: files or data in memory in, results out."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.data.urls import is_url
from fanfold.errors import InputError, PlanError, ResumeError
from fanfold.machine.discover import check_system

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.job.run import Display, Run
    from fanfold.tasks.task import Task


def _embed() -> Callable[..., Task]:
    from fanfold.tasks.embed import make_embed

    return make_embed


def _classify() -> Callable[..., Task]:
    from fanfold.tasks.classify import make_classify

    return make_classify


def _generate() -> Callable[..., Task]:
    from fanfold.tasks.generate import make_generate

    return make_generate


# verb -> the maker of its task, imported when it is asked for; its keywords are the verb's flags
MAKERS: dict[str, Callable[[], Callable[..., Task]]] = {
    "embed": _embed,
    "classify": _classify,
    "generate": _generate,
}


def options_of(verb: str) -> tuple[str, ...]:
    """The keywords that the verb's task is made with."""
    return tuple(inspect.signature(MAKERS[verb]()).parameters)


def task_of(run: dict[str, Any], model: str | None = None) -> Task:
    """The task of a run again, from its run.json; `model`: where its folder is now. Raises ResumeError and others."""
    told = run["task"]
    if told["name"] not in MAKERS:
        raise ResumeError(
            f"making the task {told['name']!r} again",
            found="a verb that this version does not know",
            allowed=", ".join(MAKERS),
            do="use the version that has written the run",
        )
    return MAKERS[told["name"]]()(model=model or told["reference"], **told["options"])


def run_files(
    verb: str,
    inputs: Sequence[str],
    out: str | Path,
    *,
    display: Display | None = None,
    signals: bool = False,
    **options: Any,
) -> Run:
    """Files in, a run folder or one file out. `options`: those of the task's maker and of job.request.Request."""
    import platform

    check_system(platform.system())
    make = MAKERS[verb]()
    task = make(**{name: options.pop(name) for name in options_of(verb) if name in options})
    # Heavy imports begin only once the cheap checks have passed.
    from fanfold.job.request import Request
    from fanfold.job.run import run_job

    if not inputs:
        raise InputError(
            "a job without inputs",
            found="no INPUT",
            allowed="files, folders, quoted globs, - or URLs",
            do=f"name at least one, for example: fanfold {verb} docs.jsonl -o out/",
        )
    place = out if is_url(str(out)) else Path(out)
    return run_job(task, Request(inputs=tuple(inputs), out=place, **options), display, signals=signals)


def call(
    verb: str,
    data: Any,
    out: str | Path | None,
    *,
    column: str,
    on: str,
    on_error: str | None,
    show: bool,
    **options: Any,
) -> Any:
    """What `ff.embed` and its kin do: see there."""
    display = None
    if show:
        from fanfold.report.progress import Progress

        display = Progress()
    if out is None:
        from fanfold.job.memory import in_memory

        return in_memory(verb, data, column=column, on=on, on_error=on_error or "stop", display=display, **options)
    if isinstance(data, str | Path):
        data = [str(data)]
    if not (isinstance(data, list | tuple) and all(isinstance(name, str | Path) for name in data)):
        raise PlanError(
            f"ff.{verb}({type(data).__name__}, out)",
            found="data in memory together with an output folder",
            allowed="with OUT: a path, a glob or a list of them; without OUT: texts, a frame or a table",
            do="leave OUT away to get the result back, or write the data to a file first",
        )
    return run_files(
        verb,
        [str(name) for name in data],
        out,
        column=column,
        on=on,
        on_error=on_error or "quarantine",
        display=display,
        **options,
    )
