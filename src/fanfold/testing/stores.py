"""What every backend of the durable verbs must do, as one suite; and an object store in memory, with faults.

    class TestMyStore(StoreSuite):
        @pytest.fixture
        def make(self, tmp_path):
            return lambda: PosixStore(tmp_path / "out")

`make` gives another store on the same place each time: what another process would see.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pytest

from fanfold.data import journal
from fanfold.errors import ResumeError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.data.objects import Blob
    from fanfold.data.store import Store

T = TypeVar("T")

FOLDERS = [".", "data", "tmp"]


class MemoryObjects:
    """Implements data.objects.Objects; what it holds dies with it.

    `fail` makes a coming call raise OSError, before it takes effect or after (the reply is lost). With
    `conditional` False, put_if_absent takes the condition and ignores it, as some stores do.
    """

    def __init__(self, *, conditional: bool = True) -> None:
        self.held: dict[str, bytes] = {}
        self.conditional = conditional
        self.calls: list[tuple[str, str]] = []
        self._faults: list[tuple[str, int, bool]] = []
        self._lock = threading.Lock()

    def fail(self, verb: str, *, times: int = 1, after: bool = False) -> None:
        """The next `times` calls of the verb raise; with `after`, when they have taken effect."""
        self._faults.append((verb, times, after))

    def get(self, name: str) -> bytes | None:
        with self._lock:
            after = self._begin("get", name)
            found = self.held.get(name)
            return self._end(after, found)

    def put(self, name: str, data: Blob) -> None:
        with self._lock:
            after = self._begin("put", name)
            self.held[name] = data[:]
            self._end(after, None)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._lock:
            after = self._begin("put_if_absent", name)
            if name in self.held and self.conditional:
                return self._end(after, False)
            self.held[name] = bytes(data)
            return self._end(after, True)

    def list(self, prefix: str) -> list[str]:
        with self._lock:
            after = self._begin("list", prefix)
            found = sorted(name for name in self.held if name.startswith(prefix))
            self._end(after, None)
            return found

    def size_bytes(self, name: str) -> int | None:
        with self._lock:
            after = self._begin("size_bytes", name)
            return self._end(after, len(self.held[name]) if name in self.held else None)

    def delete(self, *names: str) -> None:
        with self._lock:
            after = self._begin("delete", names[0])
            for name in names:
                self.held.pop(name, None)
            self._end(after, None)

    def _begin(self, verb: str, name: str) -> bool:
        """Whether the call raises when it has taken effect; raises where it must before."""
        self.calls.append((verb, name))
        for place, (failing, times, after) in enumerate(self._faults):
            if failing == verb:
                self._faults[place : place + 1] = [(failing, times - 1, after)] if times > 1 else []
                if not after:
                    raise TimeoutError(f"{verb} {name}: no answer")
                return True
        return False

    def _end(self, lost: bool, answer: T) -> T:
        if lost:
            raise TimeoutError("the reply was lost")
        return answer


class StoreSuite:
    """Facts about any backend. `make` is a fixture of the subclass: a callable that opens the place once more."""

    @pytest.fixture
    def store(self, make: Callable[[], Store]) -> Any:
        made = make()
        made.make_folders(FOLDERS)
        yield made
        made.close()

    # -- files ------------------------------------------------------------------------------------------

    def test_a_temporary_file_holds_the_bytes(self, store: Store) -> None:
        store.write_temporary("tmp/a", b"one")
        store.write_temporary("tmp/a", memoryview(b"two"))
        store.seal("tmp/a")
        assert store.read("tmp/a") == b"two"

    def test_sealing_what_is_not_there_is_an_error(self, store: Store) -> None:
        with pytest.raises(StorageError) as refused:
            store.seal("tmp/missing")
        assert "tmp/missing" in refused.value.asked

    def test_put_if_absent_publishes_and_takes_the_temporary_away(
        self, store: Store, make: Callable[[], Store]
    ) -> None:
        store.write_temporary("tmp/a", b"one")
        assert store.put_if_absent("tmp/a", "data/part")
        store.sync_folder("data")
        assert make().read("data/part") == b"one"
        assert store.list("tmp") == []

    def test_put_if_absent_never_overwrites(self, store: Store) -> None:
        store.write_temporary("tmp/a", b"one")
        store.write_temporary("tmp/b", b"two")
        assert store.put_if_absent("tmp/a", "data/part")
        assert not store.put_if_absent("tmp/b", "data/part")
        assert store.read("data/part") == b"one"
        assert store.read("tmp/b") == b"two"

    def test_many_are_put_at_once_and_each_learns_whether_it_was_first(self, store: Store) -> None:
        for number in range(30):
            store.write_temporary(f"tmp/{number}", b"%d" % number)
        store.replace("data/7", b"taken")
        pairs = [(f"tmp/{number}", f"data/{number}") for number in range(30)]
        assert list(store.put_all_if_absent(pairs)) == [number != 7 for number in range(30)]
        assert store.list("tmp") == ["7"]
        assert [store.read(f"data/{number}") for number in (6, 7, 8)] == [b"6", b"taken", b"8"]
        assert list(store.put_all_if_absent([])) == []

    def test_of_many_that_publish_one_name_at_once_one_wins(self, store: Store) -> None:
        names = [f"tmp/{i}" for i in range(8)]
        for name in names:
            store.write_temporary(name, name.encode())
        won: list[str] = []
        start = threading.Barrier(len(names))

        def publish(name: str) -> None:
            start.wait()
            if store.put_if_absent(name, "data/part"):
                won.append(name)

        threads = [threading.Thread(target=publish, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = won
        assert store.read("data/part") == winner.encode()
        assert store.list("tmp") == sorted(name.removeprefix("tmp/") for name in names if name != winner)

    def test_publishing_what_is_not_there_is_an_error_and_takes_no_name(self, store: Store) -> None:
        with pytest.raises(StorageError):
            store.put_if_absent("tmp/missing", "data/part")
        assert store.read("data/part") is None

    def test_replace_puts_new_bytes_in_place_of_old_ones(self, store: Store, make: Callable[[], Store]) -> None:
        for data in (b"a long first version", b"", b"two"):
            store.replace("run.json", data)
            assert make().read("run.json") == data
        assert [name for name in store.list(".") if name not in FOLDERS] == ["run.json"]

    def test_rename_leaves_the_new_name_only(self, store: Store) -> None:
        store.write_temporary("tmp/a", b"new")
        store.replace("data/part", b"old")
        store.rename("tmp/a", "data/part")
        assert store.read("data/part") == b"new"
        assert store.read("tmp/a") is None

    def test_renaming_what_is_not_there_is_an_error_and_keeps_the_target(self, store: Store) -> None:
        store.replace("data/part", b"old")
        with pytest.raises(StorageError):
            store.rename("tmp/missing", "data/part")
        assert store.read("data/part") == b"old"

    def test_remove_takes_a_file_away_and_does_not_mind_a_missing_one(self, store: Store) -> None:
        store.replace("file", b"x")
        for _ in range(2):
            store.remove("file")
        assert store.read("file") is None

    def test_what_is_not_there_reads_as_none_and_lists_as_empty(self, store: Store) -> None:
        assert store.read("missing") is None
        assert store.list("missing") == []

    def test_names_are_listed_sorted_and_of_one_folder_only(self, store: Store) -> None:
        for name in ("b", "a", "c"):
            store.replace(f"data/{name}", b"")
        store.replace("database", b"")
        assert store.list("data") == ["a", "b", "c"]

    def test_make_folders_is_repeatable(self, store: Store) -> None:
        store.replace("data/a", b"x")
        store.make_folders(FOLDERS)
        assert store.list("data") == ["a"]
        assert store.list("tmp") == []

    def test_the_size_is_that_of_the_bytes(self, store: Store) -> None:
        store.replace("data/a", b"12345")
        assert store.size_bytes("data/a") == 5
        assert store.size_bytes("data/missing") is None

    def test_remove_takes_many_files_away(self, store: Store) -> None:
        for name in ("data/a", "data/b", "data/c"):
            store.replace(name, b"x")
        store.remove("data/a", "data/missing", "data/c")
        store.remove()
        assert store.list("data") == ["b"]

    def test_remove_folder_takes_all_in_it_away_and_nothing_else(self, store: Store) -> None:
        for name in ("tmp/a", "tmp/b", "tmpfile"):
            store.replace(name, b"x")
        for _ in range(2):
            store.remove_folder("tmp")
        assert store.list("tmp") == []
        assert store.read("tmpfile") == b"x"

    # -- logs -------------------------------------------------------------------------------------------

    def test_append_adds_at_the_end_also_after_reopening(self, store: Store, make: Callable[[], Store]) -> None:
        store.append("commits.log", b"one\n")
        store.append("commits.log", b"two\n")
        store.close()
        other = make()
        other.append("commits.log", b"three\n")
        assert other.read("commits.log") == b"one\ntwo\nthree\n"
        assert other.list(".").count("commits.log") == 1
        other.close()

    def test_a_log_of_many_appends_keeps_their_order(self, store: Store) -> None:
        lines = [b"%d\n" % i for i in range(40)]
        for line in lines:
            store.append("commits.log", line)
        assert store.read("commits.log") == b"".join(lines)

    @pytest.mark.parametrize("size_bytes", range(12))
    def test_truncate_cuts_the_end_and_append_goes_on_there(
        self, store: Store, make: Callable[[], Store], size_bytes: int
    ) -> None:
        for line in (b"one\n", b"two\n", b"six"):
            store.append("commits.log", line)
        store.truncate("commits.log", size_bytes)
        assert (store.read("commits.log") or b"") == b"one\ntwo\nsix"[:size_bytes]
        store.append("commits.log", b"next\n")
        assert make().read("commits.log") == b"one\ntwo\nsix"[:size_bytes] + b"next\n"

    def test_the_journal_works_on_it(self, store: Store, make: Callable[[], Store]) -> None:
        entries = [{"kind": "lease", "window": i} for i in range(3)]
        journal.append(cast("Any", store), entries[:2])
        journal.append(cast("Any", store), entries[2:])
        store.append("commits.log", b"12345678 {torn")
        store.close()
        other = make()
        assert journal.load(cast("Any", other)) == entries
        assert (other.read("commits.log") or b"").endswith(b"\n")

    # -- claims -----------------------------------------------------------------------------------------

    def test_a_second_claim_is_refused_and_names_the_holder(self, store: Store, make: Callable[[], Store]) -> None:
        import os

        store.claim(".lock")
        for _ in range(2):  # a refusal changes nothing
            with pytest.raises(ResumeError) as refused:
                make().claim(".lock")
            assert f'"pid": {os.getpid()}' in refused.value.found
            assert refused.value.allowed == "one run per folder at a time"
            assert "use another output folder" in refused.value.do

    def test_a_claim_ends_with_close(self, store: Store, make: Callable[[], Store]) -> None:
        store.claim(".lock")
        store.close()
        second = make()
        second.claim(".lock")
        with pytest.raises(ResumeError):
            make().claim(".lock")
        second.close()

    def test_of_many_that_claim_at_once_one_wins(self, store: Store, make: Callable[[], Store]) -> None:
        stores = [make() for _ in range(6)]
        won: list[Store] = []
        start = threading.Barrier(len(stores))

        def take(one: Store) -> None:
            start.wait()
            try:
                one.claim(".lock")
            except ResumeError:
                return
            won.append(one)

        threads = [threading.Thread(target=take, args=(one,)) for one in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].close()

    def test_close_twice_is_harmless(self, store: Store) -> None:
        store.append("commits.log", b"x")
        store.claim(".lock")
        store.close()
        store.close()


class LocalFilesSuite(StoreSuite):
    """And facts about the local files that bulk data goes through."""

    def test_what_is_written_at_new_file_is_the_stores_once_it_is_sealed(
        self, store: Store, make: Callable[[], Store]
    ) -> None:
        store.new_file("tmp/a").write_bytes(b"one")
        store.seal("tmp/a")
        assert make().read("tmp/a") == b"one"
        assert store.put_if_absent("tmp/a", "data/part")
        assert make().read("data/part") == b"one"

    def test_an_empty_file_is_sealed_too(self, store: Store, make: Callable[[], Store]) -> None:
        store.new_file("tmp/a").write_bytes(b"")
        store.seal("tmp/a")
        assert make().read("tmp/a") == b""

    def test_what_is_placed_stands_under_its_name_whatever_was_there(
        self, store: Store, make: Callable[[], Store]
    ) -> None:
        for data in (b"a long first version", b"two"):
            store.new_file("tmp/a").write_bytes(data)
            store.place("tmp/a", "data/w")
            assert store.file("data/w").read_bytes() == data
            assert make().read("data/w") == data
        assert store.list("tmp") == []

    def test_a_file_holds_what_another_has_written(self, store: Store, make: Callable[[], Store]) -> None:
        make().replace("data/a", b"theirs")
        for _ in range(2):
            assert store.file("data/a").read_bytes() == b"theirs"
        assert not store.file("data/missing").exists()

    def test_bytes_that_another_has_replaced_are_seen_once_the_copy_is_refreshed(
        self, store: Store, make: Callable[[], Store]
    ) -> None:
        store.replace("data/a", b"old")
        assert store.file("data/a").read_bytes() == b"old"
        make().replace("data/a", b"new")
        store.refresh("data/a")
        assert store.file("data/a").read_bytes() == b"new"
        assert not store.refresh("data/missing")

    def test_a_name_that_was_removed_has_no_file(self, store: Store) -> None:
        store.replace("data/a", b"old")
        store.file("data/a")
        store.remove("data/a")
        assert not store.file("data/a").exists()
