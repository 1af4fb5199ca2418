"""The commit protocol, step by step: late twins, alarms, damage after a commit, full and failing disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_crash_states import Job, check_outcome, check_visible, small_and_quick

from fanfold.data import journal
from fanfold.data.durable import PosixStore
from fanfold.engine.engine import Desk
from fanfold.engine.schedule import Compute
from fanfold.errors import DifferenceFound, FanfoldError, RequestError, ResumeError, StorageError
from fanfold.events import Batch
from fanfold.job import assemble as job_assemble
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.job.verify import verify
from fanfold.plan.plan import Unit
from fanfold.testing.fakes import FakeTask

pytestmark = pytest.mark.faults

A, B = Unit(name="a"), Unit(name="b")


@pytest.fixture(autouse=True)
def _small_and_quick():
    with small_and_quick():
        yield


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path, "out")


@pytest.fixture
def expected(tmp_path):
    """The outcome of an undisturbed run."""
    whole = Job(tmp_path / "whole", "out")
    return whole.outcome(whole.run().summary)


class Crash(BaseException):
    """What no code of a job may catch: stands for the death of the process."""


class Listener:
    """A display that counts the rows that this run computes."""

    def __init__(self):
        self.rows = 0
        self.said = []

    def __call__(self, event):
        self.rows += event.rows if isinstance(event, Batch) else 0

    def start(self, rows_done):
        pass

    def say(self, text):
        self.said.append(text)

    def stop(self):
        pass


def run_until_assembly(job, monkeypatch):
    """The process dies when all pieces of a part are committed; their names, sorted."""

    def die(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(job_assemble, "assemble_part", die)
        with pytest.raises(Crash):
            job.run()
    return sorted((job.folder / "pieces").iterdir())


def flip(path, at=None):
    """One bit of the file is the other one; its size and time of change stay."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def go_on(job, expected):
    """The same command ends with the expected outcome; the rows that it computed."""
    listener = Listener()
    done = run_job(job.task, Request(inputs=(str(job.source),), out=job.out, on="inline"), listener)
    check_outcome(job.outcome(done.summary), expected)
    return listener.rows


# -- twins ----------------------------------------------------------------------------------------------


@dataclass
class Twins:
    """Carries a job out on two units. Unit a is taken for dead with each of its first `num_late` leases in hand
    while unit b does them again; a's results come in later, changed by `alter`."""

    num_late: int = 1
    alter: object = None
    wait: int = 1  # how many results of b come in before the late one

    def __call__(self, work, plan, agenda, request):
        late, done = [], 0
        desks = {unit: Desk(unit) for unit in (A, B)}
        while not agenda.done:
            unit = A if self.num_late else B
            assignment = agenda.next_for(unit)
            if assignment is None:
                time.sleep(0.001)
                continue
            result = work.carry_out(assignment, desks[unit])
            if unit is A and isinstance(assignment.instruction, Compute):
                self.num_late -= 1
                agenda.lost(A, assignment, "killed by SIGKILL")
                late.append((A, assignment, self.alter(work, result) if self.alter else result))
                continue
            agenda.finished([(unit, assignment, result)])
            agenda._schedule.validate_state()
            done += isinstance(assignment.instruction, Compute)
            if late and done >= self.wait:
                agenda.finished(late)
                late = []
                agenda._schedule.validate_state()
        if late:
            agenda.finished(late)


def with_twins(job, twins, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(job_run, "_run_engine", twins)
        return job.run()


def check_late_twin(job, expected, monkeypatch, *, wait=1):
    """The second result of the same pieces changes nothing: one line in the log, no row twice, nothing left."""
    done = with_twins(job, Twins(wait=wait), monkeypatch)
    leases = [(line["window"], line["first"]) for line in job.log() if line["kind"] == "lease"]
    assert len(leases) == len(set(leases)), "pieces are in the log twice"
    parts = [line["part"] for line in job.log() if line["kind"] == "part"]
    assert parts == [0, 1]
    check_outcome(job.outcome(done.summary), expected)
    assert done.summary["rows_ok"] == 13


@pytest.mark.parametrize("wait", [1, 2, 99])
def test_a_late_twin_is_ignored(job, expected, monkeypatch, wait):
    """At once, after more of its window is done, and when the whole job is done."""
    check_late_twin(job, expected, monkeypatch, wait=wait)


def other_bytes(work, result):
    """As a model that does not compute the same twice."""
    path = Path(work.folder.place) / result.temporary
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    return replace(result, sha256=hashlib.sha256(data).hexdigest())


def test_a_twin_with_other_bytes_of_the_same_pieces_is_an_alarm(job, monkeypatch):
    with pytest.raises(DifferenceFound) as alarm:
        with_twins(job, Twins(alter=other_bytes), monkeypatch)
    assert alarm.value.exit_code == 5
    committed = next(line for line in job.log() if line["kind"] == "lease")
    assert committed["name"] in str(alarm.value)
    assert committed["sha256"][:8] in str(alarm.value), "both hashes are said"


def test_both_results_are_kept_after_an_alarm(job, monkeypatch):
    with pytest.raises(DifferenceFound):
        with_twins(job, Twins(alter=other_bytes), monkeypatch)
    committed = next(line for line in job.log() if line["kind"] == "lease")
    assert (job.folder / committed["name"]).exists()
    assert list((job.folder / "tmp").iterdir())
    assert not (job.folder / "_SUCCESS").exists()


# -- published, but not logged --------------------------------------------------------------------------


def cut_last_line(job, kind):
    """The last line of the log, which is of this kind, was never written."""
    path = job.folder / journal.NAME
    lines = path.read_bytes().splitlines(keepends=True)
    while journal.decode(lines[-1].rstrip(b"\n"))["kind"] != kind:
        lines.pop()
    line = journal.decode(lines.pop().rstrip(b"\n"))
    path.write_bytes(b"".join(lines))
    return line


@pytest.mark.parametrize("damaged", [False, True])
def test_a_published_piece_without_its_line_is_never_trusted_unseen(job, expected, monkeypatch, damaged):
    """Sound or damaged: the job ends with the right bytes, and without a false alarm."""
    run_until_assembly(job, monkeypatch)
    line = cut_last_line(job, "lease")
    if damaged:
        flip(job.folder / line["name"])
    go_on(job, expected)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_published_part_without_its_line_is_never_trusted_unseen(job, expected, monkeypatch, damaged):
    real = PosixStore.append

    def die_before_a_part_is_logged(store, name, data):
        if b'"kind":"part"' in data:
            raise Crash
        real(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(PosixStore, "append", die_before_a_part_is_logged)
        with pytest.raises(Crash):
            job.run()
    (part,) = (job.folder / "data").iterdir()
    if damaged:
        flip(part)
    go_on(job, expected)


# -- damage after a commit ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_or_deleted_piece_is_computed_again_and_only_it(job, expected, monkeypatch, which, damage):
    """Found when the part is assembled; the same command, once, redoes just that piece."""
    pieces = run_until_assembly(job, monkeypatch)
    lines = {line["name"]: line for line in job.log() if line["kind"] == "lease"}
    rows_left = 14 - 1 - sum(line["rows"] - len(line["failed"]) for line in lines.values())
    damaged = lines[f"pieces/{pieces[which].name}"]
    damage(pieces[which])
    rows = go_on(job, expected)
    assert damaged["rows"] + rows_left <= rows <= damaged["rows"] + rows_left + 2  # the bad row, if it is in them


def test_a_piece_that_is_damaged_again_and_again_is_laid_to_the_disk(job, monkeypatch):
    def damaging(work, opened, part, windows, store):
        for path in (job.folder / "pieces").iterdir():
            flip(path)
        job_assemble.is_sound.__globals__["_sound"].clear()
        return real(work, opened, part, windows, store)

    real = job_assemble.assemble_part
    monkeypatch.setattr(job_assemble, "assemble_part", damaging)
    with pytest.raises(StorageError) as broken:
        job.run()
    assert "damaged" in broken.value.found
    assert not (job.folder / "_SUCCESS").exists()


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.jsonl"])
def test_a_flipped_bit_in_the_output_is_found_by_verify(tmp_path, name):
    job = Job(tmp_path, name)
    job.run()
    verified = job.out if job.out.suffix else job.out / "data" / "part-000000001.parquet"
    flip(verified)
    with pytest.raises(DifferenceFound) as found:
        verify(job.out, sample=0)
    assert str(verified) in found.value.asked
    assert found.value.found == "its bytes are not those that were committed"
    assert found.value.exit_code == 5


def test_a_part_deleted_before_the_end_is_made_again(job, expected, monkeypatch):
    real = PosixStore.replace

    def die_at_the_summary(store, name, data):
        if name == "summary.json":
            raise Crash
        real(store, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(PosixStore, "replace", die_at_the_summary)
        with pytest.raises(Crash):
            job.run()
    (job.folder / "data" / "part-000000000.parquet").unlink()
    go_on(job, expected)


# -- the log and run.json -------------------------------------------------------------------------------


def tampered(data, line, old, new):
    """The log with one number changed so that the line is JSON as before."""
    lines = data.splitlines(keepends=True)
    assert old in lines[line]
    lines[line] = lines[line].replace(old, new, 1)
    return b"".join(lines)


def check_tampered_line_is_refused(job, monkeypatch):
    """A line in the middle whose checksum does not hold: exit 2, and nothing is touched."""
    run_until_assembly(job, monkeypatch)
    log = job.folder / journal.NAME
    log.write_bytes(tampered(log.read_bytes(), 1, b'"window":', b'"window":1'))
    before = {path: path.read_bytes() for path in job.folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ResumeError) as refused:
        job.run()
    assert "damaged line at byte" in refused.value.found
    assert before == {path: path.read_bytes() for path in before}


def test_a_tampered_line_in_the_middle_of_the_log_is_refused(job, monkeypatch):
    check_tampered_line_is_refused(job, monkeypatch)


def test_a_tampered_last_line_of_the_log_is_done_again(job, expected, monkeypatch):
    run_until_assembly(job, monkeypatch)
    log = job.folder / journal.NAME
    log.write_bytes(tampered(log.read_bytes(), -1, b'"rows":', b'"rows":9'))
    assert go_on(job, expected) > 0


def test_a_run_of_another_version_is_refused_with_the_key(job, monkeypatch):
    run_until_assembly(job, monkeypatch)
    path = job.folder / "run.json"
    run = json.loads(path.read_bytes())
    run["fingerprint"]["numerics"]["version"] += 1
    path.write_text(json.dumps(run))
    with pytest.raises(ResumeError) as refused:
        job.run()
    assert "numerics.version" in refused.value.found
    assert refused.value.exit_code == 2


def test_a_run_json_of_an_unknown_form_is_refused_and_kept(job, monkeypatch):
    run_until_assembly(job, monkeypatch)
    path = job.folder / "run.json"
    path.write_text('{"format": 9}')
    with pytest.raises(ResumeError):
        job.run()
    assert path.read_text() == '{"format": 9}'


def test_a_second_run_in_the_same_folder_is_refused_with_the_holders_pid(job, expected, monkeypatch):
    run_until_assembly(job, monkeypatch)
    holder = PosixStore(job.folder)
    holder.claim(".lock")
    with pytest.raises(ResumeError) as refused:
        job.run()
    assert f'"pid": {os.getpid()}' in refused.value.found
    assert refused.value.exit_code == 2
    holder.close()
    go_on(job, expected)


# -- disks that are full or fail ------------------------------------------------------------------------


class FailsOnce:
    """The call number `at` of a primitive fails; a write leaves half of its bytes behind."""

    def __init__(self, patch, name, code, at):
        self.calls, self.failed = 0, False
        self.code, self.at = code, at
        real = getattr(PosixStore, name)

        def primitive(store, *arguments):
            self.calls += 1
            if self.calls == self.at:
                self.failed = True
                if name in ("_create", "_append"):
                    *where, data = arguments
                    real(store, *where, data[: len(data) // 2])
                raise OSError(code, os.strerror(code))
            return real(store, *arguments)

        patch.setattr(PosixStore, name, primitive)


def check_every_failure(job, expected, monkeypatch, name, code):
    """Each call of the primitive fails once, in a run of its own: a clear message, nothing half, then the end."""
    at = 0
    while True:
        at += 1
        if job.folder.exists():
            shutil.rmtree(job.disk)
            job.disk.mkdir()
        said = None
        with monkeypatch.context() as patch:
            fault = FailsOnce(patch, name, code, at)
            try:
                job.run(sync=True)
            except FanfoldError as error:
                said = error
        if not fault.failed:
            assert said is None
            return at - 1
        begun = (job.folder / "run.json").exists()
        assert isinstance(said, StorageError if begun else (StorageError, RequestError)), f"call {at}: {said}"
        assert said.exit_code == (1 if isinstance(said, StorageError) else 2)
        assert ("disk full" if code == errno.ENOSPC else os.strerror(code)) in said.found, f"call {at}: {said}"
        assert str(job.disk) in said.asked
        try:
            check_visible(job, [expected], log_holds=begun)
            check_outcome(job.outcome(job.run(sync=False).summary), expected)
        except BaseException as error:
            error.add_note(f"after call {at} of {name} had failed")
            raise


@pytest.mark.parametrize("name", ["_create", "_append", "_link", "_rename", "_make_folder"])
def test_a_full_disk_at_any_moment_is_said_and_survived(job, expected, monkeypatch, name):
    num_calls = check_every_failure(job, expected, monkeypatch, name, errno.ENOSPC)
    assert num_calls >= 5


def test_a_flush_that_fails_at_any_moment_is_said_and_survived(job, expected, monkeypatch):
    """What a failed flush has left is never trusted: the file is written anew (a second flush may lie)."""
    assert check_every_failure(job, expected, monkeypatch, "_flush_fd", errno.EIO) > 20


FULL_DISK = """
import json, subprocess, sys
from pathlib import Path
from test_commit_protocol import fill

disk, source, width = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], check=True)
first = fill(disk / "out", source, width)
subprocess.run(["mount", "-o", "remount,size=256m", disk], check=True)
print(json.dumps([first, fill(disk / "out", source, width), fill(source.parent / "out", source, width)]))
"""


def fill(out, source, width):
    """Runs a job; what it said in the end, the pieces or parts that cannot be read, the hashes of the parts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said, half, whole = None, [], {}
    try:
        run_job(FakeTask(width=width), Request(inputs=(str(source),), out=out, on="inline"))
    except FanfoldError as error:
        said = [type(error).__name__, error.exit_code, str(error)]
    for path in [*(out / "pieces").glob("*"), *(out / "data").glob("*")]:
        try:
            if path.parent.name == "data":
                pq.read_table(path)
                whole[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                with pa.OSFile(str(path)) as file:
                    pa.ipc.open_stream(file).read_all()
        except (pa.ArrowException, OSError):
            half.append(path.name)
    return said, half, whole


@pytest.mark.parametrize(
    ("full_at", "num_rows", "width", "pad"),
    [("prepare", 2500, 8, 4000), ("a piece", 3000, 1024, 10), ("a part", 2000, 640, 1000)],
)
def test_a_full_disk_of_8_mb_is_said_and_the_job_goes_on_when_there_is_room(tmp_path, full_at, num_rows, width, pad):
    """A real file system that is really full, in a mount namespace of its own."""
    probe = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"no tmpfs may be mounted here, so no disk can be filled: {probe.stderr.decode().strip()}")
    source = tmp_path / "in.jsonl"
    draw = random.Random(0)  # what can be compressed fills no disk
    rows = ({"text": f"{i}", "pad": draw.randbytes(pad // 2).hex()} for i in range(num_rows))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", FULL_DISK, str(tmp_path / "disk"), str(source), str(width)],
        capture_output=True,
        cwd=Path(__file__).parent,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    first, again, undisturbed = json.loads(done.stdout.splitlines()[-1])
    said, half, _ = first
    assert said is not None, f"8 MB were enough, {full_at} was not reached"
    name, code, text = said
    assert (name, code) == ("StorageError", 1), text
    assert "disk full" in text
    assert "make room, then run the same command again" in text
    assert half == []
    assert undisturbed[0] is None
    assert again == undisturbed
