"""How a sequence is cut over units: which positions each of them has.

Where a token sees only those before it, the later it stands the more work it is. So a unit has two pieces there, one
from the head of the sequence and one from its tail (Llama 3, arXiv 2407.21783, section 3.3.2: the same for all units).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fanfold.errors import PlanError
from fanfold.parallel.mesh import shares


@dataclass(frozen=True)
class Positions:
    """runs[r]: the consecutive positions of rank r, none of them empty, in their order."""

    runs: list[list[range]]

    @cached_property
    def sizes(self) -> list[int]:
        """How many positions each rank has."""
        return [sum(map(len, mine)) for mine in self.runs]

    @property
    def length(self) -> int:
        return sum(self.sizes)

    @cached_property
    def of_rank(self) -> list[torch.Tensor]:
        """Each rank's positions, int64 [s]."""
        return [torch.cat([torch.arange(run.start, run.stop) for run in mine]) for mine in self.runs]

    @cached_property
    def back(self) -> torch.Tensor | None:
        """Where in the ranks' shares side by side each position stands, int64 [S]; None: they stand in order."""
        order = torch.cat(self.of_rank)
        found = torch.argsort(order)
        return None if bool((order[1:] > order[:-1]).all()) else found


def cut_positions(length: int, ways: int, *, balanced: bool) -> Positions:
    """`balanced`: a piece from the head and one from the tail for each. PlanError for fewer tokens than units."""
    if length < ways:
        raise PlanError(
            f"a sequence of {length} token(s) with context={ways}",
            found=f"{length} token(s), {ways} units",
            allowed=f"at least {ways} tokens: a unit has one at the least",
            do="pad the batch, or use a smaller context",
        )
    if not balanced:
        return Positions([[run] for run in shares(length, ways)])
    pieces = shares(length, 2 * ways)
    pairs = [(pieces[rank], pieces[2 * ways - 1 - rank]) for rank in range(ways)]
    return Positions([_joined([run for run in pair if run]) for pair in pairs])


def _joined(runs: list[range]) -> list[range]:
    """Neighbours as one run."""
    if len(runs) == 2 and runs[0].stop == runs[1].start:
        return [range(runs[0].start, runs[1].stop)]
    return runs
