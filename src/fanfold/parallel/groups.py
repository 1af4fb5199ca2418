"""The groups that a rank is in: all ranks, and those that differ from it along one axis of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fanfold.parallel.mesh import Mesh
from fanfold.parallel.tensors import Alone, TensorGroup

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Axis, Split


class Groups:
    """All ranks of one model, over the file at `path`; a smaller group has a file of its own beside it.

    Every rank opens the same axes in the same order. Raises what TensorGroup raises.
    """

    def __init__(self, path: str, rank: int, split: Split, timeout_s: float) -> None:
        self.rank, self._path, self._timeout_s = rank, path, timeout_s
        self.mesh = Mesh(split=split)
        self.world = TensorGroup(path, rank, split.units, timeout_s)
        self._opened: dict[Axis, TensorGroup] = {}

    def along(self, axis: Axis) -> TensorGroup | Alone:
        """The group along the axis; all ranks where there is no other axis."""
        ranks = self.mesh.group(self.rank, axis)
        if len(ranks) == 1:
            return Alone()
        if len(ranks) == self.mesh.units:
            return self.world
        if axis not in self._opened:
            path = f"{self._path}-{axis}-{ranks[0]}"
            self._opened[axis] = TensorGroup(path, ranks.index(self.rank), len(ranks), self._timeout_s)
        return self._opened[axis]

    def set_timeout(self, timeout_s: float) -> None:
        for group in (self.world, *self._opened.values()):
            group.timeout_s = timeout_s

    def close(self) -> None:
        for group in (*self._opened.values(), self.world):
            group.close()
