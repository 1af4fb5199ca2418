"""The commands and their flags: reads them, calls the job, prints; nothing else."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Parameter

from fanfold import __version__
from fanfold.cli.equal import equal
from fanfold.cli.plan_commands import plan
from fanfold.cli.verbs import color_of, told, verb_command
from fanfold.job.command import ClassifyFlags, EmbedFlags, GenerateFlags

app = App(
    name="fanfold",
    help="Run a model over a whole dataset on every core, with the result that one core would give.",
    version=__version__,
    help_format="plaintext",
)
app.command(plan)


for _flags, _summary in (
    (EmbedFlags, "Turn texts into vectors: INPUT... -o OUT."),
    (ClassifyFlags, "Give texts, or pairs of texts, labels and scores: INPUT... -o OUT --model MODEL."),
    (GenerateFlags, "Let a language model answer every row: INPUT... -o OUT --model REF."),
):
    app.command(verb_command(_flags, _summary))


@app.command(name="run")
def run_file(
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
    from fanfold.job.command import run_config

    run = run_config(job, as_json=json_, quiet=quiet, color=color_of(no_color))
    return told(run, json_)


app.command(equal)


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
def peek(
    out: str,
    /,
    *,
    rows: int = 5,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Show the first finished rows of a run, also while it goes on.

    Parameters
    ----------
    out
        What -o named.
    rows
        How many.
    json_
        Print them as JSON on stdout.
    verbose
        Show tracebacks.
    """
    from fanfold.job.peek import peek as first_rows
    from fanfold.job.peek import peek_text

    print(json.dumps(first_rows(out, rows=rows), indent=2) if json_ else peek_text(out, rows=rows))
    return 0


@app.command
def machine(
    *,
    on: str | None = None,
    probe: bool | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    verbose: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Say what this machine has, what this process may use of it, and how fast it is (measured once, in 10 seconds).

    Parameters
    ----------
    on
        A Spark master instead of this machine: its executors, their cores, memory and versions.
    probe
        Measure anew: products by shape, memory bandwidth, links between processes; --no-probe measures nothing.
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
    record = machine_record(measure=probe is not False, anew=probe is True)
    print(json.dumps(record, indent=2) if json_ else machine_text(record))
    return 0
