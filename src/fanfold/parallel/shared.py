"""What ranks of one host say to each other, over one mapped file: a few microseconds a call instead of a socket's.

A collective goes in rounds of at most a slot a rank: every rank fills its own slot, raises its counter, and reads
the slots of all when their counters are up. A rank may fill a slot again two rounds later, for then all others have
begun the round between, so they have read it. Sums are taken in rank order by every rank, from the same bytes: all
ranks hold the same result, and the same in every run.

Every call has a head (kind, name, dtype, shape) that the others compare with their own before they take the bytes.
Who waits spins, then yields, then sleeps, and looks now and then whether the others live.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from fanfold.errors import FanfoldError, InternalError, UnitLost, cause_line
from fanfold.parallel import shared_file as place
from fanfold.parallel.shared_file import HEAD_BYTES, SLOT_BYTES, SharedFile
from fanfold.parallel.shared_head import Head, HeadCache, calls_differ, rank_lost

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, NoReturn

    from numpy.typing import NDArray

    Array = NDArray[Any]

_SPINS = 50  # about 3 us: then a core that ranks share goes to the other
_YIELD_S = 0.002
_LONGEST_NAP_S = 0.001
_LOOK_S = 0.25  # how often a waiting rank looks for the others
_STEP_S = 0.25  # a longer time between two looks at a word is our own sleep and does not count as waiting
_MAX_VIEWS = 4096


class SharedGroup:
    """`size` processes of one host that call the same collectives in the same order. One thread a rank.

    The constructor returns when all ranks are there. Names say which layer a call is for; they are compared.
    Arrays: any shape; bool, integers, floats, complex. bfloat16 travels as float32 (sums) or uint16 (the rest).

    Raises, from every call: UnitLost if a rank is gone, has failed, or is waited for longer than `timeout_s`;
    InternalError if ranks call different things. After that the group is of no more use: close it.
    `names`: what errors call the ranks, where the group is a part of another.
    """

    def __init__(
        self, path: str, rank: int, size: int, timeout_s: float = 60.0, *, names: list[int] | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self._names = names or list(range(size))
        self.timeout_s = timeout_s
        self._file = SharedFile(path, rank, size, timeout_s)
        self._map, self._words = self._file.map, self._file.words
        self._others = [other for other in range(size) if other != rank]
        self._posted = [self._file.word(other, place.POSTED) for other in range(size)]
        self._slots = [[self._file.slot(other, parity) for other in range(size)] for parity in (0, 1)]
        self._calls, self._done = self._file.word(rank, place.CALLS), self._file.word(rank, place.DONE)
        self._heads = HeadCache()
        self._views: dict[tuple[int, np.dtype, int], Array] = {}
        self._call = 0  # of any kind
        self._collective = self._message = 0
        self._round = 0
        self._ready = self._open = True

    # -- collectives ----------------------------------------------------------------------------------

    def all_reduce(self, array: Array, name: str) -> Array:
        """The sum over ranks, in place and returned: ((a_0 + a_1) + a_2) + ..., the same bytes on every rank."""
        flat = self._flat(array, writes=True)
        head = self._begin("all_reduce", name, array)
        step = SLOT_BYTES // array.itemsize
        for start in range(0, flat.size or 1, step):
            part = flat[start : start + step] if flat.size > step else flat
            views = self._fill(head, start == 0, part)
            if self.size > 1:
                np.add(views[0], views[1], out=part)
                for view in views[2:]:
                    np.add(part, view, out=part)
        return self._finish(array, flat)

    def broadcast(self, array: Array, root: int, name: str) -> Array:
        """The root's array in every rank's, in place and returned."""
        flat = self._flat(array, writes=True)
        head = self._begin("broadcast", name, array, root)
        step = SLOT_BYTES // array.itemsize
        for start in range(0, flat.size or 1, step):
            part = flat[start : start + step]
            views = self._fill(head, start == 0, part if self.rank == root else part[:0], part.size)
            if self.rank != root:
                part[...] = views[root]
        return self._finish(array, flat)

    def all_gather(self, array: Array, name: str) -> list[Array]:
        """Every rank's array, in rank order. Shapes may differ in the first axis."""
        head = self._begin("all_gather", name, array)
        flat = self._flat(array)
        step = SLOT_BYTES // array.itemsize
        self._fill(head, True, flat[:step])
        base = self._slots[self._round % 2]
        shapes = [head.shape if at == base[self.rank] else self._heads.read(self._map, at)[1].shape for at in base]
        whole = [np.empty(shape, array.dtype) for shape in shapes]
        parts = [one.reshape(-1) for one in whole]
        start = 0
        while True:
            for part, at in zip(parts, self._slots[self._round % 2], strict=True):
                got = part[start : start + step]
                got[...] = self._view(at, array.dtype, got.size)
            start += step
            if start >= max(part.size for part in parts):
                break
            self._fill(head, False, flat[start : start + step])
        self._end_call()
        return whole

    def all_to_all(self, arrays: list[Array], sizes: list[list[int]], name: str) -> list[Array]:
        """arrays[r], flat, goes to rank r; what each rank has for this one, in rank order.

        All of one dtype; rank r gives sizes[r][s] numbers to rank s. What stays here is not copied.
        """
        mine = [np.empty(0, arrays[0].dtype) if rank == self.rank else a for rank, a in enumerate(arrays)]
        flat = self._flat(np.concatenate(mine))
        head = self._begin("all_to_all", name, flat)
        got = [
            arrays[rank] if rank == self.rank else np.empty(given[self.rank], flat.dtype)
            for rank, given in enumerate(sizes)
        ]
        starts = [sum(n for to, n in enumerate(given[: self.rank]) if to != rank) for rank, given in enumerate(sizes)]
        longest = max(sum(given) - given[rank] for rank, given in enumerate(sizes))
        step = SLOT_BYTES // flat.itemsize
        for begun in range(0, longest or 1, step):
            self._fill(head, begun == 0, flat[begun : begun + step])
            for rank in self._others:
                first = max(begun, starts[rank])
                last = min(begun + step, starts[rank] + got[rank].size)
                if first < last:
                    seen = self._view(self._slots[self._round % 2][rank], flat.dtype, last - begun)
                    got[rank][first - starts[rank] : last - starts[rank]] = seen[first - begun :]
        self._end_call()
        return got

    def barrier(self, name: str) -> None:
        """Returns when every rank has come here."""
        self._fill(self._begin("barrier", name, _NOTHING), True, _NOTHING)
        self._end_call()

    # -- from one rank to another ---------------------------------------------------------------------

    def send(self, array: Array, to: int, name: str) -> None:
        """Give the array to rank `to`, which must take it by `recv`.

        Up to a slot (256 KB), and four calls ahead of the receiver, this does not wait; more waits until it is taken,
        so two ranks that send much to each other at once wait for ever: let one of them receive first.
        """
        head = self._begin("send", name, array, to)
        flat = self._flat(array)
        channel = self._channel(self.rank, to)
        sent, taken = channel // 8 + place.SENT, channel // 8 + place.TAKEN
        step = SLOT_BYTES // array.itemsize
        for start in range(0, flat.size or 1, step):
            part = flat[start : start + step]
            number = self._words[sent]
            if self._words[taken] <= number - place.CHANNEL_SLOTS:
                self._wait_long(to, taken, number - place.CHANNEL_SLOTS + 1)
            at = self._file.channel_slot(channel, number)
            if start == 0:
                self._write_head(at, self._message, head)
            self._view(at, array.dtype, part.size)[...] = part
            self._words[sent] = number + 1
        self._end_call()

    def recv(self, frm: int, name: str) -> Array:
        """The next array that rank `frm` has sent to this rank, in its dtype and shape; its name must be this one."""
        head = self._begin("recv", name, _NOTHING, frm)
        channel = self._channel(frm, self.rank)
        sent, taken = channel // 8 + place.SENT, channel // 8 + place.TAKEN
        number = self._words[taken]
        self._wait(frm, sent, number + 1)
        at = self._file.channel_slot(channel, number)
        message, theirs = self._heads.read(self._map, at)
        if theirs.name != head.name:
            self._mismatch(frm, head, self._message, theirs, message)
        array = np.empty(theirs.shape, theirs.dtype)
        flat = array.reshape(-1)
        step = SLOT_BYTES // array.itemsize
        for start in range(0, flat.size or 1, step):
            part = flat[start : start + step]
            self._wait(frm, sent, number + 1)
            part[...] = self._view(self._file.channel_slot(channel, number), array.dtype, part.size)
            number += 1
            self._words[taken] = number
        self._end_call()
        return array

    # -- ending ---------------------------------------------------------------------------------------

    def close(self, cause: str | None = None) -> None:
        """Leave the group; twice is fine. Who waits for this rank is told at once, with the cause if it has one."""
        if self._open:
            self._open = self._ready = False
            self._file.end(place.CLOSED if cause is None else place.FAILED, cause or "")
            self._views.clear()
            self._file.close()

    def __enter__(self) -> SharedGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else f"{self._where(self.rank)}: {cause_line(error)}")

    # -- rounds ---------------------------------------------------------------------------------------

    def _begin(self, kind: str, name: str, array: Array, peer: int | None = None) -> Head:
        """Write the call into our ring, where the others can read what we are in."""
        if not self._ready:
            found = "an earlier call did not end" if self._open else "the group is closed"
            raise InternalError(f"{kind} {name}", found=found, allowed="an open group", do="report it")
        if peer is not None and (not 0 <= peer < self.size or (peer == self.rank and kind != "broadcast")):
            raise InternalError(f"{kind} {name}", found=f"rank {peer}", allowed="another rank", do="report it")
        head = self._heads.of(kind, name, array.dtype, array.shape, peer)
        self._ready = False
        if peer is None or kind == "broadcast":
            number = self._collective = self._collective + 1
        else:
            number = self._message = self._message + 1
        self._call += 1
        self._write_head(self._file.ring(self.rank, self._call), number, head)
        self._words[self._calls] = self._call
        return head

    def _end_call(self) -> None:
        self._words[self._done] = self._call
        self._ready = True

    def _finish(self, array: Array, flat: Array) -> Array:
        if not array.flags.c_contiguous:
            array[...] = flat.reshape(array.shape)
        self._end_call()
        return array

    def _fill(self, head: Head, first: bool, mine: Array, count: int | None = None) -> list[Array]:
        """One round: our part into our slot, then all ranks' slots as arrays of `count` (default: our part's size)."""
        self._round += 1
        slots = self._slots[self._round % 2]
        own = slots[self.rank]
        if first:
            self._write_head(own, self._collective, head)
        if mine.size:
            self._view(own, mine.dtype, mine.size)[...] = mine
        self._words[self._posted[self.rank]] = self._round
        for other in self._others:
            self._wait(other, self._posted[other], self._round)
            if first:
                at = slots[other]
                theirs = self._map[at + 8 : at + HEAD_BYTES]
                if theirs != head.text or self._words[at // 8] != self._collective:
                    self._compare(other, head, at)
        count = mine.size if count is None else count
        return [self._view(at, mine.dtype, count) for at in slots]

    def _compare(self, other: int, head: Head, at: int) -> None:
        """Another rank's head is not ours byte for byte: only a gather's first axis may differ."""
        number, theirs = self._heads.read(self._map, at)
        if number != self._collective or not head.goes_with(theirs):
            self._mismatch(other, head, self._collective, theirs, number)

    def _write_head(self, at: int, number: int, head: Head) -> None:
        self._words[at // 8] = number
        self._map[at + 8 : at + HEAD_BYTES] = head.text

    def _view(self, at: int, dtype: np.dtype, count: int) -> Array:
        """The bytes of the slot at this position as an array."""
        key = (at, dtype, count)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            view = self._views[key] = np.frombuffer(self._map, dtype, count, at + HEAD_BYTES)
        return view

    @staticmethod
    def _flat(array: Array, *, writes: bool = False) -> Array:
        if writes and not array.flags.writeable:
            raise InternalError(
                "a collective in place", found="a read-only array", allowed="one to write", do="copy it"
            )
        return array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)

    def _channel(self, source: int, target: int) -> int:
        try:
            return self._file.channel(source, target)
        except FanfoldError as error:
            self._fail(error)

    # -- waiting --------------------------------------------------------------------------------------

    def _wait(self, other: int, word: int, least: int) -> None:
        """Until the word, which `other` writes, is at least this."""
        words = self._words
        for _ in range(_SPINS):
            if words[word] >= least:
                return
        self._wait_long(other, word, least)

    def _wait_long(self, other: int, word: int, least: int) -> None:
        words = self._words
        waited_s = look_s = 0.0
        last_s = time.monotonic()
        while words[word] < least:
            now_s = time.monotonic()
            waited_s += min(now_s - last_s, _STEP_S)  # a paused process must not blame the others
            last_s = now_s
            if waited_s < _YIELD_S:
                os.sched_yield()
                continue
            if waited_s >= look_s:
                look_s = waited_s + _LOOK_S
                found = self._trouble(other)
                if found is not None and words[word] < least:  # it may have come before its rank ended
                    self._fail(self._lost(found))
            if waited_s > self.timeout_s:
                where = "; ".join(f"rank {self._names[rank]} {self._where(rank)}" for rank in self._others)
                self._fail(self._lost(f"rank {self._names[other]} is waited for since {waited_s:.1f} s: {where}"))
            time.sleep(min(_LONGEST_NAP_S, waited_s / 8))

    def _trouble(self, other: int) -> str | None:
        """Why waiting for `other` is in vain: the first failure, a rank that is gone, or that it has left."""
        failure = self._file.first_failure()
        if failure is not None:
            return f"the first cause is rank {self._names[failure[0]]}'s, {failure[1]}"
        for rank in self._others:
            if self._file.ended(rank) == place.LIVE and self._file.state(rank) is None:
                pid = self._file.pid(rank)
                return f"rank {self._names[rank]} is gone (process {pid} has ended); it {self._where(rank)}"
        if self._file.ended(other) == place.CLOSED:
            return f"rank {self._names[other]} has left the group; it {self._where(other)}"
        return None

    def _where(self, rank: int) -> str:
        """What a rank is doing, as far as its ring tells."""
        call, done = self._words[self._file.word(rank, place.CALLS)], self._words[self._file.word(rank, place.DONE)]
        if call == 0:
            return "has not called anything yet"
        try:
            number, head = self._heads.read(self._map, self._file.ring(rank, call))
            text = head.at(number)
        except ValueError:  # it is being written
            text = f"call {call}"
        if rank == self.rank:
            return f"in {text}" if call > done else f"after {text}"
        state = {"T": " and is stopped", "D": " and waits for a disk"}.get(self._file.state(rank) or "", "")
        return (f"is in {text}" if call > done else f"has done {text} and called nothing since") + state

    def calls(self, rank: int) -> list[str]:
        """The last calls of a rank, oldest first: number, kind, name, dtype, shape."""
        last = self._words[self._file.word(rank, place.CALLS)]
        first = max(1, last - place.RING_CALLS + 2)  # the oldest may be about to be written over
        entries = (self._heads.read(self._map, self._file.ring(rank, call)) for call in range(first, last + 1))
        return [head.at(number) for number, head in entries]

    def _lost(self, found: str) -> UnitLost:
        return rank_lost(f"{self._own_name()} {self._where(self.rank)}", found, self.timeout_s)

    def _own_name(self) -> str:
        names = self._names
        whole = names == list(range(self.size))
        return f"rank {names[self.rank]} of " + (f"{self.size}" if whole else ", ".join(map(str, names)))

    def _mismatch(self, other: int, mine: Head, number: int, theirs: Head, their_number: int) -> NoReturn:
        self._fail(
            calls_differ(
                f"{self._own_name()} in {mine.at(number)}",
                f"rank {self._names[other]} is in {theirs.at(their_number)}",
            )
        )

    def _fail(self, error: FanfoldError) -> NoReturn:
        """Tell the others why, and raise."""
        self._file.end(place.FAILED, f"{self._where(self.rank)}: {error.found}")
        raise error


_NOTHING: Array = np.empty(0, np.uint8)
