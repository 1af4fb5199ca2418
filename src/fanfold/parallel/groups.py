"""The groups that a rank is in: all ranks, and those that differ from it along one axis of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.parallel.mesh import Mesh
from fanfold.parallel.tensors import Alone
from fanfold.parallel.transport import open_group

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Axis, Split
    from fanfold.parallel.tensors import TensorGroup


class Groups:
    """All ranks of one model, that meet at `place`; a smaller group has a place of its own beside it.

    Every rank opens the same axes in the same order. Raises what they raise.
    """

    def __init__(self, place: str, rank: int, split: Split, timeout_s: float) -> None:
        self.rank, self._place, self._timeout_s = rank, place, timeout_s
        self.mesh = Mesh(split=split)
        self.world = open_group(place, rank, split.units, timeout_s)
        self._opened: dict[Axis, TensorGroup] = {}

    def along(self, axis: Axis) -> TensorGroup | Alone:
        """The group along the axis; all ranks where there is no other axis."""
        ranks = self.mesh.group(self.rank, axis)
        if len(ranks) == 1:
            return Alone()
        if len(ranks) == self.mesh.units:
            return self.world
        if axis not in self._opened:
            place = f"{self._place}-{axis}-{ranks[0]}"
            self._opened[axis] = open_group(place, ranks.index(self.rank), len(ranks), self._timeout_s, names=ranks)
        return self._opened[axis]

    def set_timeout(self, timeout_s: float) -> None:
        for group in (self.world, *self._opened.values()):
            group.timeout_s = timeout_s

    def close(self) -> None:
        for group in (*self._opened.values(), self.world):
            group.close()
