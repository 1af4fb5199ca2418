"""Find the rows that make a batch fail, by computing it again with some rows replaced by fillers.

A pure state machine: it says which rows to try next and is told whether that failed. Whoever drives it
computes the batch in its own shape, the rows that are not tried replaced by a neutral filler, so that every
other row keeps its bytes.
"""

from __future__ import annotations


class Bisection:
    """Over the rows 0..num_rows-1 of a batch that has failed as a whole.

    Drive it so: `while (rows := bisection.next()) is not None: bisection.tell(passed)`. One culprit costs at
    most ceil(log2(num_rows)) + 1 tries, c culprits at most c times that. Rows of a try that passed are good and
    are not tried again; a failure that does not come back has no culprit, and every row is good.

    With `one`, it ends at the first culprit, which must have failed all by itself: for failures that cost a
    process and may have another cause than a row. Same bound; the rows left are computed as usual afterwards.
    """

    def __init__(self, num_rows: int, *, one: bool = False) -> None:
        self.num_rows = num_rows
        self.good: set[int] = set()
        self.bad: set[int] = set()
        self._one = one
        self._all = tuple(range(num_rows))
        self._suspects: tuple[int, ...] = self._all  # a culprit is among these, if there is one
        self._confirmed = False  # a try that held the suspects failed, not only the batch at first
        self._trying: tuple[int, ...] = ()

    def next(self) -> tuple[int, ...] | None:
        """The rows to try next, all others as fillers; None: nothing is left to find out."""
        if self._trying:
            return self._trying  # nobody told how it went: once more
        if not self._suspects:
            rest = tuple(row for row in self._all if row not in self.good and row not in self.bad)
            if not rest or self._one:
                return None
            self._trying = rest  # all that a passed try has not shown yet, the culprits left out
        elif len(self._suspects) == 1:
            self._trying = self._suspects  # reached by leaving others out: it must fail by itself, too
        else:
            self._trying = self._suspects[: len(self._suspects) // 2]
        return self._trying

    def tell(self, passed: bool) -> None:
        """How the rows of the last `next` went."""
        tried, self._trying = self._trying, ()
        if not tried:
            raise ValueError("nothing was tried")
        if passed:
            self.good.update(tried)
            self._suspects = tuple(row for row in self._suspects if row not in self.good)
            if len(self._suspects) == 1 and self._confirmed and not self._one:
                self._convict(self._suspects[0])
        elif len(tried) == 1:
            self._convict(tried[0])
        else:
            self._suspects, self._confirmed = tried, True

    def _convict(self, row: int) -> None:
        self.bad.add(row)
        self._suspects, self._confirmed = (), False
