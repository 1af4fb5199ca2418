"""Threads per unit: set in every library that has its own pool, then verified."""

from __future__ import annotations

import os
import sys
import threading
from itertools import product
from typing import TYPE_CHECKING, Any

from fanfold.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Callable


_lock = threading.Lock()
_num_holders = 0
_undo: list[tuple[Callable[[int], Any], int]] = []  # what the last holder to leave calls, and with what
_found: tuple[int, list[tuple[Callable[[], int], Callable[[int], Any]]]] | None = None


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


class held_threads:
    """As hold_threads, inside a with block: the caller's own process gets its settings back.

    A library that is imported inside must be held again, once it is there. Verifying takes some 20 ms, holding 2 us.
    """

    __slots__ = ("num_threads", "verify")

    def __init__(self, num_threads: int, *, verify: bool = True) -> None:
        self.num_threads = num_threads
        self.verify = verify

    def __enter__(self) -> None:
        global _num_holders
        with _lock:
            if not _num_holders:
                _limit(self.num_threads)
            _num_holders += 1
        if self.verify:
            try:
                hold_threads(self.num_threads)
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        global _num_holders
        with _lock:
            _num_holders -= 1
            if not _num_holders:
                while _undo:
                    put_back, before = _undo.pop()
                    put_back(before)


def _limit(num_threads: int) -> None:
    """Every pool of this process runs so many threads; what it ran before goes to `_undo`."""
    torch = sys.modules.get("torch")
    if torch is None:
        _undo.append((_free_torch, 0))
    else:
        _undo.append((torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(num_threads)
    for get, put in _doors():
        before = get()
        if before != num_threads:
            _undo.append((put, before))
            put(num_threads)


def _free_torch(_: int) -> None:
    """Where torch came while threads were held, it gets what it begins with."""
    if "torch" in sys.modules:
        _set_torch(os.cpu_count() or 1)


def _set_torch(num_threads: int) -> None:
    """Always, where torch is there: what MKL inside torch keeps, torch itself may not tell."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads)


def _doors() -> list[tuple[Callable[[], int], Callable[[int], Any]]]:
    """How each pool of this process is asked and told; looked for again only after something was imported."""
    global _found
    num_modules = len(sys.modules)
    if _found is None or _found[0] != num_modules:
        import threadpoolctl

        _found = (num_modules, [_door(pool) for pool in threadpoolctl.ThreadpoolController().lib_controllers])
    return _found[1]


def _door(pool: Any) -> tuple[Callable[[], int], Callable[[int], Any]]:
    """OpenBLAS is asked itself: threadpoolctl obeys only the thread that asked first, and says nothing to others."""
    if pool.internal_api == "openblas":
        for prefix, suffix in product(("", "scipy_"), ("", "64_", "_64")):
            get = getattr(pool.dynlib, f"{prefix}openblas_get_num_threads{suffix}", None)
            put = getattr(pool.dynlib, f"{prefix}openblas_set_num_threads{suffix}", None)
            if get and put:
                return get, put
    return pool.get_num_threads, pool.set_num_threads


def _over(num_threads: int) -> list[str]:
    import threadpoolctl

    return [
        f"{pool['internal_api']} {pool['num_threads']}"
        for pool in threadpoolctl.threadpool_info()
        if pool["num_threads"] > num_threads
    ]
