"""The durable verbs over an object store: what `PosixStore` does with files, done with whole objects.

An object store has no rename, no append and no lock. What it must have is a *conditional put* ("If-None-Match: *"
in S3, "ifGenerationMatch=0" in Google's, a create-only blob in Azure's): everything here that two writers could
do at once rests on it. Without it nothing can be promised: two runs would overwrite each other's pieces, each
believing that it was first. So a store that has none, or that takes the condition and ignores it, is refused with
PlanError before anything else is written.

- publish: a conditional put under the final name; the temporary object goes afterwards.
- append: numbered segments, each a conditional put. A segment stands whole or not at all, so a log is never torn,
  and a number that is taken shows a second writer at once.
- claim: numbered too. The highest number holds the folder; its holder renews its heartbeat, and whoever finds it
  expired puts the next number, which only one can. Expiry compares two machines' clocks: `expires_s` must be far
  more than they differ. A holder that was only asleep finds the higher number (or its segment taken) when it
  writes next, and stops.

A put that has returned is durable; `seal` and `sync_folder` have nothing to do. Reading what was just written
must give it (S3, Google's and Azure's all promise that).
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fanfold.data.holder import holder_stamp, is_dead, life_stamp
from fanfold.errors import PlanError, ResumeError, StorageError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Iterable, Sequence

    Blob = bytes | mmap.mmap

T = TypeVar("T")

CLAIM_EXPIRES_S = 120.0
PROBE = ".probe-"  # what a run that is refused or killed may leave: no part of a run folder
_TRIES = 3
_AT_ONCE = 16  # requests


class Objects(Protocol):
    """What an object store does. An OSError says that it did not answer: the call may have taken effect or not."""

    def get(self, name: str) -> bytes | None:
        """The object's bytes; None where there is none."""

    def put(self, name: str, data: Blob) -> None:
        """The object holds these bytes, whatever it held before."""

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """The object holds these bytes; False, and nothing changed, where the name was taken. One try, no more."""

    def list(self, prefix: str) -> list[str]:
        """The names of all objects that begin like this, sorted."""

    def size_bytes(self, name: str) -> int | None:
        """How large the object is; None where there is none."""

    def delete(self, *names: str) -> None:
        """The names are free; missing is fine."""


class ObjectStore:
    """A prefix in an object store, with the verbs of `PosixStore`."""

    def __init__(
        self,
        objects: Objects,
        root: str = "",
        *,
        shown: str = "",
        expires_s: float = CLAIM_EXPIRES_S,
        pause_s: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock` gives seconds that all machines agree on, more or less: the heartbeat of the claim.

        `shown` is what messages call the prefix; `pause_s` is waited before a second try, four times as long
        before a third.
        """
        self.root = PurePosixPath(root)
        self.shown = shown or root
        self.expires_s = expires_s
        self._pause_s = pause_s
        self._proved = False
        self._lost: ResumeError | None = None
        self._lock = threading.RLock()  # a heartbeat may come from another thread
        self._objects = objects
        self._clock = clock
        self._next_segment: dict[str, int] = {}
        self._claim: tuple[str, int, dict[str, Any]] | None = None  # name, number, stamp
        self._beat_at_s = 0.0

    def path(self, name: str) -> str:
        """What messages call it."""
        return f"{self.shown.rstrip('/')}/{name}"

    # -- writing --------------------------------------------------------------------------------------

    def make_folders(self, names: Iterable[str]) -> None:
        """Nothing to make: folders are parts of names. Refuses a store whose conditional put is none."""
        if self._proved:
            return
        probe = f"{PROBE}{uuid.uuid4().hex}"
        try:
            first, second = self._put_new(probe, b"1"), self._put_new(probe, b"2")
        except NotImplementedError:
            first = second = False
        self.remove(probe)
        if not first or second:
            raise PlanError(
                f"output to {self.shown}",
                found="the store has no conditional put: it wrote over an object that must not be written twice"
                if second
                else "the store has no conditional put",
                allowed="a store that can put an object only if its name is free (If-None-Match: *)",
                do="it cannot keep two writers apart; use another store, or a folder on a disk",
            )
        self._proved = True

    def write_temporary(self, name: str, data: bytes | memoryview) -> None:
        """The object holds the bytes."""
        self._ask(name, f"writing {len(data):,} bytes", lambda key: self._objects.put(key, bytes(data)))

    def seal(self, name: str) -> None:
        """An object that something else has put is there; what was put is durable already."""
        self._existing(name, "flushing")

    def put_if_absent(self, temporary: str, name: str) -> bool:
        """The temporary object stands under its name; False where the name was taken (nothing changed)."""
        if not self._put_new(name, self._existing(temporary, "publishing")):
            return False
        self.remove(temporary)
        return True

    def put_all_if_absent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """As `put_if_absent` of each (temporary, name), side by side: each waits for three answers."""
        if len(pairs) < 2:
            return [self.put_if_absent(temporary, name) for temporary, name in pairs]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            return list(threads.map(lambda pair: self.put_if_absent(*pair), pairs))

    def sync_folder(self, name: str) -> None:
        """Nothing to do: a put that has returned is durable."""

    def replace(self, name: str, data: bytes) -> None:
        """The name holds exactly these bytes, whatever it held before; never something in between.

        Raises: ResumeError where another run has taken the claim over.
        """
        self.beat()
        self._put(name, data)

    def _put(self, name: str, data: bytes) -> None:
        self._ask(name, f"writing {len(data):,} bytes", lambda key: self._objects.put(key, data))

    def rename(self, old: str, new: str) -> None:
        """The object stands under the new name only. A crash in between leaves both, never none."""
        self.replace(new, self._existing(old, "renaming"))
        self.remove(old)

    def append(self, name: str, data: bytes) -> None:
        """The bytes stand at the end of the log as a segment of their own; after an error all of them or none.

        Raises: ResumeError where another run has written there, or has taken the claim over.
        """
        self.beat()
        number = self._next_segment.get(name)
        if number is None:
            number = len(self._segments(name))
        if not self._put_new(_numbered(name, number), data):
            raise self._taken_over(f"segment {number} of {name} was written by another run")
        self._next_segment[name] = number + 1

    def truncate(self, name: str, size_bytes: int) -> None:
        """The log ends there. From the end backwards, so that a crash leaves a beginning of it, never a gap."""
        segments = self._segments(name)
        data = [self._existing(segment, "truncating") for segment in segments]
        total = sum(map(len, data))
        for segment, held in reversed(list(zip(segments, data, strict=True))):
            start = total - len(held)
            if total <= size_bytes:
                break
            if start >= size_bytes:
                self.remove(segment)
            else:
                self.replace(segment, held[: size_bytes - start])
            total = start
        self._next_segment.pop(name, None)

    def remove(self, *names: str) -> None:
        """The names are gone; missing is fine."""
        if names:
            keys = [self._key(name) for name in names]
            self._ask(names[0], "removing", lambda _: self._objects.delete(*keys))

    def remove_folder(self, name: str) -> None:
        """All that is in it is gone, or a log: from its end, so that what a crash leaves is a beginning of it."""
        self.beat()
        prefix = self._key(name) + "/"
        for key in reversed(self._ask(name, "listing", lambda _: self._objects.list(prefix))):
            self.remove(key.removeprefix(self._key("") + "/") if self._key("") else key)
        self._next_segment.pop(name, None)

    # -- reading --------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """The bytes under the name, a log's segments joined; None where there is none."""
        data = self._ask(name, "reading", self._objects.get)
        if data is not None:
            return data
        segments = self._segments(name)
        if len(segments) < 2:
            return self._existing(segments[0], "reading") if segments else None
        with ThreadPoolExecutor(_AT_ONCE) as readers:
            return b"".join(readers.map(lambda segment: self._existing(segment, "reading"), segments))

    def list(self, folder: str) -> list[str]:
        """Names in the folder, sorted; a log is one name; empty where there is none."""
        prefix = self._key(folder).rstrip("/") + "/" if self._key(folder) else ""
        found = self._ask(folder, "listing", lambda _: self._objects.list(prefix))
        return sorted({name.removeprefix(prefix).partition("/")[0] for name in found})

    def size_bytes(self, name: str) -> int | None:
        """How large the object is; None where there is none."""
        return self._ask(name, "reading", self._objects.size_bytes)

    # -- one writer at a time -------------------------------------------------------------------------

    def claim(self, name: str) -> None:
        """This process alone writes here until `close`, or until it has not called `beat` for `expires_s`.

        A holder that this machine knows to be dead is not waited for.
        """
        held = self._segments(name, whole=False)
        number = 1 + max((int(segment.rpartition("/")[2]) for segment in held), default=-1)
        if held:
            stamp = self._stamp(held[-1])
            expired = self._clock() - stamp.get("beat_at_s", 0.0) >= self.expires_s
            if not (stamp.get("released") or expired or is_dead(stamp)):
                raise self._held_by(stamp)
        mine = {**holder_stamp(), **life_stamp(), "token": uuid.uuid4().hex, "beat_at_s": self._clock()}
        if not self._put_new(_numbered(name, number), _json(mine)):
            raise self._held_by(self._stamp(_numbered(name, number)))
        for old in held:  # those before are over
            self.remove(old)
        self._claim = (name, number, mine)
        self._beat_at_s = mine["beat_at_s"]

    def beat(self) -> None:
        """The claim lives on; to be called a few times in `expires_s`. Cheap where the last beat is recent.

        Raises: ResumeError where another run has taken the claim over meanwhile.
        """
        with self._lock:
            if self._lost is not None:
                raise self._lost
            now_s = self._clock()
            if self._claim is None or now_s - self._beat_at_s < self.expires_s / 4:
                return
            name, number, stamp = self._claim
            holder = self._segments(name, whole=False)
            if not holder or holder[-1] != _numbered(name, number):
                self._claim = None
                self._lost = self._taken_over(f"no sign of life was given for {now_s - self._beat_at_s:.0f} s")
                raise self._lost
            stamp["beat_at_s"] = now_s
            self._put(_numbered(name, number), _json(stamp))
            self._beat_at_s = now_s

    def close(self) -> None:
        """Let go of the claim. An error leaves it to expire."""
        with self._lock:
            self._next_segment.clear()
            if self._claim is None:
                return
            name, number, stamp = self._claim
            self._claim = None
            held = self._segments(name, whole=False)
            if held and held[-1] == _numbered(name, number):
                self._put(held[-1], _json({**stamp, "released": True}))

    # -- inside ---------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        key = str(self.root / name)
        return "" if key == "." else key

    def _segments(self, name: str, *, whole: bool = True) -> Sequence[str]:
        """The numbered objects under the name, in order; with `whole`, from 0 on and without a gap."""
        numbers = [int(number) for number in self.list(name) if number.isdigit()]
        if whole and numbers != list(range(len(numbers))):
            raise StorageError(
                f"reading {self.path(name)}",
                found=f"{len(numbers)} segments, the last of which is number {numbers[-1]}: some are missing",
                allowed="every segment from 0 on",
                do="restore the missing objects from a backup, or start anew with --overwrite",
            )
        return [_numbered(name, number) for number in numbers]

    def _existing(self, name: str, doing: str) -> bytes:
        data = self._ask(name, doing, self._objects.get)
        if data is None:
            raise StorageError(
                f"{doing}: {self.path(name)}",
                found="there is no such object",
                allowed="an object that was written before",
                do="check that nothing else removes objects there",
            )
        return data

    def _put_new(self, name: str, data: bytes) -> bool:
        """A conditional put. Where the reply to an earlier try was lost, what stands there may be our own."""
        for tries in range(1, _TRIES + 1):
            try:
                if self._objects.put_if_absent(self._key(name), data):
                    return True
            except OSError as error:
                if tries == _TRIES:
                    raise self._no_answer(name, f"writing {len(data):,} bytes", error) from error
                self._wait(tries)
                continue
            return tries > 1 and self._ask(name, "reading", self._objects.get) == data
        raise AssertionError("unreachable")

    def _ask(self, name: str, doing: str, verb: Callable[[str], T]) -> T:
        """The answer of a verb that may be tried again without harm."""
        for tries in range(1, _TRIES + 1):
            try:
                return verb(self._key(name))
            except OSError as error:
                if tries == _TRIES:
                    raise self._no_answer(name, doing, error) from error
                self._wait(tries)
        raise AssertionError("unreachable")

    def _wait(self, tries: int) -> None:
        if self._pause_s:
            time.sleep(self._pause_s * 4 ** (tries - 1))

    def _stamp(self, name: str) -> dict[str, Any]:
        try:
            stamp = json.loads(self._ask(name, "reading", self._objects.get) or b"{}")
        except ValueError:
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def _no_answer(self, name: str, doing: str, error: OSError) -> StorageError:
        return StorageError(
            f"{doing}: {self.path(name)}",
            found=f"{_TRIES} tries failed; the last: {type(error).__name__}: {error.strerror or error}",
            allowed="a store that answers",
            do="check the connection and the credentials, then run the same command again to go on",
        )

    def _held_by(self, stamp: dict[str, Any]) -> ResumeError:
        shown = {key: stamp[key] for key in ("host", "boot_id", "pid", "since") if key in stamp}
        return ResumeError(
            f"writing to {self.shown}",
            found=f"another run holds it: {json.dumps(shown) if shown else 'holder unknown'}",
            allowed="one run per folder at a time",
            do=f"wait for that run to end ({self.expires_s:.0f} s if it died), or use another output folder",
        )

    def _taken_over(self, why: str) -> ResumeError:
        return ResumeError(
            f"writing to {self.shown}",
            found=f"another run writes there: {why}",
            allowed="one run per folder at a time",
            do="let that run finish; nothing that was committed is lost",
        )


def _numbered(name: str, number: int) -> str:
    return f"{name}/{number:09d}"


def _json(stamp: dict[str, Any]) -> bytes:
    return json.dumps(stamp).encode() + b"\n"
