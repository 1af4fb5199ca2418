"""What is said about a row or a file that cannot be read: always its place, always inert in a terminal."""

from __future__ import annotations

from typing import NamedTuple

SHOWN_CHARS = 80
HEAD_BYTES = 4 * SHOWN_CHARS  # enough for SHOWN_CHARS characters of UTF-8


class Problem(NamedTuple):
    """Why a record is a failed row: the error's class name, the reason in words, the row's id if readable."""

    error: str
    reason: str
    id: str | int | float | None = None


class RowProblem(Exception):
    """Raised while one record is decoded; never leaves the data package."""

    def __init__(self, error: str, reason: str, id: str | int | float | None = None) -> None:
        super().__init__(error, reason)
        self.problem = Problem(error, reason, id)


def inert(text: str) -> str:
    """The text with everything that does not print (controls, bidi marks, lone surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def excerpt(record: bytes) -> str:
    """The first 80 characters of a record, inert."""
    return inert(record[: HEAD_BYTES + 4].decode("utf-8", "backslashreplace")[:SHOWN_CHARS])


def place(path: str, number: int, unit: str = "line") -> str:
    """`FILE, line N`; a stream is called by its name."""
    return f"{'standard input' if path == '-' else inert(path)}, {unit} {number}"


def message(where: str, reason: str, head: bytes) -> str:
    """`FILE, line N: reason: first 80 characters`."""
    return f"{where}: {reason}: {excerpt(head)}" if head else f"{where}: {reason}"


def column_list(names: list[str] | tuple[str, ...], most: int = 30) -> str:
    """Column names for a message, inert, shortened where there are very many."""
    shown = ", ".join(inert(name) if name else "''" for name in names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "") if names else "none"


def usable_id(value: object) -> str | int | float | None:
    """The value if it can stand as an id in a record of failures, else None."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None
    return value
