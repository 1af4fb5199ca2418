"""What the command line calls: flags and a TOML file become a request, progress goes to stderr."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fanfold.errors import RequestError
from fanfold.job.request import names_of

if TYPE_CHECKING:
    from fanfold.job.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags that all verbs share, by name."""

    inputs: tuple[str, ...] = ()
    out: str | None = None
    model: str | None = None
    column: str = "text"
    on: str = "cpu"
    keep: str | tuple[str, ...] = "all"
    id: str | None = None
    prefix: str = ""
    dtype: str = "float32"
    revision: str | None = None
    on_error: str = "quarantine"
    max_failures: str | None = None
    memory_per_unit: str | None = None
    timeout_batch: str | None = None
    too_long: str = "truncate"
    threads: str = "1"
    compile: str = "off"
    limit: int | None = None
    overwrite: bool = False
    allow_append: bool = False
    retry_failed: bool = False
    dry_run: bool = False

    verb: ClassVar[str] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedFlags(Flags):
    """The flags of `fanfold embed`."""

    prefix_text: str | None = None
    prompt_name: str | None = None
    max_length: int | None = None
    layout: str | None = None
    chunk: int | None = None
    overlap: int | None = None
    merge: str | None = None

    verb: ClassVar[str] = "embed"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateFlags(Flags):
    """The flags of `fanfold generate`."""

    model: tuple[str, ...] = ()  # type: ignore[assignment]  # several vote
    prompt: str | None = None
    chat: bool = False
    system: str | None = None
    max_new_tokens: str | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    full_text: bool = False
    json_schema: str | None = None
    merge: str | None = None
    kv_memory: str | None = None
    layout: str | None = None

    verb: ClassVar[str] = "generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyFlags(Flags):
    """The flags of `fanfold classify`."""

    model: tuple[str, ...] = ()  # type: ignore[assignment]  # several are an ensemble
    pair: str | None = None
    labels: str | tuple[str, ...] | None = None
    hypothesis_template: str | None = None
    top_k: int | None = None
    multi_label: bool = False
    threshold: float | None = None
    aggregation: str | None = None
    max_length: int | None = None
    merge: str | None = None
    layout: str | None = None

    verb: ClassVar[str] = "classify"


FLAGS: dict[str, type[Flags]] = {flags.verb: flags for flags in (EmbedFlags, ClassifyFlags, GenerateFlags)}


def run_verb(
    flags: Flags,
    *,
    config: str | None,
    quiet: bool,
    color: bool,
    as_json: bool = False,
    given: frozenset[str] = frozenset(),
) -> Run:
    """Carry out the verb whose flags these are; `given` are those that stood on the command line."""
    from fanfold.job.show import summary_lines
    from fanfold.job.verbs import run_files
    from fanfold.report.progress import Progress

    if config is not None:
        flags = with_config(flags, Path(config), given)
    if flags.out is None:
        raise RequestError(
            f"fanfold {flags.verb}",
            found="no -o OUT",
            allowed="a folder, or a file .parquet, .jsonl or .csv",
            do="add -o, for example: -o out/",
        )
    values = asdict(flags)
    inputs, out = values.pop("inputs"), values.pop("out")
    values["keep"] = flags.keep
    if out == "-" and as_json:
        raise RequestError(
            "--json with -o -",
            found="rows and summary would both go to stdout",
            allowed="one of the two",
            do="write the rows to a file, or leave --json away",
        )
    if out == "-":
        return _to_stdout(flags.verb, inputs, values, quiet=quiet, color=color)
    if "-" in inputs:
        values["stdin"] = sys.stdin.buffer
    display = Progress(quiet=quiet, color=color)
    run = run_files(flags.verb, inputs, out, display=display, signals=True, **values)
    for line in summary_lines(run.summary):
        display.say(line)
    return run


def _to_stdout(verb: str, inputs: tuple[str, ...], values: dict[str, Any], *, quiet: bool, color: bool) -> Run:
    """JSONL rows in order on stdout; nothing is kept, so there is nothing to resume."""
    import shutil

    from fanfold.data.scratch import scratch_folder
    from fanfold.job.verbs import run_files
    from fanfold.report.progress import Progress

    with scratch_folder() as folder:
        if "-" in inputs:
            values["stdin"] = sys.stdin.buffer
        out = folder / "out.jsonl"
        run = run_files(
            verb, inputs, out, display=Progress(quiet=quiet, color=color), signals=True, **{**values, "sync": False}
        )
        if out.exists():
            with out.open("rb") as rows:
                shutil.copyfileobj(rows, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return run


def run_config(path: str, *, as_json: bool, quiet: bool, color: bool) -> Run:
    """Carry out what a job file describes; its `task` says which verb that is."""
    task = _values(Path(path)).get("task", "embed")
    flags = FLAGS[task]() if task in FLAGS else EmbedFlags()
    return run_verb(flags, config=path, quiet=quiet, color=color, as_json=as_json)


def with_config(flags: Flags, path: Path, given: frozenset[str] = frozenset()) -> Flags:
    """The file's values where the command line said nothing."""
    values = _values(path)
    task = values.pop("task", flags.verb)
    if task != flags.verb:
        allowed = f'task = "{flags.verb}"' if task in FLAGS else f"task = one of {', '.join(FLAGS)}"
        raise RequestError(f"--config {path}", found=f"task = {task!r}", allowed=allowed, do="correct the file")
    return _checked(flags, values, path, given)


def _values(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--config {path}",
            found=f"{type(error).__name__}: {error}",
            allowed="a TOML file with the command's flags as keys",
            do="check the file",
        ) from None
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _checked(flags: Flags, values: dict[str, Any], path: Path, given: frozenset[str]) -> Flags:
    known = {field.name: field for field in fields(flags)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RequestError(
            f"--config {path}",
            found=f"unknown key(s) {', '.join(unknown)}",
            allowed=", ".join(known),
            do="correct the file",
        )
    if isinstance(values.get("keep"), str):
        values["keep"] = names_of(values["keep"])
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
        elif isinstance(value, str) and isinstance(known[name].default, tuple):
            values[name] = (value,)
    for name in ("max_failures", "memory_per_unit", "timeout_batch", "max_new_tokens", "kv_memory", "threads"):
        if isinstance(values.get(name), int | float) and not isinstance(values[name], bool):
            values[name] = str(values[name])
    said = {
        name: getattr(flags, name)
        for name, field in known.items()
        if name in given or getattr(flags, name) != field.default
    }
    import pydantic

    try:
        return pydantic.TypeAdapter(type(flags)).validate_python({**values, **said}, strict=False)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise RequestError(
            f"--config {path}",
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            allowed="the types of the command's flags",
            do="correct the file",
        ) from None
