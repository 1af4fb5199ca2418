"""Random faults against real processes, for FANFOLD_CHAOS_S seconds (600): jobs end with the bytes they must have.

`--seed N` gives the same faults in the same order; when each of them hits is the machine's affair.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

CHAOS_S = float(os.environ.get("FANFOLD_CHAOS_S", "600"))
pytestmark = [pytest.mark.nightly, pytest.mark.faults, pytest.mark.timeout(CHAOS_S + 300)]

JOB = """
import json, sys
from dataclasses import replace
from pathlib import Path
from fanfold.errors import Stopped, UnitLost
from fanfold.events import Batch, ProcessStarted, UnitReady
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.testing.fakes import FakeTask

class Show:
    def __call__(self, event):
        if isinstance(event, UnitReady):
            print("unit", event.unit, event.pid, flush=True)
        if isinstance(event, ProcessStarted):
            print(event.name, event.pid, flush=True)
        if isinstance(event, Batch):
            print("batch", flush=True)
    def start(self, rows_done): pass
    def say(self, text): pass
    def stop(self): pass

asked = json.loads(sys.argv[1])
real = job_run._numerics
job_run._numerics = lambda task, kind: replace(real(task, kind), window_rows=512, windows_per_part=2)
task = FakeTask(token_s=asked["token_s"], faults=asked["faults"])
request = Request(
    inputs=(asked["docs"],), out=Path(asked["out"]), on=asked["on"], timeout_batch=asked.get("timeout_batch")
)
try:
    job_run.run_job(task, request, Show(), signals=True)
except Stopped:
    sys.exit(75)
except UnitLost as error:
    print(error, file=sys.stderr)
    sys.exit(76)
"""
STOPPED, UNIT_LOST = 75, 76

NUM_ROWS = 3_000  # six windows of 512 rows, three parts
SLOW = 0.000_02  # seconds a token takes: a job of about 3 s on one unit
BAD_ROWS = (1_234, 2_345)
RUN_WITHIN_S = 90.0  # a run, whatever happens to it
GONE_WITHIN_S = 5.0
KILLS_APART_S = 1.5  # two deaths in one batch are laid to its rows: innocent ones must not be hit again and again

ON_UNITS = ("kill a worker", "kill all workers", "kill the zygote", "freeze a worker")
ON_PARENT = ("kill the parent", "SIGINT", "SIGTERM", "SIGHUP")
BETWEEN = ("flip a byte in a lease", "delete a lease", "tear the log", "touch the input", "delete a part")
SIGNALS = {"kill the parent": "SIGKILL", "SIGINT": "SIGINT", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    lines = [json.dumps({"id": i, "text": f"{i} " + "word " * (4 + i * i % 9)}) for i in range(NUM_ROWS)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def long_enough():
    """The runner's own alarm for a test that stands still is for shorter ones; each run here has its deadline."""
    faulthandler.cancel_dump_traceback_later()


def text_of(docs, row):
    return json.loads(docs.read_text().splitlines()[row])["text"]


def bytes_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}


def failed_rows(out):
    path = out / "quarantine.jsonl"
    return {json.loads(line)["row"] for line in path.read_text().splitlines()} if path.exists() else set()


# -- processes ----------------------------------------------------------------------------------------


def stat_of(pid):
    """State, parent and session of the process; None where there is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return words[0], int(words[1]), int(words[3])


def in_session(session):
    """The processes of the session that still run. One that is only not yet waited for does not."""
    found = set()
    for entry in Path("/proc").iterdir():
        stat = stat_of(entry.name) if entry.name.isdigit() else None
        if stat is not None and stat[2] == session and stat[0] not in "ZX":
            found.add(int(entry.name))
    return found


def strike(session, pid, number):
    """Send the signal, if the process still is one of the session; whether it was sent."""
    try:
        fd = os.pidfd_open(pid)  # from here on the number cannot come to mean another process
    except ProcessLookupError:
        return False
    try:
        stat = stat_of(pid)
        if stat is None or stat[2] != session:
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


class Running:
    """A job in a process and a session of its own; what it prints is read by a thread."""

    def __init__(self, asked, errors):
        self.errors = errors
        self.units = {}
        self.zygote = None
        self.batches = 0
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", JOB, json.dumps(asked)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            match line.split():
                case ["unit", name, pid]:
                    self.units = {**self.units, name: int(pid)}
                case ["zygote", pid]:
                    self.zygote = int(pid)
                case ["batch"]:
                    self.batches += 1

    @property
    def over(self):
        return self.process.poll() is not None

    def end(self):
        """Its exit status; nobody is left a moment later."""
        try:
            code = self.process.wait(RUN_WITHIN_S)
            deadline_s = time.monotonic() + GONE_WITHIN_S
            while left := in_session(self.pid):
                assert time.monotonic() < deadline_s, f"still there {GONE_WITHIN_S} s after the parent: {left}"
                time.sleep(0.02)
        finally:
            self.close()
        return code

    def close(self):
        """Nothing of it is left, whatever the test came to."""
        for pid in in_session(self.pid):
            strike(self.pid, pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()


# -- jobs under random faults -------------------------------------------------------------------------


class Chaos:
    """Job after job, run after run; `counts` says what was done to them."""

    def __init__(self, docs, folder, seed):
        self.docs = docs
        self.folder = folder
        self.random = random.Random(seed)
        self.counts = Counter()
        self.wholes = {}
        self.story = []

    def note(self, text):
        self.story.append(text)

    def asked(self, out, *, on="inline", token_s=0.0, rows=(), fault="raise"):
        faults = {text_of(self.docs, row): fault for row in rows}
        limit = {"timeout_batch": "3s"} if fault == "hang" else {}
        return {"docs": str(self.docs), "out": str(out), "on": on, "token_s": token_s, "faults": faults, **limit}

    def whole(self, rows):
        """Bytes of the undisturbed run on one unit where these rows fail."""
        if rows not in self.wholes:
            out = self.folder / f"whole-{len(self.wholes)}"
            running = Running(self.asked(out, rows=rows), self.folder / "errors")
            assert running.end() == 0, running.errors.read_text()
            assert failed_rows(out) == set(rows)
            self.wholes[rows] = bytes_of(out)
        return self.wholes[rows]

    def job(self, number, until_s):
        """One job until it has ended; its bytes are those of the undisturbed one."""
        out = self.folder / f"job-{number}"
        self.story = []
        left_s = until_s - time.monotonic()
        choices = ["none"] * 4 + ["raise"] * 3 + (["exit"] if left_s > 30 else []) + (["hang"] if left_s > 120 else [])
        fault = self.random.choice(choices)
        rows = () if fault == "none" else tuple(sorted(self.random.sample(BAD_ROWS, 1 if fault == "hang" else 2)))
        self.counts[f"jobs with rows that {fault}" if rows else "jobs without bad rows"] += 1
        whole = self.whole(rows)
        disturbed = self.random.randint(1, 4)
        for turn in range(disturbed + 1):
            last = turn == disturbed or time.monotonic() > until_s
            fatal = fault in ("exit", "hang")
            on = self.random.choice(["cpu:1", "cpu:2", "cpu:2"] + ([] if fatal else ["inline"]))
            if self.run(out, on, rows, fault, disturb=not last):
                break
            assert not last
            self.between(out)
        if self.random.random() < 0.3:
            self.between(out)
            assert self.run(out, "cpu:2", rows, fault, disturb=False)
        assert bytes_of(out) == whole, "other bytes than the undisturbed run"
        assert failed_rows(out) == set(rows)
        assert [folder for folder in ("tmp", "pieces", "windows", "spool") if list((out / folder).glob("*"))] == []
        shutil.rmtree(out)

    def run(self, out, on, rows, fault, *, disturb):
        """One run, with faults if `disturb`; whether the job has ended."""
        self.counts["runs"] += 1
        self.note(f"run on {on}, {fault} {rows}")
        running = Running(self.asked(out, on=on, token_s=SLOW, rows=rows, fault=fault), self.folder / "errors")
        try:
            may_lose_units = fault in ("exit", "hang")
            parent_told = False
            if disturb:
                # A row is found by what units die of: where rows kill, nothing else may, or it is taken for one.
                able = [*ON_PARENT, *(ON_UNITS if on != "inline" and not may_lose_units else ())]
                for what in self.random.choices(able, k=self.random.randint(1, 4)):
                    if not self.wait(running):
                        break
                    if what in ON_UNITS:
                        may_lose_units |= what != "freeze a worker"
                        self.hit_units(running, what)
                        self.sleep(running, KILLS_APART_S)
                    else:
                        self.hit(what, strike(running.pid, running.pid, getattr(signal, SIGNALS[what])))
                        parent_told = True
                        break
            code = running.end()
        except BaseException:
            running.close()
            raise
        self.note(f"it ended with {code} after {running.batches} batches")
        self.counts[f"runs that ended with {code}"] += 1
        allowed = {0, *((UNIT_LOST,) if may_lose_units else ())}
        if parent_told:  # before it listens to signals, it dies of them as any process does
            allowed |= {STOPPED, 130, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}
            early = code == 1 and "KeyboardInterrupt" in running.errors.read_text(errors="replace")
            allowed |= {1} if early else set()
        assert code in allowed, f"exit status {code}:\n{running.errors.read_text(errors='replace')[-3000:]}"
        return code == 0

    def hit(self, what, landed):
        self.counts[what] += landed
        self.note(f"{what}{'' if landed else ' (too late)'}")

    def wait(self, running):
        """Until a random moment of the run: of its start, or of its work. False where it ended before."""
        start_s = time.monotonic()
        if self.random.random() < 0.75:
            until = self.random.randint(1, 50)
            while running.batches < until and not running.over and time.monotonic() < start_s + 10:
                time.sleep(0.005)
        else:
            self.sleep(running, self.random.uniform(0.0, 2.0))
        return not running.over

    def sleep(self, running, seconds):
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not running.over:
            time.sleep(0.01)

    def hit_units(self, running, what):
        pids = sorted(running.units.values())
        chosen = self.random.random()
        frozen_s = self.random.uniform(0.1, 2.0)
        if not pids or (what == "kill the zygote" and running.zygote is None):
            self.hit(what, False)
        elif what == "kill all workers":
            self.hit(what, sum([strike(running.pid, pid, signal.SIGKILL) for pid in pids]) > 0)
        elif what == "kill the zygote":
            self.hit(what, strike(running.pid, running.zygote, signal.SIGKILL))
        else:
            pid = pids[int(chosen * len(pids))]
            if what == "kill a worker":
                self.hit(what, strike(running.pid, pid, signal.SIGKILL))
            else:
                self.hit(what, strike(running.pid, pid, signal.SIGSTOP))
                self.sleep(running, frozen_s)
                strike(running.pid, pid, signal.SIGCONT)

    def between(self, out):
        """Perhaps the folder or the input is touched while nobody runs."""
        for what in self.random.sample(BETWEEN, k=self.random.choice([0, 0, 1, 1, 2])):
            chosen, remove = self.random.random(), what.startswith("delete")
            landed = True
            if what == "touch the input":
                os.utime(self.docs)
            elif what == "tear the log":
                landed = self.tear(out / "commits.log", chosen)
            else:
                names = sorted((out / ("data" if "part" in what else "pieces")).glob("*"))
                if landed := bool(names):
                    path = names[int(chosen * len(names))]
                    if remove:
                        path.unlink()
                    else:
                        data = bytearray(path.read_bytes())
                        data[int(self.random.random() * len(data))] ^= 1 << self.random.randrange(8)
                        path.write_bytes(data)
            if landed:
                self.hit(what, True)

    @staticmethod
    def tear(log, chosen):
        """The last line, if the log has two, is torn somewhere."""
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        if len(lines) < 2:
            return False
        kept = int(chosen * len(lines[-1]))
        log.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
        return True


def test_jobs_under_random_faults_end_with_the_right_bytes(docs, tmp_path, seed, long_enough):
    chaos = Chaos(docs, tmp_path, seed)
    start_s = time.monotonic()
    until_s = start_s + CHAOS_S * 0.75
    finished = 0
    print(f"\nseed {seed}, {CHAOS_S * 0.75:.0f} s")
    try:
        while time.monotonic() < until_s or finished == 0:
            chaos.job(finished, until_s)
            finished += 1
    except BaseException:
        print(f"job {finished}:", *chaos.story, sep="\n  ")
        raise
    finally:
        print(f"{finished} jobs finished in {time.monotonic() - start_s:.0f} s")
        for what, count in sorted(chaos.counts.items()):
            print(f"  {count:5d} {what}")


# -- one process, many jobs ---------------------------------------------------------------------------

MANY = """
import hashlib, json, os, random, shutil, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
from fanfold.errors import UnitLost
from fanfold.events import Batch, ProcessStarted, UnitReady
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.testing.fakes import FakeTask

docs, folder, seed, for_s = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
real = job_run._numerics
job_run._numerics = lambda task, kind: replace(real(task, kind), window_rows=512, windows_per_part=2)
chance = random.Random(seed)

class Killer:
    def __init__(self, what, at_batch):
        self.what, self.left = what, at_batch
        self.pids, self.zygote = {}, None
        self.killed = 0
    def __call__(self, event):
        if isinstance(event, UnitReady):
            self.pids[event.unit] = event.pid
        if isinstance(event, ProcessStarted) and event.name == "zygote":
            self.zygote = event.pid
        if isinstance(event, Batch):
            self.left -= 1
            if self.left == 0:
                self.kill(event.unit)
    def kill(self, unit):
        pids = {"worker": [self.pids[unit]], "all": list(self.pids.values()), "zygote": [self.zygote]}
        for pid in pids.get(self.what, []):
            if pid in (None, os.getpid()):
                continue
            try:
                os.kill(pid, signal.SIGKILL)
                self.killed += 1
            except ProcessLookupError:
                pass
    def start(self, rows_done): pass
    def say(self, text): pass
    def stop(self): pass

def processes():
    found = 0
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "stat").read_text().rsplit(")", 1)[1].split() if entry.name.isdigit() else None
        except OSError:
            continue
        found += words is not None and int(words[3]) == os.getpid() and words[0] not in "ZX"
    return found

def settled():
    # once those that were told to end have
    end_s = time.monotonic() + 3
    while processes() > 4 and time.monotonic() < end_s:
        time.sleep(0.05)
    return processes()

def data_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}

whole = None
start_s = time.monotonic()
number = 0
while number < 3 or time.monotonic() < start_s + for_s:
    what = chance.choice(["none", "worker", "worker", "all", "zygote"]) if number else "none"
    on = chance.choice(["cpu:2", "cpu:2", "cpu:1", "inline"]) if number else "inline"
    killer = Killer(what if on != "inline" else "none", chance.randint(1, 50))
    out = folder / f"out-{number}"
    job_run.run_job(FakeTask(), Request(inputs=(docs,), out=out, on=on), killer)
    data = data_of(out)
    whole = whole or data
    tmp = len(list((out / "tmp").glob("*")))
    shutil.rmtree(out)
    print(json.dumps({
        "job": number, "on": on, "what": killer.what, "killed": killer.killed, "same": data == whole,
        "rss_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "fds": len(os.listdir("/proc/self/fd")), "processes": settled(), "threads": threading.active_count(),
        "tmp": tmp,
    }), flush=True)
    number += 1
"""

WARM_UP_JOBS = 8  # imports, allocators and warm workers are there by then
RSS_MARGIN_BYTES = 48_000_000
FD_MARGIN = 4


def test_a_parent_of_many_jobs_does_not_grow(docs, tmp_path, seed, long_enough):
    """Workers are killed all the time; memory, descriptors, children, threads and files stay what they were."""
    for_s = CHAOS_S * 0.25
    print(f"\nseed {seed}, {for_s:.0f} s")
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", MANY, str(docs), str(tmp_path), str(seed), str(for_s)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    watchdog = threading.Timer(for_s + 120, lambda: strike(process.pid, process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        jobs = [json.loads(line) for line in process.stdout]
        code = process.wait(60)
        deadline_s = time.monotonic() + GONE_WITHIN_S
        while left := in_session(process.pid):
            assert time.monotonic() < deadline_s, f"still there {GONE_WITHIN_S} s after the parent: {left}"
            time.sleep(0.02)
    finally:
        watchdog.cancel()
        for pid in in_session(process.pid):
            strike(process.pid, pid, signal.SIGKILL)
        process.wait(10)
        process.stdout.close()
    assert code == 0, errors.read_text(errors="replace")[-3000:]
    assert [job for job in jobs if not job["same"]] == []
    assert [job for job in jobs if job["tmp"]] == []
    killed = Counter(job["what"] for job in jobs if job["killed"])
    first, last = jobs[min(WARM_UP_JOBS, len(jobs) // 2)], jobs[-1]
    print(f"{len(jobs)} jobs in one process; killed in: {dict(killed)}")
    for name in ("rss_bytes", "fds", "processes", "threads"):
        most = max(job[name] for job in jobs)
        print(
            f"  {name:10} after job {first['job']}: {first[name]:,}; "
            f"after job {last['job']}: {last[name]:,}; most: {most:,}"
        )
    assert last["rss_bytes"] - first["rss_bytes"] < RSS_MARGIN_BYTES
    tail = jobs[first["job"] :]
    assert max(job["fds"] for job in tail) <= max(job["fds"] for job in jobs[: first["job"] + 1]) + FD_MARGIN
    assert max(job["processes"] for job in jobs) <= 4  # the parent, the zygote and two workers
    assert max(job["threads"] for job in tail) <= 4  # the main one, the idle timer, a scan that is about to end
