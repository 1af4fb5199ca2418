"""Tokens of a model in stages: the last stage chooses them, and only they travel back.

Micro-batches go round in a ring: while the last stage computes one, the first computes the next. On every rank they
take turns in the same order, so messages need no names of their own.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.parallel.tensors import TensorGroup

T = TypeVar("T")
MOST = 4  # micro-batches: as many calls may a rank be ahead of the one that takes them (parallel/shared.py)


class Tokens:
    """Chosen by the lead, taken by all others. `world`: all ranks; None where each has the logits and chooses alike.

    turn() lets other micro-batches go on between a forward pass and the next that needs its tokens.
    """

    def __init__(self, world: TensorGroup | None, lead: int, turn: Callable[[], None] = lambda: None) -> None:
        self._world, self._lead, self._turn = world, lead, turn

    def agree(self, choose: Callable[[], list[int]]) -> list[int]:
        """What `choose` gives on the lead; elsewhere it is not called."""
        world = self._world
        if world is None:
            return choose()
        if world.rank != self._lead:
            self._turn()
            return [int(token) for token in world.recv(self._lead, "tokens")]
        tokens = choose()
        for rank in range(world.size):
            if rank != self._lead:
                world.send(np.asarray(tokens, dtype=np.int64), rank, "tokens")
        self._turn()
        return tokens


def take_turns(jobs: Sequence[Callable[[Callable[[], None]], T]], begin: Callable[[], Any]) -> list[T]:
    """Results of all jobs, of which one runs at a time: each until it calls turn(), round and round, in their order.

    begin() is called at the start of each job's thread. The first error is raised, the others end.
    """
    if len(jobs) == 1:
        return [jobs[0](lambda: None)]
    ring = _Ring(len(jobs))
    found: dict[int, T] = {}

    def run(number: int) -> None:
        try:
            ring.wait(number)
            begin()
            found[number] = jobs[number](lambda: ring.turn(number))
        except BaseException as error:
            ring.fail(error)
        else:
            ring.leave(number)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if ring.error is not None:
        raise ring.error
    return [found[number] for number in range(len(jobs))]


class _Ended(Exception):
    """Another job has failed."""


class _Ring:
    """Whose turn it is."""

    def __init__(self, count: int) -> None:
        self._live = list(range(count))
        self._now = 0  # the job that runs
        self._changed = threading.Condition()
        self.error: BaseException | None = None

    def wait(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._now == number or self.error is not None)
            if self.error is not None:
                raise _Ended

    def turn(self, number: int) -> None:
        self._pass_on(number)
        self.wait(number)

    def leave(self, number: int) -> None:
        self._pass_on(number, leaves=True)

    def fail(self, error: BaseException) -> None:
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    def _pass_on(self, number: int, *, leaves: bool = False) -> None:
        with self._changed:
            place = self._live.index(number)
            behind = self._live[(place + 1) % len(self._live)]
            if leaves:
                self._live.remove(number)
            self._now = behind
            self._changed.notify_all()
