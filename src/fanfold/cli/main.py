"""The entry point: exit codes, error messages, and the front page, which needs no command's imports."""

from __future__ import annotations

import os
import sys
from typing import Any

from fanfold import __version__
from fanfold.errors import FanfoldError, InternalError

HELP = """\
Usage: fanfold COMMAND [ARGUMENTS]

Run a model over a whole dataset on every core, with the result that one core would give.

  embed INPUT... -o OUT     Turn texts into vectors; the same command again goes on where it stopped.
  classify INPUT... -o OUT  Give texts labels and scores, or find entities in them.
  generate INPUT... -o OUT  Let a language model answer every row.
  run JOB.toml              Carry out a job that a TOML file describes.
  verify OUT                Check a finished job: checksums, and a sample computed again, byte for byte.
  equal MODEL --layout L    Compare a model that is split over units with the whole, gradients included.
  show OUT                  Say what a run chose and why, how far it is, and what failed.
  peek OUT                  Show the first finished rows, also while the job runs.
  plan train|infer|embed    Say which way to be parallel, how fast, how much memory, and why; also: plan validate.
  machine                   Say what this process may use of the machine, and how fast it is.

  fanfold COMMAND --help says more. Exit codes: 0 all rows; 1 failed; 2 not started; 3 some rows failed;
  4 stopped, resumable; 5 difference found; 6 refused by a safety rule.
"""


def main() -> None:
    """Entry point of the command `fanfold`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of one command."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    verbose = "--verbose" in arguments
    try:
        code = _command(arguments)
        sys.stdout.flush()
        return code
    except FanfoldError as error:
        return _report(error, verbose)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return _report(
            InternalError(
                f"fanfold {arguments[0]}",
                found=f"{type(error).__name__}: {error}",
                allowed="no error that Fanfold does not know",
                do="run again with --verbose and report what it prints",
            ),
            verbose,
        )


def _command(arguments: list[str]) -> int:
    from cyclopts import CycloptsError

    from fanfold.cli.commands import app
    from fanfold.cli.verbs import DASH, GIVEN

    # cyclopts takes a bare "-" for an option; it is a value here: stdin or stdout.
    arguments = [DASH if argument == "-" else argument for argument in arguments]
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _usage(error)
    # Flags given here win over a --config file, also where they say what the default says.
    GIVEN.set(frozenset(bound.arguments))
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def _usage(error: Any) -> int:
    command = " ".join(["fanfold", *(getattr(error, "command_chain", None) or ())])
    found = " ".join(str(error).split())
    print(
        f"UsageError: {command}\n  found:   {found}\n  allowed: the flags that the command's help lists\n"
        f"  do:      {command} --help",
        file=sys.stderr,
    )
    return 2


def _report(error: FanfoldError, verbose: bool) -> int:
    if verbose:
        import traceback

        traceback.print_exc()
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()
