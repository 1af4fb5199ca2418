"""Where a function over pieces runs: asked for, or chosen from what its first pieces have shown."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine.threads import Threads
from fanfold.job import engines
from fanfold.job.lending import Lending
from fanfold.job.piecework import EachRow, PieceWork, add_block, code_of, compute_piece
from fanfold.plan.plan import Unit
from fanfold.planner.carrier import Carrier, Measured, choose_carrier

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.data.pieces import Stock
    from fanfold.merge.merge import OrderedFold

_PROBE_S = 0.005  # a function that is through sooner is not worth a second unit
_START_S = 0.15  # worker processes that are not there yet (docs/log.md)
_WARM_S = 0.02
_AFRESH_S = 0.1  # more work than this is worth another look at a known function: its parts are kept anyway
SHORT_S = 0.001  # a function is tried for so long
_STREAM_S = 0.05  # a stream is tried for so long: nobody knows what is left of it
_PATIENCE_S = 0.1  # for a source that is slow itself
_MAX_KNOWN = 256

_known: dict[Any, tuple[float, float, float]] = {}  # function and data -> seconds a row, speed-up, bytes a row


def probe(
    f: Any,
    here: Callable[[], Any],
    stock: Stock,
    merge: Any,
    done: OrderedFold[Any],
    cores: int,
    first: int = 0,
    enough_s: float | None = None,
) -> tuple[Carrier, int]:
    """Computes pieces from `first` on, keeps their parts, and chooses; little work for a known function is not probed.

    The carrier, and the first piece that is left. A choice is remembered by the code and the kind of rows, so that
    the same lambda, made again, is known.
    """
    key = (*_named(f), *_rows_like(stock))
    begin = first
    known = _known.get(key)
    if known is None or stock.kind == "stream" or known[0] * stock.rows_left(0) > _AFRESH_S:
        elapsed_s, rows = 0.0, 0
        if enough_s is None:
            enough_s = _STREAM_S if stock.kind == "stream" else SHORT_S
        until_s = time.perf_counter() + _PATIENCE_S
        while (first < begin + 2 or (elapsed_s < enough_s and time.perf_counter() < until_s)) and _there(stock, first):
            begun_s = time.perf_counter()
            place = stock.place(first)
            part = compute_piece(here(), stock.read(first, stock.lent(first, "here")), merge, place)
            add_block(done, 0, first, part, place)
            stock.forget(first, first)
            took_s = time.perf_counter() - begun_s
            if first > begin:  # the first call also imports and allocates
                elapsed_s, rows = elapsed_s + took_s, rows + place.rows
            first += 1
        row_s = elapsed_s / max(1, rows)
        there = _there(stock, first)
        left_s = row_s * stock.rows_left(first) if there else 0.0
        if left_s < _PROBE_S or cores == 1:
            return Carrier("inline", 1, f"inline: what is left takes {left_s * 1e3:.2g} ms"), first
        bytes_per_row = _bytes_per_row(stock, first)
        speedup, first = _two_threads(f, stock, merge, done, first, row_s)
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[key] = (row_s, speedup, bytes_per_row)
    if not _there(stock, first):
        return Carrier("inline", 1, "inline: nothing is left"), first
    row_s, speedup, bytes_per_row = _known[key]
    measured = Measured(
        row_s=row_s,
        thread_speedup=speedup,
        bytes_per_row=bytes_per_row,
        portable=True,
        start_s=_WARM_S if engines.is_warm() else _START_S,
    )
    rows_left = stock.rows_left(first)
    carrier = choose_carrier(measured, rows_left, cores)
    # asked only now: pickling may cost more than the job
    if carrier.kind == "cpu" and not _portable((f, merge, done.blocks()[:1]), stock, first):
        carrier = choose_carrier(replace(measured, portable=False), rows_left, cores)
    return carrier, first


def _named(f: Any) -> tuple[Any, ...]:
    """What a function is known by: its code and what that wraps, or else itself."""
    each = isinstance(f, EachRow)
    inner = f.f if isinstance(f, EachRow) else f
    codes: list[Any] = []
    while inner is not None and len(codes) < 8:
        codes.append(code_of(inner) if code_of(inner) is not None else inner)
        inner = getattr(inner, "__wrapped__", None)
    try:
        hash(codes[0])
    except TypeError:
        return each, id(codes[0])
    return each, *codes


def _there(stock: Stock, piece: int) -> bool:
    return piece < stock.num_known or stock.more()


def _rows_like(stock: Stock) -> tuple[Any, ...]:
    data = getattr(stock, "data", None)
    return stock.kind, str(getattr(data, "dtype", "")), tuple(getattr(data, "shape", ())[1:])


def _two_threads(
    f: Any, stock: Stock, merge: Any, done: OrderedFold[Any], first: int, row_s: float
) -> tuple[float, int]:
    """How much faster two threads are than one, over pieces whose parts are kept."""
    last, rows = first, 0
    until_s = time.perf_counter() + _PATIENCE_S
    while _there(stock, last) and (
        last - first < 2 or (row_s * rows < _PROBE_S and last - first < 64 and time.perf_counter() < until_s)
    ):
        rows += stock.place(last).rows
        last += 1
    if last - first < 2:
        return 1.0, first
    agenda = Lending(stock, partial(add_block, done), first, num_units=2, stop=last)
    begun_s = time.perf_counter()
    Threads(units_of("threads", 2)).carry_out(PieceWork(f=f, read=stock.read, merge=merge), agenda)
    elapsed_s = time.perf_counter() - begun_s
    return min(2.0, row_s * rows / max(elapsed_s, 1e-9)), last


def units_of(kind: str, count: int) -> tuple[Unit, ...]:
    """Units by name: threads:0, threads:1, ..."""
    return tuple(Unit(name=f"{kind}:{index}") for index in range(count))


def _bytes_per_row(stock: Stock, piece: int) -> float:
    """That would cross a pipe, both ways; an array is written to memory that processes share."""
    data = getattr(stock, "data", None)
    if stock.kind in ("array", "tensor") and data is not None:
        return float(data.nbytes) / max(1, stock.num_rows)
    lent = stock.lent(piece, "host")
    try:
        size_bytes = len(pickle.dumps(stock.read(piece, None) if lent is None else lent, 5))
        return 2.0 * size_bytes / max(1, stock.place(piece).rows)
    except Exception:
        return 0.0


def _portable(shipped: Any, stock: Stock, piece: int) -> bool:
    try:
        cloudpickle.dumps(shipped)
        if stock.kind in ("list", "tuple", "stream"):
            cloudpickle.dumps(stock.lent(piece, "host"))
    except Exception:
        return False
    return True
