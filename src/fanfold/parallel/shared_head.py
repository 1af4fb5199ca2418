"""The head of a call: what it is and what it carries, as text of a fixed length that ranks compare.

Also what is said where calls do not meet, whatever carries them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fanfold.errors import InternalError, UnitLost
from fanfold.parallel.shared_file import HEAD_BYTES

if TYPE_CHECKING:
    import mmap

_TEXT_BYTES = HEAD_BYTES - 8  # a number of 8 bytes comes first
_NAME_BYTES = 140
_MAX_HEADS = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """One call: `all_reduce layers.7.mlp.down float32 (1, 768)`."""

    kind: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    peer: int | None  # of a send, a recv or a broadcast
    text: bytes

    def goes_with(self, other: Head) -> bool:
        """Whether two ranks that call these are in the same call."""
        same = (self.kind, self.name, self.dtype, self.peer) == (other.kind, other.name, other.dtype, other.peer)
        if self.kind in ("all_gather", "all_to_all"):
            return same and len(self.shape) == len(other.shape) > 0 and self.shape[1:] == other.shape[1:]
        return same and self.shape == other.shape

    def at(self, number: int) -> str:
        """In words, with its number."""
        towards = {"send": " to rank ", "recv": " from rank ", "broadcast": " of rank "}.get(self.kind)
        what = f"{self.kind}#{number} {self.name}" + (f"{towards}{self.peer}" if towards else "")
        return what if self.kind in ("barrier", "recv") else f"{what} {self.dtype} {self.shape}"


class HeadCache:
    """Heads by what they say and by their text: a model makes the same calls again and again."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, str, np.dtype, tuple[int, ...], int | None], Head] = {}
        self._read: dict[bytes, Head] = {}

    def of(self, kind: str, name: str, dtype: np.dtype, shape: tuple[int, ...], peer: int | None) -> Head:
        """The head of our own call. InternalError for arrays that cannot travel."""
        key = (kind, name, dtype, shape, peer)
        head = self._of.get(key)
        if head is None:
            if len(self._of) >= _MAX_HEADS:
                self._of.clear()
            head = self._of[key] = _made(kind, _short(name), dtype, shape, peer)
        return head

    def read(self, memory: mmap.mmap, at: int) -> tuple[int, Head]:
        """Number and head that stand at this position."""
        number = int.from_bytes(memory[at : at + 8], "little", signed=True)
        return number, self.parse(memory[at + 8 : at + HEAD_BYTES])

    def parse(self, text: bytes) -> Head:
        """The head that the text says."""
        head = self._read.get(text)
        if head is None:
            if len(self._read) >= _MAX_HEADS:
                self._read.clear()
            kind, name, dtype, shape, peer = text.rstrip(b"\0").decode().split("\n")
            sizes = tuple(int(size) for size in shape.split(",") if size)
            head = Head(kind, name, np.dtype(dtype), sizes, int(peer) if peer else None, text)
            self._read[text] = head
        return head


def _short(name: str) -> str:
    """The name, or its end and a checksum of all of it if it is too long for a head."""
    data = name.replace("\n", " ").encode("utf-8", "replace")
    if len(data) > _NAME_BYTES:
        data = b"%08x.." % zlib.crc32(data) + data[-_NAME_BYTES + 10 :]
    return data.decode("utf-8", "replace")


def _made(kind: str, name: str, dtype: np.dtype, shape: tuple[int, ...], peer: int | None) -> Head:
    if dtype.kind not in "biufc" or dtype.char in "gG":  # long doubles hold bytes without a meaning
        found = f"dtype {dtype}"
    elif kind == "all_reduce" and dtype.kind == "b":
        found = "a sum of booleans"
    elif kind == "all_gather" and not shape:
        found = "an array without axes"
    else:
        parts = (kind, name, dtype.str, ",".join(map(str, shape)), "" if peer is None else str(peer))
        text = "\n".join(parts).encode()
        if len(text) <= _TEXT_BYTES:
            return Head(kind, name, dtype, shape, peer, text.ljust(_TEXT_BYTES, b"\0"))
        found = f"an array of {len(shape)} axes"
    raise InternalError(
        f"{kind} {name}",
        found=found,
        allowed="integers, floats and complex numbers (booleans where nothing is added), few axes",
        do="bfloat16: send float32, or its bits as uint16",
    )


def rank_lost(asked: str, found: str, timeout_s: float) -> UnitLost:
    """A rank waits in vain."""
    return UnitLost(
        asked,
        found=found,
        allowed=f"every rank alive and in the same call within {timeout_s:g} s",
        do="look at the rank named first; the group ends as a whole",
    )


def calls_differ(asked: str, found: str) -> InternalError:
    """Two ranks are in different calls."""
    return InternalError(
        asked,
        found=found,
        allowed="the same call on every rank (all_gather: another first axis)",
        do="report it with the model's config; --layout without this method computes the same",
    )
