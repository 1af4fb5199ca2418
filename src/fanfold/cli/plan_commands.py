"""`fanfold plan`: which way to be parallel, how fast, how much memory, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from fanfold.job.plan import Choice

plan = App(name="plan", help="Say which way to be parallel, how fast it will be, how much memory it needs, and why.")
_Switch = Annotated[bool, Parameter(negative="")]
_Json = Annotated[bool, Parameter(name="--json", negative="")]
_Csv = Annotated[bool, Parameter(name="--csv", negative="")]


@plan.command
def train(
    *,
    model: str,
    on: str,
    global_batch: int,
    seq: int = 2048,
    fix: str | None = None,
    precision: str = "bf16",
    cluster: str | None = None,
    json_: _Json = False,
    csv_: _Csv = False,
    plot: str | None = None,
    verbose: _Switch = False,
) -> int:
    """Choose the layout to train a model in, and predict a step's time and memory.

    Parameters
    ----------
    model
        A name of the catalogue (gpt3-175b, llama-3-70b), or a path to a config.json.
    on
        How many of which accelerator, for example 1024xA100-80GB-SXM.
    global_batch
        Sequences a step.
    seq
        Tokens a sequence.
    fix
        Degrees that are given, for example tensor=8,pipeline=16; the rest is chosen.
    precision
        Of the matrix products: bf16, fp16, fp8, tf32 or fp32.
    cluster
        A TOML file with devices per node, network cards and links, where the name cannot say.
    json_
        Print it as JSON on stdout.
    csv_
        Print the layouts as CSV on stdout.
    plot
        Write time and memory over layouts, and scaling, as an SVG file.
    verbose
        Show tracebacks.
    """
    from fanfold.job.plan import plan_train

    choice = plan_train(model, on, global_batch=global_batch, seq=seq, fix=fix, precision=precision, cluster=cluster)
    return _show(choice, as_json=json_, as_csv=csv_, plot=plot)


@plan.command
def infer(
    *,
    model: str,
    on: str,
    input_tokens: int,
    output_tokens: int,
    concurrency: int = 1,
    fix: str | None = None,
    precision: str = "bf16",
    cluster: str | None = None,
    json_: _Json = False,
    csv_: _Csv = False,
    plot: str | None = None,
    verbose: _Switch = False,
) -> int:
    """Choose the layout to serve a model in, and predict tokens a second, latencies and memory.

    Parameters
    ----------
    model
        A name of the catalogue (llama-3-70b), or a path to a config.json.
    on
        How many of which accelerator, for example 8xH100-80GB-SXM.
    input_tokens
        Tokens of a prompt.
    output_tokens
        Tokens generated for it.
    concurrency
        Requests at a time.
    fix
        Degrees that are given, for example tensor=4; the rest is chosen.
    precision
        Of the weights: bf16, fp16, fp8, tf32 or fp32.
    cluster
        A TOML file with devices per node, network cards and links, where the name cannot say.
    json_
        Print it as JSON on stdout.
    csv_
        Print the layouts as CSV on stdout.
    plot
        Write rate and memory over layouts, and scaling, as an SVG file.
    verbose
        Show tracebacks.
    """
    from fanfold.job.plan import plan_infer

    choice = plan_infer(
        model,
        on,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        fix=fix,
        precision=precision,
        cluster=cluster,
    )
    return _show(choice, as_json=json_, as_csv=csv_, plot=plot)


@plan.command
def embed(
    *inputs: str,
    tokens_per_row: str | None = None,
    rows: int | None = None,
    model: str | None = None,
    column: str = "text",
    on: str = "cpu",
    json_: _Json = False,
    verbose: _Switch = False,
) -> int:
    """Say what fanfold embed would do on this machine: units, time and memory, and why.

    Parameters
    ----------
    inputs
        Files, folders or quoted globs, as for embed; their first 4,096 rows are looked at.
    tokens_per_row
        Instead of an input: median and 90th percentile of the tokens in a row, for example 23,120.
    rows
        How many rows there are, with --tokens-per-row.
    model
        A model folder or a Hugging Face id; the demo model if left away.
    column
        The column that holds the text.
    on
        Where to run: inline, cpu (all allowed cores) or cpu:N.
    json_
        Print it as JSON on stdout.
    verbose
        Show tracebacks.
    """
    from fanfold.job.plan_embed import plan_embed

    found = plan_embed(inputs, tokens_per_row=tokens_per_row, rows=rows, model=model, column=column, on=on)
    print(json.dumps(found.record(), indent=2) if json_ else found.text)
    return 0


@plan.command
def validate(*tables: str, json_: _Json = False, verbose: _Switch = False) -> int:
    """Predict every row of tables of measurements, and say how far off the predictions are.

    Parameters
    ----------
    tables
        CSV files with the columns of validation/.
    json_
        Print the records as JSON on stdout.
    verbose
        Show tracebacks.
    """
    from fanfold.errors import RequestError
    from fanfold.job.plan_tables import COVERAGE, validate_files, validation_text

    if not tables:
        raise RequestError(
            "fanfold plan validate", found="no table", allowed="CSV files", do="name them: fanfold plan validate a.csv"
        )
    records, covered = validate_files(tables)
    print(json.dumps(records, indent=2) if json_ else validation_text(records, covered))
    return 0 if covered >= COVERAGE else 1


def _show(choice: Choice, *, as_json: bool, as_csv: bool, plot: str | None) -> int:
    if plot is not None:
        from fanfold.job.plan_plot import write_plot

        write_plot(choice, plot)
    print(json.dumps(choice.record(), indent=2) if as_json else choice.csv() if as_csv else choice.text)
    return 0
