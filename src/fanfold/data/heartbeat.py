"""A thread that calls a function again and again while a block runs: the sign of life of a claim."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from fanfold.errors import FanfoldError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Heartbeat:
    """Calls `beat` every `interval_s`. Its errors are left to whoever writes next, who meets them too."""

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        self._beat = beat
        self._interval_s = interval_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fanfold-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            try:
                self._beat()
            except FanfoldError:
                pass
