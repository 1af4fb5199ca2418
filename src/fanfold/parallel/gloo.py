"""The same exchanges over gloo, where ranks cannot share a mapped file: another system or processor.

Slower (docs/parallel.md), and the same bits: sums are taken in rank order by every rank, from all ranks' arrays. gloo
hangs or mixes bytes where ranks call different things, so heads are exchanged and compared before every call.
"""

from __future__ import annotations

import os
import time
from collections import deque
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fanfold.errors import InternalError, cause_line
from fanfold.parallel.shared_file import process_state
from fanfold.parallel.shared_head import HeadCache, calls_differ, rank_lost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from numpy.typing import NDArray

    from fanfold.errors import UnitLost
    from fanfold.parallel.shared_head import Head

    Array = NDArray[Any]

_HOST = "127.0.0.1"
_SETTLE_S = 1.0  # a rank whose connection is gone may need a moment to be gone itself, or to say why
_AHEAD = 2 * 4  # a head and an array each
_NOTHING: Array = np.empty(0, np.uint8)


class GlooGroup:
    """`size` processes of one host that call the same collectives in the same order; as SharedGroup, which see.

    Everything listens on the loopback address only. `path`: a file that no group has used before.
    Raises: UnitLost if a rank is gone, has failed, or is waited for longer than `timeout_s`; InternalError if ranks
    call different things. After that the group is of no more use: close it.
    """

    def __init__(self, path: str, rank: int, size: int, timeout_s: float = 60.0) -> None:
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self._timeout_s = timeout_s
        self._heads = HeadCache()
        self._number = 0
        self._doing = "has not called anything yet"
        self._open = True
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()  # being sent, and the memory that it is sent from
        self._store: Any = dist.FileStore(path, size)
        self._store.set_timeout(timedelta(seconds=timeout_s))
        self._store.set(f"pid-{rank}", str(os.getpid()))
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_HOST)]
        self._gloo: Any = None
        with self._named():
            self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self._store), rank, size, options)

    @property
    def timeout_s(self) -> float:
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._timeout_s = seconds
        self._gloo._set_default_timeout(timedelta(seconds=seconds))

    # -- collectives ----------------------------------------------------------------------------------

    def all_reduce(self, array: Array, name: str) -> Array:
        """The sum over ranks, in place and returned: ((a_0 + a_1) + a_2) + ..., the same bytes on every rank."""
        with self._call("all_reduce", name, array):
            first, *others = self._gathered(np.ascontiguousarray(array).reshape(-1), [array.size] * self.size)
            total = first.copy()
            for other in others:
                total += other
            array[...] = total.reshape(array.shape)
        return array

    def broadcast(self, array: Array, root: int, name: str) -> Array:
        """The root's array in every rank's, in place and returned."""
        with self._call("broadcast", name, array, root):
            parts = self._gathered(np.ascontiguousarray(array).reshape(-1), [array.size] * self.size)
            array[...] = parts[root].reshape(array.shape)
        return array

    def all_gather(self, array: Array, name: str) -> list[Array]:
        """Every rank's array, in rank order. Shapes may differ in the first axis."""
        with self._call("all_gather", name, array) as heads:
            flat = np.ascontiguousarray(array).reshape(-1)
            parts = self._gathered(flat, [int(np.prod(head.shape)) for head in heads])
            return [part.reshape(head.shape).copy() for part, head in zip(parts, heads, strict=True)]

    def all_to_all(self, arrays: list[Array], sizes: list[list[int]], name: str) -> list[Array]:
        """arrays[r], flat, goes to rank r; what each rank has for this one. Rank r gives sizes[r][s] numbers to s."""
        flat = np.concatenate([np.ascontiguousarray(array).reshape(-1) for array in arrays])
        with self._call("all_to_all", name, flat):
            parts = self._gathered(flat, [sum(given) for given in sizes])
            starts = [sum(given[: self.rank]) for given in sizes]
            return [
                part[start : start + given[self.rank]].copy()
                for part, start, given in zip(parts, starts, sizes, strict=True)
            ]

    def barrier(self, name: str) -> None:
        """Returns when every rank has come here."""
        with self._call("barrier", name, _NOTHING):
            pass

    # -- from one rank to another ---------------------------------------------------------------------

    def send(self, array: Array, to: int, name: str) -> None:
        """Give the array to rank `to`, which must take it by `recv`. Four messages may wait to be taken."""
        head = self._heads.of("send", name, array.dtype, array.shape, to)
        with self._named(f"send {name} to rank {to}"):
            for flat in (np.frombuffer(head.text, np.uint8), np.ascontiguousarray(array).reshape(-1)):
                if flat.size:
                    mine = _bytes_of(flat.copy())
                    self._sent.append((self._gloo.send([mine], to, 0), mine))
            while len(self._sent) > _AHEAD:
                self._sent.popleft()[0].wait()

    def recv(self, frm: int, name: str) -> Array:
        """The next array that rank `frm` has sent to this rank, in its dtype and shape; its name must be this one."""
        mine = self._heads.of("recv", name, _NOTHING.dtype, _NOTHING.shape, frm)
        text = np.empty(len(mine.text), np.uint8)
        with self._named(f"recv {name} from rank {frm}"):
            self._gloo.recv([_bytes_of(text)], frm, 0).wait()
            head = self._heads.parse(text.tobytes())
            if head.name != mine.name:
                self._differ(mine.at(0), frm, head.at(0))
            array = np.empty(head.shape, head.dtype)
            if array.size:
                self._gloo.recv([_bytes_of(array.reshape(-1))], frm, 0).wait()
        return array

    # -- ending ---------------------------------------------------------------------------------------

    def close(self, cause: str | None = None) -> None:
        """Leave the group; twice is fine."""
        if self._open:
            self._open = False
            if cause is not None:
                self._tell(cause)
            else:
                with suppress(RuntimeError):  # nobody takes it any more
                    while self._sent:
                        self._sent.popleft()[0].wait()
            self._gloo = None

    def __enter__(self) -> GlooGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else f"{self._doing}: {cause_line(error)}")

    # -- one call -------------------------------------------------------------------------------------

    @contextmanager
    def _call(self, kind: str, name: str, array: Array, peer: int | None = None) -> Iterator[list[Head]]:
        """Compare heads first; what goes wrong inside is told with this call's name. Yields all ranks' heads."""
        if not self._open:
            raise InternalError(f"{kind} {name}", found="the group is closed", allowed="an open group", do="report it")
        self._number += 1
        mine = self._heads.of(kind, name, array.dtype, array.shape, peer)
        with self._named(mine.at(self._number)):
            texts = self._gathered(np.frombuffer(mine.text, np.uint8).copy(), [len(mine.text)] * self.size)
            heads = [self._heads.parse(text.tobytes()) for text in texts]
            for rank, head in enumerate(heads):
                if not mine.goes_with(head):
                    self._differ(mine.at(self._number), rank, head.at(self._number))
            yield heads
        self._doing = f"has done {mine.at(self._number)} and called nothing since"

    def _gathered(self, flat: Array, counts: list[int]) -> list[Array]:
        """Every rank's numbers; gloo gathers equal lengths, so shorter ones are padded on the way."""
        longest = max(counts)
        if not longest:
            return [flat[:0] for _ in counts]
        mine = np.zeros(longest, flat.dtype)
        mine[: flat.size] = flat
        found = [np.empty(longest, flat.dtype) for _ in counts]
        self._gloo.allgather([[_bytes_of(one) for one in found]], [_bytes_of(mine)]).wait()
        return [one[:count] for one, count in zip(found, counts, strict=True)]

    @contextmanager
    def _named(self, doing: str = "joins the group") -> Iterator[None]:
        self._doing = f"in {doing}"
        try:
            yield
        except RuntimeError as error:  # how gloo tells of everything
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> UnitLost:
        """Whose fault it is: who has told of a failure, else whose process is gone, else gloo's words."""
        found = self._first_cause()
        deadline_s = time.monotonic() + _SETTLE_S
        while found is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
            found = self._first_cause()
        if found is None:
            found = cause_line(error)
            if "imed out" in found:
                found = f"a rank is waited for since {self._timeout_s:g} s: {found}"
            self._tell(found)
        return rank_lost(f"rank {self.rank} of {self.size} {self._doing}", found, self._timeout_s)

    def _first_cause(self) -> str | None:
        if self._store.check(["cause"]):
            return f"the first cause is {self._store.get('cause').decode()}"
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"pid-{rank}"]):
                pid = int(self._store.get(f"pid-{rank}"))
                if not _lives(pid):
                    return f"rank {rank} is gone (process {pid} has ended)"
        return None

    def _differ(self, mine: str, other: int, theirs: str) -> None:
        found = f"rank {other} is in {theirs}"
        self._tell(f"in {mine}: {found}")
        raise calls_differ(f"rank {self.rank} of {self.size} in {mine}", found)

    def _tell(self, cause: str) -> None:
        """The first one who tells is believed."""
        self._store.compare_set("cause", "", f"rank {self.rank}'s, {cause}")


def _bytes_of(flat: Array) -> torch.Tensor:
    """The array's own memory as bytes: gloo knows few dtypes."""
    return torch.from_numpy(flat.view(np.uint8))


def _lives(pid: int) -> bool:
    if os.path.isdir("/proc/self"):
        return process_state(pid) is not None
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
