"""A command for each verb, made of the fields of its flags, and what each flag means."""

from __future__ import annotations

import inspect
import json
import os
from contextvars import ContextVar
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

from cyclopts import Parameter

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.job.command import Flags
    from fanfold.job.run import Run

DASH = "\0-"  # a bare "-" on its way through the parser
GIVEN: ContextVar[frozenset[str]] = ContextVar("GIVEN", default=frozenset())  # names of the flags given

# Of a flag; of a verb's own where it means something else there.
MEANING = {
    "inputs": "Files, folders, quoted globs, - for JSONL on stdin, or URLs: JSONL, CSV, Parquet, text (a row a line).",
    "out": "A folder, or a file .parquet, .jsonl or .csv; - for rows on stdout.",
    "model": "A model folder or a Hugging Face id; the demo model if left away.",
    "column": "The column that holds the text.",
    "on": "Where to run: inline, cpu (all allowed cores), cpu:N, cuda, cuda:0,1, or a Spark master: spark://HOST:PORT, "
    "yarn, k8s://..., local[N], local-cluster[N,CORES,MB].",
    "keep": "Input columns kept in the output: all, none, or names with commas.",
    "id": "The column that names a row in quarantine.jsonl.",
    "prefix": "Put before the names of the result columns.",
    "prefix_text": "Put before every text.",
    "layout": "Split one model over several units: tensor=N, pipeline=N, context=N[:ring|:ulysses], with commas.",
    "prompt_name": "A prompt that the model's files name.",
    "max_length": "Tokens kept of a text; the model's own limit if left away.",
    "chunk": "Cut long texts into parts of so many tokens, a row each (columns record and part).",
    "overlap": "Tokens that a part shares with the one before.",
    "merge": "mean: one vector a text again, the mean over its parts.",
    "generate.model": "A model folder or a Hugging Face id of a language model; several times for an ensemble.",
    "generate.merge": "vote: of several models' answers the one that most of them give.",
    "generate.column": "The column that holds the prompt, or with --chat what the user says.",
    "generate.too_long": "Prompts longer than the model's context: truncate (the end stays; counted), or quarantine.",
    "generate.top_k": "Draw among so many tokens.",
    "prompt": "A prompt over columns instead, for example 'Summarise: {text}'.",
    "chat": "Put the prompt into the model's chat template, as what the user says; a column of messages is a chat.",
    "system": "What the system says before everything else; in a chat.",
    "max_new_tokens": "The most tokens of an answer (256 if left away): a number, or a column that says it for each "
    "row.",
    "stop": "End an answer with this text; may be given several times.",
    "temperature": "Draw tokens; above 1 flatter, below 1 sharper; 0 takes the most probable one.",
    "top_p": "Draw among the most probable tokens that together have this share.",
    "min_p": "Draw among tokens with at least this share of the most probable one's.",
    "repetition_penalty": "Make tokens that stand there already less probable (above 1).",
    "seed": "Draws depend on it, on the row and on the position, and on nothing else.",
    "full_text": "Put the prompt before its answer in generated_text.",
    "json_schema": "A file with a JSON Schema that every answer keeps to.",
    "kv_memory": "What a unit may hold of keys and values (1.5GB if left away); more lets more rows share a step.",
    "classify.model": "A model folder or a Hugging Face id; several times for an ensemble.",
    "classify.merge": "How several models become one answer: mean (of their scores), or vote.",
    "pair": "The column of the second text: a pair of texts is one row, as for reranking.",
    "labels": "Labels of your own, with commas, for a model of natural language inference (zero-shot).",
    "hypothesis_template": "The sentence a label is put into, {} for the label; 'This example is {}.' if left away.",
    "top_k": "Also a column labels: so many labels with their scores, the best first.",
    "multi_label": "Every label for itself: a column labels of those that reach the threshold.",
    "threshold": "The least score of what stands in labels or entities; 0.5 with --multi-label alone.",
    "aggregation": "How tokens become entities: none, simple (if left away), first, average, max.",
    "dtype": "float32 or bfloat16.",
    "revision": "The model's commit, tag or branch on the hub.",
    "on_error": "Failed rows: quarantine (set aside), null (kept with empty results), or stop.",
    "max_failures": "Stop above this many failed rows: a number or a share such as 5%.",
    "memory_per_unit": "The most a unit may hold, for example 2GB.",
    "threads": "Threads a unit: a number, or auto (what this machine's measured rates recommend). They shape bytes.",
    "timeout_batch": "End a unit that gives no sign of life for so long, for example 10min.",
    "too_long": "Texts longer than the model's limit: truncate (counted), or quarantine.",
    "compile": "Compile the model for this machine first: on, off, or auto (on where the job is long enough to gain "
    "by it).",
    "limit": "Only the first so many rows.",
    "overwrite": "Start anew.",
    "allow_append": "Go on although rows were appended to the input; only the new ones are computed.",
    "retry_failed": "Compute the failed rows of a finished job once more, all others stay.",
    "dry_run": "Say what would be done, and stop.",
    "config": "A TOML file with these flags as keys; flags given here win.",
    "json_": "Print the summary as JSON on stdout.",
    "quiet": "Say nothing but errors.",
    "verbose": "Say more; show tracebacks.",
    "no_color": "No colors (also the variable NO_COLOR).",
}
_SHOWN: dict[str, tuple[Any, Any]] = {
    "config": (str | None, None),
    "json_": (bool, False),
    "quiet": (bool, False),
    "verbose": (bool, False),
    "no_color": (bool, False),
}
_NAMES = {"out": ("-o", "--out"), "json_": ("--json",)}


def verb_command(kind: type[Flags], summary: str) -> Callable[..., int]:
    """`fanfold VERB`: its parameters are the fields of `kind` and how to show the run."""

    def command(*inputs: str, **values: Any) -> int:
        from fanfold.job.command import run_verb
        from fanfold.job.request import names_of

        shown = {name: values.pop(name, default) for name, (_, default) in _SHOWN.items()}
        values = {name: "-" if value == DASH else value for name, value in values.items()}
        if "keep" in values:
            values["keep"] = names_of(values["keep"])
        flags = kind(inputs=tuple("-" if name == DASH else name for name in inputs), **values)
        run = run_verb(
            flags,
            config=shown["config"],
            given=GIVEN.get(),
            as_json=shown["json_"],
            quiet=shown["quiet"],
            color=color_of(shown["no_color"]),
        )
        return told(run, shown["json_"])

    hints = get_type_hints(kind)
    hints |= {"keep": str, "labels": str | None}  # names with commas
    wanted = {field.name: (hints[field.name], field.default) for field in fields(kind) if field.name != "inputs"}
    parameters = [
        inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL, annotation=_described(kind, "inputs", str))
    ]
    for name, (hint, default) in {**wanted, **_SHOWN}.items():
        assert default is not MISSING
        annotation = _described(kind, name, hint)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    command.__name__ = command.__qualname__ = kind.verb
    command.__doc__ = f"{summary}\n\nRunning the same command again goes on where it stopped."
    command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
    return command


def _described(kind: type[Flags], name: str, hint: Any) -> Any:
    settings: dict[str, Any] = {"help": MEANING.get(f"{kind.verb}.{name}") or MEANING[name]}
    if name in _NAMES:
        settings["name"] = list(_NAMES[name])
    if hint is bool or get_origin(hint) is tuple:
        settings["negative"] = ""
    return Annotated[hint, Parameter(**settings)]


def told(run: Run, as_json: bool) -> int:
    """The exit code, after the summary was printed where it was asked for."""
    if as_json:
        print(json.dumps(run.summary or run.plan, indent=2))
    return run.exit_code


def color_of(no_color: bool) -> bool:
    return not no_color and not os.environ.get("NO_COLOR")
