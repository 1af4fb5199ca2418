"""The engine for a plan; local workers stay warm between the calls of one process."""

from __future__ import annotations

import atexit
import os
import threading
import time

from fanfold.engine.inline import Inline
from fanfold.engine.local import Local
from fanfold.engine.supervisor import IN_WORKER
from fanfold.errors import PlanError

IDLE_S = 300.0

_lock = threading.RLock()
_warm: Local | None = None
_timer: threading.Timer | None = None
_used_s = 0.0
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


def is_warm() -> bool:
    """Whether worker processes are there already."""
    return _warm is not None and bool(_warm.units)


def hold() -> threading.RLock:
    """One job at a time uses the warm workers."""
    return _lock


def _local(imports: tuple[str, ...], threads: int) -> Local:
    global _warm, _timer, _used_s, _settings
    if os.environ.get(IN_WORKER):
        raise PlanError(
            "a job inside a worker",
            found="a module that starts a job whenever it is imported, or a task that starts one",
            allowed="jobs started by a script or a notebook; on='inline' inside a worker",
            do="put the call into a function, or under: if __name__ == '__main__'",
        )
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
    """End the warm workers, if there are any; the next call starts new ones."""
    global _warm, _timer
    with _lock:
        if _timer is not None:
            _timer.cancel()
            _timer = None
        if _warm is not None:
            _warm.close()
            _warm = None


atexit.register(shutdown)
