"""The callable that engines ship to units: a source, a task and a sink put together.

A window lives through three instructions. *Prepare* reads its rows, makes tokens of them and cuts them into
pieces; *compute* runs a lease of pieces through the model; *assemble* puts the rows of a part in order and
writes it. Workers read and write files themselves; only names, counts and hashes travel to the parent.
"""

from __future__ import annotations

import errno
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.data.durable import storage_error
from fanfold.engine.engine import LOADING
from fanfold.engine.schedule import Assemble, Compute, Load, Prepare
from fanfold.errors import FanfoldError, InternalError, StorageError, UnitLost, cause_line

if TYPE_CHECKING:
    from fanfold.data.run_folder import RunFolder
    from fanfold.data.source import RowFailure, Source, Window
    from fanfold.engine.engine import Assignment, Desk
    from fanfold.plan.numerics import Numerics
    from fanfold.tasks.task import Opened, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """How rows become output: its format, the prefix of result columns, and whether failed rows stand as nulls."""

    format: str  # parquet, jsonl, csv
    prefix: str = ""
    failed_as_null: bool = False
    too_long: str = "truncate"  # or quarantine


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWindow:
    """What the parent must know of a prepared window; `costs` and `rows` are per piece."""

    costs: tuple[int, ...]
    rows: tuple[int, ...]
    tokens: int
    truncated: int
    failures: tuple[RowFailure, ...]
    source_sha256: str
    items_sha256: str
    kept_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowDetail:
    """A window and, once it was prepared, the hashes of its two files."""

    window: Window
    items_sha256: str | None = None
    kept_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Instead of a lease: these rows of one batch, all others as fillers, to see whether the unit survives it."""

    batch: int  # within the lease's one piece
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialDone:
    """The unit survived; not passed: the rows raised, `cause` is (error, message)."""

    passed: bool
    cause: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseDetail(WindowDetail):
    """What a unit must know of a lease. left_out: (piece, batch) -> rows known to be bad -> (error, message)."""

    left_out: dict[tuple[int, int], dict[int, tuple[str, str]]] = field(default_factory=dict)
    trial: Trial | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseDone:
    """A lease's result file, sealed under a temporary name; `last` < asked where a stop came in between."""

    last: int
    rows: int
    temporary: str
    sha256: str
    tokens: int
    padded_tokens: int
    elapsed_s: float
    failures: tuple[RowFailure, ...] = ()
    sums: dict[str, int] = field(default_factory=dict)  # of the result columns that the task counts


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedLease:
    """A published lease file, as the assembler reads it."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """Committed lease files that are gone or not what was committed: window and name of each."""

    leases: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """All of a computed window: where its leases are, and which rows failed as (offset, part)."""

    detail: WindowDetail
    leases: tuple[CommittedLease, ...]
    failed: frozenset[tuple[int, int | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDone:
    """A part, sealed under a temporary name. window_sha256: one hash of the Arrow buffers per window."""

    temporary: str
    rows: int
    num_bytes: int
    sha256: str
    window_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobWork:
    """Everything a unit needs to do its share of the job."""

    task: Task
    source: Source
    numerics: Numerics
    output: OutputRules
    folder: RunFolder

    @property
    def imports(self) -> tuple[str, ...]:
        return unit_imports(self.task)

    @property
    def threads(self) -> int:
        return self.numerics.threads_per_unit

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        """The result for the agenda; whatever a full or broken disk causes comes out as StorageError."""
        try:
            return self._carry_out(assignment, desk)
        except StorageError:
            raise
        except Exception as error:
            cause = disk_error(error)
            if cause is None:
                raise
            path = Path(cause.filename or self.folder.place)
            raise storage_error(path, "writing results", cause) from error

    def _carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        from fanfold.job import assemble, compute, prepare

        store = self.folder.open()
        match assignment.instruction:
            case Load():
                self.loaded(desk)
                return None
            case Prepare():
                with desk.timed("prepare", f"window {assignment.instruction.window}"):
                    return prepare.prepare_window(
                        self, self.opened(desk), assignment.detail.window, store, alive=lambda: desk.beat(0, 0)
                    )
            case Compute() as lease:
                opened = self.loaded(desk)
                return compute.compute_lease(self, opened, lease, assignment.detail, desk, store)
            case Assemble() as part:
                with desk.timed("assemble", f"part {part.part}"):
                    return assemble.assemble_part(self, self.opened(desk), part, assignment.detail, store)
        raise InternalError(
            f"carrying out {assignment.instruction}", found="unknown", allowed="known ones", do="report this"
        )

    def opened(self, desk: Desk) -> Opened:
        """The task on this unit; a warm unit keeps the model of the job before where it is the same."""
        wanted = (self.task.key, self.numerics.dtype, self.numerics.threads_per_unit, self.numerics.compiled)
        if desk.cache.get("key") != wanted:
            desk.clear()
            opened = self.task.open(desk.unit, self.numerics)
            if hasattr(opened, "close"):
                desk.ends.append(opened.close)
            desk.cache.update(key=wanted, opened=opened, loaded=False)
        found: Opened = desk.cache["opened"]
        return found

    def loaded(self, desk: Desk) -> Opened:
        """As `opened`, with the model in memory and the number of threads verified."""
        opened = self.opened(desk)
        if not desk.cache["loaded"]:
            from fanfold.machine.threads import hold_threads

            desk.at(*LOADING)
            with desk.timed("load"):
                try:
                    opened.load()
                except FanfoldError:
                    raise
                except Exception as error:
                    raise UnitLost(
                        f"loading the model on {desk.unit.name}",
                        found=cause_line(error),
                        allowed="a model that loads",
                        do="run again with --verbose to see where it failed",
                    ) from error
                hold_threads(self.threads)  # inline, the engine's caller gives the process its settings back
            desk.cache["loaded"] = True
        return opened


def place_names(task: Task) -> list[str]:
    """The columns that say where an output row comes from."""
    return ["row"] if task.chunking is None or merges(task) else ["record", "part"]


def merges(task: Task) -> bool:
    """Whether a record's text is cut into parts whose results become one row again."""
    return task.chunking is not None and task.chunking.merge is not None


def unit_imports(task: Task) -> tuple[str, ...]:
    """Modules that every unit of a job needs: the job's own, then the task's."""
    return ("fanfold.job.ready", *task.imports)


def disk_error(error: BaseException | None) -> OSError | None:
    """The disk's own error behind an error, where there is one: cleaning up after it often raises others."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def unique() -> str:
    """Part of a temporary file's name: processes of several machines, with the same ids, write into one folder."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def items_name(window: int) -> str:
    return f"windows/w-{window:09d}.arrow"


def kept_name(window: int) -> str:
    return f"windows/k-{window:09d}.arrow"


def lease_name(window: int, first: int, last: int) -> str:
    return f"pieces/w-{window:09d}-p-{first:06d}-{last:06d}.arrow"


def part_name(part: int, suffix: str, generation: int = 0) -> str:
    again = f".g{generation}" if generation else ""
    return f"data/part-{part:09d}{again}.{suffix}"


def rescue_name(window: int, generation: int) -> str:
    return f"pieces/w-{window:09d}-g{generation}.arrow"
