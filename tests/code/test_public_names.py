"""What users can name is written down here: adding or taking away one is a decision, not an accident."""

from __future__ import annotations

import contextlib
import inspect
import io
import re

import pytest

import fanfold
import fanfold.job.embed
import fanfold.job.verify
import fanfold.merge
from fanfold import errors
from fanfold.cli.commands import app
from fanfold.cli.main import HELP, run

NAMES = [
    "ArgMax",
    "Concat",
    "Count",
    "Distinct",
    "EnsembleMean",
    "Histogram",
    "Mean",
    "MinMax",
    "Moments",
    "Quantiles",
    "Record",
    "SoftmaxParts",
    "Sum",
    "TopK",
    "Vote",
    "Weighted",
    "classify",
    "embed",
    "fold",
    "generate",
    "map",
    "parallel",
    "plan",
    "shutdown",
    "verify",
]
MERGE_NAMES = [
    "ArgMax",
    "Concat",
    "Count",
    "Distinct",
    "EnsembleMean",
    "Histogram",
    "Mean",
    "Merge",
    "MinMax",
    "Moments",
    "OrderedFold",
    "Quantiles",
    "Record",
    "SoftmaxPart",
    "SoftmaxParts",
    "Sum",
    "TopK",
    "Vote",
    "Weighted",
    "fold",
]

FLAGS = {
    "embed": [
        "INPUTS",
        "--out -o",
        *(
            "--allow-append",
            "--chunk",
            "--column",
            "--compile",
            "--config",
            "--dry-run",
            "--dtype",
            "--id",
            "--json",
            "--keep",
            "--layout",
            "--limit",
        ),
        *("--max-failures", "--max-length", "--memory-per-unit", "--merge", "--model", "--no-color", "--on"),
        *(
            "--on-error",
            "--overlap",
            "--overwrite",
            "--prefix",
            "--prefix-text",
            "--prompt-name",
            "--quiet",
            "--retry-failed",
            "--revision",
        ),
        *("--threads", "--timeout-batch", "--too-long", "--verbose"),
    ],
    "generate": [
        "INPUTS",
        "--out -o",
        *("--allow-append", "--chat", "--column", "--compile", "--config", "--dry-run", "--dtype", "--full-text"),
        *("--id", "--json"),
        *(
            "--json-schema",
            "--keep",
            "--kv-memory",
            "--layout",
            "--limit",
            "--max-failures",
            "--max-new-tokens",
            "--memory-per-unit",
            "--merge",
            "--min-p",
        ),
        *("--model", "--no-color", "--on", "--on-error", "--overwrite", "--prefix", "--prompt", "--quiet"),
        *("--repetition-penalty", "--retry-failed", "--revision", "--seed", "--stop", "--system", "--temperature"),
        *("--threads", "--timeout-batch", "--too-long", "--top-k", "--top-p", "--verbose"),
    ],
    "equal": ["MODEL", "--dtype", "--json", "--layout", "--revision", "--verbose"],
    "classify": [
        "INPUTS",
        "--out -o",
        *("--aggregation", "--allow-append", "--column", "--compile", "--config", "--dry-run", "--dtype"),
        *("--hypothesis-template", "--id", "--json", "--keep", "--labels", "--layout", "--limit"),
        *("--max-failures", "--max-length", "--memory-per-unit", "--merge", "--model", "--multi-label"),
        *("--no-color", "--on", "--on-error", "--overwrite", "--pair", "--prefix", "--quiet", "--retry-failed"),
        *("--revision",),
        *("--threads", "--threshold", "--timeout-batch", "--too-long", "--top-k", "--verbose"),
    ],
    "run": ["JOB", "--json", "--no-color", "--quiet", "--verbose"],
    "verify": ["OUT", "--json", "--model", "--sample", "--seed", "--verbose"],
    "show": ["OUT", "--profile", "--verbose"],
    "peek": ["OUT", "--json", "--rows", "--verbose"],
    "plan train": [
        *("--cluster", "--csv", "--fix", "--global-batch", "--json", "--model", "--on", "--plot"),
        *("--precision", "--seq", "--verbose"),
    ],
    "plan infer": [
        *("--cluster", "--concurrency", "--csv", "--fix", "--input-tokens", "--json", "--model", "--on"),
        *("--output-tokens", "--plot", "--precision", "--verbose"),
    ],
    "plan embed": [
        *("INPUTS", "--column", "--json", "--model", "--on", "--rows", "--tokens-per-row", "--verbose"),
    ],
    "plan validate": ["TABLES", "--json", "--verbose"],
    "machine": ["--no-probe --probe", "--json", "--on", "--verbose"],
}

# Class: base, exit code. Same tree as in the docstring of errors.py.
ERRORS = {
    "FanfoldError": ("Exception", 1),
    "RequestError": ("FanfoldError", 2),
    "PlanError": ("RequestError", 2),
    "ResumeError": ("RequestError", 2),
    "InputError": ("RequestError", 2),
    "MissingExtra": ("RequestError", 2),
    "DataError": ("FanfoldError", 1),
    "PieceFailed": ("DataError", 1),
    "MachineError": ("FanfoldError", 1),
    "UnitLost": ("MachineError", 1),
    "OutOfMemory": ("MachineError", 1),
    "StorageError": ("MachineError", 1),
    "Stopped": ("FanfoldError", 4),
    "DifferenceFound": ("FanfoldError", 5),
    "SafetyError": ("FanfoldError", 6),
    "InternalError": ("FanfoldError", 1),
}


def names_below(commands, above=""):
    """Every command by its full name; those that only hold others are left out."""
    for name in commands:
        if not name.startswith("-"):
            below = list(names_below(commands[name], f"{above}{name} "))
            yield from below or [above + name]


def command_of(name):
    found = app
    for part in name.split():
        found = found[part]
    return found


def help_of(command):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run([*command.split(), "--help"]) == 0
    return out.getvalue()


help_of("show")  # the first one imports rich: outside of any test's time


def test_public_names_are_these():
    assert sorted(fanfold.__all__) == NAMES


def test_every_public_name_can_be_had_and_is_listed():
    for name in NAMES:
        assert getattr(fanfold, name).__name__ == name
        assert name in dir(fanfold)


def test_other_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fanfold' has no attribute 'embedd'"):
        _ = fanfold.embedd


def test_merge_names_are_these():
    assert sorted(fanfold.merge.__all__) == MERGE_NAMES
    assert all(hasattr(fanfold.merge, name) for name in MERGE_NAMES)


def test_commands_are_these():
    assert sorted(names_below(app)) == sorted(FLAGS)


@pytest.mark.parametrize("command", FLAGS)
def test_flags_of_a_command_are_these(command):
    found = [" ".join(sorted(argument.names)) for argument in command_of(command).assemble_argument_collection()]
    assert sorted(found) == sorted(FLAGS[command])


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_a_command_says_something_of_every_flag(command):
    text = " ".join(help_of(command).split())
    for names in (argument.names for argument in command_of(command).assemble_argument_collection()):
        listed = re.escape(names[0].removeprefix("--"))
        assert re.search(rf"{listed}\b[^.]* [A-Z][^.]*\.", text), f"{command} {names[0]} is not explained"


def test_the_front_page_names_every_command():
    for command in FLAGS:
        assert f"\n  {command.split()[0]}" in HELP


def test_error_classes_and_exit_codes_are_these():
    found = {
        name: (kind.__base__.__name__, kind.exit_code)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, errors.FanfoldError)
    }
    assert found == ERRORS


def test_the_drawn_tree_holds_every_error():
    for name, (_, exit_code) in ERRORS.items():
        (line,) = [line for line in errors.__doc__.splitlines() if name in line.split()]
        if "exit" in line:
            assert line.endswith(f"exit {exit_code}")


def test_every_error_has_a_line_of_explanation():
    for name in ERRORS:
        assert getattr(errors, name).__doc__.strip()
