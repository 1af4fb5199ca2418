"""Threads per unit: set in every library that has its own pool, then verified."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from fanfold.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Iterator


_torch_before: list[int] = []  # what torch had before it was held, oldest first


def hold_threads(num_threads: int) -> None:
    """No pool of this process runs more threads than this; InternalError where one does not obey.

    The environment variables set before the imports do most of it; torch ignores some of them, and
    OpenMP ignores torch (pytorch/pytorch#19213), so both are set and then looked at.
    """
    import threadpoolctl

    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != num_threads:
        _torch_before.append(torch.get_num_threads())
        torch.set_num_threads(num_threads)
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
def held_threads(num_threads: int) -> Iterator[None]:
    """As hold_threads, for a while: the caller's own process gets its settings back.

    A library that is imported inside must be held again, once it is there.
    """
    import threadpoolctl

    with threadpoolctl.threadpool_limits(limits=num_threads):
        _torch_before.clear()
        hold_threads(num_threads)
        try:
            yield
        finally:
            if _torch_before:
                sys.modules["torch"].set_num_threads(_torch_before[0])


def _over(num_threads: int) -> list[str]:
    import threadpoolctl

    return [
        f"{pool['internal_api']} {pool['num_threads']}"
        for pool in threadpoolctl.threadpool_info()
        if pool["num_threads"] > num_threads
    ]
