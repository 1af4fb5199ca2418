"""Windows of the input, looked for by a thread a little ahead of the work."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.data.source import Source, Window


class Feed:
    """Windows of the input, looked for by a thread a little ahead of the work."""

    def __init__(self, source: Source, window_rows: int, after: Window | None, ahead: int) -> None:
        self._queue: queue.Queue[Window | BaseException | None] = queue.Queue(maxsize=ahead)
        self._closed = False
        self._windows = source.windows(window_rows, after)
        self._thread = threading.Thread(target=self._scan, name="fanfold-scan", daemon=True)
        self._thread.start()

    def _scan(self) -> None:
        last: BaseException | None = None
        try:
            for window in self._windows:
                if not self._put(window):
                    return
        except BaseException as error:
            last = error
        self._put(last)

    def _put(self, item: Window | BaseException | None) -> bool:
        while not self._closed:
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def take(self) -> Iterator[Window | None]:
        """Windows found by now; None at the input's end. Raises what the scan raised."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            if item is None:
                return

    def close(self) -> None:
        """The scan writes nothing more; one that waits for a pipe ends with the process."""
        self._closed = True
        self._thread.join(timeout=1.0)
