"""A live program over several processes: it starts, is watched, and dies as a whole."""

from __future__ import annotations

import selectors
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import cloudpickle

from fanfold.engine.wire import Closed
from fanfold.errors import FanfoldError, UnitLost, cause_line
from fanfold.plan.plan import Unit

if TYPE_CHECKING:
    from fanfold.engine.engine import Program
    from fanfold.engine.supervisor import Process, Supervisor


class Group:
    """`size` processes that run `program(rank, size, channel)`. Messages go to and from single ranks.

    `memory_bytes`: what each may hold beyond what its imports hold; more is an error there.
    """

    def __init__(
        self, supervisor: Supervisor, unit: Unit, program: Program, size: int, *, memory_bytes: int | None = None
    ) -> None:
        self._supervisor = supervisor
        body = cloudpickle.dumps(program)
        self._members: list[Process] = []
        self._inbox: list[deque[Any]] = [deque() for _ in range(size)]
        self._finished: set[int] = set()
        self._cause: FanfoldError | None = None
        try:
            for rank in range(size):
                member = supervisor.start(
                    Unit(name=f"{unit.name}.{rank}", device=unit.device), memory_bytes=memory_bytes
                )
                self._members.append(member)
                member.channel.send(("run", body, rank, size))
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return len(self._inbox)

    @property
    def pids(self) -> tuple[int | None, ...]:
        return tuple(member.pid for member in self._members)

    def send(self, rank: int, message: Any) -> None:
        """To one rank; UnitLost if the group has ended."""
        self._check()
        try:
            self._members[rank].channel.send(message)
        except Closed:
            self._collect(0.0)
            self._check()

    def receive(self, rank: int, timeout_s: float) -> Any:
        """The rank's next message; the group ends, with the first cause, if a rank dies or is silent too long."""
        deadline_s = time.monotonic() + timeout_s
        while not self._inbox[rank]:
            self._check()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                self._end(f"rank {rank} was silent for {timeout_s:g} s")
            self._collect(max(0.0, left_s))
        return self._inbox[rank].popleft()

    def close(self) -> None:
        """End every member; twice is fine."""
        for member in self._members:
            member.kill()
            if member.popen is not None:
                member.popen.wait()
            member.channel.close()
            member.stderr.close()
        self._members.clear()

    def _check(self) -> None:
        if self._cause is not None:
            raise self._cause
        if not self._members:
            self._end("the group was closed")

    def _collect(self, timeout_s: float) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, member in enumerate(self._members):
                if rank not in self._finished:
                    selector.register(member.channel, selectors.EVENT_READ, rank)
            ready = [key.data for key, _ in selector.select(timeout_s)]
        self._supervisor.read_news()
        for rank in ready:
            member = self._members[rank]
            member.stderr.read()
            try:
                messages = member.channel.drain()
            except Closed:
                words = member.stderr.text()
                cause = self._supervisor.exit_cause(member)
                self._end(f"rank {rank} {cause}" + (f"; its last words:\n{words}" if words else ""))
            for message in messages:
                self._take(rank, message)

    def _take(self, rank: int, message: Any) -> None:
        match message:
            case ("up", pid):
                self._members[rank].up, self._members[rank].pid = True, pid
            case ("finished",):
                self._finished.add(rank)
            case ("failed", error, traceback):
                self._end(f"rank {rank} failed: {cause_line(error)}\n{traceback}")
            case _:
                self._inbox[rank].append(message)

    def _end(self, found: str) -> None:
        """Remember the first cause and end all members."""
        self._cause = UnitLost(
            f"a group of {self.size} units",
            found=found,
            allowed="every rank alive and answering",
            do="look at the first cause above; the group was ended as a whole",
        )
        self.close()
        raise self._cause
