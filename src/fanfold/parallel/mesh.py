"""Which rank does what: one grid, data x pipeline x context x expert x tensor, and the groups that come from it.

Ranks count along the last axis first, so those that talk most, the tensor group, stand together. Experts have an axis
of their own: `expert` units hold different experts and the same of everything else, which tensor may cut further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from fanfold.errors import PlanError

if TYPE_CHECKING:
    from fanfold.parallel.rules import Family

Axis = Literal["data", "pipeline", "context", "expert", "tensor"]
AXES: tuple[Axis, ...] = get_args(Axis)
ContextMethod = Literal["allgather", "ulysses", "ring"]
CONTEXT_METHODS: tuple[ContextMethod, ...] = get_args(ContextMethod)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one model is cut.

    `tensor` units share every layer, `expert` units the experts of a layer, `context` units the positions of a
    sequence, of which attention exchanges keys and values by `context_method`; `pipeline` stages hold consecutive
    layers.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    context_method: ContextMethod = "allgather"
    table: Family | None = field(default=None, compare=False, repr=False)  # derived, where the family has none
    shown_check: str = field(default="", compare=False, repr=False)  # how it was found right

    @property
    def units(self) -> int:
        return self.tensor * self.pipeline * self.context * self.expert

    @property
    def width(self) -> int:
        """Ranks of one pipeline stage; they stand together."""
        return self.units // self.pipeline

    def __str__(self) -> str:
        named = [(axis, int(getattr(self, axis))) for axis in AXES if axis != "data"]
        words = [f"{axis}={count}" + self._method(axis) for axis, count in named if count > 1]
        return " ".join(words) or "whole"

    def _method(self, axis: Axis) -> str:
        return f":{self.context_method}" if axis == "context" and self.context_method != "allgather" else ""

    def stage_of(self, rank: int) -> int:
        return rank // self.width

    def place_of(self, rank: int) -> int:
        """Which share of its stage's layers a rank holds."""
        return rank % self.tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The grid of all ranks: `data` copies of a model that is cut by `split`."""

    split: Split
    data: int = 1

    @property
    def units(self) -> int:
        return self.data * self.split.units

    @property
    def counts(self) -> dict[Axis, int]:
        return {axis: self.data if axis == "data" else int(getattr(self.split, axis)) for axis in AXES}

    def place(self, rank: int, axis: Axis) -> int:
        """A rank's coordinate."""
        return rank // self._step(axis) % self.counts[axis]

    def group(self, rank: int, axis: Axis) -> list[int]:
        """The ranks that differ from this one along the axis only, itself among them; a rank's place is its index."""
        step = self._step(axis)
        first = rank - self.place(rank, axis) * step
        return [first + i * step for i in range(self.counts[axis])]

    def _step(self, axis: Axis) -> int:
        return math.prod(self.counts[inner] for inner in AXES[AXES.index(axis) + 1 :])


def parse_split(layout: str) -> Split:
    """`tensor=2`, `pipeline=2,tensor=2`, `context=2:ring`. Raises PlanError."""
    found: dict[str, Any] = {}
    method: ContextMethod = "allgather"
    for part in filter(None, (word.strip() for word in layout.replace(" ", ",").split(","))):
        name, sign, value = part.partition("=")
        number, colon, named = value.partition(":")
        good = bool(sign) and name in AXES and name != "data" and name not in found
        good = good and number.isdecimal() and int(number) >= 1
        if not good or (colon and (name != "context" or named not in CONTEXT_METHODS)):
            raise PlanError(
                f"--layout {layout}",
                found=f"{part!r}",
                allowed="tensor=N, pipeline=N, context=N, context=N:allgather, context=N:ulysses, context=N:ring, "
                "expert=N, several with commas; each once, N at least 1",
                do="for example --layout tensor=2",
            )
        found[name] = int(number)
        method = next((known for known in CONTEXT_METHODS if known == named), method)
    return Split(**found, context_method=method)


def shares(count: int, ways: int) -> list[range]:
    """`count` things over `ways` units in consecutive shares; the first ones have one more where it does not go up."""
    least, more = divmod(count, ways)
    ends = [least * (i + 1) + min(i + 1, more) for i in range(ways)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def head_shares(num_heads: int, num_kv: int, ways: int) -> list[tuple[range, range]]:
    """Query heads and their key-value heads for each unit; where there are too few of these, units share one.

    Raises PlanError where a unit would have no head.
    """
    group = num_heads // num_kv
    if ways <= num_kv:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in shares(num_kv, ways)]
    found = []
    for head, units in enumerate(shares(ways, num_kv)):
        for mine in shares(group, len(units)):
            found.append((range(head * group + mine.start, head * group + mine.stop), range(head, head + 1)))
    if any(not heads for heads, _ in found):
        raise PlanError(
            f"context={ways}:ulysses",
            found=f"{num_heads} attention heads and {num_kv} key-value heads for {ways} units",
            allowed="a query head for each unit at the least, and units of one key-value head share its queries",
            do=f"use context={ways}:ring or context={ways}:allgather, which leave heads whole",
        )
    return found
