"""Power loss at every moment of a job: from every state that the disk may be left in, the same command finishes.

`fanfold.testing.crash` records what a small job does to the disk and makes up every legal state (what "every"
leaves out stands in the docstring of `crash_states`). Each state is looked at as it is, then recovered.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest

from fanfold.data import journal
from fanfold.data.durable import PosixStore
from fanfold.engine import inline
from fanfold.errors import ResumeError
from fanfold.job import fingerprint as job_fingerprint
from fanfold.job import prepare
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.report import timeline
from fanfold.testing.crash import (
    BLOCKS,
    FlushedFile,
    FlushedFolder,
    MadeFolder,
    Moved,
    Named,
    Record,
    RemovedFolder,
    Unnamed,
    Wrote,
    crash_states,
    recording,
)
from fanfold.testing.fakes import FakeTask

pytestmark = pytest.mark.faults

POISON = "poison"
TEXTS = [f"{i} " + "word " * (i * i % 4) for i in range(14)]
TEXTS[8] = POISON
NAMES = ["out", "out.parquet", "out.jsonl"]


@contextmanager
def small_and_quick():
    """Three windows of five rows, two parts; and nothing is measured that a recovery does not depend on."""
    with pytest.MonkeyPatch.context() as patch:
        real, machine = job_run._numerics, job_run.discover()
        patch.setattr(
            job_run,
            "_numerics",
            lambda task, kind: replace(real(task, kind), window_rows=5, batch_tokens=32, windows_per_part=2),
        )
        patch.setattr(job_run, "discover", lambda: machine)
        patch.setattr(job_run, "held_threads", lambda threads: nullcontext())
        patch.setattr("fanfold.machine.threads.hold_threads", lambda threads: None)
        patch.setattr(job_fingerprint, "_version", functools.cache(job_fingerprint._version))
        patch.setattr(timeline.Timeline, "_measure_memory", lambda self: None)
        patch.setattr(inline, "_POLL_S", 0.0005)
        yield


@dataclass(frozen=True)
class Outcome:
    """What must not depend on any crash."""

    files: dict[str, str]  # every file that stays, the parts and the output with their hash
    quarantine: bytes
    output_sha256: str
    rows: tuple[int, int, int]


class Job:
    """A small job with one bad row; its disk is the folder that crashes."""

    def __init__(self, folder, out_name, *, width=4, source="in.jsonl"):
        self.disk = folder / "disk"
        self.disk.mkdir(parents=True)
        self.out = self.disk / out_name
        self.folder = self.out.with_name(out_name + ".run") if self.out.suffix else self.out
        self.source = folder / source
        data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
        self.source.write_bytes(gzip.compress(data) if source.endswith(".gz") else data)
        self.task = FakeTask(width=width, faults={POISON: "raise"})

    def run(self, *, task=None, **settings):
        """The same command, in a new process as far as the job can tell."""
        prepare._sound.clear()
        request = Request(inputs=(str(self.source),), out=self.out, on="inline", **settings)
        return run_job(task or self.task, request)

    def outcome(self, summary):
        files = {}
        for path in sorted(self.disk.rglob("*")):
            if path.is_file():
                is_result = path == self.out or path.parent.name == "data"
                name = str(path.relative_to(self.disk))
                files[name] = hashlib.sha256(path.read_bytes()).hexdigest() if is_result else ""
        quarantine = self.folder / "quarantine.jsonl"
        return Outcome(
            files=files,
            quarantine=quarantine.read_bytes() if quarantine.exists() else b"",
            output_sha256=summary["output_sha256"],
            rows=(summary["rows_in"], summary["rows_ok"], summary["rows_failed"]),
        )

    def log(self):
        """What a resume will read."""
        return journal.load(PosixStore(self.folder), repair=False)


def check_visible(job, finished, *, log_holds=True):
    """No half state can be seen; what the log says is there. `finished`: the outcomes that may stand complete."""
    results = {sha256 for outcome in finished for sha256 in outcome.files.values() if sha256}
    if (job.folder / "_SUCCESS").exists():
        standing = {
            str(path.relative_to(job.disk)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (job.out, *job.folder.glob("data/*"))
            if path.is_file()
        }
        wanted = [{name: sha256 for name, sha256 in outcome.files.items() if sha256} for outcome in finished]
        if job.out.is_dir():
            assert standing in wanted, "_SUCCESS beside parts that are not the whole output"
        else:  # the parts that the file was made of go at some time
            assert any(whole.items() <= standing.items() for whole in wanted), "_SUCCESS without the output"
        assert json.loads((job.folder / "summary.json").read_bytes())["rows_in"] in {done.rows[0] for done in finished}
    elif job.out.is_file():
        assert hashlib.sha256(job.out.read_bytes()).hexdigest() in results, "half an output file"
    for path in job.folder.glob("pieces/*"):
        with pa.OSFile(str(path)) as file:
            pa.ipc.open_stream(file).read_all()  # raises where it is cut or zero
    if log_holds:
        check_log_holds(job)


def check_log_holds(job):
    """Every line stands for a file that is there, whole."""
    log = job.log()
    assembled = {window for part in log if part["kind"] == "part" for window in range(part["first"], part["last"] + 1)}
    files = [entry for entry in log if entry["kind"] == "file"]
    for entry in log:
        if (entry["kind"] == "lease" and entry["window"] not in assembled) or (entry["kind"] == "part" and not files):
            path = job.folder / entry["name"]
            assert path.exists(), f"{entry['name']} is in the log and not there"
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"], f"{entry['name']} is damaged"


def check_outcome(outcome, expected):
    """The same results, and nothing beside them."""
    assert outcome.rows == expected.rows
    assert outcome.quarantine == expected.quarantine
    assert outcome.output_sha256 == expected.output_sha256
    results = {name: sha256 for name, sha256 in outcome.files.items() if sha256}
    assert results == {name: sha256 for name, sha256 in expected.files.items() if sha256}
    assert not expected.files.keys() - outcome.files.keys(), "a record is missing"
    left = [name.rpartition("/")[2] for name in outcome.files.keys() - expected.files.keys()]
    assert not left, f"left behind: {sorted(left)}"


def check_recovery(job, state, expected, *, finished=None, log_holds=True, **settings):
    """The state is clean as it stands, and the same command ends as if nothing had happened."""
    state.materialise(job.disk)
    try:
        check_visible(job, finished or [expected], log_holds=log_holds)
        done_before = (job.folder / "_SUCCESS").exists() and not settings.get("overwrite")
        rows_logged = sum(entry["rows"] for entry in job.log() if entry["kind"] == "lease") if log_holds else 0
        done = job.run(sync=False, **settings)
        check_outcome(job.outcome(done.summary), expected)
        if log_holds and not done_before:
            assert done.summary["rows_resumed"] == rows_logged, "committed work was done again, or invented"
    except BaseException as error:
        error.add_note(state.why)
        raise


def check_all(job, states, expected, **settings):
    """Every state recovers; the failure lists those that do not."""
    failures, kinds, start_s = [], Counter(), time.monotonic()
    for state in states:
        try:
            check_recovery(job, state, expected, **settings)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            failures.append(f"{state.why}\n      {type(error).__name__}: {line}")
            kinds[f"{type(error).__name__}: {re.sub('[0-9a-f]{8}', '*', line)[:100]}"] += 1
    print(f"{job.out.name}: {len(states)} states in {time.monotonic() - start_s:.1f} s, {len(failures)} failed")
    shown = "\n".join([*(f"{count} x {kind}" for kind, count in kinds.most_common()), *failures[:12]])
    if failures:
        pytest.fail(f"{len(failures)} of {len(states)} states do not recover:\n{shown}", pytrace=False)


@pytest.fixture
def folder():
    """In memory where that is possible: a recovery costs no disk time, and what was flushed is in the record."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fanfold-crash-", dir=shm if shm.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _small_and_quick():
    with small_and_quick():
        yield


def recorded(job, **settings):
    """(what the run did to the disk, how it ended)"""
    with recording(job.disk) as record:
        done = job.run(**settings)
    return record, job.outcome(done.summary)


def test_every_state_of_a_run_recovers(folder):
    job = Job(folder, "out")
    record, expected = recorded(job)
    assert expected.rows == (14, 13, 1)
    assert [name for name, sha256 in expected.files.items() if sha256] == [
        "out/data/part-000000000.parquet",
        "out/data/part-000000001.parquet",
    ]
    assert not [name for name in expected.files if "tmp" in name]
    check_all(job, crash_states(record, recent=2), expected)


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.csv"])
def test_every_state_while_one_file_is_made_recovers(folder, name):
    """The first part of the job is that of a folder; from the last part's line in the log on it is not."""
    job = Job(folder, name)
    record, expected = recorded(job)
    since = max(at for at, step in enumerate(record.steps) if "/pieces/" in getattr(step, "name", ""))
    check_all(job, crash_states(record, recent=2, since=since), expected)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_every_state_of_a_resume_recovers(folder, share):
    """A second crash, while the job goes on after a first one in which nothing was kept that was not flushed."""
    job = Job(folder, "out")
    record, expected = recorded(job)
    moment = int(share * len(record.steps))
    first = next(s for s in crash_states(replace(record, steps=record.steps[:moment]), recent=1, since=moment))
    first.materialise(job.disk)
    again, outcome = recorded(job)
    check_outcome(outcome, expected)
    check_all(job, crash_states(again, recent=1), expected)


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_every_state_of_an_overwrite_recovers(folder, name):
    """Until the new output stands complete, either the old one does or none; then the new one."""
    old = Job(folder / "old", name, width=3)
    old_outcome = old.outcome(old.run().summary)
    job = Job(folder / "new", name)
    job.run(task=replace(job.task, width=3))
    assert job.outcome(job.run(task=replace(job.task, width=3)).summary).files == old_outcome.files
    record, expected = recorded(job, overwrite=True)
    assert expected.output_sha256 != old_outcome.output_sha256
    until = next(at for at, step in enumerate(record.steps) if "/pieces/w-" in getattr(step, "name", ""))
    states = crash_states(replace(record, steps=record.steps[:until]), recent=2 if name == "out" else 1)
    states += crash_states(record, recent=1, since=len(record.steps) - 8)  # in between it is a run like any other
    check_all(job, states, expected, finished=[expected, old_outcome], log_holds=False, overwrite=True)


def test_every_state_of_a_run_over_a_packed_input_recovers(folder):
    """Its rows are unpacked into the run folder, window by window."""
    job = Job(folder, "out", source="in.jsonl.gz")
    record, expected = recorded(job)
    assert any("/spool/" in getattr(step, "name", "") for step in record.steps)
    check_all(job, crash_states(record, recent=1), expected)


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_every_state_while_failed_rows_are_tried_again_recovers(folder, name):
    """Until the new output stands complete, either the old one does or none; then the new one, all rows in it."""
    job = Job(folder, name)
    old = job.outcome(job.run().summary)
    mended = replace(job.task, faults={})
    record, expected = recorded(job, task=mended, retry_failed=True)
    assert (old.rows, expected.rows) == ((14, 13, 1), (14, 14, 0))
    states = crash_states(record, recent=1)
    check_all(job, states, expected, finished=[old, expected], log_holds=False, task=mended, retry_failed=True)


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_every_state_while_appended_rows_are_computed_recovers(folder, name):
    job = Job(folder, name)
    old = job.outcome(job.run().summary)
    with job.source.open("a") as file:
        for text in TEXTS[:7]:
            file.write(json.dumps({"text": "more " + text}) + "\n")
    record, expected = recorded(job, allow_append=True)
    assert expected.rows == (21, 20, 1)
    states = crash_states(record, recent=1)
    check_all(job, states, expected, finished=[old, expected], log_holds=False, allow_append=True)


@pytest.mark.parametrize("share", [0.75, 1.0])
@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_whatever_is_deleted_is_made_again_or_its_loss_is_said_and_nothing_touched(folder, name, share):
    """Each file and each folder of a half done and of a finished run, deleted by somebody."""
    job = Job(folder, name)
    record, expected = recorded(job)
    moment = int(share * len(record.steps))
    state = next(s for s in crash_states(replace(record, steps=record.steps[:moment]), recent=1, since=moment))
    state.materialise(job.disk)
    victims = [path.relative_to(job.disk) for path in job.disk.rglob("*") if path not in (job.folder, job.out)]
    said = set()
    for victim in sorted(victims):
        state.materialise(job.disk)
        path = job.disk / victim
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = contents(job.disk)
        wanted = {name: sha256 for name, sha256 in expected.files.items() if sha256}
        try:
            job.run(sync=False)
        except ResumeError:
            said.add(victim.name)
            wanted = before
        standing = contents(job.disk)
        assert wanted.items() <= standing.items(), f"without {victim} it ends with another output"
        assert wanted is not before or standing == before, f"without {victim} it refuses, and touches the folder"
    assert said == {"run.json", "commits.log"}


def contents(folder):
    """What every file holds, but for those that only say who is at work."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock" and path.suffix != ".tmp"
    }


# -- the model itself ---------------------------------------------------------------------------------


def states_of(steps, tmp_path, **settings):
    with recording(tmp_path) as empty:
        pass
    return crash_states(Record(tmp_path, empty.start, steps), **settings)


def trees(states):
    return {tuple(sorted((name, state.data[number]) for name, number in state.files.items())) for state in states}


def test_a_name_may_be_lost_until_its_folder_is_flushed(tmp_path):
    wrote = [Named("a", 0), Wrote(0, b"x"), FlushedFile(0)]
    assert trees(states_of(wrote, tmp_path)) == {(), (("a", b""),), (("a", b"\0"),), (("a", b"x"),)}
    (only,) = trees(states_of([*wrote, FlushedFolder(".")], tmp_path, since=4))
    assert only == (("a", b"x"),)


def test_unflushed_bytes_are_torn_at_borders_of_blocks_or_zero(tmp_path):
    data = bytes(range(1, 251)) * 20
    found = {dict(tree).get("a") for tree in trees(states_of([Named("a", 0), Wrote(0, data)], tmp_path))}
    assert {len(torn) for torn in found - {None}} == {0, 512, 4096, 4608, 5000}
    assert bytes(5000) in found
    assert data[:4608] + bytes(392) in found


def test_flushed_bytes_of_a_log_are_never_torn(tmp_path):
    steps = [Named("log", 0), Wrote(0, b"one\n"), FlushedFile(0), FlushedFolder("."), Wrote(0, b"one\ntwo\n")]
    found = trees(states_of(steps, tmp_path, since=4))
    assert found == {(("log", b"one\n"),), (("log", b"one\ntwo\n"),), (("log", b"one\n\0\0\0\0"),)}


def test_a_rename_is_there_or_not_and_brings_its_file(tmp_path):
    steps = [Named("t", 0), Wrote(0, b"new"), FlushedFile(0), Moved("t", "f")]
    assert trees(states_of(steps, tmp_path, since=4)) == {(), (("t", b"new"),), (("f", b"new"),)}
    assert trees(states_of([*steps, FlushedFolder(".")], tmp_path, since=5)) == {(("f", b"new"),)}


def test_a_link_may_survive_the_name_it_was_made_from_and_the_other_way_round(tmp_path):
    steps = [MadeFolder("d"), FlushedFolder("."), Named("t", 0), Named("d/f", 0), Unnamed("t"), FlushedFolder("d")]
    found = {tuple(sorted(state.files)) for state in states_of(steps, tmp_path, since=6)}
    assert found == {("d/f",), ("d/f", "t")}


def test_a_removed_folder_takes_all_in_it(tmp_path):
    steps = [MadeFolder("d"), Named("d/f", 0), FlushedFolder("."), RemovedFolder("d"), FlushedFolder(".")]
    (state,) = states_of(steps, tmp_path, since=5)
    assert not state.files
    assert not state.folders


def test_hard_links_come_back_as_hard_links(tmp_path):
    steps = [Named("a", 0), Wrote(0, b"x"), FlushedFile(0), Named("b", 0), FlushedFolder(".")]
    (state,) = states_of(steps, tmp_path, since=5)
    state.materialise(tmp_path / "again")
    assert (tmp_path / "again" / "a").samefile(tmp_path / "again" / "b")


def test_what_others_write_without_the_store_is_recorded_too(tmp_path):
    store = PosixStore(tmp_path / "out")
    with recording(tmp_path) as record:
        store.make_folders(["tmp", "windows"])
        store.path("tmp/a").write_bytes(b"1" * BLOCKS[0])
        store.seal("tmp/a")
        store.path("tmp/a").rename(store.path("windows/a"))
    assert [step for step in record.steps if not isinstance(step, FlushedFolder)] == [
        MadeFolder("out"),
        MadeFolder("out/tmp"),
        MadeFolder("out/windows"),
        Named("out/tmp/a", 0),
        Wrote(0, b"1" * BLOCKS[0]),
        FlushedFile(0),
        Moved("out/tmp/a", "out/windows/a"),
    ]


def test_a_store_that_does_not_flush_promises_nothing(tmp_path):
    store = PosixStore(tmp_path, sync=False)
    with recording(tmp_path) as record:
        store.replace("a", b"x")
    assert not [step for step in record.steps if isinstance(step, FlushedFile | FlushedFolder)]
