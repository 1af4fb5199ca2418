"""Prompts that begin alike: which of them share a beginning worth computing once."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARED_TOKENS = 32  # shorter beginnings cost less than the copies


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first `length` tokens of prompt `first`, shared by at least two prompts; `parent` is a shorter one in it."""

    first: int
    length: int
    parent: int | None = None


def shared_prefixes(prompts: Sequence[Sequence[int]]) -> tuple[list[Prefix], list[int | None]]:
    """Prefixes, parents before children, and for each prompt the longest that it begins with.

    A prompt's last token is never part of a prefix: it must be computed to give the next one. Every prefix adds
    SHARED_TOKENS or more to its parent. Depends on the prompts alone.

    >>> shared_prefixes([[7] * 40 + [1], [7] * 40 + [2], [5]])
    ([Prefix(first=0, length=40, parent=None)], [0, 0, None])
    """
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    common = [_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    prefixes: list[Prefix] = []
    longest: list[int | None] = [None] * len(prompts)
    stack: list[tuple[int, int, int | None, int]] = [(0, len(order), None, 0)]
    while stack:
        start, stop, parent, depth = stack.pop()
        # Runs of neighbours that go on alike for SHARED_TOKENS behind the parent.
        begin = start
        for place in range(start, stop):
            if place + 1 < stop and common[place] >= depth + SHARED_TOKENS:
                continue
            if place > begin:
                length = min(common[begin:place])
                prefixes.append(Prefix(order[begin], length, parent))
                for member in order[begin : place + 1]:
                    longest[member] = len(prefixes) - 1
                stack.append((begin, place + 1, len(prefixes) - 1, length))
            begin = place + 1
    return prefixes, longest


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with, but for the last of the shorter one."""
    count = 0
    for x, y in zip(a[:-1], b[:-1], strict=False):
        if x != y:
            break
        count += 1
    return count
