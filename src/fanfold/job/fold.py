"""`fold` and `map`: a function over pieces of data in memory, and the pieces' results as one."""

from __future__ import annotations

import functools
import pickle
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.data.pieces import Pieces, pieces_of
from fanfold.data.scratch import scratch_folder
from fanfold.engine._worker import portable
from fanfold.engine.engine import Assignment, Desk, Failure
from fanfold.engine.inline import Inline
from fanfold.engine.schedule import Compute, Schedule
from fanfold.engine.threads import Threads
from fanfold.errors import DataError, FanfoldError, PieceFailed, PlanError, cause_line
from fanfold.events import BatchBegun, Event
from fanfold.job import engines
from fanfold.machine.discover import discover
from fanfold.machine.threads import held_threads
from fanfold.merge.gather import Concat
from fanfold.merge.merge import OrderedFold
from fanfold.merge.record import Record
from fanfold.plan.plan import Unit
from fanfold.planner.carrier import Carrier, Measured, choose_carrier, parse_on

if TYPE_CHECKING:
    from fanfold.engine.engine import Engine

_MAX_DEATHS = 2  # of the units that computed one piece
_PROBE_S = 0.005  # a function that is through sooner is not worth a second unit
_START_S = 0.15  # worker processes that are not there yet (docs/log.md)
_WARM_S = 0.02
_FOREVER_S = 1e9  # nobody but the user knows how long a piece may take
_MAX_KNOWN = 256

_known: dict[Any, tuple[float, float, float]] = {}  # function -> seconds a row, speed-up by threads, bytes a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A result, and how it was come by."""

    value: Any
    on: str
    reason: str
    num_rows: int
    num_pieces: int
    elapsed_s: float

    def __str__(self) -> str:
        return (
            f"{self.num_rows:,} rows in {self.num_pieces:,} pieces on {self.on}, {self.elapsed_s:.3g} s: {self.reason}"
        )


def fold(f: Any, x: Any, merge: Any, *, pieces: int | None = None, on: str = "auto", explain: bool = False) -> Any:
    """merge(f(x_1), ..., f(x_M)): x in M pieces of consecutive rows, f of each on all units, the results as one.

    `f` gets a piece, of the kind of `x`: a read-only view of an array, a list, a table; a class is made once per
    unit and its object called. Merges take one value per row, axis 0 the piece's rows, unless told otherwise
    (`Mean(of="pieces")`). A dict of merges gives a dict of results. Pieces depend on the data alone and join in
    a fixed tree, so the bits do not depend on `on`: auto, inline, threads[:N], cpu[:N],
    or a Spark master (spark://HOST:PORT, local[N], ...).
    `explain=True` returns a `Folded`: the value, where it was computed, and why there.
    Raises: PieceFailed where f raises or kills its process; DataError, PlanError.
    """
    if isinstance(merge, Mapping):
        merge = Record(merge)
    folded = _run(f, x, merge, pieces, on)
    return folded if explain else folded.value


def map(f: Any, x: Any, *, on: str = "auto", each: bool = False, explain: bool = False) -> Any:
    """What f returns for every piece of x, one value per row, in order and of the kind of x.

    `each=True` calls f with single rows, as `Pool.map` does: lists and generators give a list, an array an array.
    Otherwise as `fold`.
    """
    whole = (_EachArray() if _is_array(x) else _EachList()) if each else _Rows()
    folded = _run(_EachRow(f) if each else f, x, whole, None, on)
    return folded if explain else folded.value


def _is_array(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "numpy" and hasattr(x, "dtype")


# -- what is merged by `map` --------------------------------------------------------------------------


class _Rows(Concat):
    """Concat, of as many values as there are rows."""

    __slots__ = ()

    def lift(self, value: Any, rows: int) -> Any:
        part = Concat.lift(self, value, rows)
        if len(value) != rows:
            raise DataError(
                "map a function over rows",
                found=f"a piece of {rows} row(s) gave {len(value)} value(s)",
                allowed="one value for each row",
                do="return a value for each row; for other lengths: ff.fold(f, x, ff.Concat())",
            )
        return part


class _EachList(_Rows):
    """The values of single rows as one list."""

    __slots__ = ()

    def finish(self, part: Any) -> Any:
        return Concat.finish(self, part) if part.blocks else []


class _EachArray(_EachList):
    """The values of single rows as one array."""

    __slots__ = ()

    def finish(self, part: Any) -> Any:
        import numpy as np

        try:
            array = np.asarray(_EachList.finish(self, part))
        except ValueError:
            array = np.empty(0, object)
        if array.dtype.hasobject:
            raise DataError(
                "map a function over the rows of an array",
                found="values that make no array: objects, or arrays of several shapes",
                allowed="numbers, strings, or arrays of one shape",
                do="pass a list to get a list back: ff.map(f, list(x), each=True)",
            )
        return array


# -- the function -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _EachRow:
    """A function of one row as a function of pieces."""

    f: Any

    def __call__(self, piece: Any) -> list[Any]:
        return [self.f(row) for row in piece]


def _is_loaded(f: Any) -> bool:
    """Whether f is a class whose objects are called: a model, say, that is loaded once per unit."""
    return isinstance(f, type) and any("__call__" in vars(kind) for kind in f.__mro__)


def made(f: Any) -> Callable[[Any], Any]:
    """What a unit calls with pieces: for a class an object of it."""
    if isinstance(f, _EachRow):
        return _EachRow(made(f.f))
    return f() if _is_loaded(f) else f  # type: ignore[no-any-return]


def _code(f: Any) -> Any:
    """The code that runs when f, or an object of f, is called; None for what is not written in Python."""
    if isinstance(f, _EachRow):
        return _code(f.f)
    if not hasattr(f, "__code__"):
        f = (f if isinstance(f, type) else type(f)).__call__
    return getattr(f, "__code__", None)


# -- one run ------------------------------------------------------------------------------------------


def _run(f: Any, x: Any, merge: Any, num_pieces: int | None, on: str) -> Folded:
    start_s = time.perf_counter()
    _check(f, merge)
    cores = _cores()
    asked = parse_on(on, cores)
    if isinstance(x, Iterator | range):
        if num_pieces is not None and not isinstance(x, range):
            raise PlanError(
                f"pieces={num_pieces} of a generator",
                found="rows whose number is not known",
                allowed="pieces for data whose length is known",
                do="leave pieces away, or pass list(x)",
            )
        x = list(x)
    source = pieces_of(x, num_pieces)
    count = source.cuts.num_pieces
    here = functools.cache(lambda: made(f))  # the function in the calling thread, made at most once
    with ExitStack() as stack:
        stack.enter_context(held_threads(1, verify=False))
        if count <= 1 and (asked is None or asked.kind == "inline"):
            carrier = asked or Carrier("inline", 1, "inline: the data is one piece")
            value = merge.finish(_compute(here(), source, merge, 0) if count else merge.empty())
        else:
            done = OrderedFold(merge)
            carrier, first = (asked, 0) if asked else _probe(f, here, source, merge, done, cores)
            if first < count:
                _carry(carrier, here() if carrier.kind == "inline" else f, source, merge, done, first, stack)
            value = merge.finish(done.part(count))
    return Folded(
        value=value,
        on=carrier.shown,
        reason=carrier.reason,
        num_rows=source.cuts.num_rows,
        num_pieces=count,
        elapsed_s=time.perf_counter() - start_s,
    )


def _check(f: Any, merge: Any) -> None:
    if not callable(f):
        raise PlanError(f"fold {f!r:.80}", found="not callable", allowed="a function or a class", do="pass a function")
    if not all(hasattr(merge, name) for name in ("empty", "lift", "join", "finish")) or isinstance(merge, type):
        raise PlanError(
            f"merge by {merge!r:.80}",
            found="no merge",
            allowed="an object with empty, lift, join and finish, or a dict of them",
            do="pass for example ff.Mean()",
        )


@functools.cache
def _cores() -> int:
    return discover().cores


def _compute(call: Callable[[Any], Any], source: Pieces, merge: Any, piece: int, value: Any = None) -> Any:
    """The part of one piece; PieceFailed names it, the user's own error is its cause."""
    rows = source.rows(piece)
    before = source.version()
    try:
        result = call(source.take(piece) if value is None else value)
    except Exception as error:
        # the traceback begins in the user's function
        own = error.__traceback__.tb_next if error.__traceback__ else None
        raise _failed(source, piece, error) from error.with_traceback(own)
    if source.version() != before:
        raise _written(source, piece)
    try:
        return merge.lift(result, rows)
    except FanfoldError as error:
        raise type(error)(
            f"{error.asked}, {_name(source, piece)}", found=error.found, allowed=error.allowed, do=error.do
        ) from None


def _name(source: Pieces, piece: int) -> str:
    start, stop = source.cuts.bounds(piece)
    return f"piece {piece} of {source.cuts.num_pieces} (rows {start}-{stop - 1})"


def _failed(source: Pieces, piece: int, error: BaseException) -> PieceFailed:
    do = "repair the function, or the rows; the error above is its own"
    if "read-only" in str(error):
        do = "change a copy: x = x.copy(); a piece is shared by all units and cannot be written to"
    return PieceFailed(
        f"the function over {_name(source, piece)}",
        found=cause_line(error),
        allowed="a function that returns for every piece",
        do=do,
    )


def _written(source: Pieces, piece: int) -> PieceFailed:
    return PieceFailed(
        f"the function over {_name(source, piece)}",
        found="it wrote to the tensor that it was given",
        allowed="functions that leave their input as it is: other units read it at the same time",
        do="change a copy: x = x.clone()",
    )


# -- which carrier ------------------------------------------------------------------------------------


def _probe(
    f: Any, here: Callable[[], Any], source: Pieces, merge: Any, done: OrderedFold[Any], cores: int
) -> tuple[Carrier, int]:
    """Computes the first pieces, keeps their parts, and chooses; a function known from before is not probed.

    A choice is remembered by the code, so that the same lambda, made again, is known.
    """
    count = source.cuts.num_pieces
    key = _code(f) or (f if isinstance(f, type) else type(f))
    first = 0
    if key not in _known:
        elapsed_s, rows = 0.0, 0
        while first < count and (first < 2 or elapsed_s < _PROBE_S / 5):
            begun_s = time.perf_counter()
            done.add(first, _compute(here(), source, merge, first))
            took_s = time.perf_counter() - begun_s
            if first:  # the first call also imports and allocates
                elapsed_s, rows = elapsed_s + took_s, rows + source.rows(first)
            first += 1
        row_s = elapsed_s / max(1, rows)
        left_s = row_s * source.cuts.rows_from(first)
        if first == count or left_s < _PROBE_S or cores == 1:
            return Carrier("inline", 1, f"inline: what is left takes {left_s * 1e3:.2g} ms"), first
        speedup, first = _two_threads(f, source, merge, done, first, row_s)
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = (row_s, speedup, _bytes_per_row(source))
    row_s, speedup, bytes_per_row = _known[key]
    measured = Measured(
        row_s=row_s,
        thread_speedup=speedup,
        bytes_per_row=bytes_per_row,
        portable=source.kind != "tensor",
        start_s=_WARM_S if engines.is_warm() else _START_S,
    )
    rows_left = source.cuts.rows_from(first)
    carrier = choose_carrier(measured, rows_left, cores)
    if carrier.kind == "cpu" and not _portable(f, source):  # asked only now: pickling may cost more than the job
        carrier = choose_carrier(replace(measured, portable=False), rows_left, cores)
    return carrier, first


def _two_threads(
    f: Any, source: Pieces, merge: Any, done: OrderedFold[Any], first: int, row_s: float
) -> tuple[float, int]:
    """How much faster two threads are than one, over pieces whose parts are kept."""
    last = first
    rows = source.rows(first)
    while last + 1 < source.cuts.num_pieces and (last == first or (row_s * rows < _PROBE_S and last - first < 63)):
        last += 1
        rows += source.rows(last)
    if last == first:
        return 1.0, first
    agenda = _Agenda(source, done, first, last + 1, num_units=2)
    begun_s = time.perf_counter()
    Threads(_units("threads", 2)).carry_out(_Work(f=f, source=source, merge=merge), agenda)
    elapsed_s = time.perf_counter() - begun_s
    return min(2.0, row_s * rows / max(elapsed_s, 1e-9)), last + 1


def _bytes_per_row(source: Pieces) -> float:
    if source.kind == "array":
        return float(source.data.nbytes) / max(1, source.cuts.num_rows)
    try:
        return 2.0 * len(pickle.dumps(source.take(0), 5)) / max(1, source.rows(0))
    except Exception:
        return 0.0


def _portable(f: Any, source: Pieces) -> bool:
    try:
        cloudpickle.dumps(f)
        if source.kind in ("list", "tuple"):
            cloudpickle.dumps(source.take(0))
    except Exception:
        return False
    return True


# -- carrying out -------------------------------------------------------------------------------------


def _units(kind: str, count: int) -> tuple[Unit, ...]:
    return tuple(Unit(name=f"{kind}:{index}") for index in range(count))


def _carry(
    carrier: Carrier, f: Any, source: Pieces, merge: Any, done: OrderedFold[Any], first: int, stack: ExitStack
) -> None:
    count = source.cuts.num_pieces
    agenda = _Agenda(source, done, first, count, num_units=max(1, carrier.count))
    engine: Engine
    if carrier.kind not in ("cpu", "spark"):
        engine = Inline() if carrier.kind == "inline" else Threads(_units("threads", carrier.count))
        engine.carry_out(_Work(f=f, source=source, merge=merge), agenda)
        return
    try:
        body = cloudpickle.dumps((f, merge))
    except Exception as error:
        raise PlanError(
            f"on={carrier.shown}",
            found=f"a function that cannot be sent to another process: {cause_line(error)}",
            allowed="functions and data that can be pickled",
            do="open files, locks and connections inside the function, or use on='threads'",
        ) from error
    if source.kind == "array" and carrier.kind == "cpu":
        folder = stack.enter_context(scratch_folder(_room(source.data.nbytes)))
        sent = source.mapped(folder / "array")
    else:
        sent = replace(source, data=None)
        agenda.ships = True
    work = _Shipped(
        body=body, source=sent, token=time.monotonic_ns(), file=getattr(_code(f), "co_filename", "<unknown>")
    )
    stack.enter_context(engines.hold())
    imports = ("fanfold.job.fold", "numpy")
    try:
        if carrier.kind == "spark":
            spark = engines.spark_for(carrier.master, imports=imports, threads=1)
            spark.limit(memory_bytes=None, timeout_batch_s=_FOREVER_S)
            spark.resize(_units("spark", min(spark.cluster.slots, count - first)))
            agenda.schedule.num_units = len(spark.units)
            spark.carry_out(work, agenda)
            return
        local = engines.engine_for("local", imports=imports, threads=1)
        assert not isinstance(local, Inline)
        local.resize(_units("cpu", carrier.count))
        local.limit(memory_bytes=None, timeout_batch_s=_FOREVER_S)
        local.carry_out(work, agenda)
    finally:
        engines.touch()


def _room(num_bytes: int) -> Path | None:
    """Memory that looks like a disk, where there is enough of it."""
    shared = Path("/dev/shm")
    try:
        return shared if shutil.disk_usage(shared).free > 2 * num_bytes else None
    except OSError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """Leases of pieces on a unit: f over each piece, parts joined as far as the fixed tree allows."""

    f: Any
    source: Pieces
    merge: Any
    imports: tuple[str, ...] = ()
    threads: int = 1

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        lease = assignment.instruction
        assert isinstance(lease, Compute)
        if "fold call" not in desk.cache:
            desk.cache["fold call"] = made(self.f)
        call = desk.cache["fold call"]
        values: Sequence[Any] | None = assignment.detail
        parts: OrderedFold[Any] = OrderedFold(self.merge)
        begun_s = time.perf_counter()
        last = lease.first
        for last in range(lease.first, lease.last + 1):
            desk.at(last, 0)
            value = None if values is None else values[last - lease.first]
            parts.add(last, _compute(call, self.source, self.merge, last, value))
            if desk.stopping():
                break
        return last, parts.blocks(), time.perf_counter() - begun_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shipped:
    """_Work as it travels to a process: opened there once."""

    body: bytes
    source: Pieces
    token: int
    file: str  # where the function was written
    imports: tuple[str, ...] = ()
    threads: int = 1

    def carry_out(self, assignment: Assignment, desk: Desk) -> Any:
        if desk.cache.get("fold token") != self.token:
            f, merge = pickle.loads(self.body)
            work = _Work(f=f, source=self.source.opened(), merge=merge)
            desk.cache.pop("fold call", None)  # of the call before
            desk.cache.update({"fold token": self.token, "fold work": work})
        if assignment.detail is not None:
            values = pickle.loads(assignment.detail)
            if self.source.kind == "array":
                for value in values:
                    value.flags.writeable = False  # as a view of the whole would be
            assignment = replace(assignment, detail=values)
        try:
            return desk.cache["fold work"].carry_out(assignment, desk)
        except FanfoldError as error:
            cause = error.__cause__
            return _Broken(error, portable(cause) if cause else None, _shown(cause, self.file))


def _shown(error: BaseException | None, file: str) -> str:
    """The traceback in words. Code that travelled by value has lost its file: it is the function's own."""
    if error is None:
        return ""
    frames = [
        traceback.FrameSummary(file if frame.filename.startswith("<") else frame.filename, frame.lineno, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(frames)]
    return "".join([*lines, *traceback.format_exception_only(error)])


@dataclass(frozen=True, slots=True)
class _Broken:
    """A failure on its way to the parent: the error, the user's own, and where that was raised."""

    error: FanfoldError
    cause: BaseException | None
    traceback: str


class _RemoteTraceback(Exception):
    """Where an error was raised in another process, in words; printed above the error."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass
class _Agenda:
    """Pieces first..stop - 1 of the source as one window; parts go to `done`."""

    source: Pieces
    done_parts: OrderedFold[Any]
    first: int
    stop: int
    num_units: int
    ships: bool = False  # the pieces travel with the lease
    at: dict[str, int] = field(default_factory=dict)  # unit -> the piece that it is at
    deaths: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.schedule = Schedule(num_units=self.num_units)
        costs = [max(1, self.source.rows(piece)) for piece in range(self.stop)]
        self.schedule.window_known(0, costs, [(0, self.first - 1)] if self.first else ())
        self.schedule.input_ended(1)
        self._num_left = self.stop - self.first

    def next_for(self, unit: Unit) -> Assignment | None:
        instruction = self.schedule.next_for(unit.name) if self._num_left else None
        if not isinstance(instruction, Compute):
            return None
        if not self.ships:
            return Assignment(instruction)
        values = [self.source.take(piece) for piece in range(instruction.first, instruction.last + 1)]
        try:
            return Assignment(instruction, cloudpickle.dumps(values))
        except Exception as error:
            raise PlanError(
                "on=cpu",
                found=f"rows that cannot be sent to another process: {cause_line(error)}",
                allowed="data that can be pickled",
                do="use on='threads', or pass what the rows are made from",
            ) from error

    @property
    def done(self) -> bool:
        return not self._num_left

    @property
    def stopping(self) -> bool:
        return False

    def finished(self, results: Sequence[tuple[Unit, Assignment, Any]]) -> None:
        for unit, assignment, result in results:
            lease = assignment.instruction
            assert isinstance(lease, Compute)
            if isinstance(result, _Broken):
                cause = result.cause
                if cause is not None:
                    cause.__cause__ = _RemoteTraceback(result.traceback)
                raise result.error from cause
            last, blocks, elapsed_s = result
            if self.schedule.computed(unit.name, lease, last, elapsed_s):
                self._num_left -= last + 1 - lease.first
                for level, index, part in blocks:
                    self.done_parts.add_block(level, index, part)

    def failed(self, unit: Unit, assignment: Assignment, failure: Failure) -> None:
        raise failure.error

    def lost(self, unit: Unit, assignment: Assignment | None, cause: str) -> None:
        self.schedule.gave_up(unit.name)
        piece = self.at.pop(unit.name, None)
        if assignment is None or piece is None:
            return
        self.deaths[piece] = self.deaths.get(piece, 0) + 1
        if self.deaths[piece] >= _MAX_DEATHS:
            raise PieceFailed(
                f"the function over {_name(self.source, piece)}",
                found=f"{self.deaths[piece]} processes died computing it; the last: {cause}",
                allowed="a function that returns",
                do="run the piece alone with on='inline' under a debugger, or give it less data",
            )
        self.schedule.isolate(0, piece)

    def tell(self, event: Event) -> None:
        if isinstance(event, BatchBegun):
            self.at[event.unit] = event.piece
