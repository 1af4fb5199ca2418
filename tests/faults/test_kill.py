"""kill -9 of everything at random moments: the same command finishes, nothing lost, nothing doubled."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

SCRIPT = """
import sys, json
from pathlib import Path
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask
inputs, out, on, token_s = sys.argv[1:5]
run = run_job(FakeTask(token_s=float(token_s)), Request(inputs=(inputs,), out=Path(out), on=on))
print(json.dumps(run.summary))
"""


def write(path, num_rows):
    path.write_text(
        "".join(json.dumps({"id": i, "text": f"row {i} " + "x" * (i % 40)}) + "\n" for i in range(num_rows))
    )
    return path


def start(inputs, out, on, token_s):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(inputs), str(out), on, str(token_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(inputs, out, on, token_s=0.0):
    process = start(inputs, out, on, token_s)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return json.loads(output)


def leases(out):
    """Rows in the leases that the log holds."""
    try:
        lines = (out / "commits.log").read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    entries = [json.loads(line[9:]) for line in lines if line.endswith(b"}")]
    return sum(entry["rows"] for entry in entries if entry["kind"] == "lease")


@pytest.mark.parametrize(
    ("num_rows", "on", "then", "kills"),
    [(4000, "cpu:2", "cpu:2", 20), (12_000, "cpu:2", "cpu:1", 3), (12_000, "cpu:2", "inline", 3)],
)
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, seed, num_rows, on, then, kills):
    inputs = write(tmp_path / "in.jsonl", num_rows)
    whole = finish(inputs, tmp_path / "whole", "inline")
    chance = random.Random(seed + num_rows)
    out, token_s = tmp_path / "out", 2e-4 if num_rows <= 4000 else 1e-5
    committed = landed = 0
    for _ in range(kills):
        process = start(inputs, out, on, token_s)
        time.sleep(chance.uniform(0.4, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()
        if process.wait() != -signal.SIGKILL:
            break  # it was done before
        landed += 1
        now = leases(out)
        assert now >= committed  # what was committed stays committed
        committed = now
    summary = finish(inputs, out, then)
    print(f"{landed} kills landed, {committed} of {num_rows} rows were committed by then")
    if landed == kills:  # otherwise the summary is that of a run that came to its end
        assert summary["rows_resumed"] == committed
    assert (summary["rows_in"], summary["rows_ok"], summary["rows_failed"]) == (num_rows, num_rows, 0)
    assert summary["output_sha256"] == whole["output_sha256"]
    table = pq.read_table(tmp_path / "out" / "data")
    assert table.column("row").to_pylist() == list(range(num_rows))
    assert table.equals(pq.read_table(tmp_path / "whole" / "data"))
    assert landed, "no kill landed while the job was running"
    for folder in ("tmp", "pieces", "windows", "spool"):
        assert not list((out / folder).glob("*"))


def test_no_process_is_left_two_seconds_after_the_parent_was_killed(tmp_path):
    inputs = write(tmp_path / "in.jsonl", 3000)
    process = start(inputs, tmp_path / "out", "cpu:2", 1e-4)
    try:
        pids = children_within(process.pid, 10.0, at_least=3)  # a zygote and two workers
    finally:
        process.kill()
        process.communicate()
    deadline_s = time.monotonic() + 2.0
    while time.monotonic() < deadline_s and any(map(alive, pids)):
        time.sleep(0.02)
    assert not [pid for pid in pids if alive(pid)]


def test_a_worker_stuck_in_c_code_goes_with_its_parent(tmp_path):
    """The death pipe must not need the worker's interpreter: it may be held by C code for ever."""
    script = """
import ctypes, sys, time
from fanfold.engine.local import Local
from fanfold.plan.plan import Unit
def stuck(rank, size, channel):
    channel.send("stuck now")
    ctypes.PyDLL(None).sleep(600)   # holds the interpreter lock
engine = Local((Unit(name="cpu:0"),))
group = engine.start_group(stuck, 1)
group.receive(0, 30)
print(group.pids[0], flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        pid = int(process.stdout.readline())
        assert alive(pid)
    finally:
        process.kill()
        process.communicate()
    deadline_s = time.monotonic() + 2.0
    while time.monotonic() < deadline_s and alive(pid):
        time.sleep(0.02)
    assert not alive(pid)


def children_within(pid, seconds, at_least):
    """All descendants of a process, once there are so many."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        found = descendants(pid)
        if len(found) >= at_least:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{len(found)} processes after {seconds} s, {at_least} expected")


def descendants(pid):
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *descendants(child)]
    except OSError:
        pass
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
