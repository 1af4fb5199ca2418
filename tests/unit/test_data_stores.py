"""Both backends of the durable verbs pass one suite; and what only the object store has to promise."""

from __future__ import annotations

import pytest

from fanfold.data.durable import PosixStore
from fanfold.data.objects import ObjectStore
from fanfold.errors import PlanError, ResumeError, StorageError
from fanfold.testing.stores import MemoryObjects, StoreSuite


class TestPosixStore(StoreSuite):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda: PosixStore(tmp_path / "out")


class TestObjectStore(StoreSuite):
    @pytest.fixture
    def make(self):
        objects = MemoryObjects()
        return lambda: ObjectStore(objects, "bucket/out")


class TestObjectStoreAtTheRoot(StoreSuite):
    @pytest.fixture
    def make(self):
        objects = MemoryObjects()
        return lambda: ObjectStore(objects)


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def objects():
    return MemoryObjects()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_store(objects, clock):
    return lambda: ObjectStore(objects, "out", expires_s=60, clock=clock)


# -- conditional puts -------------------------------------------------------------------------------------


def test_a_store_that_ignores_the_condition_is_refused_before_anything_is_written():
    objects = MemoryObjects(conditional=False)
    with pytest.raises(PlanError) as refused:
        ObjectStore(objects, "out").make_folders(["."])
    assert "no conditional put" in refused.value.found
    assert "If-None-Match" in refused.value.allowed
    assert refused.value.exit_code == 2
    assert objects.held == {}


def test_a_store_without_a_conditional_put_is_refused():
    class Plain(MemoryObjects):
        def put_if_absent(self, name, data):
            raise NotImplementedError

    with pytest.raises(PlanError) as refused:
        ObjectStore(Plain(), "out").make_folders(["."])
    assert "no conditional put" in refused.value.found


# -- a store that does not answer -------------------------------------------------------------------------


VERBS = [
    ("put", lambda store: store.write_temporary("tmp/a", b"x")),
    ("put", lambda store: store.replace("run.json", b"x")),
    ("get", lambda store: store.read("tmp/there")),
    ("list", lambda store: store.list("data")),
    ("delete", lambda store: store.remove("tmp/there")),
    ("put_if_absent", lambda store: store.append("log", b"x")),
    ("put_if_absent", lambda store: store.put_if_absent("tmp/there", "data/part")),
    ("put_if_absent", lambda store: store.claim(".lock")),
]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(("verb", "call"), VERBS)
def test_a_call_without_an_answer_is_tried_again(objects, open_store, verb, call, after):
    store = open_store()
    store.write_temporary("tmp/there", b"there")
    objects.fail(verb, times=2, after=after)
    call(store)


@pytest.mark.parametrize(("verb", "call"), VERBS)
def test_a_store_that_never_answers_is_an_error_that_says_so(objects, open_store, verb, call):
    store = open_store()
    store.write_temporary("tmp/there", b"there")
    objects.fail(verb, times=99)
    with pytest.raises(StorageError) as refused:
        call(store)
    assert refused.value.found.startswith("3 tries failed; the last: TimeoutError")
    assert "run the same command again" in refused.value.do
    assert "out" in refused.value.asked


def test_a_publication_whose_reply_was_lost_is_ours(objects, open_store):
    store = open_store()
    store.write_temporary("tmp/a", b"one")
    objects.fail("put_if_absent", after=True)
    assert store.put_if_absent("tmp/a", "data/part")
    assert store.list("tmp") == []


def test_a_name_that_another_took_while_no_reply_came_is_not_ours(objects, open_store):
    store = open_store()
    store.write_temporary("tmp/a", b"one")
    objects.held["out/data/part"] = b"other"
    objects.fail("put_if_absent")
    assert not store.put_if_absent("tmp/a", "data/part")
    assert store.read("data/part") == b"other"


def test_a_line_whose_reply_was_lost_stands_once(objects, open_store):
    store = open_store()
    objects.fail("put_if_absent", after=True)
    store.append("log", b"one\n")
    store.append("log", b"two\n")
    assert store.read("log") == b"one\ntwo\n"


# -- logs -------------------------------------------------------------------------------------------------


def test_a_second_writer_of_a_log_is_found_at_its_next_line(open_store):
    first, second = open_store(), open_store()
    first.append("log", b"1")
    second.append("log", b"2")
    with pytest.raises(ResumeError) as refused:
        first.append("log", b"3")
    assert "segment 1 of log was written by another run" in refused.value.found
    assert second.read("log") == b"12"


def test_a_log_with_a_missing_segment_is_refused(objects, open_store):
    store = open_store()
    for line in (b"1", b"2", b"3"):
        store.append("log", line)
    del objects.held["out/log/000000001"]
    with pytest.raises(StorageError) as refused:
        open_store().read("log")
    assert "some are missing" in refused.value.found


def test_a_truncation_that_is_cut_short_leaves_a_beginning_of_the_log(objects, open_store):
    store = open_store()
    for line in (b"1", b"2", b"3"):
        store.append("log", line)
    objects.fail("delete", times=3, after=True)
    with pytest.raises(StorageError):
        store.truncate("log", 0)
    assert open_store().read("log") == b"12"


# -- claims -----------------------------------------------------------------------------------------------


def test_a_claim_without_a_heartbeat_expires(open_store, clock):
    open_store().claim(".lock")
    clock.now_s += 59
    with pytest.raises(ResumeError) as refused:
        open_store().claim(".lock")
    assert "60 s if it died" in refused.value.do
    clock.now_s += 2
    open_store().claim(".lock")
    with pytest.raises(ResumeError):
        open_store().claim(".lock")


def test_a_heartbeat_keeps_the_claim(open_store, clock):
    holder = open_store()
    holder.claim(".lock")
    for _ in range(10):
        clock.now_s += 20
        holder.beat()
    with pytest.raises(ResumeError):
        open_store().claim(".lock")


def test_appending_is_a_sign_of_life(open_store, clock):
    holder = open_store()
    holder.claim(".lock")
    for i in range(10):
        clock.now_s += 20
        holder.append("log", b"%d" % i)
    with pytest.raises(ResumeError):
        open_store().claim(".lock")


def test_a_holder_that_slept_too_long_learns_it_before_it_writes(open_store, clock):
    sleeper, other = open_store(), open_store()
    sleeper.claim(".lock")
    sleeper.append("log", b"1")
    clock.now_s += 61
    other.claim(".lock")
    with pytest.raises(ResumeError) as refused:
        sleeper.append("log", b"2")
    assert "no sign of life was given for 61 s" in refused.value.found
    assert other.read("log") == b"1"


def test_a_holder_that_slept_does_not_release_the_claim_of_another(open_store, clock):
    sleeper, other = open_store(), open_store()
    sleeper.claim(".lock")
    clock.now_s += 61
    other.claim(".lock")
    sleeper.close()
    with pytest.raises(ResumeError):
        open_store().claim(".lock")


def test_beating_often_costs_no_calls(objects, open_store, clock):
    holder = open_store()
    holder.claim(".lock")
    before = len(objects.calls)
    for _ in range(100):
        clock.now_s += 0.1
        holder.beat()
    assert len(objects.calls) == before


def test_a_damaged_stamp_is_taken_for_a_dead_holder(objects, open_store):
    open_store().claim(".lock")
    (name,) = [name for name in objects.held if "/.lock/" in name]
    objects.held[name] = b"\0\0"
    open_store().claim(".lock")
