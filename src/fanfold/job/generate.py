"""`generate` from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.data.scratch import scratch_folder
from fanfold.data.urls import is_url
from fanfold.errors import FanfoldError, PlanError
from fanfold.machine.discover import check_system
from fanfold.quantity import parse_bytes
from fanfold.tasks.generate import Generate, make_generate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.job.run import Display, Run

_TASK_OPTIONS = (
    *("model", "revision", "dtype", "prompt", "chat", "system", "max_new_tokens", "stop", "temperature", "top_p"),
    *("top_k", "min_p", "repetition_penalty", "seed", "full_text", "json_schema"),
)
_PEEK_BYTES = 1 << 20


def generate_files(
    inputs: Sequence[str],
    out: str | Path,
    *,
    column: str = "text",
    id: str | None = None,
    memory_per_unit: str | None = None,
    display: Display | None = None,
    signals: bool = False,
    stdin: Any = None,
    **options: Any,
) -> Run:
    """Files in, a run folder or one file out. Other keywords: make_generate's, and those of job.request.Request."""
    import platform

    check_system(platform.system())
    of_task = {name: options.pop(name) for name in _TASK_OPTIONS if name in options}
    task = _task(inputs, stdin, column, of_task, memory_per_unit)
    # Heavy imports begin only once the cheap checks have passed.
    from fanfold.job.request import Request
    from fanfold.job.run import missing_inputs, run_job

    if not inputs:
        raise missing_inputs("generate")
    if task.prompting.requests and id is None:
        id = "custom_id"
    place = out if is_url(str(out)) else Path(out)
    request = Request(
        inputs=tuple(inputs), out=place, column=column, id=id, memory_per_unit=memory_per_unit, stdin=stdin, **options
    )
    return run_job(task, request, display, signals=signals)


def _task(
    inputs: Sequence[str], stdin: Any, column: str, of_task: dict[str, Any], memory_per_unit: str | None
) -> Generate:
    stop = of_task.pop("stop", ())
    requests = of_task.get("prompt") is None and column == "text" and _are_requests(inputs, stdin)
    return make_generate(
        column=column,
        requests=requests,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        memory_bytes=parse_bytes(memory_per_unit, name="--memory-per-unit") if memory_per_unit else None,
        **{"model": None, **of_task},
    )


def _are_requests(inputs: Sequence[str], stdin: Any) -> bool:
    """Whether the first record is a line of an OpenAI batch file: {"custom_id": ..., "body": {"messages": [...]}}."""
    from fanfold.data.listing import list_inputs
    from fanfold.data.spool import open_stream

    if list(inputs) == ["-"]:
        first = stdin.peek() if hasattr(stdin, "peek") else b""
        return b'"custom_id"' in first and b'"body"' in first and b'"messages"' in first
    try:
        listing = list_inputs(inputs)
        if listing.family != "jsonl":
            return False
        with open_stream(listing.files[0].path) as stream:
            record = json.loads(stream.readline(_PEEK_BYTES))
    except (FanfoldError, OSError, ValueError, RecursionError):  # said better where the input is opened
        return False
    body = record.get("body") if isinstance(record, dict) else None
    return isinstance(body, dict) and isinstance(body.get("messages"), list)


def generate(
    data: Any,
    out: str | Path | None = None,
    *,
    model: str,
    column: str = "text",
    on: str = "cpu",
    on_error: str | None = None,
    show: bool = False,
    **options: Any,
) -> Any:
    """Completions of a language model, as transformers' `generate` would give them; greedy unless a flag asks.

    With `out`: `data` names files (a path, a glob, or a list of them); returns a Run. Without: `data` is a list of
    texts, or of messages with chat=True (a list of texts comes back), or a frame or Arrow table (it comes back with
    the columns generated_text, finish_reason, prompt_tokens, completion_tokens); a path is read and gives texts.

    `json_schema` is a file, an object or a pydantic model. `on_error` in memory is `stop` (DataError names the row)
    unless it is `null` (None for that row). Other keywords are the command line's: prompt, chat, system,
    max_new_tokens, stop, temperature, top_p, top_k, min_p, repetition_penalty, seed, full_text, keep, id, ...
    Raises: the errors of fanfold.errors; MissingExtra says what to install.
    """
    display = None
    if show:
        from fanfold.report.progress import Progress

        display = Progress()
    common = {"model": model, "column": column, "on": on, "display": display, **options}
    if out is None:
        return _in_memory(data, {**common, "on_error": on_error or "stop"})
    if isinstance(data, str | Path):
        data = [str(data)]
    if not (isinstance(data, list | tuple) and all(isinstance(name, str | Path) for name in data)):
        raise PlanError(
            f"ff.generate({type(data).__name__}, out)",
            found="data in memory together with an output folder",
            allowed="with OUT: a path, a glob or a list of them; without OUT: texts, a frame or a table",
            do="leave OUT away to get the result back, or write the data to a file first",
        )
    return generate_files([str(name) for name in data], out, on_error=on_error or "quarantine", **common)


def _in_memory(data: Any, options: dict[str, Any]) -> Any:
    from fanfold.job.finish import read_output

    with scratch_folder() as folder:
        kind, rows = ("path", None) if isinstance(data, str | Path) else _rows(data, options["column"])
        source = str(data)
        if rows is not None:
            if not rows:
                return [] if kind == "texts" else data
            source = str(folder / "rows.jsonl")
            with open(source, "w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        run = generate_files([source], folder / "out", keep="none", sync=False, **options)
        table = read_output(run.folder).drop_columns(["row"])
    if kind in ("texts", "path"):
        return table.column(options.get("prefix", "") + "generated_text").to_pylist()
    return _joined(data, table)


def _rows(data: Any, column: str) -> tuple[str, list[dict[str, Any]]]:
    """texts or frame, and the rows as objects."""
    if hasattr(data, "to_pylist") and hasattr(data, "schema"):  # an Arrow table
        return "frame", data.to_pylist()
    if hasattr(data, "columns") and hasattr(data, "to_dicts"):  # Polars
        return "frame", data.to_dicts()
    if hasattr(data, "columns") and hasattr(data, "to_dict"):  # pandas
        missing = data.astype(object).where(data.notna(), None)
        return "frame", missing.to_dict(orient="records")
    values = data.tolist() if hasattr(data, "tolist") else list(data)
    if values and all(isinstance(value, dict) for value in values):
        return "texts", values
    return "texts", [{column: value} for value in values]


def _joined(data: Any, table: Any) -> Any:
    """The frame or table with the result columns."""
    if hasattr(data, "append_column"):
        for name in table.column_names:
            data = data.append_column(name, table.column(name))
        return data
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    if hasattr(data, "with_columns"):
        import sys

        return data.with_columns(*(sys.modules["polars"].Series(name, values) for name, values in columns.items()))
    return data.assign(**columns)
