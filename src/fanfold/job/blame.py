"""Who is to blame when units die: the search for the row that kills them."""

from __future__ import annotations

import re

from fanfold.job.work import Trial, TrialDone
from fanfold.split.bisect import Bisection

POISON_DEATHS = 2


class Blame:
    """Pieces that units died of, and the search for the rows that are to blame.

    Two deaths in the same batch make it poison: it is never simply tried again. Its rows are tried in halves,
    the others as fillers, a unit's death counting as "failed"; a row is to blame only if a unit died of it alone.
    Then the batch is computed without it.
    """

    def __init__(self) -> None:
        self._deaths: dict[tuple[int, int, int], list[tuple[str, str]]] = {}  # window, piece, batch -> causes
        self._searches: dict[tuple[int, int], tuple[int, Bisection]] = {}  # window, piece -> batch, search
        self.left_out: dict[tuple[int, int], dict[int, dict[int, tuple[str, str]]]] = {}
        self._fruitless: dict[tuple[int, int, int], int] = {}

    def died(self, window: int, piece: int, batch: int, num_rows: int, cause: tuple[str, str]) -> bool:
        """A unit died of this batch. True: it is poison now, and a search for the rows has begun."""
        causes = self._deaths.setdefault((window, piece, batch), [])
        causes.append(cause)
        if (window, piece) in self._searches:
            self._searches[window, piece][1].tell(False)
            return True
        if len(causes) < POISON_DEATHS:
            return False
        causes.clear()
        known = len(self.left_out.get((window, piece), {}).get(batch, {}))
        self._searches[window, piece] = (batch, Bisection(num_rows - known, one=True))
        causes.append(cause)
        return True

    def trial(self, window: int, piece: int) -> Trial | None:
        """What to try next of a piece that is searched; None where it is computed as it is."""
        search = self._searches.get((window, piece))
        if search is None:
            return None
        batch, bisection = search
        tried = bisection.next()
        if tried is None:
            self._conclude(window, piece, batch, bisection)
            return None
        return Trial(batch=batch, rows=tuple(self._places(window, piece, batch, bisection)[i] for i in tried))

    def tried(self, window: int, piece: int, done: TrialDone) -> None:
        """How the last trial of the piece went; the unit has survived it."""
        batch, bisection = self._searches[window, piece]
        if done.cause is not None:
            self._deaths[window, piece, batch].append(done.cause)  # the last one is that of the row alone
        bisection.tell(done.passed)

    def fruitless(self, window: int, piece: int, batch: int) -> int:
        """How many searches of this batch found no culprit."""
        return self._fruitless.get((window, piece, batch), 0)

    def _places(self, window: int, piece: int, batch: int, bisection: Bisection) -> list[int]:
        known = self.left_out.get((window, piece), {}).get(batch, {})
        return [row for row in range(bisection.num_rows + len(known)) if row not in known]

    def _conclude(self, window: int, piece: int, batch: int, bisection: Bisection) -> None:
        places = self._places(window, piece, batch, bisection)
        cause = self._deaths.pop((window, piece, batch))[-1]
        del self._searches[window, piece]
        if not bisection.bad:
            key = (window, piece, batch)
            self._fruitless[key] = self._fruitless.get(key, 0) + 1
            return
        found = self.left_out.setdefault((window, piece), {}).setdefault(batch, {})
        for i in bisection.bad:
            found[places[i]] = cause


_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)  # as faulthandler writes it


def death_of(cause: str) -> tuple[str, str]:
    """What a unit died of, from the engine's words: (class, one line, with the innermost frame of a crash)."""
    line = cause.splitlines()[0]
    frame = _FRAME.search(cause)
    if frame is not None and "Fatal Python error" in cause:
        line += f" in {frame[3]} ({frame[1].rpartition('/')[2]}, line {frame[2]})"
    classes = {"SIGSEGV": "Segfault", "SIGBUS": "Segfault", "out of memory": "OutOfMemory", "no sign of life": "Hang"}
    for word, error in classes.items():
        if word in line:
            return error, line
    return "UnitLost", line
