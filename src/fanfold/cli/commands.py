"""The commands and their flags: reads them, calls the job, prints; nothing else."""

from __future__ import annotations

import json
import os
from contextvars import ContextVar
from typing import Annotated

from cyclopts import App, Parameter

from fanfold import __version__
from fanfold.cli.plan_commands import plan

DASH = "\0-"  # a bare "-" on its way through the parser

GIVEN: ContextVar[frozenset[str]] = ContextVar("GIVEN", default=frozenset())  # names of the flags given

app = App(
    name="fanfold",
    help="Run a model over a whole dataset on every core, with the result that one core would give.",
    version=__version__,
    help_format="plaintext",
)
app.command(plan)


@app.command
def embed(
    *inputs: str,
    out: Annotated[str | None, Parameter(name=["-o", "--out"])] = None,
    model: str | None = None,
    column: str = "text",
    on: str = "cpu",
    keep: str = "all",
    id: str | None = None,
    prefix: str = "",
    prefix_text: str | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    chunk: int | None = None,
    overlap: int | None = None,
    merge: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    on_error: str = "quarantine",
    max_failures: str | None = None,
    memory_per_unit: str | None = None,
    timeout_batch: str | None = None,
    too_long: str = "truncate",
    compile: str = "off",
    limit: int | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    allow_append: Annotated[bool, Parameter(negative="")] = False,
    retry_failed: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    config: str | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
    no_color: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Turn texts into vectors: INPUT... -o OUT.

    Running the same command again goes on where it stopped.

    Parameters
    ----------
    inputs
        Files, folders, quoted globs, - for JSONL on stdin, or URLs: JSONL, CSV, Parquet, text (a row a line).
    out
        A folder, or a file .parquet, .jsonl or .csv.
    model
        A model folder or a Hugging Face id; the demo model if left away.
    column
        The column that holds the text.
    on
        Where to run: inline, cpu (all allowed cores), cpu:N, cuda, cuda:0,1, or a Spark master: spark://HOST:PORT,
        yarn, k8s://..., local[N], local-cluster[N,CORES,MB].
    keep
        Input columns kept in the output: all, none, or names with commas.
    id
        The column that names a row in quarantine.jsonl.
    prefix
        Put before the names of the result columns.
    prefix_text
        Put before every text.
    prompt_name
        A prompt that the model's files name.
    max_length
        Tokens kept of a text; the model's own limit if left away.
    chunk
        Cut long texts into parts of so many tokens, a row each (columns record and part).
    overlap
        Tokens that a part shares with the one before.
    merge
        mean: one vector a text again, the mean over its parts.
    dtype
        float32 or bfloat16.
    revision
        The model's commit, tag or branch on the hub.
    on_error
        Failed rows: quarantine (set aside), null (kept with empty results), or stop.
    max_failures
        Stop above this many failed rows: a number or a share such as 5%.
    memory_per_unit
        The most a unit may hold, for example 2GB.
    timeout_batch
        End a unit that gives no sign of life for so long, for example 10min.
    too_long
        Texts longer than the model's limit: truncate (counted), or quarantine.
    compile
        Compile the model for this machine first: on, off, or auto (on where the job is long enough to gain by it).
    limit
        Only the first so many rows.
    overwrite
        Start anew.
    allow_append
        Go on although rows were appended to the input; only the new ones are computed.
    retry_failed
        Compute the failed rows of a finished job once more, all others stay.
    dry_run
        Say what would be done, and stop.
    config
        A TOML file with these flags as keys; flags given here win.
    json_
        Print the summary as JSON on stdout.
    quiet
        Say nothing but errors.
    verbose
        Say more; show tracebacks.
    no_color
        No colors (also the variable NO_COLOR).
    """
    from fanfold.job.command import EmbedFlags, run_embed
    from fanfold.job.request import names_of

    flags = EmbedFlags(
        inputs=tuple("-" if name == DASH else name for name in inputs),
        out="-" if out == DASH else out,
        model=model,
        column=column,
        on=on,
        keep=names_of(keep),
        id=id,
        prefix=prefix,
        prefix_text=prefix_text,
        prompt_name=prompt_name,
        max_length=max_length,
        chunk=chunk,
        overlap=overlap,
        merge=merge,
        dtype=dtype,
        revision=revision,
        on_error=on_error,
        max_failures=max_failures,
        memory_per_unit=memory_per_unit,
        timeout_batch=timeout_batch,
        too_long=too_long,
        compile=compile,
        limit=limit,
        overwrite=overwrite,
        allow_append=allow_append,
        retry_failed=retry_failed,
        dry_run=dry_run,
    )
    run = run_embed(flags, config=config, given=GIVEN.get(), as_json=json_, quiet=quiet, color=_color(no_color))
    if json_:
        print(json.dumps(run.summary or run.plan, indent=2))
    return run.exit_code


@app.command(name="run")
def run_config(
    job: str,
    /,
    *,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    quiet: Annotated[bool, Parameter(negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
    no_color: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Carry out a job that a TOML file describes: the flags of a command as keys, and task = "embed".

    Parameters
    ----------
    job
        The file, for example job.toml.
    json_
        Print the summary as JSON on stdout.
    quiet
        Say nothing but errors.
    verbose
        Say more; show tracebacks.
    no_color
        No colors (also the variable NO_COLOR).
    """
    from fanfold.job.command import EmbedFlags, run_embed

    run = run_embed(EmbedFlags(), config=job, quiet=quiet, color=_color(no_color))
    if json_:
        print(json.dumps(run.summary or run.plan, indent=2))
    return run.exit_code


@app.command
def verify(
    out: str,
    /,
    *,
    sample: int = 200,
    seed: int = 0,
    model: str | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Check a finished job: every checksum, and a sample of rows computed again on one unit, byte for byte.

    Parameters
    ----------
    out
        What -o named.
    sample
        Whole batches are computed again until they hold this many rows; 0 checks the checksums alone.
    seed
        Which batches are drawn.
    model
        Where the model's folder is now, if it was moved.
    json_
        Print the verdict as JSON on stdout.
    verbose
        Show tracebacks.
    """
    from fanfold.job.verify import verify as check

    verdict = check(out, sample=sample, seed=seed, model=model)
    if json_:
        print(json.dumps(verdict.record, indent=2))
    else:
        print(verdict.text)
    return 0


@app.command
def show(
    out: str,
    /,
    *,
    profile: Annotated[bool, Parameter(negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Say what a run was asked, what it chose and why, how far it is, and what failed.

    Parameters
    ----------
    out
        What -o named.
    profile
        Instead, where each unit's time went, against this machine's rate (measured for 2 seconds).
    verbose
        Show tracebacks.
    """
    from fanfold.job.profile import profile as profile_page
    from fanfold.job.show import show as page

    print(profile_page(out) if profile else page(out))
    return 0


@app.command
def machine(
    *,
    on: str | None = None,
    probe: bool = True,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Say what this machine has, what this process may use of it, and how fast it is (2 seconds).

    Parameters
    ----------
    on
        A Spark master instead of this machine: its executors, their cores, memory and versions.
    probe
        Measure the rate of matrix products and the memory bandwidth.
    json_
        Print it as JSON on stdout.
    verbose
        Show tracebacks.
    """
    from fanfold.job.machine import cluster_record, cluster_text, machine_record, machine_text

    if on is not None:
        cluster = cluster_record(on)
        print(json.dumps(cluster, indent=2) if json_ else cluster_text(cluster))
        return 0
    record = machine_record(measure=probe)
    print(json.dumps(record, indent=2) if json_ else machine_text(record))
    return 0


def _color(no_color: bool) -> bool:
    return not no_color and not os.environ.get("NO_COLOR")
