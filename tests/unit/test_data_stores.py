"""Both backends of the durable verbs pass one suite; and what only the object store has to promise."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import uuid

import pytest

from fanfold.data import staged
from fanfold.data.durable import PosixStore
from fanfold.data.objects import ObjectStore
from fanfold.data.remote import FsspecObjects
from fanfold.data.s3 import S3Objects
from fanfold.data.staged import StagedStore
from fanfold.errors import MissingExtra, PlanError, ResumeError, StorageError
from fanfold.testing.stores import LocalFilesSuite, MemoryObjects, StoreSuite


class TestPosixStore(LocalFilesSuite):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda: PosixStore(tmp_path / "out")


class TestStagedStore(LocalFilesSuite):
    @pytest.fixture
    def make(self, tmp_path):
        objects, numbers = MemoryObjects(), itertools.count()

        def make():
            scratch = tmp_path / str(next(numbers))  # as on another machine
            scratch.mkdir()
            return StagedStore(objects, "bucket/out", scratch=scratch)

        return make


class TestMemoryOfFsspec(LocalFilesSuite):
    @pytest.fixture
    def make(self):
        top = f"bucket-{uuid.uuid4().hex}"
        return lambda: StagedStore(FsspecObjects("memory", top), "out")


class TestS3(LocalFilesSuite):
    @pytest.fixture
    def make(self, s3, s3_bucket):
        return lambda: StagedStore(S3Objects(s3_bucket.name), "some/out", pause_s=0.01)


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


def test_a_log_whose_removal_is_cut_short_is_a_beginning_of_it(objects, open_store):
    store = open_store()
    for line in (b"1", b"2", b"3"):
        store.append("log", line)
    objects.fail("delete", times=3, after=True)
    with pytest.raises(StorageError):
        store.remove_folder("log")
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


@pytest.mark.parametrize(
    "write", [lambda store: store.replace("_SUCCESS", b""), lambda store: store.remove_folder("pieces")]
)
def test_a_holder_that_slept_too_long_neither_replaces_nor_clears_away(objects, open_store, clock, write):
    sleeper, other = open_store(), open_store()
    sleeper.claim(".lock")
    clock.now_s += 61
    other.claim(".lock")
    other.replace("pieces/a", b"x")
    before = dict(objects.held)
    with pytest.raises(ResumeError) as refused:
        write(sleeper)
    assert "no sign of life was given for 61 s" in refused.value.found
    assert objects.held == before


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


def test_a_holder_whose_process_this_machine_knows_to_be_dead_is_not_waited_for(objects, open_store):
    code = "import json; from fanfold.data.holder import *; print(json.dumps({**holder_stamp(), **life_stamp()}))"
    stamp = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    open_store().claim(".lock")
    (name,) = [name for name in objects.held if "/.lock/" in name]
    held = json.loads(objects.held[name])
    assert stamp.keys() < held.keys()
    elsewhere = [{"host": "another"}, {"boot_id": "another"}, {"pids": "pid:[1]"}]  # machine, start, container
    for other in [*elsewhere, {"begun": None}]:
        objects.held[name] = json.dumps({**held, **stamp, **other}).encode()
        with pytest.raises(ResumeError):
            open_store().claim(".lock")
    objects.held[name] = json.dumps({**held, **stamp}).encode()
    open_store().claim(".lock")


def test_a_process_that_has_taken_the_number_of_a_dead_holder_is_not_taken_for_it(objects, open_store):
    open_store().claim(".lock")
    (name,) = [name for name in objects.held if "/.lock/" in name]
    held = json.loads(objects.held[name])
    assert held["pid"] == os.getpid()
    objects.held[name] = json.dumps({**held, "begun": "1"}).encode()
    open_store().claim(".lock")


# -- heartbeat --------------------------------------------------------------------------------------------


def test_a_claim_lives_on_while_nothing_is_written(objects, tmp_path):
    class Fast(Clock):
        now_s = 0.0

        def __call__(self):
            self.now_s += 100.0  # every look at the clock is far later than the one before
            return self.now_s

    holder = StagedStore(objects, "out", scratch=tmp_path, expires_s=0.08, clock=Fast())
    holder.claim(".lock")
    (name,) = [name for name in objects.held if "/.lock/" in name]
    first, beats = objects.held[name], threading.Event()
    real = objects.put

    def put(key, data):
        real(key, data)
        if key == name and data != first:
            beats.set()

    objects.put = put
    assert beats.wait(10)
    holder.close()
    assert json.loads(objects.held[name])["released"]
    assert not [thread for thread in threading.enumerate() if thread.name == "fanfold-heartbeat"]


def test_a_heartbeat_that_finds_the_claim_taken_stops_the_next_write(objects, clock, tmp_path):
    sleeper = StagedStore(objects, "out", scratch=tmp_path, expires_s=60, clock=clock)
    sleeper.claim(".lock")
    clock.now_s += 61
    ObjectStore(objects, "out", expires_s=60, clock=clock).claim(".lock")
    with pytest.raises(ResumeError):
        sleeper.beat()  # as the thread does, which can tell nobody
    with pytest.raises(ResumeError) as refused:
        sleeper.append("log", b"1")
    assert "no sign of life was given for 61 s" in refused.value.found
    sleeper.close()


# -- copies -----------------------------------------------------------------------------------------------


def test_the_oldest_copies_are_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setattr(staged, "KEEP_BYTES", 25)
    objects = MemoryObjects()
    store = StagedStore(objects, "out", scratch=tmp_path)
    for name in "abc":
        store.replace(name, name.encode() * 10)
    for name in "abacb":  # b goes for c, then a for b
        assert store.file(name).read_bytes() == name.encode() * 10
    assert sorted(path.name for path in store.files.iterdir()) == ["b", "c"]
    gets = [name for verb, name in objects.calls if verb == "get"]
    assert gets == ["out/a", "out/b", "out/c", "out/b"]


def test_a_store_without_a_folder_for_its_files_takes_one_away_again():
    store = StagedStore(MemoryObjects(), "out")
    store.new_file("tmp/a").write_bytes(b"x")
    folder = store.files
    assert folder.is_dir()
    store.close()
    assert not folder.exists()


# -- S3 ---------------------------------------------------------------------------------------------------


@pytest.fixture
def s3_store(s3, s3_bucket):
    return StagedStore(S3Objects(s3_bucket.name), "out", pause_s=0.01)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Slow Down", "409 Conflict"])
def test_a_conditional_put_that_s3_did_not_answer_well_is_tried_again(s3, s3_store, status, after):
    s3.fail("PUT", status, after=after)
    s3_store.append("log", b"one")
    s3_store.append("log", b"two")
    assert s3_store.read("log") == b"onetwo"


def test_a_name_that_another_took_meanwhile_in_s3_is_not_ours(s3, s3_bucket, s3_store):
    s3_store.write_temporary("tmp/a", b"one")
    s3_bucket.client.put_object(Bucket=s3_bucket.name, Key="out/data/part", Body=b"other")
    s3.fail("PUT", after=False)
    assert not s3_store.put_if_absent("tmp/a", "data/part")
    assert s3_store.read("data/part") == b"other"


def test_more_names_than_one_request_takes_are_removed(s3_bucket, s3_store, monkeypatch):
    monkeypatch.setattr("fanfold.data.s3._MANY", 3)
    names = [f"data/{i}" for i in range(8)]
    for name in names:
        s3_store.replace(name, b"x")
    s3_store.remove(*names[:7])
    assert s3_store.list("data") == ["7"]


def test_a_bucket_that_is_not_there_is_refused_at_once(s3, s3_bucket):
    store = ObjectStore(S3Objects("no-such-bucket"), "out", shown="s3://no-such-bucket/out")
    before = s3.requests.total()
    with pytest.raises(StorageError) as refused:
        store.claim(".lock")
    assert s3.requests.total() == before + 1
    assert refused.value.found == "NoSuchBucket (404)"
    assert "AWS_ENDPOINT_URL" in refused.value.do


def test_missing_credentials_are_refused(s3, s3_bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError) as refused:
        ObjectStore(S3Objects(s3_bucket.name), "out").claim(".lock")
    assert refused.value.found == "NoCredentialsError"
    assert "AWS_PROFILE" in refused.value.do


@pytest.mark.slow
def test_a_server_that_is_not_there_is_an_error_without_its_address(s3, s3_bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1/hidden")
    with pytest.raises(StorageError) as refused:
        ObjectStore(S3Objects(s3_bucket.name), "out").append("log", b"x")
    assert "EndpointConnectionError" in refused.value.found
    assert "hidden" not in str(refused.value)


def test_without_botocore_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fanfold.extras.has", lambda module: not module.startswith("botocore"))
    with pytest.raises(MissingExtra) as refused:
        S3Objects("bucket")
    assert "pip install 'fanfold[s3]'" in refused.value.do


@pytest.mark.parametrize("scheme", ["http", "ftp", "abfs", "hf", "sftp"])
def test_a_store_that_cannot_keep_two_writers_apart_is_refused(scheme):
    with pytest.raises(PlanError) as refused:
        FsspecObjects(scheme, "host")
    assert "cannot keep two writers apart" in refused.value.found
