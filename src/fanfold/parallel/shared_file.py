"""One mapped file that the ranks of a group on one host share: where what lies in it, who is attached, who lives.

    page 0                     magic, version, ranks
    control of rank r          words that only r writes; the last calls of r
    slots of rank r            two (odd and even rounds), each a head and bytes: what r gives to all
    channel from r to s        two counters and four slots: what r sends to s alone

Every word is 8 bytes, aligned, with one writer. A writer fills a slot and then raises a counter; a reader waits
for the counter and then reads the slot. That is right where stores arrive in program order (x86-64) and needs
fences elsewhere, which Python does not have: there the transport is refused. The file loses its name as soon as
all ranks hold it, so nothing stays behind however they end.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import platform
import secrets
import sys
import time
from typing import TYPE_CHECKING

from fanfold.errors import InternalError, PlanError, SafetyError, StorageError, UnitLost

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = "/dev/shm"
HEAD_BYTES = 256  # of a slot and of an entry of the ring: a number and a text
SLOT_BYTES = 256 << 10
CHANNEL_SLOTS = 4
RING_CALLS = 16

_PREFIX = "fanfold-group-"
_MAGIC = 0x31_646C_6F66_6E61_66  # "fanfold1"
_PAGE = 4096
_CONTROL_BYTES = _PAGE + RING_CALLS * HEAD_BYTES
_CAUSE_BYTES = 2048
# Words of a rank's control page. What others spin on has two cache lines for itself.
PID, STARTED, ENDED, ENDED_NS, CALLS, DONE, POSTED, CAUSE = 0, 1, 2, 3, 8, 9, 32, 64
LIVE, CLOSED, FAILED = 0, 1, 2
# Words of a channel.
SENT, TAKEN = 0, 32


def refusal() -> str | None:
    """Why ranks cannot share memory here; None where they can."""
    if sys.platform != "linux":
        return f"the system is {sys.platform}, not Linux"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the processor is {platform.machine()}, where stores may arrive out of order"
    if not os.path.isdir(FOLDER) or process_state(os.getpid()) is None:
        return f"{FOLDER} or /proc is not mounted"
    return None


def new_path() -> str:
    """A path for a new group's file; files that dead groups have left are removed."""
    for path in _left_behind():
        try:
            os.unlink(path)
        except OSError:
            pass  # another process was faster
    return f"{FOLDER}/{_PREFIX}{secrets.token_hex(8)}"


def process_state(pid: int) -> tuple[str, int] | None:
    """State letter (as in `ps`) and start time of a process; None if there is none or it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state = fields[0].decode()
    return None if state in "ZX" else (state, int(fields[19]))


class SharedFile:
    """The file at `path`, made by whoever comes first, with this process as `rank` of `size`.

    Raises: PlanError where memory cannot be shared, StorageError if it is full, SafetyError if the file is another
    user's, UnitLost if a rank does not come within `timeout_s` or dies before.
    """

    def __init__(self, path: str, rank: int, size: int, timeout_s: float) -> None:
        if (why := refusal()) is not None:
            raise PlanError(
                "shared memory between ranks",
                found=why,
                allowed=f"Linux on x86-64 with {FOLDER} and /proc",
                do="use gloo, which works everywhere and is slower",
            )
        if not 0 <= rank < size:
            raise InternalError(
                "joining a group", found=f"rank {rank} of {size}", allowed="0 <= rank < size", do="report it"
            )
        self.path, self.rank, self.size = path, rank, size
        self._channels_at = _PAGE + size * (_CONTROL_BYTES + 2 * (HEAD_BYTES + SLOT_BYTES))
        self._channel_bytes = _PAGE + CHANNEL_SLOTS * (HEAD_BYTES + SLOT_BYTES)
        self._length = self._channels_at + size * size * self._channel_bytes
        self._reserved: set[int] = set()
        self._fd = _open_locked(path)
        self._ours = False  # whether the name is ours to remove
        try:
            self._join()
            self._wait_for_all(timeout_s)
        except BaseException:
            self._remove_name()
            self.close()
            raise
        self._remove_name()

    # -- where what lies ------------------------------------------------------------------------------

    def control(self, rank: int) -> int:
        """Byte position of a rank's control page."""
        return _PAGE + rank * _CONTROL_BYTES

    def word(self, rank: int, word: int) -> int:
        """Index in `words` of a word of a rank's control page."""
        return self.control(rank) // 8 + word

    def ring(self, rank: int, call: int) -> int:
        """Byte position of the rank's entry for its call of this number."""
        return self.control(rank) + _PAGE + call % RING_CALLS * HEAD_BYTES

    def slot(self, rank: int, round_: int) -> int:
        """Byte position of the slot that the rank fills in this round."""
        at = _PAGE + self.size * _CONTROL_BYTES
        return at + (2 * rank + round_ % 2) * (HEAD_BYTES + SLOT_BYTES)

    def channel(self, source: int, target: int) -> int:
        """Byte position of the channel between two ranks, one of them this; its memory is taken at its first use."""
        at = self._channels_at + (source * self.size + target) * self._channel_bytes
        if at not in self._reserved:
            self._reserve(at, self._channel_bytes if source == self.rank else _PAGE)
            self._reserved.add(at)
        return at

    def channel_slot(self, channel: int, number: int) -> int:
        """Byte position of the slot for the channel's chunk of this number."""
        return channel + _PAGE + number % CHANNEL_SLOTS * (HEAD_BYTES + SLOT_BYTES)

    # -- who is attached ------------------------------------------------------------------------------

    def pid(self, rank: int) -> int:
        return self.words[self.word(rank, PID)]

    def state(self, rank: int) -> str | None:
        """The state letter of a rank's process; None if it is gone."""
        found = process_state(self.pid(rank))
        return found[0] if found is not None and found[1] == self.words[self.word(rank, STARTED)] else None

    def ended(self, rank: int) -> int:
        """LIVE, CLOSED or FAILED, as the rank has said."""
        return self.words[self.word(rank, ENDED)]

    def cause(self, rank: int) -> str:
        """Why the rank has failed, in its words."""
        at = self.control(rank) + CAUSE * 8
        return self.map[at : at + _CAUSE_BYTES].rstrip(b"\0").decode("utf-8", "replace")

    def end(self, how: int, cause: str = "") -> None:
        """Tell the others how this rank has ended; the first word stands."""
        if self.ended(self.rank) == LIVE:
            text = cause.encode("utf-8", "replace")[:_CAUSE_BYTES]
            at = self.control(self.rank) + CAUSE * 8
            self.map[at : at + len(text)] = text
            self.words[self.word(self.rank, ENDED_NS)] = time.monotonic_ns()
            self.words[self.word(self.rank, ENDED)] = how

    def first_failure(self) -> tuple[int, str] | None:
        """The rank that failed first, and its cause."""
        failed = [rank for rank in range(self.size) if self.ended(rank) == FAILED]
        if not failed:
            return None
        first = min(failed, key=lambda rank: self.words[self.word(rank, ENDED_NS)])
        return first, self.cause(first)

    def close(self) -> None:
        """Let go of the file; twice is fine. Arrays over the map must be gone, else it stays until they are."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if hasattr(self, "words"):
                self.words.release()
                try:
                    self.map.close()
                except BufferError:
                    pass

    # -- joining --------------------------------------------------------------------------------------

    def _join(self) -> None:
        """With the file locked: lay it out if it is new, take our place in it, unlock."""
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SafetyError(
                f"sharing memory by {self.path}",
                found=f"a file of user {found.st_uid} with mode {found.st_mode & 0o777:o}",
                allowed="a file that this user alone can read and write",
                do="use another path; new_path() gives one",
            )
        if found.st_size not in (0, self._length):
            self._refuse(f"a file of {found.st_size:,} bytes instead of {self._length:,}")
        if found.st_size == 0:
            self._ours = True
            os.ftruncate(self._fd, self._length)
            self._reserve(0, _PAGE + self.size * _CONTROL_BYTES)
        self.map = mmap.mmap(self._fd, self._length)
        self.words = memoryview(self.map).cast("q")
        if found.st_size == 0:
            self.words[0], self.words[1] = _MAGIC, self.size
        elif (self.words[0], self.words[1]) != (_MAGIC, self.size):
            self._refuse("a file of another version")
        if self.pid(self.rank):
            self._refuse(f"rank {self.rank} is process {self.pid(self.rank)} already")
        self._ours = True
        self._reserve(self.slot(self.rank, 0), 2 * (HEAD_BYTES + SLOT_BYTES))
        state = process_state(os.getpid())
        assert state is not None
        self.words[self.word(self.rank, STARTED)] = state[1]
        self.words[self.word(self.rank, PID)] = os.getpid()
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _remove_name(self) -> None:
        """Every rank does it: the last one may be killed before it can."""
        try:
            if self._ours and os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                os.unlink(self.path)
        except OSError:
            pass  # another rank was faster

    def _refuse(self, found: str) -> None:
        raise InternalError(
            f"joining the group at {self.path} as rank {self.rank} of {self.size}",
            found=found,
            allowed="one new path a group, and one process a rank",
            do="use another path; new_path() gives one",
        )

    def _reserve(self, at: int, length: int) -> None:
        """Take the memory now: a full /dev/shm is then an error and not a bus error later."""
        try:
            os.posix_fallocate(self._fd, at, length)
        except OSError as error:
            raise StorageError(
                f"shared memory of {length:,} bytes for rank {self.rank}",
                found=f"{self.path}: {error.strerror}",
                allowed=f"about {2 * SLOT_BYTES:,} bytes a rank and {CHANNEL_SLOTS * SLOT_BYTES:,} a channel",
                do=f"make {FOLDER} larger (docker: --shm-size=256m) or use gloo",
            ) from None

    def _wait_for_all(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            missing = [rank for rank in range(self.size) if not self.pid(rank)]
            came = [rank for rank in range(self.size) if self.pid(rank) and self.ended(rank) == LIVE]
            dead = [rank for rank in came if self.state(rank) is None]
            failure = self.first_failure()
            if failure is not None:
                found = f"the first cause is rank {failure[0]}'s: {failure[1]}"
            elif dead:
                found = f"rank {dead[0]} (process {self.pid(dead[0])}) is gone"
            elif not missing:
                return
            elif time.monotonic() > deadline_s:
                found = f"no rank {', '.join(map(str, missing))} within {timeout_s:g} s"
            else:
                time.sleep(0.002)
                continue
            self.end(FAILED, found)
            raise UnitLost(
                f"rank {self.rank} waits for the {self.size} ranks of its group",
                found=found,
                allowed="every rank attached",
                do="look at the first error of that rank",
            )


def _open_locked(path: str) -> int:
    """The file at the path, made where there is none, locked; never one that has just lost its name."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def _left_behind() -> Iterator[str]:
    """Files of groups that died before all ranks had come: nobody who has joined lives."""
    for entry in os.scandir(FOLDER):
        if not entry.name.startswith(_PREFIX):
            continue
        try:
            fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not any(_joined(fd)):
                yield entry.path
        except OSError:
            pass  # somebody is joining
        finally:
            os.close(fd)


def _joined(fd: int) -> Iterator[bool]:
    """For every rank that has joined: whether it lives."""
    head = memoryview(os.pread(fd, 16, 0).ljust(16, b"\0")).cast("q")
    for rank in range(head[1] if head[0] == _MAGIC else 0):
        pid, started = memoryview(os.pread(fd, 16, _PAGE + rank * _CONTROL_BYTES).ljust(16, b"\0")).cast("q")
        if pid:
            found = process_state(pid)
            yield found is not None and found[1] == started
