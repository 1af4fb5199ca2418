"""The store's verbs: what is true after each of them, and what is said when the disk fails."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fanfold.data import durable
from fanfold.data.durable import PosixStore, holder_stamp, storage_error
from fanfold.data.journal import append, load
from fanfold.errors import ResumeError, StorageError


@pytest.fixture
def store(tmp_path):
    made = PosixStore(tmp_path / "out")
    made.make_folders([".", "data", "tmp"])
    yield made
    made.close()


def failing(monkeypatch, name, code, *, after=0):
    """os.NAME raises this error from the call number `after` on."""
    real, calls = getattr(os, name), []

    def call(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(code, os.strerror(code), str(arguments[0]) if name == "link" else None)
        return real(*arguments, **options)

    monkeypatch.setattr(durable.os, name, call)
    return calls


@pytest.fixture
def flushed(monkeypatch):
    """The paths that were fsynced, in order."""
    paths, real = [], os.fsync

    def fsync(fd):
        paths.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        real(fd)

    if not Path("/proc/self/fd").exists():
        pytest.skip("which file is flushed is read from /proc")
    monkeypatch.setattr(durable.os, "fsync", fsync)
    return paths


# -- verbs ------------------------------------------------------------------------------------------------


def test_make_folders_is_repeatable_and_makes_parents(tmp_path):
    store = PosixStore(tmp_path / "a" / "b")
    for _ in range(2):
        store.make_folders([".", "data", "x/y"])
    assert store.list(".") == ["data", "x"]
    assert store.list("x") == ["y"]


def test_a_temporary_file_holds_the_bytes(store):
    store.write_temporary("tmp/a", b"one")
    store.write_temporary("tmp/a", memoryview(b"two"))
    assert store.read("tmp/a") == b"two"


def test_put_if_absent_publishes_and_takes_the_temporary_away(store):
    store.write_temporary("tmp/a", b"one")
    assert store.put_if_absent("tmp/a", "data/part")
    assert store.read("data/part") == b"one"
    assert store.list("tmp") == []


def test_put_if_absent_never_overwrites(store):
    store.write_temporary("tmp/a", b"one")
    store.write_temporary("tmp/b", b"two")
    assert store.put_if_absent("tmp/a", "data/part")
    assert not store.put_if_absent("tmp/b", "data/part")
    assert store.read("data/part") == b"one"
    assert store.read("tmp/b") == b"two"


def test_put_if_absent_does_not_overwrite_a_folder_or_a_dangling_link(store):
    (store.root / "data" / "folder").mkdir()
    (store.root / "data" / "link").symlink_to("nowhere")
    for name in ("folder", "link"):
        store.write_temporary("tmp/a", b"one")
        assert not store.put_if_absent("tmp/a", f"data/{name}")
    assert (store.root / "data" / "link").is_symlink()


def test_replace_gives_new_content_and_leaves_no_temporary(store):
    store.replace("run.json", b"one")
    store.replace("run.json", b"two")
    assert store.read("run.json") == b"two"
    assert store.list(".") == ["data", "run.json", "tmp"]


def test_rename_leaves_the_new_name_only(store):
    store.write_temporary("tmp/a", b"new")
    store.replace("file", b"old")
    store.rename("tmp/a", "file")
    assert store.read("file") == b"new"
    assert store.list("tmp") == []


def test_append_adds_at_the_end_also_after_reopening(store):
    store.append("commits.log", b"one\n")
    store.append("commits.log", b"two\n")
    store.close()
    other = PosixStore(store.root)
    other.append("commits.log", b"three\n")
    other.close()
    assert store.read("commits.log") == b"one\ntwo\nthree\n"


def test_append_goes_on_after_short_writes(store, monkeypatch):
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    store.append("commits.log", b"0123456789")
    assert store.read("commits.log") == b"0123456789"


def test_truncate_cuts_the_end_and_append_goes_on_there(store):
    store.append("commits.log", b"whole\ntor")
    store.truncate("commits.log", 6)
    store.append("commits.log", b"next\n")
    assert store.read("commits.log") == b"whole\nnext\n"


def test_remove_takes_a_file_away_and_does_not_mind_a_missing_one(store):
    store.replace("file", b"x")
    for _ in range(2):
        store.remove("file")
    assert store.read("file") is None


def test_what_is_not_there_reads_as_none_and_lists_as_empty(store):
    assert store.read("missing") is None
    assert store.list("missing") == []


def test_names_are_listed_sorted(store):
    for name in ("b", "a", "c"):
        store.replace(f"data/{name}", b"")
    assert store.list("data") == ["a", "b", "c"]


def test_close_twice_is_harmless(store):
    store.append("commits.log", b"x")
    store.claim(".lock")
    store.close()
    store.close()


# -- flushing ---------------------------------------------------------------------------------------------


def test_bytes_are_flushed_before_they_are_renamed(store, flushed, monkeypatch):
    order, real = [], os.replace
    monkeypatch.setattr(durable.os, "replace", lambda a, b: (order.append(list(flushed)), real(a, b)))
    store.replace("run.json", b"x")
    assert [path.suffix for path in order[0]] == [".tmp"]
    assert flushed[-1] == store.root


def test_an_append_is_flushed_and_so_is_the_folder_of_a_new_file(store, flushed):
    store.append("commits.log", b"one")
    assert flushed == [store.root, store.path("commits.log")]
    store.append("commits.log", b"two")
    assert flushed[2:] == [store.path("commits.log")]


def test_seal_flushes_a_file_that_something_else_has_written(store, flushed):
    store.path("tmp/a").write_bytes(b"x")
    store.seal("tmp/a")
    assert flushed == [store.path("tmp/a")]


def test_sync_folder_flushes_the_folder(store, flushed):
    store.sync_folder("data")
    assert flushed == [store.path("data")]


def test_a_cut_is_flushed(store, flushed):
    store.append("commits.log", b"torn")
    flushed.clear()
    store.truncate("commits.log", 0)
    assert flushed == [store.path("commits.log")]


def test_a_new_run_folder_is_flushed_into_the_folder_above_it(tmp_path, flushed):
    """Otherwise a crash takes the whole folder with everything that was committed in it."""
    PosixStore(tmp_path / "out").make_folders([".", "data"])
    assert tmp_path in flushed


def test_a_store_that_dies_with_the_process_flushes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(durable.os, "fsync", lambda fd: pytest.fail("flushed"))
    store = PosixStore(tmp_path / "out", sync=False)
    store.make_folders([".", "tmp"])
    store.write_temporary("tmp/a", b"x")
    store.seal("tmp/a")
    store.put_if_absent("tmp/a", "a")
    store.sync_folder(".")
    store.replace("b", b"x")
    store.append("log", b"x")
    store.truncate("log", 0)
    store.close()


# -- claims -----------------------------------------------------------------------------------------------


def test_a_second_claim_is_refused_and_names_the_holder(store):
    store.claim(".lock")
    second = PosixStore(store.root)
    with pytest.raises(ResumeError) as refused:
        second.claim(".lock")
    assert refused.value.exit_code == 2
    assert refused.value.asked == f"writing to {store.root}"
    assert f'"pid": {os.getpid()}' in refused.value.found
    assert refused.value.allowed == "one run per folder at a time"
    assert "use another output folder" in refused.value.do


def test_a_refused_claim_leaves_the_holders_stamp(store):
    store.claim(".lock")
    stamp = store.read(".lock")
    with pytest.raises(ResumeError):
        PosixStore(store.root).claim(".lock")
    assert store.read(".lock") == stamp


def test_a_claim_ends_with_close(store):
    store.claim(".lock")
    store.close()
    second = PosixStore(store.root)
    second.claim(".lock")
    second.close()


@pytest.mark.slow
def test_a_claim_ends_with_its_holder(store):
    code = "import sys; from pathlib import Path; from fanfold.data.durable import PosixStore as S\n"
    code += "S(Path(sys.argv[1])).claim('.lock'); print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ResumeError) as refused:
            store.claim(".lock")
        assert f'"pid": {holder.pid}' in refused.value.found
        holder.kill()
    store.claim(".lock")
    assert json.loads(store.read(".lock"))["pid"] == os.getpid()


def test_a_shorter_stamp_leaves_nothing_of_a_longer_one(store):
    store.path(".lock").write_bytes(b"x" * 5000)
    store.claim(".lock")
    assert json.loads(store.read(".lock")) == {**holder_stamp(), "since": json.loads(store.read(".lock"))["since"]}


def test_the_stamp_names_host_boot_and_process():
    stamp = holder_stamp()
    assert list(stamp) == ["host", "boot_id", "pid", "since"]
    assert stamp["pid"] == os.getpid()
    assert stamp["host"]


# -- a disk that fails ------------------------------------------------------------------------------------


def full(error, doing, path):
    assert error.asked == f"{doing} to {path}"
    assert error.found.startswith("disk full: ")
    assert error.found.endswith(" bytes are free")
    assert error.found.removeprefix("disk full: ").split()[0].replace(",", "").isdigit()
    assert error.allowed == "room for the whole result"
    assert error.do == "make room, then run the same command again: it goes on where it stopped"
    assert error.exit_code == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_need_and_room(store, monkeypatch, code):
    failing(monkeypatch, "fsync", code)
    with pytest.raises(StorageError) as refused:
        store.write_temporary("tmp/a", bytes(12_345))
    full(refused.value, "writing 12,345 bytes", store.path("tmp/a"))
    assert isinstance(refused.value.__cause__, OSError)


def test_a_full_disk_while_appending_is_said_with_the_need(store, monkeypatch):
    failing(monkeypatch, "write", errno.ENOSPC)
    with pytest.raises(StorageError) as refused:
        store.append("commits.log", bytes(1_000))
    full(refused.value, "appending 1,000 bytes", store.path("commits.log"))


def test_a_full_disk_while_publishing_leaves_the_name_free(store, monkeypatch):
    store.write_temporary("tmp/a", b"x")
    failing(monkeypatch, "link", errno.ENOSPC)
    with pytest.raises(StorageError) as refused:
        store.put_if_absent("tmp/a", "data/part")
    full(refused.value, "publishing", store.path("data/part"))
    assert store.list("data") == []


def test_free_room_is_asked_of_the_nearest_folder_that_is_there(tmp_path):
    error = storage_error(tmp_path / "no" / "such" / "folder", "writing", OSError(errno.ENOSPC, "full"))
    full(error, "writing", tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda store: store.write_temporary("tmp/a", b"x"), "fsync"),
        (lambda store: store.seal("tmp/there"), "fsync"),
        (lambda store: store.sync_folder("data"), "fsync"),
        (lambda store: store.replace("run.json", b"x"), "fsync"),
        (lambda store: store.replace("run.json", b"x"), "replace"),
        (lambda store: store.put_if_absent("tmp/there", "data/part"), "link"),
        (lambda store: store.put_if_absent("tmp/there", "data/part"), "unlink"),
        (lambda store: store.append("commits.log", b"x"), "write"),
        (lambda store: store.append("commits.log", b"x"), "fsync"),
        (lambda store: store.append("commits.log", b"x"), "open"),
        (lambda store: store.truncate("tmp/there", 0), "fsync"),
        (lambda store: store.make_folders(["new"]), "fsync"),
        (lambda store: store.claim(".lock"), "open"),
        (lambda store: store.claim(".lock"), "ftruncate"),
        (lambda store: store.claim(".lock"), "pwrite"),
    ],
)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO])
def test_every_verb_says_storage_error_with_path_and_cause(store, monkeypatch, call, name, code):
    store.write_temporary("tmp/there", b"there")
    failing(monkeypatch, name, code)
    with pytest.raises(StorageError) as refused:
        call(store)
    assert str(store.root) in refused.value.asked
    assert os.strerror(code) in refused.value.found
    assert refused.value.allowed == "a folder on a disk that this user may write to"
    assert refused.value.do == "check the permissions and the disk, or choose another output with -o"


@pytest.mark.parametrize(
    "call",
    [lambda store: store.remove("tmp"), lambda store: store.read("tmp"), lambda store: store.list("tmp/there")],
    ids=["remove", "read", "list"],
)
def test_removing_and_reading_say_storage_error_too(store, call):
    """A folder stands where a file is expected, or the reverse: any OSError but a missing name."""
    store.write_temporary("tmp/there", b"there")
    with pytest.raises(StorageError) as refused:
        call(store)
    assert str(store.root) in refused.value.asked


def test_a_failed_flush_does_not_publish(store, monkeypatch):
    failing(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(StorageError):
        store.replace("run.json", b"new")
    assert store.read("run.json") is None


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failed_replace_keeps_the_old_content_and_leaves_no_temporary(store, monkeypatch, name):
    store.replace("run.json", b"old")
    failing(monkeypatch, name, errno.ENOSPC)
    with pytest.raises(StorageError):
        store.replace("run.json", b"new")
    assert store.read("run.json") == b"old"
    assert store.list(".") == ["data", "run.json", "tmp"]


@pytest.fixture
def torn(store, monkeypatch):
    """A log whose second append was cut short by a full disk, which has room again now."""
    append(store, [{"n": 1}])
    with monkeypatch.context() as patch:
        real, room = os.write, [3]

        def write(fd, data):
            taken = bytes(data[: room[0]])
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] -= len(taken)
            return real(fd, taken)

        patch.setattr(durable.os, "write", write)
        with pytest.raises(StorageError) as refused:
            append(store, [{"n": 2}])
    full(refused.value, "appending 17 bytes", store.path("commits.log"))
    return store


def test_a_log_with_a_torn_append_keeps_what_it_held(torn):
    torn.close()
    other = PosixStore(torn.root)
    assert load(other) == [{"n": 1}]
    append(other, [{"n": 3}])
    assert load(other) == [{"n": 1}, {"n": 3}]
    other.close()


def test_a_torn_append_never_gets_into_the_middle_of_the_log(torn):
    """Cut off before the next append, or no further append: with a good line behind it, it would be damage."""
    try:
        append(torn, [{"n": 3}])
    except StorageError:
        assert load(torn) == [{"n": 1}]
    else:
        assert load(torn) == [{"n": 1}, {"n": 3}]
