"""What a user asks of a job, whatever the task: inputs, output, where, and what to do with bad rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fanfold.errors import RequestError
from fanfold.quantity import parse_bytes, parse_duration_s, parse_share

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.quantity import Limit

ON_ERROR = ("quarantine", "null", "stop")
TOO_LONG = ("truncate", "quarantine")
COMPILE = ("off", "on", "auto")


def names_of(keep: str) -> str | tuple[str, ...]:
    """What --keep says: all, none, or names with commas."""
    return keep if keep in ("all", "none") else tuple(name for name in keep.split(",") if name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One job. Field names are the command line's flags."""

    inputs: tuple[str, ...]
    out: Path | str  # a URL is a string
    column: str = "text"
    id: str | None = None
    keep: str | tuple[str, ...] = "all"
    on: str = "cpu"
    on_error: str = "quarantine"
    max_failures: str | None = None
    memory_per_unit: str | None = None
    timeout_batch: str | None = None
    too_long: str = "truncate"
    compile: str = "off"
    threads: str = "1"
    limit: int | None = None
    prefix: str = ""
    overwrite: bool = False
    allow_append: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    sync: bool = True  # False only for folders that die with the process
    stdin: Any = field(default=None)

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            object.__setattr__(self, "keep", names_of(self.keep))
        if self.on_error not in ON_ERROR:
            raise RequestError(
                f"--on-error {self.on_error}",
                found="no such policy",
                allowed=", ".join(ON_ERROR),
                do="leave it away to set failed rows aside",
            )
        if self.too_long not in TOO_LONG:
            raise RequestError(
                f"--too-long {self.too_long}",
                found="no such policy",
                allowed=", ".join(TOO_LONG),
                do="leave it away to cut long texts to the model's limit",
            )
        if self.compile not in COMPILE:
            raise RequestError(
                f"--compile {self.compile}",
                found="no such choice",
                allowed=", ".join(COMPILE),
                do="leave it away to run the model as it is",
            )
        if self.limit is not None and self.limit < 0:
            raise RequestError(
                f"--limit {self.limit}",
                found="a negative number",
                allowed="0 or more rows",
                do="choose a number",
            )

    def check(self) -> None:
        """Every quantity can be read: RequestError before anything is made."""
        _ = self.failure_limit, self.unit_memory_bytes, self.timeout_batch_s

    @property
    def failure_limit(self) -> Limit | None:
        return parse_share(self.max_failures, name="--max-failures") if self.max_failures else None

    @property
    def unit_memory_bytes(self) -> int | None:
        return parse_bytes(self.memory_per_unit, name="--memory-per-unit") if self.memory_per_unit else None

    @property
    def timeout_batch_s(self) -> float | None:
        return parse_duration_s(self.timeout_batch, name="--timeout-batch") if self.timeout_batch else None

    @property
    def record(self) -> dict[str, Any]:
        """The settings that shape the output: part of the fingerprint."""
        return {
            "column": self.column,
            "id": self.id,
            "keep": list(self.keep) if isinstance(self.keep, tuple) else self.keep,
            "failed_as_null": self.on_error == "null",
            "too_long": self.too_long,
            "limit": self.limit,
            "prefix": self.prefix,
        }
