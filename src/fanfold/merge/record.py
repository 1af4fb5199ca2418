"""Several merges of the same values at once, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fanfold.errors import DataError, PlanError


@dataclass(frozen=True, slots=True)
class RecordPart:
    """One part for each name."""

    names: tuple[str, ...]
    parts: tuple[Any, ...]


@dataclass(frozen=True, slots=True, init=False)
class Record:
    """A result for each name; every merge gets what each piece gave. Bounds and errors are those of the merges.

    >>> from fanfold.merge import Count, Mean
    >>> merge = Record({"mean": Mean(), "rows": Count()})
    >>> merge.finish(merge.lift([1.0, 2.0], 2))
    {'mean': 1.5, 'rows': 2}
    """

    merges: tuple[tuple[str, Any], ...]

    def __init__(self, merges: Mapping[str, Any]) -> None:
        if not isinstance(merges, Mapping) or not merges or not all(isinstance(name, str) for name in merges):
            raise PlanError(
                f"Record({merges!r:.80})",
                found="not at least one merge by name",
                allowed="a dict of names and merges",
                do='write for example {"mean": ff.Mean(), "rows": ff.Count()}',
            )
        object.__setattr__(self, "merges", tuple(merges.items()))

    def empty(self) -> RecordPart:
        """The empty part of each merge."""
        return self._part(merge.empty() for _, merge in self.merges)

    def lift(self, value: Any, rows: int) -> RecordPart:
        """The value as a part of each merge."""
        return self._part(merge.lift(value, rows) for _, merge in self.merges)

    def join(self, left: RecordPart, right: RecordPart) -> RecordPart:
        """Name by name. Raises DataError where the names are not those of this record."""
        names = tuple(name for name, _ in self.merges)
        for part in (left, right):
            if part.names != names:
                raise DataError(
                    "join results by name",
                    found=f"parts named {', '.join(part.names)}",
                    allowed=f"parts named {', '.join(names)}",
                    do="join parts of the same record only",
                )
        pairs = zip(self.merges, left.parts, right.parts, strict=True)
        return self._part(merge.join(a, b) for (_, merge), a, b in pairs)

    def finish(self, part: RecordPart) -> dict[str, Any]:
        """The results by name."""
        return {name: merge.finish(own) for (name, merge), own in zip(self.merges, part.parts, strict=True)}

    def _part(self, parts: Any) -> RecordPart:
        return RecordPart(tuple(name for name, _ in self.merges), tuple(parts))
