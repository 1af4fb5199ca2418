"""The job's side of a run: gives out work, commits what comes back, remembers what failed.

The parent alone commits. A lease's file is published under a name that depends on its pieces, never on the
attempt; then one checksummed line goes to the log. What is in the log is done, whatever happens next.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fanfold.data import journal
from fanfold.data.source import Window
from fanfold.engine.engine import LOADING, Assignment
from fanfold.engine.schedule import Assemble, Compute, Load, Prepare, Schedule
from fanfold.errors import (
    DataError,
    DifferenceFound,
    FanfoldError,
    InternalError,
    PieceFailed,
    ResumeError,
    StorageError,
    UnitLost,
    cause_line,
)
from fanfold.events import BatchBegun, Event, InputEnded, Note, WindowFound, WindowPrepared
from fanfold.job.blame import Blame, death_of
from fanfold.job.feed import Feed
from fanfold.job.prepare import is_sound
from fanfold.job.window import window_of
from fanfold.job.work import (
    CommittedLease,
    Damaged,
    LeaseDetail,
    LeaseDone,
    PartDone,
    PreparedWindow,
    TrialDone,
    WindowDetail,
    WindowResult,
    items_name,
    kept_name,
    lease_name,
    part_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.data.source import Source
    from fanfold.data.store import Store
    from fanfold.engine.engine import Failure
    from fanfold.plan.plan import Unit
    from fanfold.quantity import Limit

MAX_ATTEMPTS = 3
MAX_DEATHS_IN_A_ROW = 24  # of any units, without one result: the machine is to blame, not a row


@dataclass(slots=True)
class _OpenWindow:
    """A window between found and assembled."""

    detail: WindowDetail
    rows: tuple[int, ...] = ()  # per piece
    costs: tuple[int, ...] = ()  # per piece
    leases: dict[int, tuple[int, str | None, str | None]] = field(default_factory=dict)  # first -> last, name, sha256
    rescued: tuple[str, str] | None = None  # name and sha256 of rows saved from an older output
    lines: dict[int, dict[str, Any]] = field(default_factory=dict)  # first -> the lease's line in the log
    failed: set[tuple[int, int | None]] = field(default_factory=set)  # offset and part


@dataclass(slots=True)
class Totals:
    """What the log says so far, and what this run has added."""

    rows_found: int = 0  # records of the input
    rows_prepared: int = 0  # what was made of them: the same number, unless texts are cut into parts
    num_windows: int = 0
    rows_computed: int = 0
    rows_resumed: int = 0
    tokens_resumed: int = 0
    rows_assembled: int = 0
    truncated: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    sums: Counter[str] = field(default_factory=Counter)  # of result columns that the task counts
    sums_resumed: Counter[str] = field(default_factory=Counter)
    first_commit_s: float | None = None  # on the monotonic clock
    num_leases: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)  # the one output file, as it was published
    retries: dict[str, int] = field(default_factory=dict)


class JobAgenda:
    """Implements engine.Agenda for a job with a source, a task and a run folder."""

    def __init__(
        self,
        *,
        source: Source,
        store: Store,
        schedule: Schedule,
        suffix: str,
        on_error: str = "quarantine",
        max_failures: Limit | None = None,
        tell: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._source = source
        self._store = store
        self._schedule = schedule
        self._suffix = suffix
        self._on_error = on_error
        self._max_failures = max_failures
        self._tell = tell
        self._open: dict[int, _OpenWindow] = {}
        self._loaded: set[str] = set()
        self._attempts: dict[tuple[Any, ...], int] = {}
        self._blame = Blame()
        self._at: dict[str, tuple[int, int]] = {}  # unit -> piece and batch it has begun
        self._deaths_in_a_row = 0
        self._ended = False
        self._stop = False
        self._feed: Feed | None = None
        self._last_window: Window | None = None  # the scan goes on behind it
        self._known: dict[int, Window] = {}  # windows that the log knows
        self._awaited: set[int] = set()  # of them, those whose rows are gone until the stream has brought them again
        self._generation: dict[int, int] = {}  # part -> how often it was opened again
        self._scanned_bytes = 0
        self.totals = Totals()

    # -- starting and resuming ------------------------------------------------------------------------

    def restore(self, entries: Sequence[dict[str, Any]]) -> None:
        """Take over what earlier runs have committed: entries as `job.log.settle` leaves them."""
        for entry in entries:
            match entry["kind"]:
                case "window":
                    window = window_of(entry)
                    self._known[window.index] = window
                    self._found(window)
                    self._know(window.index, entry)
                case "lease":
                    lease = self._open[entry["window"]]
                    lease.leases[entry["first"]] = (entry["last"], entry["name"], entry["sha256"])
                    self._count_lease(lease, entry)
                    self.totals.rows_resumed += entry["rows"]
                    self.totals.tokens_resumed += entry["tokens"]
                    self.totals.sums_resumed.update(entry.get("sums", {}))
                case "rescue":
                    self._open[entry["window"]].rescued = (entry["name"], entry["sha256"])
                case "part":
                    self.totals.parts[entry["part"]] = entry
                    self.totals.rows_assembled += entry["rows"]
                    for index in range(entry["first"], entry["last"] + 1):
                        del self._open[index]
                case "file":
                    self.totals.files.append(entry)
                case "reopen":
                    self._generation.update((part["part"], part["generation"]) for part in entry["parts"])
        # Units prepare windows side by side: a crash may leave a later one in the log without an earlier one.
        index = 0
        while index in self._known:
            self._last_window = self._known[index]
            index += 1
        if self._last_window is not None and self._last_window.sha256 is not None:
            self._last_window = None  # a stream is looked at from its beginning, and compared
        for index in sorted(self._open):
            if self._stands_prepared(index):
                self._resume_window(index)
            else:
                self._awaited.add(index)

    def _stands_prepared(self, index: int) -> bool:
        """Whether the window can be computed at once; a stream's may first have to come by again."""
        detail = self._open[index].detail
        return detail.window.sha256 is None or (
            is_sound(self._store, items_name(index), detail.items_sha256 or "")
            and is_sound(self._store, kept_name(index), detail.kept_sha256 or "")
        )

    def _resume_window(self, index: int) -> None:
        window = self._open[index]
        done = [(first, last) for first, (last, _, _) in window.leases.items()]
        self._schedule.window_known(index, window.costs, done)

    def start(self, window_rows: int, ahead: int) -> None:
        """Begin to look for windows behind the last known one."""
        self._feed = Feed(self._source, window_rows, self._last_window, ahead)

    def request_stop(self) -> None:
        """Running pieces end and are committed; nothing new begins."""
        self._stop = True

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()

    # -- engine.Agenda --------------------------------------------------------------------------------

    def next_for(self, unit: Unit) -> Assignment | None:
        self._take_windows()
        instruction = self._schedule.next_for(unit.name)
        if instruction is None and unit.name not in self._loaded:
            self._loaded.add(unit.name)
            return Assignment(Load())
        match instruction:
            case Prepare():
                return Assignment(instruction, self._open[instruction.window].detail)
            case Compute():
                self._loaded.add(unit.name)
                self._at.pop(unit.name, None)
                return Assignment(instruction, self._lease_detail(instruction))
            case Assemble():
                windows = range(instruction.first, instruction.last + 1)
                return Assignment(instruction, tuple(self._result(index) for index in windows))
        return None

    @property
    def done(self) -> bool:
        self._take_windows()
        return self._schedule.done

    @property
    def stopping(self) -> bool:
        return self._stop

    def finished(self, results: Sequence[tuple[Unit, Assignment, Any]]) -> None:
        self._deaths_in_a_row = 0
        entries: list[dict[str, Any]] = []
        leftovers: list[str] = []
        published: list[tuple[str, str, str]] = []  # temporary, name, sha256
        for unit, assignment, result in results:
            self._at.pop(unit.name, None)
            match assignment.instruction:
                case Prepare() as prepare:
                    if self._schedule.prepared(unit.name, prepare, result.costs):
                        entries.append(self._window_entry(prepare.window, result))
                case Compute() as lease if isinstance(result, TrialDone):
                    if self._schedule.has(unit.name, lease):
                        self._schedule.gave_up(unit.name)
                        self._blame.tried(lease.window, lease.first, result)
                case Compute() as lease:
                    if self._schedule.computed(unit.name, lease, result.last, result.elapsed_s):
                        entries.append(self._lease_entry(lease, result))
                        published.append((result.temporary, entries[-1]["name"], result.sha256))
                    else:
                        self._check_twin(lease, result)
                        leftovers.append(result.temporary)
                case Assemble() as part if isinstance(result, Damaged):
                    if self._schedule.has(unit.name, part):
                        entries += self._lose(unit, part, result)
                case Assemble() as part:
                    if self._schedule.assembled(unit.name, part):
                        entries.append(self._part_entry(part, result))
                        published.append((result.temporary, entries[-1]["name"], result.sha256))
                    else:
                        leftovers.append(result.temporary)
        self._publish(published)
        if entries:
            journal.append(self._store, entries)
        if self.totals.first_commit_s is None and any(entry["kind"] == "lease" for entry in entries):
            self.totals.first_commit_s = time.monotonic()
        for entry in entries:
            if entry["kind"] == "part":
                self._clean_up(entry)
        for name in leftovers:
            self._store.remove(name)
        self._check_failures()

    def failed(self, unit: Unit, assignment: Assignment, failure: Failure) -> None:
        self._schedule.gave_up(unit.name)
        error = failure.error
        if isinstance(error, FanfoldError) and not isinstance(error, DataError):
            raise error
        if isinstance(assignment.instruction, Load):
            raise error
        self._retry(assignment, "exception", cause_line(error), failure)

    def lost(self, unit: Unit, assignment: Assignment | None, cause: str) -> None:
        self._loaded.discard(unit.name)
        self._schedule.gave_up(unit.name)
        self._deaths_in_a_row += 1
        error, what = death_of(cause)
        self.totals.retries[error] = self.totals.retries.get(error, 0) + 1
        if assignment is None:
            return
        instruction = assignment.instruction
        at = self._at.pop(unit.name, None)
        if at == LOADING:
            self._lost_while_loading(unit, what, cause)
        elif isinstance(instruction, Compute) and at is not None:
            self._suspect(instruction, at, (error, what), cause)
        else:
            self._tell(Note(at_s=time.monotonic(), text=f"{unit.name} {what}; replaced"))
            self._retry(assignment, None, cause, None)

    def _lost_while_loading(self, unit: Unit, what: str, cause: str) -> None:
        self._tell(Note(at_s=time.monotonic(), text=f"{unit.name} {what} while it loaded the model; replaced"))
        deaths = self._attempts[("load",)] = self._attempts.get(("load",), 0) + 1
        if deaths >= MAX_ATTEMPTS:
            raise UnitLost(
                f"loading the model on {unit.name}",
                found=f"units died of it {deaths} times; the last: {cause}",
                allowed="a model that loads",
                do="look at the last words; is there memory enough (fanfold machine)?",
            )

    def tell(self, event: Event) -> None:
        if isinstance(event, BatchBegun):
            self._at[event.unit] = (event.piece, event.batch)
        self._tell(event)

    # -- inside ---------------------------------------------------------------------------------------

    def _lease_detail(self, lease: Compute) -> LeaseDetail:
        detail = self._open[lease.window].detail
        trial = self._blame.trial(lease.window, lease.first) if lease.first == lease.last else None
        left_out = {
            (piece, batch): rows
            for piece in range(lease.first, lease.last + 1)
            for batch, rows in self._blame.left_out.get((lease.window, piece), {}).items()
        }
        return LeaseDetail(
            window=detail.window,
            items_sha256=detail.items_sha256,
            kept_sha256=detail.kept_sha256,
            left_out=left_out,
            trial=trial,
        )

    def _suspect(self, lease: Compute, at: tuple[int, int], why: tuple[str, str], cause: str) -> None:
        """A unit died of a batch: once is bad luck, twice makes the batch poison."""
        piece, batch = at
        rows = self._open[lease.window].rows[piece]
        self._schedule.isolate(lease.window, piece)
        searching = self._blame.died(lease.window, piece, batch, rows, why)
        first_row = self._open[lease.window].detail.window.first_row
        where = f"window {lease.window} (from row {first_row}), piece {piece}"
        then = "looking for the row that is to blame" if searching else "replaced; the piece is tried once more"
        self._tell(Note(at_s=time.monotonic(), text=f"a unit {why[1]} in {where}: {then}"))
        too_many = self._deaths_in_a_row > MAX_DEATHS_IN_A_ROW
        if too_many or self._blame.fruitless(lease.window, piece, batch) >= MAX_ATTEMPTS:
            raise UnitLost(
                f"computing {where}",
                found=f"{self._deaths_in_a_row} deaths of units in a row; the last: {cause}",
                allowed="units that live, or a row that can be set aside",
                do="look at the last words; run the same command again to go on",
            )

    def _take_windows(self) -> None:
        while self._feed is not None and not self._ended and self._schedule.wants_window:
            window = next(self._feed.take(), self._feed)
            if window is self._feed:
                return
            if window is None:
                self._ended = True
                self._schedule.input_ended(self.totals.num_windows)
                self._tell(InputEnded(at_s=time.monotonic(), rows=self.totals.rows_found))
            else:
                assert isinstance(window, Window)
                if window.index in self._known:
                    self._check_known(window)
                    continue
                self._found(window)
                self._schedule.window_found(window.index)

    def _check_known(self, window: Window) -> None:
        """A window that the log knows was looked at again."""
        known = self._known[window.index]
        if (known.num_rows, known.sha256) != (window.num_rows, window.sha256):
            raise ResumeError(
                f"going on with the input behind row {window.first_row - 1}",
                found=f"window {window.index} is not what it was when the job was started",
                allowed="the same rows as before, from the first one on",
                do="give it the same input, or start anew with --overwrite",
            )
        if window.index in self._awaited:
            self._awaited.remove(window.index)
            self._resume_window(window.index)
        if window.index not in self._open:
            self._source.release(window.index)

    def _found(self, window: Window) -> None:
        self._open[window.index] = _OpenWindow(WindowDetail(window=window))
        self.totals.rows_found += window.num_rows
        self.totals.num_windows += 1
        self._scanned_bytes += sum(span.stop - span.start for span in window.spans)
        total = self._source.total_bytes
        share = min(1.0, self._scanned_bytes / total) if total and window.sha256 is None else None
        self._tell(WindowFound(at_s=time.monotonic(), rows=window.num_rows, scanned_share=share))

    def _window_entry(self, index: int, result: PreparedWindow) -> dict[str, Any]:
        window = self._open[index].detail.window
        entry: dict[str, Any] = {
            "kind": "window",
            "window": index,
            "first_row": window.first_row,
            "num_rows": window.num_rows,
            "spans": [list(asdict(span).values()) for span in window.spans],
            "sha256": window.sha256,
            "costs": list(result.costs),
            "rows": list(result.rows),
            "tokens": result.tokens,
            "truncated": result.truncated,
            "source_sha256": result.source_sha256,
            "items_sha256": result.items_sha256,
            "kept_sha256": result.kept_sha256,
            "failed": [asdict(failure) for failure in result.failures],
        }
        self._know(index, entry)
        return entry

    def _know(self, index: int, entry: dict[str, Any]) -> None:
        """The window is prepared."""
        window = self._open[index]
        window.detail = WindowDetail(
            window=window.detail.window, items_sha256=entry["items_sha256"], kept_sha256=entry["kept_sha256"]
        )
        window.rows = tuple(entry["rows"])
        window.costs = tuple(entry["costs"])
        self.totals.truncated += entry["truncated"]
        self._note_failures(window, entry["failed"])
        rows = sum(entry["rows"]) + len(entry["failed"])
        self.totals.rows_prepared += rows
        records = window.detail.window.num_rows
        self._tell(WindowPrepared(at_s=time.monotonic(), records=records, rows=rows, tokens=sum(entry["costs"])))

    def _lease_entry(self, lease: Compute, result: LeaseDone) -> dict[str, Any]:
        window = self._open[lease.window]
        expected = sum(window.rows[lease.first : result.last + 1])
        if result.rows != expected:
            raise InternalError(
                f"window {lease.window} pieces {lease.first}-{result.last}: {expected} rows",
                found=f"{result.rows} rows came back",
                allowed="every row once",
                do="report this",
            )
        name = lease_name(lease.window, lease.first, result.last)
        entry = {
            "kind": "lease",
            "window": lease.window,
            "first": lease.first,
            "last": result.last,
            "attempt": lease.attempt,
            "rows": result.rows,
            "tokens": result.tokens,
            "padded_tokens": result.padded_tokens,
            **({"sums": result.sums} if result.sums else {}),
            "name": name,
            "sha256": result.sha256,
            "failed": [asdict(failure) for failure in result.failures],
        }
        window.leases[lease.first] = (result.last, name, result.sha256)
        self._count_lease(window, entry)
        return entry

    def _check_twin(self, lease: Compute, result: LeaseDone) -> None:
        """A late result of pieces that are committed already must have the same bytes: the determinism alarm."""
        window = self._open.get(lease.window)
        last, name, sha256 = (window.leases.get(lease.first) if window else None) or (None, None, None)
        if last == result.last and sha256 is not None and sha256 != result.sha256:
            raise DifferenceFound(
                f"window {lease.window}, pieces {lease.first}-{result.last}, computed twice",
                found=f"other bytes than before: {name} has sha256 {sha256}, {result.temporary} has {result.sha256}",
                allowed="the same bytes every time (level B)",
                do="both files are kept; is the task random, or the machine broken? --overwrite starts anew",
            )

    def _count_lease(self, window: _OpenWindow, entry: dict[str, Any]) -> None:
        window.lines[entry["first"]] = entry
        self.totals.rows_computed += entry["rows"]
        self.totals.tokens += entry["tokens"]
        self.totals.padded_tokens += entry["padded_tokens"]
        self.totals.sums.update(entry.get("sums", {}))
        self.totals.num_leases += 1
        self._note_failures(window, entry["failed"])

    def _part_entry(self, part: Assemble, result: PartDone) -> dict[str, Any]:
        generation = self._generation.get(part.part, 0)
        name = part_name(part.part, self._suffix, generation)
        entry = {
            "kind": "part",
            "part": part.part,
            "first": part.first,
            "last": part.last,
            "name": name,
            "rows": result.rows,
            "bytes": result.num_bytes,
            "sha256": result.sha256,
            "window_sha256": list(result.window_sha256),
        }
        self.totals.parts[part.part] = entry
        self.totals.rows_assembled += result.rows
        return entry

    def _lose(self, unit: Unit, part: Assemble, damaged: Damaged) -> list[dict[str, Any]]:
        """Committed files are damaged: their pieces are computed again, and only they."""
        entries: list[dict[str, Any]] = []
        for index in sorted({window for window, _ in damaged.leases}):
            window = self._open[index]
            names = {name for at, name in damaged.leases if at == index}
            if window.rescued is not None and window.rescued[0] in names:
                raise StorageError(
                    f"assembling part {part.part}",
                    found=f"{self._store.path(window.rescued[0])} is damaged; it held rows of an older output",
                    allowed="files that only Fanfold has written",
                    do="start anew with --overwrite",
                )
            for first, (_, name, _) in sorted(window.leases.items()):
                if name in names:
                    del window.leases[first]
                    self._uncount_lease(window, window.lines.pop(first))
                    self._store.remove(str(name))
                    entries.append({"kind": "lost", "window": index, "first": first})
                    self._tell(Note(at_s=time.monotonic(), text=f"{name} is damaged: its rows are computed again"))
            done = [(first, last) for first, (last, _, _) in window.leases.items()]
            self._schedule.damaged(unit.name, index, window.costs, done)
        key = ("damaged", part.part)
        self._attempts[key] = self._attempts.get(key, 0) + 1
        if self._attempts[key] > MAX_ATTEMPTS:
            raise StorageError(
                f"assembling part {part.part}",
                found=f"files in {self._store.path('pieces')} were damaged {self._attempts[key]} times",
                allowed="a disk that keeps what is written",
                do="check the disk, then run the same command again",
            )
        return entries

    def _uncount_lease(self, window: _OpenWindow, entry: dict[str, Any]) -> None:
        """As if it had never been: its rows and its failures."""
        self.totals.rows_computed -= entry["rows"]
        self.totals.tokens -= entry["tokens"]
        self.totals.padded_tokens -= entry["padded_tokens"]
        self.totals.sums.subtract(entry.get("sums", {}))
        gone = {(failure["offset"], failure.get("part")) for failure in entry["failed"]}
        window.failed -= gone
        first = window.detail.window.first_row
        self.totals.failures = [
            failure for failure in self.totals.failures if (failure["row"] - first, failure.get("part")) not in gone
        ]

    def _publish(self, results: list[tuple[str, str, str]]) -> None:
        """Put them under their names, durably; what stands there already must be the same."""
        put = self._store.put_all_if_absent([(temporary, name) for temporary, name, _ in results])
        for (temporary, name, sha256), first in zip(results, put, strict=True):
            if first:
                continue
            if not is_sound(self._store, name, sha256):
                raise DifferenceFound(
                    f"publishing {name}",
                    found="a file of that name whose bytes differ from what was computed now",
                    allowed="the same bytes every time",
                    do=f"keep both ({name}, {temporary}) and report this; --overwrite starts anew",
                )
            self._store.remove(temporary)
        for folder in sorted({name.partition("/")[0] for _, name, _ in results}):
            self._store.sync_folder(folder)

    def _clean_up(self, entry: dict[str, Any]) -> None:
        """The part is logged: what it was made of may go, and so may the part that it replaces."""
        generations = range(self._generation.get(entry["part"], 0))
        gone = [part_name(entry["part"], self._suffix, generation) for generation in generations]
        for index in range(entry["first"], entry["last"] + 1):
            window = self._open.pop(index)
            gone += [name for _, name, _ in window.leases.values() if name is not None]
            if window.rescued is not None:
                gone.append(window.rescued[0])
            gone += [items_name(index), kept_name(index)]
        self._store.remove(*gone)
        for index in range(entry["first"], entry["last"] + 1):
            self._source.release(index)

    def _result(self, index: int) -> WindowResult:
        window = self._open[index]
        files = [window.rescued] if window.rescued else []
        files += [(name, sha256) for _, (_, name, sha256) in sorted(window.leases.items()) if name and sha256]
        leases = [CommittedLease(name=name, sha256=sha256) for name, sha256 in files]
        return WindowResult(detail=window.detail, leases=tuple(leases), failed=frozenset(window.failed))

    def _note_failures(self, window: _OpenWindow, failures: list[dict[str, Any]]) -> None:
        for failure in failures:
            part = failure.get("part")
            window.failed.add((failure["offset"], part))
            self.totals.failures.append(
                {
                    "row": window.detail.window.first_row + failure["offset"],
                    **({} if part is None else {"part": part}),
                    "id": failure["id"],
                    "error": failure["error"],
                    "message": failure["message"],
                    "window": window.detail.window.index,
                    "piece": failure["piece"],
                    "attempts": failure["attempts"],
                }
            )

    def _check_failures(self) -> None:
        num_failed = len(self.totals.failures)
        if not num_failed:
            return
        last = self.totals.failures[-1]
        if self._on_error == "stop":
            first = min(self.totals.failures, key=lambda failure: failure["row"])
            raise DataError(
                "every row without an error (--on-error stop)",
                found=f"row {first['row']}: {first['error']}: {first['message']}",
                allowed="no failed row",
                do="fix the row and run the same command again, or use --on-error quarantine",
            )
        seen = self.totals.rows_computed + num_failed
        if self._max_failures is not None and seen >= 100 and not self._max_failures.allows(num_failed, seen):
            raise DataError(
                f"at most {self._max_failures} failed rows (--max-failures)",
                found=f"{num_failed} of {seen} rows failed; the last: {last['error']}: {last['message']}",
                allowed=str(self._max_failures),
                do="look at quarantine.jsonl; run the same command with a higher limit to go on",
            )

    def _retry(self, assignment: Assignment, kind: str | None, cause: str, failure: Failure | None) -> None:
        """Count the attempt; PieceFailed or UnitLost after the last one."""
        if kind is not None:
            self.totals.retries[kind] = self.totals.retries.get(kind, 0) + 1
        instruction = assignment.instruction
        key: tuple[Any, ...] = (type(instruction).__name__,)
        match instruction:
            case Compute():
                key = (*key, instruction.window, instruction.first)
            case Prepare():
                key = (*key, instruction.window)
            case Assemble():
                key = (*key, instruction.part)
        attempts = self._attempts[key] = self._attempts.get(key, 0) + 1
        if attempts < MAX_ATTEMPTS:
            return
        what = _shown(instruction, self._open)
        if failure is None:
            raise UnitLost(
                what,
                found=f"{attempts} units died doing it; the last: {cause}",
                allowed=f"fewer than {MAX_ATTEMPTS} deaths",
                do="look at the last words; run the same command again to go on",
            )
        raise PieceFailed(
            what,
            found=f"it failed {attempts} times; the last error: {cause}\n{failure.traceback}",
            allowed="errors of single rows, which are set aside",
            do="run again with --verbose; report this if the error is not yours",
        ) from failure.error


def _shown(instruction: Any, windows: dict[int, _OpenWindow]) -> str:
    match instruction:
        case Compute():
            window = windows[instruction.window].detail.window
            rows = f"rows {window.first_row}-{window.first_row + window.num_rows - 1}"
            return f"window {instruction.window} ({rows}), pieces {instruction.first}-{instruction.last}"
        case Prepare():
            return f"preparing window {instruction.window}"
        case Assemble():
            return f"assembling part {instruction.part}"
    return str(instruction)
