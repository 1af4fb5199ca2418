"""Ranks of one host exchange tensors through one mapped file: no copies through the kernel, one fixed order.

Each rank has two slots, used in turn. To exchange, a rank writes into its slot, raises its counter, and waits for the
counters of the others; then every slot may be read until the exchange after the next begins. A rank cannot be further
ahead, because it waits for all counters each time. Counters are written after the data; x86 keeps that order, and on
ARM the interpreter's own locks between two statements do.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
import time
import zlib
from pathlib import Path

import torch

from fanfold.errors import UnitLost

SLOT_BYTES = 4 << 20
TIMEOUT_S = 60.0
_HEADER = 4096  # of the file: a line of 128 bytes a rank, so at most 32 ranks
_LINE = 128
_META = 512  # in front of each slot: bytes, checksum and words of what it holds
_SPINS = 20_000  # a millisecond; then the processor is given away
_LOOK_S = 0.5  # how often a waiting rank looks whether the others live
_COUNTER, _PID, _CLOSED = 0, 1, 2  # in a rank's line, int64 each


def make_file(path: str, size: int) -> None:
    """The file for a group of `size` ranks; its pages are there once they are used."""
    if size > _HEADER // _LINE:
        raise ValueError(f"{size} ranks on one host, at most {_HEADER // _LINE}")
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.ftruncate(fd, _HEADER + 2 * size * (_META + SLOT_BYTES))
    finally:
        os.close(fd)


def new_path() -> str:
    """A name that nobody has, in memory where the system has such a folder."""
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    return os.path.join(folder, f"fanfold-{os.getpid()}-{secrets.token_hex(6)}")


def _call(words: str) -> tuple[int, bytes]:
    """What stands in a slot's header for these words: a checksum with their length, and themselves."""
    text = words.encode()[: _META - 16]
    return zlib.crc32(text) << 16 | len(text), text


class SharedGroup:
    """`size` ranks over one file. Every call names itself; ranks that are in different calls are told apart."""

    def __init__(self, path: str, rank: int, size: int, timeout_s: float = TIMEOUT_S) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._lines = memoryview(self._map)[:_HEADER].cast("q")
        self._bytes = memoryview(self._map)
        self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._slots = [
            [self._tensor[self._slot(rank, turn) + _META :][:SLOT_BYTES] for turn in (0, 1)] for rank in range(size)
        ]
        self._views: dict[tuple[int, torch.dtype, int], list[torch.Tensor]] = {}
        self._calls: dict[tuple[str, torch.Size, torch.dtype], tuple[int, bytes]] = {}
        self._metas = [
            [self._bytes[self._slot(rank, turn) : self._slot(rank, turn) + 16].cast("q") for turn in (0, 1)]
            for rank in range(size)
        ]
        self._counters = [rank * (_LINE // 8) + _COUNTER for rank in range(size)]
        self._done = 0
        self._set(_PID, os.getpid())

    def close(self) -> None:
        """This rank takes part no more; the others are told where they wait for it."""
        self._set(_CLOSED, 1)

    def all_reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The sum over all ranks, added in the order of ranks, in place and returned; the same bits on every rank."""
        if self.size == 1:
            return x
        x = x.detach()
        flat = x.view(-1) if x.is_contiguous() else x.reshape(-1)
        call = self._calls.get((name, x.shape, x.dtype))
        if call is None:
            call = self._calls[name, x.shape, x.dtype] = _call(f"all_reduce {name} {tuple(x.shape)} {x.dtype}")
        step = SLOT_BYTES // x.element_size()
        count = flat.numel()
        if count <= step:
            self._add(flat, call)
        else:
            for start in range(0, count, step):
                self._add(flat[start : start + step], call)
        if not x.is_contiguous():
            x.copy_(flat.view(x.shape))
        return x

    def _add(self, x: torch.Tensor, call: tuple[int, bytes]) -> None:
        views = self._exchange(x, call)
        if self.size == 2:
            torch.add(views[0], views[1], out=x)
            return
        total = views[0] + views[1]
        for view in views[2:]:
            total += view
        x.copy_(total)

    def all_gather(self, x: torch.Tensor, name: str, sizes: list[int], dim: int = -1) -> torch.Tensor:
        """All ranks' tensors side by side along `dim`, of which rank r has sizes[r]; other dimensions are the same."""
        if self.size == 1:
            return x
        dim %= x.dim()
        rest = (*x.shape[:dim], *x.shape[dim + 1 :])
        call = _call(f"all_gather {name} {rest} along {dim}, {sizes}, {x.dtype}")
        shapes = [(*x.shape[:dim], count, *x.shape[dim + 1 :]) for count in sizes]
        lengths = [torch.Size(shape).numel() for shape in shapes]
        flat = x.detach().contiguous().reshape(-1)
        found = [torch.empty(length, dtype=x.dtype) for length in lengths]
        step = SLOT_BYTES // x.element_size()
        for start in range(0, max(1, *lengths), step):
            views = self._exchange(flat[start : start + step], call, lengths, start)
            for rank, view in enumerate(views):
                found[rank][start : start + step].copy_(view)
        return torch.cat([part.view(shape) for part, shape in zip(found, shapes, strict=True)], dim=dim)

    def barrier(self, name: str) -> None:
        """Until every rank has come here."""
        self._exchange(torch.empty(0, dtype=torch.uint8), _call(f"barrier {name}"))

    def _exchange(
        self, x: torch.Tensor, call: tuple[int, bytes], lengths: list[int] | None = None, start: int = 0
    ) -> list[torch.Tensor]:
        """Every rank's flat tensor in the order of ranks, to be read before the next call.

        `lengths`: how long each rank's whole tensor is, of which this is what begins at `start`; None: like x.
        """
        done = self._done = self._done + 1
        turn = done & 1
        check, text = call
        meta = self._metas[self.rank][turn]
        if meta[1] != check:
            meta[1] = check
            at = self._slot(self.rank, done) + 16
            self._bytes[at : at + len(text)] = text
        views = self._views_of(turn, x.dtype, x.numel(), lengths, start)
        views[self.rank].copy_(x)
        lines, counters = self._lines, self._counters
        lines[counters[self.rank]] = done
        for rank in range(self.size):
            if lines[counters[rank]] < done:
                self._wait_for(rank, text)
            if self._metas[rank][turn][1] != check:
                raise self._lost(
                    f"rank {self.rank} is in #{done} {text.decode()}; rank {rank} is in {self._words(rank, done)}"
                )
        return views

    def _views_of(
        self, turn: int, dtype: torch.dtype, count: int, lengths: list[int] | None, start: int
    ) -> list[torch.Tensor]:
        if lengths is None:
            key = (turn, dtype, count)
            found = self._views.get(key)
            if found is None:
                size = count * dtype.itemsize
                with torch.inference_mode(False):  # kept, and written to in either mode
                    found = self._views[key] = [slots[turn][:size].view(dtype) for slots in self._slots]
            return found
        step = SLOT_BYTES // dtype.itemsize
        here = [min(step, max(0, length - start)) for length in lengths]
        return [slots[turn][: n * dtype.itemsize].view(dtype) for slots, n in zip(self._slots, here, strict=True)]

    def _slot(self, rank: int, done: int) -> int:
        return _HEADER + (2 * rank + (done & 1)) * (_META + SLOT_BYTES)

    def _wait_for(self, rank: int, text: bytes) -> None:
        place = self._counters[rank]
        words = text.decode()
        lines, done = self._lines, self._done
        for _ in range(_SPINS):
            if lines[place] >= done:
                return
        start_s = look_s = time.monotonic()
        pause_s = 0.0
        while lines[place] < done:
            time.sleep(pause_s)
            now_s = time.monotonic()
            if now_s - start_s > 0.002:
                pause_s = min(1e-3, pause_s + 2e-5)
            if now_s - look_s > _LOOK_S:
                look_s = now_s
                if lines[rank * (_LINE // 8) + _CLOSED] or not self._lives(rank):
                    raise self._lost(
                        f"rank {rank} has ended, last in {self._words(rank)}; rank {self.rank} waits in #{done} {words}"
                    )
                if now_s - start_s > self.timeout_s:
                    raise self._lost(
                        f"rank {self.rank} waits in #{done} {words} for {self.timeout_s:g} s; "
                        f"rank {rank} is behind {self._words(rank)}"
                    )

    def _lives(self, rank: int) -> bool:
        pid = self._lines[rank * (_LINE // 8) + _PID]
        try:
            if pid:
                os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True  # a zombie is seen by the one that waits for it: the group's parent

    def _words(self, rank: int, done: int | None = None) -> str:
        done = self._lines[self._counters[rank]] if done is None else done
        if not done:
            return "no collective yet"
        at = self._slot(rank, done) + 16
        length = self._metas[rank][done & 1][1] & 0xFFFF
        return f"#{done} {bytes(self._bytes[at : at + length]).decode(errors='replace')}"

    def _set(self, what: int, value: int) -> None:
        self._lines[self.rank * (_LINE // 8) + what] = value

    def _lost(self, found: str) -> UnitLost:
        return UnitLost(
            f"a collective of {self.size} ranks",
            found=found,
            allowed="all ranks in the same collective, within the timeout",
            do="the group ends as a whole; the first cause is what it says of the rank that failed",
        )
