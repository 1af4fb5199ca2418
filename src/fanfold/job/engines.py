"""The engine for a plan; local workers stay warm between the calls of one process."""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fanfold.engine.inline import Inline
from fanfold.engine.local import Local
from fanfold.engine.supervisor import IN_WORKER
from fanfold.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.engine.spark import Spark

IDLE_S = 300.0

_lock = threading.RLock()
_warm: Local | None = None
_spark: Spark | None = None
_timer: threading.Timer | None = None
_used_s = 0.0
_num_held = 0
_settings: frozenset[tuple[str, str]] = frozenset()  # of stores, as the warm workers were given them
_OF_STORES = ("AWS_", "FSSPEC_", "GOOGLE_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


def warm_up(imports: tuple[str, ...], threads: int) -> None:
    """Begin the imports of the workers to come; returns at once."""
    with _lock:
        _local(imports, threads).warm_up()


def engine_for(kind: str, *, imports: tuple[str, ...], threads: int) -> Inline | Local:
    """The engine, warm where it can be."""
    if kind == "inline":
        return Inline()
    return _local(imports, threads)


def spark_for(master: str, *, imports: tuple[str, ...], threads: int, processes: int = 1) -> Spark:
    """The cluster, connected; the same as before where master, imports, threads and processes allow it."""
    global _spark, _used_s
    _refuse_in_worker()
    with _lock:
        _used_s = time.monotonic()
        if _spark is not None and (
            (_spark.master, _spark.threads, _spark.processes) != (master, threads, processes)
            or not set(imports) <= set(_spark.imports)
            or not _spark.is_alive
        ):
            _close_spark()
        if _spark is None:
            from fanfold.engine.spark import Spark

            _spark = Spark(master, imports=imports, threads=threads, processes=processes)
        if _timer is None:
            _start_timer(IDLE_S)
        return _spark


def _close_spark() -> None:
    global _spark
    if _spark is not None:
        closing, _spark = _spark, None
        closing.close()


def kill() -> None:
    """End everything at once, in whatever state it is: for a second Ctrl-C."""
    if _spark is not None:
        _spark.kill()
    if _warm is not None:
        _warm.close()


def is_warm() -> bool:
    """Whether worker processes are there already."""
    return _warm is not None and bool(_warm.units)


def in_worker() -> bool:
    """Whether this process is a worker itself."""
    return bool(os.environ.get(IN_WORKER))


@contextmanager
def hold() -> Iterator[None]:
    """One job at a time uses the warm workers."""
    global _num_held
    with _lock:
        _num_held += 1
        try:
            yield
        finally:
            _num_held -= 1


def is_held_here() -> bool:
    """Whether this very thread is in the middle of a job: its input, say, is what another job gives."""
    if not _lock.acquire(blocking=False):
        return False
    try:
        return _num_held > 0
    finally:
        _lock.release()


def _refuse_in_worker() -> None:
    if in_worker():
        raise PlanError(
            "a job inside a worker",
            found="a module that starts a job whenever it is imported, or a task that starts one",
            allowed="jobs started by a script or a notebook; on='inline' inside a worker",
            do="put the call into a function, or under: if __name__ == '__main__'",
        )


def _local(imports: tuple[str, ...], threads: int) -> Local:
    global _warm, _used_s, _settings
    _refuse_in_worker()
    with _lock:
        _used_s = time.monotonic()
        settings = frozenset(item for item in os.environ.items() if item[0].upper().startswith(_OF_STORES))
        fits = _warm is not None and _warm.threads == threads and set(imports) <= set(_warm.imports)
        if _warm is not None and not (fits and settings == _settings):
            shutdown()
        if _warm is None:
            _settings = settings
            _warm = Local((), imports=imports, threads=threads)
        if _timer is None:
            _start_timer(IDLE_S)
        return _warm


def _start_timer(delay_s: float) -> None:
    global _timer
    _timer = threading.Timer(delay_s, _close_if_idle)
    _timer.daemon = True
    _timer.start()


def _close_if_idle() -> None:
    global _timer
    if not _lock.acquire(blocking=False):
        _start_timer(IDLE_S)  # a job is running
        return
    try:
        _timer = None
        left_s = _used_s + IDLE_S - time.monotonic()
        if left_s > 0:
            _start_timer(left_s)
        else:
            shutdown()
    finally:
        _lock.release()


def touch() -> None:
    """The workers were used just now."""
    global _used_s
    _used_s = time.monotonic()


def shutdown() -> None:
    """End the warm workers and the connection to Spark, if there are any; the next call starts new ones."""
    global _warm, _timer
    with _lock:
        if _timer is not None:
            _timer.cancel()
            _timer = None
        if _warm is not None:
            _warm.close()
            _warm = None
        _close_spark()


def _forget() -> None:
    """In a child that was forked: the workers are its parent's, it makes its own."""
    global _warm, _timer, _lock
    _lock = threading.RLock()
    _timer = None
    if _warm is not None:
        _warm.forget()
        _warm = None


atexit.register(shutdown)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
