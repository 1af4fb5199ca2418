"""`fold` and `map`: a function over pieces of data in memory, and the pieces' results as one."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.data.pieces import Pieces, pieces_of, whole_piece
from fanfold.data.scratch import scratch_folder
from fanfold.data.streams import StreamRows
from fanfold.engine.inline import Inline
from fanfold.engine.threads import Threads
from fanfold.errors import DataError, InputError, PlanError, cause_line
from fanfold.job import engines
from fanfold.job.choice import SHORT_S, probe, units_of
from fanfold.job.lending import Lending
from fanfold.job.piecework import EachRow, PieceWork, ShippedWork, add_block, code_of, compute_piece, made
from fanfold.machine.discover import discover
from fanfold.machine.threads import held_threads
from fanfold.merge.gather import Concat
from fanfold.merge.merge import OrderedFold
from fanfold.merge.record import Record
from fanfold.planner.carrier import Carrier, parse_on
from fanfold.split.piece import Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.data.pieces import Stock

_FOREVER_S = 1e9  # nobody but the user knows how long a piece may take
_ROUND_S = 1.0  # of a lazy map: what is computed before results are handed out
_one_thread = held_threads(1, verify=False)


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
    `x`: NumPy array, list, tuple, range, iterator (taken piece by piece), Arrow, pandas, Polars, torch tensor; or a
    path or glob: `.npy` is mapped, Parquet gives Arrow tables, JSONL and CSV lists of dicts, text lists of strings.
    `explain=True` returns a `Folded`: the value, where it was computed, and why there.
    Raises: PieceFailed where f raises or kills its process; DataError, PlanError, InputError.
    """
    merge = _checked(f, merge)
    if pieces is None and not explain and (on == "auto" or on == "inline"):
        view = whole_piece(x)
        if view is not None:  # one piece: nothing to choose, little to do
            with _one_thread:
                return merge.finish(compute_piece(made(f), view, merge, Place(0, 0, len(view), 1)))
    folded = _run(f, x, merge, pieces, on)
    return folded if explain else folded.value


def map(f: Any, x: Any, *, on: str = "auto", each: bool = False, explain: bool = False) -> Any:
    """What f returns for every piece of x, one value per row, in order and of the kind of x.

    `each=True` calls f with single rows, as `Pool.map` does: lists and iterators give a list, an array an array.
    An iterator gives an iterator otherwise: it is read, and its results come, as far as they are asked for.
    All else as `fold`.
    """
    if isinstance(x, Iterator) and not each and not explain:
        return _lazily(f, x, on)
    whole = _checked(f, (_EachArray() if _is_array(x) else _EachList()) if each else _Rows())
    folded = _run(EachRow(f) if each else f, x, whole, None, on)
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


# -- one run ------------------------------------------------------------------------------------------


def _run(f: Any, x: Any, merge: Any, num_pieces: int | None, on: str) -> Folded:
    start_s = time.perf_counter()
    cores = _cores()
    asked = parse_on(on, cores)
    with ExitStack() as stack:
        stack.enter_context(_one_thread)
        stock = _stock(x, num_pieces, stack)
        done: OrderedFold[Any] = OrderedFold(merge)
        here = functools.cache(lambda: made(f))  # the function in the calling thread, made at most once
        first = 0
        if "numpy" in sys.modules:
            _keep_heap()
        if asked is not None:
            carrier = asked
        elif stock.num_known == 1 and not stock.more():
            carrier = Carrier("inline", 1, "inline: the data is one piece")
        else:
            carrier, first = probe(f, here, stock, merge, done, cores)
        if first < stock.num_known or stock.more():
            carry = _carrying(carrier, f, here, stock, merge, stack)
            carry(
                Lending(
                    stock,
                    functools.partial(add_block, done),
                    first,
                    num_units=max(1, carrier.count),
                    to=carrier.reach,
                )
            )
        value = merge.finish(done.part(stock.num_known))
    return Folded(
        value=value,
        on=carrier.shown,
        reason=carrier.reason,
        num_rows=stock.num_rows,
        num_pieces=stock.num_known,
        elapsed_s=time.perf_counter() - start_s,
    )


def _lazily(f: Any, rows: Iterator[Any], on: str) -> Iterator[Any]:
    """The rows that f gives for pieces of the rows, in rounds of about a second."""
    cores = _cores()
    return _rounds(f, rows, _checked(f, _Rows()), parse_on(on, cores), cores)


def _rounds(f: Any, rows: Iterator[Any], merge: _Rows, asked: Carrier | None, cores: int) -> Iterator[Any]:
    stock = StreamRows(rows)
    here = functools.cache(lambda: made(f))
    with ExitStack() as stack:
        carrier, first, num_pieces = asked, 0, 0
        carry: Callable[[Lending], None] | None = None
        while first < stock.num_known or stock.more():
            if carrier is None or (asked is None and carrier.kind == "inline"):  # asked again, as more has come
                done: OrderedFold[Any] = OrderedFold(merge)
                with _one_thread:
                    carrier, first = probe(f, here, stock, merge, done, cores, first, SHORT_S)
                carry = None
                yield from _in_order(done.blocks())
                if first == stock.num_known and not stock.more():
                    return
            if carry is None:
                carry = _carrying(carrier, f, here, stock, merge, stack)
            num_pieces = num_pieces or 2 * max(1, carrier.count)
            stop = first + num_pieces
            while stock.num_known < stop and stock.more():
                pass
            blocks: list[tuple[int, int, Any]] = []
            begun_s = time.perf_counter()
            with _one_thread:
                carry(
                    Lending(
                        stock,
                        lambda level, index, part, place, blocks=blocks: blocks.append((level, index, part)),  # type: ignore[misc]
                        first,
                        num_units=max(1, carrier.count),
                        to=carrier.reach,
                        stop=min(stop, stock.num_known),
                    )
                )
            if time.perf_counter() - begun_s < _ROUND_S:
                num_pieces *= 2
            first = min(stop, stock.num_known)
            yield from _in_order(blocks)


def _in_order(blocks: list[tuple[int, int, Any]]) -> Iterator[Any]:
    for _, _, part in sorted(blocks, key=lambda block: block[1] << block[0]):
        for rows in part.blocks:
            yield from rows


def _stock(x: Any, num_pieces: int | None, stack: ExitStack) -> Stock:
    """The data as pieces."""
    if isinstance(x, range):
        x = list(x)
    if isinstance(x, str | Path):
        if str(x).lower().endswith(".npy"):
            x = _mapped(str(x))
        else:
            from fanfold.data.filepieces import FilePieces

            _refuse_pieces(num_pieces, "files")
            return FilePieces([str(x)], stack.enter_context(scratch_folder()) / "spool")
    if isinstance(x, Iterator):
        _refuse_pieces(num_pieces, "an iterator")
        return StreamRows(x)
    return pieces_of(x, num_pieces)


def _refuse_pieces(num_pieces: int | None, what: str) -> None:
    if num_pieces is not None:
        raise PlanError(
            f"pieces={num_pieces} of {what}",
            found="rows whose number is not known",
            allowed="pieces for data whose length is known",
            do="leave pieces away, or pass the rows as a list or an array",
        )


def _mapped(path: str) -> Any:
    """The array of a .npy file, mapped and not read."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the input {path}",
            found=cause_line(error),
            allowed="a .npy file of numbers or strings",
            do="check the path; save it again with numpy.save",
        ) from error


def _checked(f: Any, merge: Any) -> Any:
    """The merge, of a dict the record of merges. Raises PlanError for what is no function or no merge."""
    if not callable(f):
        raise PlanError(f"fold {f!r:.80}", found="not callable", allowed="a function or a class", do="pass a function")
    if hasattr(merge, "lift") and hasattr(merge, "join") and hasattr(merge, "finish") and not isinstance(merge, type):
        return merge
    if isinstance(merge, Mapping):
        return Record({name: _checked(f, own) for name, own in merge.items()})
    raise PlanError(
        f"merge by {merge!r:.80}",
        found="no merge",
        allowed="an object with empty, lift, join and finish, or a dict of them",
        do="pass for example ff.Mean()",
    )


@functools.cache
def _cores() -> int:
    """That this process may use: a worker has one, the others are taken."""
    return 1 if engines.in_worker() else discover().cores


# -- carrying out -------------------------------------------------------------------------------------


def _carrying(
    carrier: Carrier, f: Any, here: Callable[[], Any], stock: Stock, merge: Any, stack: ExitStack
) -> Callable[[Lending], None]:
    """What carries an agenda out there; called again, it finds what it has sent and made."""
    if carrier.reach != "here":
        return _in_processes(carrier, f, here, stock, merge, stack)
    if carrier.kind == "inline":
        inline, work = Inline(), PieceWork(f=here(), read=stock.read, merge=merge)
        return lambda agenda: inline.carry_out(work, agenda)
    threads, work = Threads(units_of("threads", carrier.count)), PieceWork(f=f, read=stock.read, merge=merge)
    return lambda agenda: threads.carry_out(work, agenda)


@functools.cache
def _keep_heap() -> None:
    """Once: memory that pieces need over and over stays with this process, up to 8 MB.

    glibc gives the main thread's memory back when 128 KiB are free at its end, and takes it again for the next piece;
    a block of 4 MB that was mapped and freed raises that limit (mallopt(3), M_TRIM_THRESHOLD).
    """
    sys.modules["numpy"].empty(4 << 20, "uint8")


def _in_processes(
    carrier: Carrier, f: Any, here: Callable[[], Any], stock: Stock, merge: Any, stack: ExitStack
) -> Callable[[Lending], None]:
    try:
        body = cloudpickle.dumps((f, merge))
    except Exception as error:
        raise PlanError(
            f"on={carrier.shown}",
            found=f"a function that cannot be sent to another process: {cause_line(error)}",
            allowed="functions and data that can be pickled",
            do="open files, locks and connections inside the function, or use on='threads'",
        ) from error
    path = None
    if carrier.reach == "host" and isinstance(stock, Pieces) and stock.kind in ("array", "tensor"):
        path = stack.enter_context(scratch_folder(_room(stock.data.nbytes))) / "array"
    work = ShippedWork(
        body=body,
        source=stock.sent(path),
        token=time.monotonic_ns(),
        file=getattr(code_of(f), "co_filename", "<unknown>"),
    )
    imports = ("fanfold.job.piecework", "numpy", *(["torch"] if stock.kind == "tensor" else []))

    def carry(agenda: Lending) -> None:
        if engines.is_held_here():  # it feeds a job that has the workers
            agenda.to = "here"
            Inline().carry_out(PieceWork(f=here(), read=stock.read, merge=merge), agenda)
            return
        with engines.hold():
            if carrier.kind == "spark":
                spark = engines.spark_for(carrier.master, imports=imports, threads=1)
                spark.limit(memory_bytes=None, timeout_batch_s=_FOREVER_S)
                spark.resize(units_of("spark", spark.cluster.slots))
                agenda.use(len(spark.units))
                spark.carry_out(work, agenda)
                engines.touch()
                return
            local = engines.engine_for("local", imports=imports, threads=1)
            assert not isinstance(local, Inline)
            local.resize(units_of("cpu", carrier.count))
            local.limit(memory_bytes=None, timeout_batch_s=_FOREVER_S)
            try:
                local.carry_out(work, agenda)
            finally:
                engines.touch()

    return carry


def _room(num_bytes: int) -> Path | None:
    """Memory that looks like a disk, where there is enough of it."""
    shared = Path("/dev/shm")
    try:
        return shared if shutil.disk_usage(shared).free > 2 * num_bytes else None
    except OSError:
        return None
