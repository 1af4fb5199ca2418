"""`embed` from Python and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.data.urls import is_url
from fanfold.errors import PlanError
from fanfold.machine.discover import check_system
from fanfold.tasks.embed import make_embed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.job.run import Display, Run
    from fanfold.plan.numerics import Dtype


def embed_files(
    inputs: Sequence[str],
    out: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    prefix_text: str | None = None,
    prompt_name: str | None = None,
    chunk: int | None = None,
    overlap: int | None = None,
    merge: str | None = None,
    display: Display | None = None,
    signals: bool = False,
    **request: Any,
) -> Run:
    """Files in, a run folder or one file out. Keywords beyond the model's are those of job.request.Request."""
    import platform

    check_system(platform.system())
    task = make_embed(
        model=model,
        revision=revision,
        dtype=dtype,
        max_length=max_length,
        prefix_text=prefix_text,
        prompt_name=prompt_name,
        chunk=chunk,
        overlap=overlap,
        merge=merge,
    )
    # Heavy imports begin only once the cheap checks have passed.
    from fanfold.job.request import Request
    from fanfold.job.run import missing_inputs, run_job

    if not inputs:
        raise missing_inputs()
    place = out if is_url(str(out)) else Path(out)
    return run_job(task, Request(inputs=tuple(inputs), out=place, **request), display, signals=signals)


def embed(
    data: Any,
    out: str | Path | None = None,
    *,
    column: str = "text",
    model: str | None = None,
    on: str = "cpu",
    on_error: str | None = None,
    show: bool = False,
    **options: Any,
) -> Any:
    """Embeddings of texts, as sentence-transformers' `encode` would give them.

    With `out`: `data` names files (a path, a glob, or a list of them); returns a Run. Without: `data` is a list
    of texts, a Series or an array of texts (an ndarray float32 [n, d] comes back), or a frame or Arrow table
    (it comes back with the column `embedding`); a path is read. Row order is kept.

    `on_error` in memory is `stop` (DataError names the row) unless it is `null` (NaN or null for that row).
    Other keywords are the command line's: revision, dtype, max_length, chunk, prefix_text, keep, id, ...
    Raises: the errors of fanfold.errors; MissingExtra says what to install.
    """
    display = None
    if show:
        from fanfold.report.progress import Progress

        display = Progress()
    if out is None:
        from fanfold.job.memory import embed_in_memory

        return embed_in_memory(
            data, column=column, model=model, on=on, on_error=on_error or "stop", display=display, **options
        )
    if isinstance(data, str | Path):
        data = [str(data)]
    if not (isinstance(data, list | tuple) and all(isinstance(name, str | Path) for name in data)):
        raise PlanError(
            f"ff.embed({type(data).__name__}, out)",
            found="data in memory together with an output folder",
            allowed="with OUT: a path, a glob or a list of them; without OUT: texts, a frame or a table",
            do="leave OUT away to get the result back, or write the data to a file first",
        )
    return embed_files(
        [str(name) for name in data],
        out,
        column=column,
        model=model,
        on=on,
        on_error=on_error or "quarantine",
        display=display,
        **options,
    )
