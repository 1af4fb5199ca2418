"""Which rank does what: one grid, data x pipeline x tensor, and the groups that come from it."""

from __future__ import annotations

from dataclasses import dataclass

from fanfold.errors import PlanError

METHODS = ("data", "pipeline", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one model is cut. `tensor` units share every layer; `pipeline` stages hold consecutive layers."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def units(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        named = (("pipeline", self.pipeline), ("tensor", self.tensor))
        return " ".join(f"{name}={count}" for name, count in named if count > 1) or "whole"

    def stage_of(self, rank: int) -> int:
        """Ranks of one stage stand together."""
        return rank // self.tensor

    def place_of(self, rank: int) -> int:
        """Which share of its stage's layers a rank holds."""
        return rank % self.tensor


def parse_split(layout: str) -> Split:
    """`tensor=2`, `pipeline=2`, `tensor=2,pipeline=2`. Raises PlanError."""
    found: dict[str, int] = {}
    for part in filter(None, (word.strip() for word in layout.replace(" ", ",").split(","))):
        name, sign, number = part.partition("=")
        if name not in ("tensor", "pipeline") or not sign or not number.isdecimal() or int(number) < 1 or name in found:
            raise PlanError(
                f"--layout {layout}",
                found=f"{part!r}",
                allowed="tensor=N, pipeline=N, or both with a comma; each once, N at least 1",
                do="for example --layout tensor=2",
            )
        found[name] = int(number)
    return Split(**found)


def shares(count: int, ways: int) -> list[range]:
    """`count` things over `ways` units in consecutive shares; the first ones have one more where it does not go up."""
    least, more = divmod(count, ways)
    ends = [least * (i + 1) + min(i + 1, more) for i in range(ways)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
