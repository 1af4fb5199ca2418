"""A real control group (v1, writable by root) with a process in it, made and removed by the test."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fanfold.machine.cgroup import read_oom_kills

pytestmark = pytest.mark.slow

DISCOVER = """
import dataclasses, json
from fanfold.machine.discover import discover
print(json.dumps(dataclasses.asdict(discover())))
"""
HOLD_A_GIGABYTE = "text = b'x' * 1_000_000_000"


def own_v1_group(controller):
    top = Path("/sys/fs/cgroup") / controller
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(",") and (top / "tasks").exists():
            own = top / path.lstrip("/")
            return own if own.exists() else top
    return None


def remove(group):
    """The kernel needs a moment after the last process of a group has gone."""
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:
            time.sleep(0.02)
    return group.rmdir()


@contextlib.contextmanager
def child_groups(limits):
    """A new group below our own for each controller, with these files written into it."""
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("no control groups here: this is not Linux")
    made = []
    try:
        for controller, files in limits.items():
            own = own_v1_group(controller)
            if own is None:
                pytest.skip(f"the {controller} controller is not mounted as cgroup v1 here")
            group = own / f"fanfold-test-{os.getpid()}"
            try:
                group.mkdir()
                made.append(group)
                for name, text in files.items():
                    (group / name).write_text(text)
            except OSError as error:
                pytest.skip(f"no child group of {own} can be made here: {error.strerror}")
        yield made
    finally:
        for group in made:
            remove(group)


def run_inside(groups, code):
    """Runs Python in the groups: the shell joins them before it becomes Python."""
    join = " && ".join(f"echo $$ > '{group}/cgroup.procs'" for group in groups)
    command = ["sh", "-c", f'{join} && exec "$0" -c "$1"', sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_discover_in_a_group_of_one_and_a_half_cores_and_half_a_gigabyte():
    cpu = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"}
    memory = {"memory.limit_in_bytes": str(512 * 2**20)}
    with child_groups({"cpu": cpu, "memory": memory}) as groups:
        done = run_inside(groups, DISCOVER)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        name = groups[0].name
    assert found["cores"] == 1
    assert found["memory_bytes"] == 512 * 2**20
    assert found["memory_reason"].startswith("the cgroup allows 537 MB of ")
    assert name in found["memory_reason"]
    if len(found["core_numbers"]) > 1:
        assert found["cores_reason"].startswith("the CPU quota is 1.5 cores of ")
        assert name in found["cores_reason"]


def test_a_process_killed_for_memory_is_counted_in_its_group():
    memory = {"memory.limit_in_bytes": str(128 * 2**20)}
    with child_groups({"memory": memory}) as groups:
        if (groups[0] / "memory.memsw.limit_in_bytes").exists():
            (groups[0] / "memory.memsw.limit_in_bytes").write_text(str(128 * 2**20))
        waiting = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            (groups[0] / "cgroup.procs").write_text(str(waiting.pid))
            assert read_oom_kills(pid=waiting.pid) == 0
            done = run_inside(groups, HOLD_A_GIGABYTE)
            assert done.returncode == -9, done.stderr
            assert read_oom_kills(pid=waiting.pid) == 1
        finally:
            waiting.communicate(b"\n", timeout=30)
