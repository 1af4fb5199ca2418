"""Every error a caller can meet, one tree, split by what the caller can do about it.

FanfoldError
├── RequestError      change the request              exit 2
│   ├── PlanError         it cannot be laid out like this
│   ├── ResumeError       the folder holds another job
│   ├── InputError        an input is missing or unreadable
│   └── MissingExtra      an optional package is not installed
├── DataError         fix the data                    exit 1
│   └── PieceFailed       a piece failed after its retries
├── MachineError      fix the machine                 exit 1
│   ├── UnitLost          a unit died and could not be replaced
│   ├── OutOfMemory       a unit went over its memory
│   └── StorageError      a disk is full or broken
├── Stopped           stopped on request; resumable   exit 4
├── DifferenceFound   two results that must be equal are not   exit 5
├── SafetyError       refused by a safety rule        exit 6
└── InternalError     a bug in Fanfold: report it     exit 1
"""

from __future__ import annotations

from typing import Any, ClassVar


class FanfoldError(Exception):
    """What was asked, what was found, what is allowed, what to do: in that order, always all four."""

    exit_code: ClassVar[int] = 1

    def __init__(self, asked: str, *, found: str, allowed: str, do: str) -> None:
        super().__init__(asked)
        self.asked = asked
        self.found = found
        self.allowed = allowed
        self.do = do

    def __str__(self) -> str:
        return f"{self.asked}\n  found:   {self.found}\n  allowed: {self.allowed}\n  do:      {self.do}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.asked, self.found, self.allowed, self.do))


def _rebuild(kind: type[FanfoldError], asked: str, found: str, allowed: str, do: str) -> FanfoldError:
    return kind(asked, found=found, allowed=allowed, do=do)


class RequestError(FanfoldError):
    """The request cannot be carried out as it stands; nothing was started."""

    exit_code = 2


class PlanError(RequestError):
    """No plan fits: units, memory, layout or settings that exclude each other."""


class ResumeError(RequestError):
    """The output folder was started by a different job, or is held by another process."""


class InputError(RequestError):
    """An input does not exist, cannot be read, or lacks the column."""


class MissingExtra(RequestError):
    """An optional package is needed; the message holds the pip line."""


class DataError(FanfoldError):
    """The data cannot be processed; the message names the rows."""


class PieceFailed(DataError):
    """A piece failed after all its retries; the message holds the first error."""


class MachineError(FanfoldError):
    """The machine failed the job."""


class UnitLost(MachineError):
    """A unit died and replacing it did not help."""


class OutOfMemory(MachineError):
    """A unit went over its memory limit."""


class StorageError(MachineError):
    """A disk is full, broken or read-only."""


class Stopped(FanfoldError):
    """Stopped on request (a signal); the same command goes on where it stopped."""

    exit_code = 4


class DifferenceFound(FanfoldError):
    """Two results that must be equal are not."""

    exit_code = 5


class SafetyError(FanfoldError):
    """Refused: pickled weights, remote code, a damaged model file."""

    exit_code = 6


class InternalError(FanfoldError):
    """A promise of Fanfold's own code is broken: please report it."""


def cause_line(error: BaseException) -> str:
    """One line for an error of any kind: its class and the first line of its message."""
    try:
        text = str(error).strip().splitlines()
    except Exception:  # a __str__ that is itself broken
        text = []
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
