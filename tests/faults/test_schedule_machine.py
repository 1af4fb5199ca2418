"""Schedule, agenda and log under every mix of faults that hypothesis can think of.

The real `Schedule`, `JobAgenda`, journal and store work on a real folder; the units and the input are made up. A
model of the folder is kept from what was delivered, and compared with what the log says after every step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fanfold.data import journal
from fanfold.data.durable import PosixStore
from fanfold.data.folder import Output, open_run
from fanfold.data.source import RowFailure, Span, Window
from fanfold.engine.engine import LOADING, Failure
from fanfold.engine.schedule import Assemble, Compute, Load, Prepare, Schedule
from fanfold.errors import PieceFailed, StorageError, UnitLost
from fanfold.events import BatchBegun
from fanfold.job.agenda import MAX_ATTEMPTS, JobAgenda
from fanfold.job.log import borders, settle
from fanfold.job.reopen import _begin_append, mend
from fanfold.job.work import (
    Damaged,
    LeaseDone,
    PartDone,
    PreparedWindow,
    TrialDone,
    items_name,
    kept_name,
)
from fanfold.plan.plan import Unit

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

PRIMITIVES = ("_create", "_append", "_cut", "_link", "_rename", "_unlink", "_make_folder")
HUNG = "no sign of life for 300 s (--timeout-batch): killed"
KILLED = "killed by SIGKILL"
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where folders are fast
MAX_TURNS = 3_000  # of the units, until a job without faults has ended
MAX_RUNS = 40  # what was tried too often in one run ends it; the same command goes on


# -- what a job is about ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A window: rows and cost of each piece; rows that cannot be read, that raise, and that kill (offsets)."""

    rows: tuple[int, ...]
    costs: tuple[int, ...]
    unread: int
    raising: frozenset[int]
    fatal: frozenset[int]

    @property
    def num_rows(self):
        return sum(self.rows) + self.unread

    def offsets(self, piece):
        start = sum(self.rows[:piece])
        return range(start, start + self.rows[piece])

    @property
    def failed(self):
        return self.raising | self.fatal | set(range(sum(self.rows), self.num_rows))


@st.composite
def specs(draw):
    rows = tuple(draw(st.lists(st.integers(1, 3), max_size=14)))
    bad = st.sets(st.integers(0, max(0, sum(rows) - 1)), max_size=1) if rows else st.just(set())
    fatal = frozenset(draw(bad))
    return Spec(
        rows=rows,
        costs=tuple(draw(st.integers(1, 9)) for _ in rows),
        unread=draw(st.integers(0, 1)),
        raising=frozenset(draw(bad)) - fatal,
        fatal=fatal,
    )


class Input:
    """Implements data.source.Source as far as an agenda needs it."""

    def __init__(self, windows, spooled):
        self.specs = list(windows)
        self.spooled = spooled
        self.total_bytes = None if spooled else 1_000
        self.spool = set()  # windows of a stream that have come by in this run and are still held

    def window(self, index):
        first = sum(spec.num_rows for spec in self.specs[:index])
        count = self.specs[index].num_rows
        span = Span(file=0, start=first, stop=first + count, rows=count, first_line=first + 1)
        sha256 = f"{index}:{self.specs[index]}" if self.spooled else None
        return Window(index=index, first_row=first, num_rows=count, spans=(span,), sha256=sha256)

    def windows(self, window_rows, after=None):
        for index in range(0 if after is None else after.index + 1, len(self.specs)):
            self.spool.add(index)
            yield self.window(index)

    def release(self, window_index):
        self.spool.discard(window_index)


class SteppedFeed:
    """Implements job.feed.Feed without a thread: as many windows are found as the machine allows."""

    def __init__(self, source, window_rows, after, ahead):
        self._windows = source.windows(window_rows, after)
        self.allowed = 0

    def take(self):
        while self.allowed:
            self.allowed -= 1
            window = next(self._windows, None)
            yield window
            if window is None:
                return

    def close(self):
        pass


class Crashed(Exception):
    """The parent died in the middle of a write."""


class Power:
    """Fails the store's primitives once as many as allowed have been carried out."""

    def __init__(self):
        self.left = None
        self.keep_share = 0.0

    def watch(self, store):
        for name in PRIMITIVES:
            setattr(store, name, self._limited(name, getattr(store, name)))

    def _limited(self, name, real):
        def primitive(*arguments):
            if self.left == 0:
                if name == "_append":
                    fd, path, data = arguments
                    real(fd, path, data[: int(len(data) * self.keep_share)])
                raise Crashed(name)
            if self.left is not None:
                self.left -= 1
            return real(*arguments)

        return primitive


class Committed:
    """The model: what the lines of the log make of the folder; every fact once."""

    def __init__(self):
        self.windows = set()
        self.pieces = {}  # (window, piece) -> first piece of the lease that it came in
        self.parts = {}  # part -> (first, last)
        self.rows = {}  # (window, first) -> rows of the lease
        self.part_rows = {}
        self.failed = set()  # (window, offset, piece)

    def apply(self, entry):
        match entry["kind"]:
            case "window":
                index = entry["window"]
                assert index not in self.windows, f"window {index} was committed twice"
                self.windows.add(index)
                self.failed |= {(index, failure["offset"], None) for failure in entry["failed"]}
            case "lease":
                index, first = entry["window"], entry["first"]
                assert index in self.windows, f"a lease of window {index}, which is not prepared"
                for piece in range(first, entry["last"] + 1):
                    assert (index, piece) not in self.pieces, f"window {index}: piece {piece} was committed twice"
                    self.pieces[index, piece] = first
                self.rows[index, first] = entry["rows"]
                self.failed |= {(index, failure["offset"], failure["piece"]) for failure in entry["failed"]}
            case "lost":
                self._lose(entry["window"], entry["first"])
            case "part":
                span = range(entry["first"], entry["last"] + 1)
                assert entry["part"] not in self.parts, f"part {entry['part']} was committed twice"
                assert not set(span) & self.in_parts, f"windows {span} are in two parts"
                self.parts[entry["part"]] = (entry["first"], entry["last"])
                self.part_rows[entry["part"]] = entry["rows"]
            case "drop":
                for index in entry["windows"]:
                    for key in [key for key in self.rows if key[0] == index]:
                        self._lose(*key)
                    self.windows.discard(index)
                    self.failed = {key for key in self.failed if key[0] != index}
                gone = set(entry["windows"])
                lost = [part for part, (a, b) in self.parts.items() if gone & set(range(a, b + 1))]
                for part in lost:
                    del self.parts[part], self.part_rows[part]

    def _lose(self, index, first):
        pieces = {key for key, start in self.pieces.items() if key[0] == index and start == first}
        assert pieces, f"window {index}: the lease from piece {first} was lost twice"
        for key in pieces:
            del self.pieces[key]
        del self.rows[index, first]
        self.failed = {key for key in self.failed if (key[0], key[2]) not in pieces}

    @property
    def in_parts(self):
        return {index for first, last in self.parts.values() for index in range(first, last + 1)}

    def facts(self):
        return self.windows, self.pieces, self.parts, self.rows, self.part_rows, self.failed


# -- the machine ------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """A job over several runs. Between two runs there is only the folder."""

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="fanfold-machine-", dir=MEMORY)) / "out"
        self.power = Power()
        self.agenda = None  # None: no run is going on
        self.log = []  # its lines, as last seen
        self.replayed = 0  # how many of them were compared with the model
        self.committed = Committed()
        self.damaged_parts = set()  # names, looked at when the next run begins
        self.must_grow = False

    @initialize(
        windows=st.lists(specs(), min_size=1, max_size=3),
        num_units=st.integers(1, 3),
        windows_per_part=st.integers(1, 3),
        look_ahead=st.integers(1, 3),
        spooled=st.booleans(),
    )
    def begin(self, windows, num_units, windows_per_part, look_ahead, spooled):
        self.source = Input(windows, spooled)
        self.units = [Unit(name=f"cpu:{i}") for i in range(num_units)]
        self.windows_per_part = windows_per_part
        self.look_ahead = look_ahead
        self.root.mkdir()
        (self.root / "run.json").write_text(json.dumps({"fanfold_version": "0", "fingerprint": {}}))
        self._start()

    def teardown(self):
        try:
            if hasattr(self, "source"):
                self._check_end()
        finally:
            self._end()
            shutil.rmtree(self.root.parent)

    # -- runs ---------------------------------------------------------------------------------------------

    def _start(self):
        """What job.run does before it gives the work to an engine; False where the power failed."""
        output = Output(self.root)
        self.store, _ = open_run(output, overwrite=False, sync=False)
        self.power.watch(self.store)
        try:
            entries = journal.load(self.store)
            assert entries == self.log
            if self.must_grow:
                _begin_append(self.store, settle(entries), self.windows_per_part)
                self.must_grow = False
                entries = journal.load(self.store)
            settled = settle(mend(self.store, output, entries))
        except Crashed:
            self._end()
            return False
        self.damaged_parts.clear()
        self.schedule = Schedule(
            num_units=len(self.units),
            windows_per_part=self.windows_per_part,
            look_ahead=self.look_ahead,
            borders=borders(settled),
        )
        self.agenda = JobAgenda(source=self.source, store=self.store, schedule=self.schedule, suffix="parquet")
        self.agenda.restore(settled)
        self.source.spool.clear()
        with mock.patch("fanfold.job.agenda.Feed", SteppedFeed):
            self.agenda.start(4096, 4)
        self.busy = {}  # unit -> assignment
        self.arrived = []  # (unit, assignment, result), to be committed together
        self.late = []  # (unit, assignment) of units that were declared dead
        self.given = set()
        self.attempts = {}  # (window, piece) -> last attempt
        self.mishaps = 0
        return True

    def _end(self):
        """The parent is gone, and its units with it: only the folder is left."""
        self.power.left = None
        if hasattr(self, "store"):
            self.store.close()
        self.agenda = None

    def _ends_by(self, call, *arguments):
        """True where the job ended because something failed too often; the same command goes on."""
        try:
            call(*arguments)
        except (UnitLost, PieceFailed, StorageError):
            assert self.mishaps >= MAX_ATTEMPTS, "given up although nothing failed that often"
            self._end()
            return True
        return False

    def _commit(self):
        """Results that have arrived are committed together; what the log must say then."""
        wanted = [line for _, assignment, result in self.arrived for line in lines_of(assignment, result)]
        wanted = [json.loads(json.dumps(line)) for line in wanted]
        before = len(self.log)
        results, self.arrived = self.arrived, []
        self.mishaps += sum(isinstance(result, Damaged) for _, _, result in results)
        crashed = False
        try:
            ended = self._ends_by(self.agenda.finished, results)
        except Crashed:
            crashed = ended = True
            self._end()
        self._read_log(whole=not crashed)
        new = [{key: entry[key] for key in line} for entry, line in zip(self.log[before:], wanted, strict=False)]
        assert new == wanted[: len(new)]
        if not crashed and not ended:
            assert len(self.log) - before == len(wanted)
        return not ended

    def _read_log(self, *, whole=True):
        """The log only ever grows; each new line goes into the model."""
        store = PosixStore(self.root, sync=False)
        data = store.read(journal.NAME) or b""
        entries = journal.load(store, repair=False)
        if whole:
            assert data == b"" or data.endswith(b"\n")
        assert entries[: len(self.log)] == self.log, "what was committed did not stay committed"
        for entry in entries[len(self.log) :]:
            self.committed.apply(entry)
        self.log = entries

    # -- rules: a run -------------------------------------------------------------------------------------
    # Each one first brings about what it needs: a rule that waits for others hardly ever has its turn.

    @rule(
        found=st.integers(0, 2),
        count=st.integers(1, 3),
        turns=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.0]), st.booleans()),
            max_size=8,
        ),
        elapsed_s=st.sampled_from([0, 1e-3, 1e-3, 9]),
    )
    def work(self, found, count, turns, elapsed_s):
        """Windows are found, units get something to do, and finish it, wholly or in part, alone or together."""
        self._go()
        self.find(found)
        for which, share, alone in turns:
            self.assign(count)
            if self.busy and not self._finish(self._pick(which), share, elapsed_s):
                return
            if (alone or not self.busy) and not self._commit():
                return

    def _go(self):
        if self.agenda is None:
            assert self._restart()

    def find(self, count):
        self.agenda._feed.allowed += count

    def assign(self, count):
        held = {unit for unit, _, _ in self.arrived} | set(self.busy)
        for unit in [unit for unit in self.units if unit not in held][:count]:
            assignment = self.agenda.next_for(unit)
            if assignment is not None:
                self.busy[unit] = assignment
                self._check_new(assignment.instruction)

    def _check_new(self, instruction):
        if isinstance(instruction, Load):
            return
        assert instruction not in self.given, f"{instruction} was given twice"
        self.given.add(instruction)
        if isinstance(instruction, Compute):
            for piece in range(instruction.first, instruction.last + 1):
                key = (instruction.window, piece)
                assert instruction.attempt > self.attempts.get(key, 0), f"{instruction}: piece {piece} had that before"
                self.attempts[key] = instruction.attempt

    def _pick(self, which):
        return sorted(self.busy, key=lambda unit: unit.name)[which % len(self.busy)]

    def _pick_busy(self, which):
        """A unit that has something to do; None where there is nothing to do."""
        self._go()
        if not self.busy:
            self.find(1)
            if self._commit():
                self.assign(1)
        return self._pick(which) if self.agenda is not None and self.busy else None

    def _finish(self, unit, share=1.0, elapsed_s=1e-3):
        """The unit's result has arrived, or it died of a row; False where that ended the job."""
        assignment = self.busy.pop(unit)
        result = self.carry_out(unit, assignment, share, elapsed_s)
        if isinstance(result, BatchBegun):
            return self._die(unit, assignment, (result.piece, 0), KILLED)
        self.arrived.append((unit, assignment, result))
        return True

    @rule(
        which=st.integers(0, 5),
        where=st.sampled_from(["nowhere", "loading", "batch", "batch"]),
        piece=st.integers(0, 9),
        comes_late=st.booleans(),
    )
    def die(self, which, where, piece, comes_late):
        """A unit dies, or is declared dead: then its result may arrive all the same."""
        unit = self._pick_busy(which)
        if unit is not None:
            assignment = self.busy.pop(unit)
            place = self._place(assignment, where, piece)
            if self._die(unit, assignment, place, HUNG if comes_late else KILLED) and comes_late:
                self.late.append((unit, assignment))

    def _place(self, assignment, where, piece):
        """Where a unit dies of bad luck: never in a trial, whose row would be blamed for it."""
        instruction = assignment.instruction
        if where == "loading" and isinstance(instruction, Load | Compute):
            return LOADING
        if where == "batch" and isinstance(instruction, Compute) and assignment.detail.trial is None:
            return (instruction.first + piece % (instruction.last - instruction.first + 1), 0)
        return None

    def _die(self, unit, assignment, at, cause):
        self.mishaps += 1
        if at is not None:
            self.agenda.tell(BatchBegun(at_s=0.0, unit=unit.name, piece=at[0], batch=at[1]))
        return not self._ends_by(self.agenda.lost, unit, assignment, cause)

    @precondition(lambda self: self.agenda is not None and self.late)
    @rule(which=st.integers(0, 5))
    def arrive_late(self, which):
        """The result of a unit that was declared dead changes nothing."""
        self.assign(len(self.units))  # what takes its place is busy with something else
        unit, assignment = self.late.pop(which % len(self.late))
        if self.source.spooled and set(windows_of(assignment)) & self.committed.in_parts:
            return  # it would have to be made from a stream that is gone
        result = self.carry_out(unit, assignment, 1.0, 1.0)
        if isinstance(result, BatchBegun):
            return
        self.agenda.finished([(unit, assignment, result)])
        if isinstance(result, LeaseDone | PartDone):
            assert not (self.root / result.temporary).exists()
        before = len(self.log)
        self._read_log()
        assert len(self.log) == before

    @rule(which=st.integers(0, 5))
    def die_idle(self, which):
        self._go()
        unit = self.units[which % len(self.units)]
        if unit not in self.busy and unit not in {held for held, _, _ in self.arrived}:
            self.mishaps += 1
            self._ends_by(self.agenda.lost, unit, None, KILLED)

    @rule(which=st.integers(0, 5))
    def fail(self, which):
        """An exception that no row is to blame for."""
        unit = self._pick_busy(which)
        if unit is not None and self.busy[unit].instruction != Load():
            self.mishaps += 1
            failure = Failure(error=OSError("a passing trouble"), traceback="")
            self._ends_by(self.agenda.failed, unit, self.busy.pop(unit), failure)

    @rule(which=st.integers(0, 20), remove=st.booleans())
    def tamper(self, which, remove):
        """A committed lease loses its file, or a byte of it is another one."""
        self._tamper("lease", which, remove)

    # -- rules: between runs ------------------------------------------------------------------------------

    @rule(
        how=st.sampled_from(["crash", "crash in commit", "crash in commit", "stop"]),
        steps=st.integers(0, 9),
        keep_share=st.sampled_from([0.0, 0.3, 0.7, 0.99, 1.0]),
        touched=st.lists(
            st.tuples(st.sampled_from(["lease", "window", "part", "part"]), st.integers(0, 20), st.booleans()),
            max_size=3,
        ),
        windows=st.one_of(st.just([]), st.lists(specs(), min_size=1, max_size=2)),
        restart_steps=st.one_of(st.none(), st.none(), st.integers(0, 4)),
    )
    def another_run(self, how, steps, keep_share, touched, windows, restart_steps):
        """The parent ends, in the middle of a commit or after a signal; files are damaged, rows are appended."""
        self._go()
        if how == "stop":
            self._stop(share=keep_share)
        elif how == "crash in commit":
            self._crash_in_commit(steps, keep_share)
        if self.agenda is not None:
            self._end()
        for kind, which, remove in touched:
            self._tamper(kind, which, remove)
        if windows:
            self._grow(windows)
        if restart_steps is not None:
            self._restart(restart_steps, keep_share)

    def _stop(self, share):
        """A signal: running leases end early, and are committed."""
        self.agenda.request_stop()
        if all(self._finish(unit, share) for unit in list(self.busy)):
            self._commit()

    def _crash_in_commit(self, steps, keep_share):
        """The parent dies after so many changes of the folder; of the line that it writes, a share is there."""
        if all(self._finish(unit) for unit in list(self.busy)) and self.arrived:
            self.power.left, self.power.keep_share = steps, keep_share
            self._commit()
            self.power.left = None

    def _restart(self, steps=None, keep_share=0.0):
        """A new run; False where the power failed before it began to work."""
        broken = {name for name in self.damaged_parts if name in self._names("part")}
        wanted = [
            index
            for entry in settle(self.log)
            if entry["kind"] == "part" and entry["name"] in broken
            for index in range(entry["first"], entry["last"] + 1)
        ]
        before, had_to_grow = len(self.log), self.must_grow
        self.power.left, self.power.keep_share = steps, keep_share
        try:
            started = self._start()
        finally:
            self.power.left = None
        self._read_log(whole=started)
        new = self.log[before:]
        dropped = [entry["windows"] for entry in new if entry["kind"] == "drop"]
        if started and not had_to_grow:
            assert dropped == ([wanted] if wanted else [])
            assert len(new) == len(dropped)
        return started

    def _grow(self, windows):
        """Rows were appended to the input, and the next run is told to take them."""
        settled = settle(self.log)
        known = {entry["window"] for entry in settled if entry["kind"] == "window"}
        gap = next(index for index in range(len(known) + 1) if index not in known)
        if self.source.spooled or len(self.source.specs) > 8 or any(first > gap for first, _ in borders(settled)):
            return  # the last: test_a_border_behind_a_gap_is_forgotten_with_the_windows_behind_it
        self.source.specs += windows
        self.must_grow = True

    def _tamper(self, kind, which, remove):
        """A file is gone, or not what it was; a prepared one was never flushed, a part is looked at by its length."""
        if kind == "window":
            there = sorted((self.root / "windows").glob("*"))
        else:
            there = [self.root / name for name in sorted(self._names(kind)) if (self.root / name).exists()]
        if not there:
            return
        path = there[which % len(there)]
        data = path.read_bytes()
        path.unlink()
        if kind == "part":
            self.damaged_parts.add(f"data/{path.name}")
        if kind != "window" and not remove and data:
            path.write_bytes(data[:-1] if kind == "part" else data[:-1] + bytes([data[-1] ^ 1]))

    # -- units --------------------------------------------------------------------------------------------

    def carry_out(self, unit, assignment, share, elapsed_s):
        """What JobWork returns; a BatchBegun is the batch that the unit died of."""
        match assignment.instruction:
            case Prepare() as prepare:
                return self._prepare(prepare.window)
            case Compute() as lease:
                return self._compute(unit, lease, assignment.detail, share, elapsed_s)
            case Assemble() as part:
                return self._assemble(unit, part, assignment.detail)
        return None

    def _prepare(self, index):
        spec = self.source.specs[index]
        assert not self.source.spooled or index in self.source.spool, f"window {index} of the stream is gone"
        for name in (items_name(index), kept_name(index)):
            (self.root / name).write_bytes(name.encode())
        unread = range(sum(spec.rows), spec.num_rows)
        return PreparedWindow(
            costs=spec.costs,
            rows=spec.rows,
            tokens=sum(spec.costs),
            truncated=0,
            failures=tuple(RowFailure(offset=offset, error="BadRecord", message="") for offset in unread),
            source_sha256="",
            items_sha256=hashlib.sha256(items_name(index).encode()).hexdigest(),
            kept_sha256=hashlib.sha256(kept_name(index).encode()).hexdigest(),
        )

    def _ensure_prepared(self, index):
        if not all((self.root / name).exists() for name in (items_name(index), kept_name(index))):
            self._prepare(index)

    def _compute(self, unit, lease, detail, share, elapsed_s):
        spec = self.source.specs[lease.window]
        self._ensure_prepared(lease.window)
        if detail.trial is not None:
            assert lease.first == lease.last
            offsets = spec.offsets(lease.first)
            tried = {offsets[row] for row in detail.trial.rows}
            if tried & spec.fatal:
                return BatchBegun(at_s=0.0, unit=unit.name, piece=lease.first, batch=0)
            raised = ("ValueError", "this row is poison") if tried & spec.raising else None
            return TrialDone(passed=raised is None, cause=raised)
        last = lease.last if share == 1.0 else lease.first - 1 + int(share * (lease.last + 1 - lease.first))
        lines, failures, rows = [], [], 0
        for piece in range(lease.first, last + 1):
            offsets = spec.offsets(piece)
            left_out = {offsets[row] for row in detail.left_out.get((piece, 0), {})}
            assert left_out <= spec.fatal | spec.raising, "a row without a fault was blamed"
            if spec.fatal & set(offsets) - left_out:
                return BatchBegun(at_s=0.0, unit=unit.name, piece=piece, batch=0)
            rows += len(offsets)
            for offset in offsets:
                if offset in spec.failed:
                    failures.append(RowFailure(offset=offset, error="Bad", message="", piece=piece))
                else:
                    lines.append(f"{offset}\n")
        data = "".join(lines).encode()
        temporary = f"tmp/{lease.window:09d}-{lease.first:06d}-{lease.attempt}-{unit.name}"
        (self.root / temporary).write_bytes(data)
        return LeaseDone(
            last=last,
            rows=rows,
            temporary=temporary,
            sha256=hashlib.sha256(data).hexdigest(),
            tokens=rows,
            padded_tokens=rows,
            elapsed_s=elapsed_s,
            failures=tuple(failures),
        )

    def _assemble(self, unit, part, results):
        assert [result.detail.window.index for result in results] == list(range(part.first, part.last + 1))
        found, damaged = {}, []
        for result in results:
            for lease in result.leases:
                path = self.root / lease.name
                data = path.read_bytes() if path.exists() else None
                if data is None or hashlib.sha256(data).hexdigest() != lease.sha256:
                    damaged.append((result.detail.window.index, lease.name))
                else:
                    found.setdefault(result.detail.window.index, []).extend(map(int, data.split()))
        if damaged:
            return Damaged(leases=tuple(damaged))
        rows = []
        for result in results:
            index, spec = result.detail.window.index, self.source.specs[result.detail.window.index]
            self._ensure_prepared(index)
            offsets = sorted(found.get(index, []))
            assert result.failed == {(offset, None) for offset in spec.failed}
            assert offsets == sorted(set(range(spec.num_rows)) - spec.failed)
            rows += [result.detail.window.first_row + offset for offset in offsets]
        data = "".join(f"{row}\n" for row in rows).encode() or b"empty"
        temporary = f"tmp/part-{part.part:09d}-{part.attempt}-{unit.name}"
        (self.root / temporary).write_bytes(data)
        return PartDone(
            temporary=temporary,
            rows=len(rows),
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            window_sha256=("",) * len(results),
        )

    # -- what is always true ------------------------------------------------------------------------------

    def _names(self, kind):
        """Names that the log holds; of leases those whose part is not there yet."""
        return {
            entry["name"]
            for entry in settle(self.log)
            if entry["kind"] == kind and (kind == "part" or entry["window"] not in self.committed.in_parts)
        }

    @invariant()
    def the_log_says_what_the_folder_holds(self):
        if self.replayed == len(self.log):
            return
        self.replayed = len(self.log)
        replayed = Committed()
        for entry in settle(self.log):
            replayed.apply(entry)
        assert replayed.facts() == self.committed.facts()
        for first, last in replayed.parts.values():
            for index in range(first, last + 1):
                pieces = {piece for window, piece in replayed.pieces if window == index}
                assert pieces == set(range(len(self.source.specs[index].rows)))

    @precondition(lambda self: self.agenda is not None)
    @invariant()
    def no_piece_is_lost(self):
        self.schedule.validate_state()
        out = {}
        for instruction in self.schedule._out.values():
            if isinstance(instruction, Compute):
                out.setdefault(instruction.window, []).extend(range(instruction.first, instruction.last + 1))
        preparing = [i.window for i in self.schedule._out.values() if isinstance(i, Prepare)]
        preparing += self.schedule._unprepared
        assert len(preparing) == len(set(preparing))
        for index, window in self.schedule._open.items():
            if window.costs is None:
                assert index in preparing
                continue
            pieces = [piece for start, stop in window.todo for piece in range(start, stop)]
            pieces += out.get(index, [])
            pieces += [piece for at, piece in self.committed.pieces if at == index]
            assert sorted(pieces) == list(range(len(self.source.specs[index].rows)))
        known = self.committed.windows - self.committed.in_parts
        assert known <= self.schedule._open.keys() | self.schedule._computed | self.agenda._awaited

    @precondition(lambda self: self.agenda is not None)
    @invariant()
    def the_totals_are_those_of_the_log(self):
        totals, first_row = self.agenda.totals, {}
        assert totals.rows_computed == sum(self.committed.rows.values())
        assert totals.rows_assembled == sum(self.committed.part_rows.values())
        for index in self.committed.windows:
            first_row[index] = self.source.window(index).first_row
        failed = sorted(first_row[index] + offset for index, offset, _ in self.committed.failed)
        assert sorted(failure["row"] for failure in totals.failures) == failed

    # -- the end ------------------------------------------------------------------------------------------

    def _check_end(self):
        """Without further faults, and then once more, everything is there exactly once."""
        for _ in range(2):
            self._drain()
            if self.damaged_parts:
                self._end()
        assert not self.damaged_parts
        everything = {(index, piece) for index, spec in enumerate(self.source.specs) for piece in range(len(spec.rows))}
        assert self.committed.pieces.keys() == everything
        assert sorted(i for a, b in self.committed.parts.values() for i in range(a, b + 1)) == list(
            range(len(self.source.specs))
        )
        wanted, failed, first_row = [], set(), 0
        for spec in self.source.specs:
            wanted += [first_row + offset for offset in range(spec.num_rows) if offset not in spec.failed]
            failed |= {first_row + offset for offset in spec.failed}
            first_row += spec.num_rows
        parts = [name for _, name in sorted((e["part"], e["name"]) for e in settle(self.log) if e["kind"] == "part")]
        lines = [line for name in parts for line in (self.root / name).read_bytes().replace(b"empty", b"").split()]
        assert [int(line) for line in lines] == wanted
        assert {failure["row"] for failure in self.agenda.totals.failures} == failed
        assert len(self.agenda.totals.failures) == len(failed)
        totals = self.agenda.totals
        assert (totals.rows_found, totals.rows_assembled) == (first_row, first_row - len(failed))
        assert sorted(path.name for path in (self.root / "data").iterdir()) == [Path(name).name for name in parts]
        assert list((self.root / "pieces").iterdir()) == []
        assert not self.schedule.busy

    def _drain(self):
        runs = 0
        for _ in range(MAX_TURNS):
            if self.agenda is None:
                runs += 1
                assert runs < MAX_RUNS, "run after run is given up"
                self._go()
            self.find(9)
            self.assign(len(self.units))
            if not all(self._finish(unit) for unit in list(self.busy)):
                continue
            if not self._commit():
                continue
            self.the_log_says_what_the_folder_holds()
            self.no_piece_is_lost()
            self.the_totals_are_those_of_the_log()
            if self.agenda.done:
                return
        raise AssertionError(f"it does not end: {self.schedule._open}, {self.schedule._out}")


def windows_of(assignment):
    """What it is about."""
    match assignment.instruction:
        case Prepare(window=index) | Compute(window=index):
            return [index]
        case Assemble() as part:
            return list(range(part.first, part.last + 1))
    return []


def lines_of(assignment, result):
    """What the log must say of a result."""
    match assignment.instruction:
        case Prepare() as prepare:
            return [{"kind": "window", "window": prepare.window, "costs": result.costs}]
        case Compute() as lease if isinstance(result, LeaseDone) and result.last >= lease.first:
            return [{"kind": "lease", "window": lease.window, "first": lease.first, "last": result.last}]
        case Assemble() as part if isinstance(result, PartDone):
            return [{"kind": "part", "part": part.part, "first": part.first, "last": part.last, "rows": result.rows}]
        case Assemble() if isinstance(result, Damaged):
            firsts = [(index, int(name.split("-")[3])) for index, name in result.leases]
            return [{"kind": "lost", "window": index, "first": first} for index, first in sorted(firsts)]
    return []


def run_machine(seed, *, examples, steps):
    run_state_machine_as_test(
        hypothesis.seed(seed)(Machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to shrink takes minutes; --seed finds the same again
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_whatever_happens_every_row_comes_out_once(seed):
    run_machine(seed, examples=200, steps=50)


@pytest.mark.nightly
def test_whatever_happens_every_row_comes_out_once_in_long_runs(seed):
    run_machine(seed, examples=2_000, steps=80)


# -- found by it, or while it was written -----------------------------------------------------------------


@pytest.fixture
def job():
    """Makes a machine that is driven by hand, on a window with pieces of so many rows."""
    made = []

    def make(*windows, **given):
        machine = Machine()
        made.append(machine)
        machine.begin(
            **{"num_units": 2, "windows_per_part": 1, "look_ahead": 2, "spooled": False, **given}, windows=windows
        )
        machine.find(9)
        return machine

    yield make
    for machine in made:
        machine._end()
        shutil.rmtree(machine.root.parent)


def a_window(*rows, raising=(), fatal=()):
    return Spec(rows=rows, costs=(1,) * len(rows), unread=0, raising=frozenset(raising), fatal=frozenset(fatal))


def step(machine, unit=0, count=1):
    """The unit is given something, if it has nothing, and delivers it."""
    for _ in range(count):
        if machine.units[unit] not in machine.busy:
            machine.busy[machine.units[unit]] = machine.agenda.next_for(machine.units[unit])
        machine._finish(machine.units[unit])
        machine._commit()


def in_search(job):
    """A job whose next instruction is a trial: row 0 raises, row 1 has killed two units."""
    machine = job(a_window(2, raising=[0], fatal=[1]))
    step(machine, count=3)
    return machine


def test_a_row_that_raises_beside_one_that_kills_keeps_its_own_error(job):
    machine = in_search(job)
    found = {}
    for _ in range(20):
        machine.assign(1)
        found |= getattr(machine.busy[machine.units[0]].detail, "left_out", {}).get((0, 0), {})
        if found:
            break
        step(machine)
    assert found == {0: ("ValueError", "this row is poison")}


def test_a_late_assembly_that_finds_its_files_cleaned_up_is_ignored(job):
    """No engine lets a result of a unit through that it has declared dead; twins of other kinds are ignored, too."""
    machine = job(a_window(1))
    step(machine, count=2)
    machine.assign(1)
    unit, late = next(iter(machine.busy.items()))
    assert isinstance(late.instruction, Assemble)
    machine.die(0, "nowhere", 0, True)
    step(machine, unit=1)
    assert machine.agenda.done
    result = machine.carry_out(unit, late, 1.0, 1.0)
    assert isinstance(result, Damaged)
    machine.agenda.finished([(unit, late, result)])


def test_a_late_trial_takes_nothing_from_the_unit(job):
    """No engine lets a result of a unit through that it has declared dead; twins of other kinds are ignored, too."""
    machine = in_search(job)
    machine.assign(1)
    unit, late = next(iter(machine.busy.items()))
    assert late.detail.trial is not None
    machine.die(0, "nowhere", 0, True)
    machine.assign(1)
    assert machine.schedule.busy
    machine.agenda.finished([(unit, late, machine.carry_out(unit, late, 1.0, 1.0))])
    assert machine.schedule.busy


def test_pieces_that_an_early_stop_gives_back_remember_their_attempt():
    schedule = Schedule(num_units=1)
    schedule.window_known(0, [1] * 40, [])
    schedule.input_ended(1)
    schedule.computed("cpu:0", schedule.next_for("cpu:0"), 0, 1e-3)
    assert schedule.next_for("cpu:0").last > 3
    first = schedule.gave_up("cpu:0")
    second = schedule.next_for("cpu:0")
    assert (second.first, second.attempt) == (first.first, 2)
    schedule.computed("cpu:0", second, second.first, 1e-3)
    assert schedule.next_for("cpu:0").attempt == 3


def test_a_border_behind_a_gap_is_forgotten_with_the_windows_behind_it(tmp_path):
    """Rows appended, a part deleted, a crash while it is made again, rows appended again: a window is in two parts."""

    def windows(*found):
        return [{"kind": "window", "window": index, "rows": []} for index in found]

    store = PosixStore(tmp_path, sync=False)
    appended = {"kind": "append", "first_window": 4, "first_part": 2}
    journal.append(store, [*windows(0, 1, 2, 3), appended, *windows(4, 5), {"kind": "drop", "windows": [2, 3]}])
    journal.append(store, windows(2))
    _begin_append(store, settle(journal.load(store)), 2)
    schedule = Schedule(num_units=1, windows_per_part=2, borders=borders(settle(journal.load(store))))
    store.close()
    parts = sorted({schedule.part_of(index) for index in range(8)})
    spans = [range(first, last + 1) for first, last in map(schedule._windows_of, parts)]
    assert [index for span in spans for index in span][:8] == list(range(8))
