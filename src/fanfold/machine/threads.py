"""Threads per unit: set in every library that has its own pool, then verified."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from fanfold.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator


_lock = threading.Lock()
_held: list[tuple[int, Any]] = []  # one entry per holder: torch's threads before the first, and its limits
_found: tuple[int, Any] | None = None


def hold_threads(num_threads: int) -> None:
    """No pool of this process runs more threads than this; InternalError where one does not obey.

    The environment variables set before the imports do most of it; torch ignores some of them, and
    OpenMP ignores torch (pytorch/pytorch#19213), so both are set and then looked at.
    """
    import threadpoolctl

    _set_torch(num_threads)
    over = _over(num_threads)
    if over:
        threadpoolctl.threadpool_limits(limits=num_threads)
        over = _over(num_threads)
    if over:
        raise InternalError(
            f"{num_threads} thread(s) on this unit",
            found="pools that run more: " + ", ".join(over),
            allowed=f"at most {num_threads} per pool",
            do="report this with the output of `python -m threadpoolctl -i torch`",
        )


@contextlib.contextmanager
def held_threads(num_threads: int, *, verify: bool = True) -> Iterator[None]:
    """As hold_threads, for a while: the caller's own process gets its settings back.

    A library that is imported inside must be held again, once it is there. Verifying takes some 20 ms.
    """
    with _lock:
        if not _held:
            torch = sys.modules.get("torch")
            before = torch.get_num_threads() if torch is not None else os.cpu_count() or 1
            _held.append((before, _pools().limit(limits=num_threads)))
            _set_torch(num_threads)
        else:
            _held.append(_held[0])
    try:
        if verify:
            hold_threads(num_threads)
        yield
    finally:
        with _lock:
            before, limits = _held.pop()
            if not _held:  # the last one out
                limits.restore_original_limits()
                _set_torch(before)


def _set_torch(num_threads: int) -> None:
    """Always, where torch is there: what MKL inside torch keeps, torch itself may not tell."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)


def _pools() -> Any:
    """The thread pools of this process; looked for again only after something was imported."""
    global _found
    import threadpoolctl

    num_modules = len(sys.modules)
    if _found is None or _found[0] != num_modules:
        _found = (num_modules, threadpoolctl.ThreadpoolController())
    return _found[1]


def _over(num_threads: int) -> list[str]:
    import threadpoolctl

    return [
        f"{pool['internal_api']} {pool['num_threads']}"
        for pool in threadpoolctl.threadpool_info()
        if pool["num_threads"] > num_threads
    ]
