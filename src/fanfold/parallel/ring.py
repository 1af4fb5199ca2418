"""Tokens of a model in stages: the last stage chooses them, and only they travel back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.tensors import TensorGroup


class Tokens:
    """Chosen by the lead, taken by all others. `world`: all ranks; None where each has the logits and chooses alike."""

    def __init__(self, world: TensorGroup | None, lead: int) -> None:
        self._world, self._lead = world, lead

    def agree(self, choose: Callable[[], list[int]]) -> list[int]:
        """What `choose` gives on the lead; elsewhere it is not called."""
        world = self._world
        if world is None:
            return choose()
        if world.rank != self._lead:
            return [int(token) for token in world.recv(self._lead, "tokens")]
        tokens = choose()
        for rank in range(world.size):
            if rank != self._lead:
                world.send(np.asarray(tokens, dtype=np.int64), rank, "tokens")
        return tokens
