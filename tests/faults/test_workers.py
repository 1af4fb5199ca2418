"""Workers and parents that die, on real processes: nothing is lost, no byte changes, nobody stays behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fanfold.engine.supervisor import Supervisor
from fanfold.engine.wire import Closed
from fanfold.errors import FanfoldError, UnitLost
from fanfold.events import Batch, Note, UnitDied, UnitReady
from fanfold.job import engines
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.plan.plan import Unit
from fanfold.testing.fakes import FakeTask

pytestmark = pytest.mark.faults

NUM_ROWS = 6_000  # two windows, about 130 batches
SLOW = 0.000_02  # seconds a token takes: a job of about 3 s on two units
GONE_WITHIN_S = 2.0
READY_WITHIN_S = 2.0


class Listener:
    """A display that remembers events and calls `on_event` with each."""

    def __init__(self, on_event=lambda event: None):
        self.events = []
        self.said = []
        self.pids = {}
        self.on_event = on_event

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, UnitReady):
            self.pids[event.unit] = event.pid
        self.on_event(event)

    def start(self, rows_done):
        pass

    def say(self, text):
        self.said.append(text)

    def stop(self):
        pass

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def _fresh_workers():
    engines.shutdown()
    yield
    engines.shutdown()


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    lines = [json.dumps({"id": i, "text": f"{i} " + "word " * (4 + i * i % 9)}) for i in range(NUM_ROWS)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(docs):
    """The bytes of the undisturbed run on one unit."""
    out = docs.parent / "whole"
    run(docs, out, on="inline", task=FakeTask())
    return bytes_of(out)


def run(docs, out, *, task=None, display=None, on="cpu:2"):
    return run_job(task or FakeTask(token_s=SLOW), Request(inputs=(str(docs),), out=Path(out), on=on), display)


def bytes_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}


def alive(pid):
    """Whether the process runs; one that is only not yet waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until_gone(pids, within_s):
    """Seconds until all of them have ended."""
    start_s = time.monotonic()
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() - start_s < within_s, f"still there after {within_s} s: {left}"
        time.sleep(0.01)
    return time.monotonic() - start_s


def children(pid):
    """The processes that this one has started and that still run."""
    return {child for child, parent in parents_of_all().items() if parent == pid and alive(child)}


def descendants(pid):
    """The process's children, their children and so on."""
    parents = parents_of_all()
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def parents_of_all():
    """pid -> the pid of its parent, for every process there is."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    return parents


# -- workers ------------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_soon_and_no_byte_changes(docs, expected, tmp_path):
    seed = random.randrange(1 << 30)
    at_batch = random.Random(seed).randrange(5, 100)
    print(f"seed {seed}: a worker is killed at batch {at_batch}")
    batches = 0

    def on_event(event):
        nonlocal batches
        batches += isinstance(event, Batch)
        if isinstance(event, Batch) and batches == at_batch:
            os.kill(listener.pids[event.unit], signal.SIGKILL)

    listener = Listener(on_event)
    done = run(docs, tmp_path / "out", display=listener)
    assert bytes_of(tmp_path / "out") == expected
    assert done.exit_code == 0
    assert done.summary["rows_ok"] == NUM_ROWS
    assert sum(done.summary["retries"].values()) == 1
    (died,) = listener.of(UnitDied)
    assert "SIGKILL" in died.cause
    ready_s = min(e.at_s for e in listener.of(UnitReady) if e.unit == died.unit and e.at_s > died.at_s) - died.at_s
    print(f"a dead worker was replaced and ready after {ready_s:.2f} s")
    assert ready_s <= READY_WITHIN_S
    assert len(listener.of(UnitReady)) == 3


def test_all_workers_killed_at_once_are_replaced(docs, expected, tmp_path):
    batches = 0

    def on_event(event):
        nonlocal batches
        batches += isinstance(event, Batch)
        if isinstance(event, Batch) and batches == 60:
            for pid in listener.pids.values():
                os.kill(pid, signal.SIGKILL)

    listener = Listener(on_event)
    done = run(docs, tmp_path / "out", display=listener)
    assert bytes_of(tmp_path / "out") == expected
    assert done.exit_code == 0
    assert {event.unit for event in listener.of(UnitDied)} == {"cpu:0", "cpu:1"}
    assert 1 <= sum(done.summary["retries"].values()) <= 2


def test_workers_that_die_again_and_again_end_the_job_which_can_go_on(docs, expected, tmp_path):
    def on_event(event):
        if isinstance(event, Batch):
            os.kill(listener.pids[event.unit], signal.SIGKILL)

    listener = Listener(on_event)
    start_s = time.monotonic()
    with pytest.raises(UnitLost) as caught:
        run(docs, tmp_path / "out", display=listener)
    print(f"given up after {time.monotonic() - start_s:.1f} s and {len(listener.of(UnitDied))} deaths")
    assert caught.value.exit_code == 1
    assert "killed by SIGKILL" in str(caught.value)
    done = run(docs, tmp_path / "out", task=FakeTask())
    assert bytes_of(tmp_path / "out") == expected
    assert done.summary["rows_in"] == done.summary["rows_ok"] == NUM_ROWS


def test_a_killed_zygote_is_replaced(docs, expected, tmp_path):
    """The process that workers are forked from dies; the workers go with it."""
    batches = 0
    killed = []

    def on_event(event):
        nonlocal batches
        batches += isinstance(event, Batch)
        if isinstance(event, Batch) and batches == 60 and not killed:
            stat = Path(f"/proc/{listener.pids[event.unit]}/stat").read_text()
            killed.append(int(stat.rsplit(")", 1)[1].split()[1]))
            assert killed[0] in descendants(os.getpid())
            os.kill(killed[0], signal.SIGKILL)

    listener = Listener(on_event)
    done = run(docs, tmp_path / "out", display=listener)
    assert killed
    assert bytes_of(tmp_path / "out") == expected
    assert done.exit_code == 0


@pytest.mark.timeout(120)
def test_the_death_of_a_worker_is_seen_though_another_was_forked_in_the_same_breath():
    """Both requests wait when the zygote looks: the first fork must not keep the second one's pipes open."""
    before = children(os.getpid())  # a master of Spark, say, that other tests have started
    supervisor = Supervisor(imports=(), threads=1)
    started = []
    try:
        started.append(supervisor.start(Unit(name="warm-up")))
        read_message(started[0])
        (zygote,) = children(os.getpid()) - before
        os.kill(zygote, signal.SIGSTOP)
        started += [supervisor.start(Unit(name=f"cpu:{index}")) for index in range(2)]
        _, one, two = started
        os.kill(zygote, signal.SIGCONT)
        assert read_message(one)[0] == "up"
        up, pid = read_message(two)
        assert up == "up"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Closed):
            read_message(two)
    finally:
        for process in started:
            process.channel.close()
            process.stderr.close()
        supervisor.close()


def read_message(process, within_s=5.0):
    """The next message of a worker; Closed once it is gone."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        for message in process.channel.drain():
            return message
        time.sleep(0.01)
    raise AssertionError(f"{process.unit.name} said nothing for {within_s} s, and its end was not seen")


@pytest.mark.timeout(120)
def test_a_frozen_worker_is_replaced_and_can_not_come_back(docs, expected, tmp_path):
    """SIGSTOP: its lease ends with its life, so there is no twin to wake up later."""
    frozen, batches = [], 0

    def on_event(event):
        nonlocal batches
        batches += isinstance(event, Batch)
        if isinstance(event, Batch) and batches == 50 and not frozen:
            frozen.append(listener.pids[event.unit])
            os.kill(frozen[0], signal.SIGSTOP)

    listener = Listener(on_event)
    request = Request(inputs=(str(docs),), out=tmp_path / "out", on="cpu:2", timeout_batch="1s")
    done = run_job(FakeTask(token_s=SLOW), request, listener)
    assert bytes_of(tmp_path / "out") == expected
    assert done.exit_code == 0
    (died,) = listener.of(UnitDied)
    assert "no sign of life for 1 s" in died.cause
    assert not alive(frozen[0])


@pytest.mark.timeout(120)
def test_a_job_that_was_stopped_as_a_whole_loses_no_worker(docs, expected, tmp_path):
    """Ctrl-Z, and fg much later: nobody was silent, all of them were stopped."""
    out = tmp_path / "out"
    script = JOB.replace('on="cpu:2")', 'on="cpu:2", timeout_batch="1s")')
    with start_job(docs, out, script=script) as parent:
        pids = read_until(parent, 40)
        everybody = [parent.pid, *descendants(parent.pid)]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)
        for pid in everybody:
            os.kill(pid, signal.SIGCONT)
        rest = parent.stdout.read().splitlines()
    assert parent.returncode == 0
    assert rest[-1] == "done"
    assert not [line for line in rest if line.startswith("pid")], f"{pids} were replaced"
    assert bytes_of(out) == expected


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["exit", "segfault"])
def test_a_row_that_kills_its_worker_once_costs_a_retry(docs, expected, tmp_path, fault):
    text = json.loads(docs.read_text().splitlines()[1234])["text"]
    task = FakeTask(faults={text: f"once:{fault}"}, once_path=str(tmp_path / "once"))
    listener = Listener()
    done = run(docs, tmp_path / "out", task=task, display=listener)
    assert (tmp_path / "once").exists()
    assert bytes_of(tmp_path / "out") == expected
    assert sum(done.summary["retries"].values()) == 1
    cause = {"exit": "exit code 7", "segfault": "SIGSEGV"}[fault]
    assert cause in listener.of(UnitDied)[0].cause
    assert any(cause in note.text for note in listener.of(Note))


def test_no_worker_outlives_shutdown(docs, tmp_path):
    before = descendants(os.getpid())  # a master of Spark, say, that other tests have started
    listener = Listener()
    run(docs, tmp_path / "out", task=FakeTask(), display=listener)
    ours = descendants(os.getpid()) - before
    assert set(listener.pids.values()) <= ours
    engines.shutdown()
    wait_until_gone(ours, GONE_WITHIN_S)


# -- loading ------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_a_worker_that_dies_while_loading_is_named_within_seconds(docs, expected, tmp_path):
    start_s = time.monotonic()
    with pytest.raises(UnitLost) as caught:
        run(docs, tmp_path / "out", task=FakeTask(load_fault="exit"))
    elapsed_s = time.monotonic() - start_s
    print(f"a load that kills its worker was said after {elapsed_s:.1f} s:\n{caught.value}")
    assert elapsed_s < 10
    assert caught.value.exit_code == 1
    assert "ended with exit code 7" in str(caught.value)
    assert "load" in str(caught.value).lower()
    assert "cpu:" in str(caught.value)
    run(docs, tmp_path / "out", task=FakeTask())
    assert bytes_of(tmp_path / "out") == expected


@pytest.mark.timeout(120)
@pytest.mark.parametrize("on", ["inline", "cpu:1", "cpu:2"])
def test_a_load_that_raises_is_an_error_of_ours_that_names_the_cause(docs, expected, tmp_path, on):
    start_s = time.monotonic()
    with pytest.raises(FanfoldError) as caught:
        run(docs, tmp_path / "out", task=FakeTask(load_fault="raise"), on=on)
    print(f"a load that raises was said after {time.monotonic() - start_s:.1f} s:\n{caught.value}")
    assert time.monotonic() - start_s < 10
    assert caught.value.exit_code == 1
    assert "ValueError: this row is poison" in str(caught.value)
    assert "load" in str(caught.value).lower()
    run(docs, tmp_path / "out", task=FakeTask())
    assert bytes_of(tmp_path / "out") == expected


# -- the parent ---------------------------------------------------------------------------------------

JOB = """
import sys, time
from pathlib import Path
from fanfold.events import Batch, UnitReady
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.plan.plan import Unit
from fanfold.testing.fakes import FakeTask

class Show:
    def __call__(self, event):
        if isinstance(event, UnitReady):
            print("pid", event.pid, flush=True)
        if isinstance(event, Batch):
            print("batch", flush=True)
    def start(self, rows_done): pass
    def say(self, text): pass
    def stop(self): pass

task = FakeTask(token_s=float(sys.argv[3]), faults={sys.argv[4]: "hang"} if len(sys.argv) > 4 else {})
run_job(task, Request(inputs=(sys.argv[1],), out=Path(sys.argv[2]), on="cpu:2"), Show(), signals=True)
print("done", flush=True)
"""


def start_job(docs, out, token_s=SLOW, *more, script=JOB, **variables):
    words = map(str, (docs, out, token_s, *more))
    return subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )


def read_until(process, num_batches):
    """Lines of its output until it has told so many batches; the pids of its workers."""
    pids = set()
    for line in process.stdout:
        if line.startswith("pid"):
            pids.add(int(line.split()[1]))
        num_batches -= line == "batch\n"
        if num_batches <= 0 and len(pids) == 2:
            return pids
    raise AssertionError(f"it ended with {process.wait()}")


@pytest.mark.parametrize("at_batch", [1, 40, 100])
def test_workers_go_with_a_killed_parent_and_the_same_command_finishes(docs, expected, tmp_path, at_batch):
    out = tmp_path / "out"
    with start_job(docs, out) as parent:
        pids = read_until(parent, at_batch)
        pids |= descendants(parent.pid)
        parent.send_signal(signal.SIGKILL)
        parent.stdout.read()
    gone_s = wait_until_gone(pids, GONE_WITHIN_S)
    print(f"parent killed at batch {at_batch}: {len(pids)} processes were gone after {gone_s:.2f} s")
    assert parent.returncode == -signal.SIGKILL
    assert not (out / "_SUCCESS").exists()
    done = run(docs, out, task=FakeTask())
    print(f"rows_resumed {done.summary['rows_resumed']}")
    assert bytes_of(out) == expected
    assert at_batch < 100 or done.summary["rows_resumed"] > 0
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        *("_SUCCESS", "commits.log", "data", "run.json", "summary.json", "trace.json.gz")
    ]


def test_a_worker_that_hangs_goes_with_a_killed_parent(docs, tmp_path):
    text = json.loads(docs.read_text().splitlines()[700])["text"]
    with start_job(docs, tmp_path / "out", 0, text) as parent:
        pids = read_until(parent, 5) | descendants(parent.pid)
        time.sleep(0.5)  # until it hangs
        parent.send_signal(signal.SIGKILL)
        parent.stdout.read()
    wait_until_gone(pids, GONE_WITHIN_S)


def test_processes_that_still_import_go_with_a_killed_parent(docs, tmp_path):
    """Importing torch takes seconds; whoever kills the command in them leaves nothing behind either."""
    (tmp_path / "slow_to_import.py").write_text(
        f"import time\nopen({str(tmp_path / 'importing')!r}, 'w').close()\nfor _ in range(300):\n    time.sleep(0.1)\n"
    )
    script = JOB.replace(
        "task = FakeTask(",
        "class Slow(FakeTask):\n    __slots__ = ()\n    imports = ('slow_to_import',)\ntask = Slow(",
    )
    with start_job(docs, tmp_path / "out", script=script, PYTHONPATH=str(tmp_path)) as parent:
        deadline_s = time.monotonic() + 20
        while not (tmp_path / "importing").exists():
            assert time.monotonic() < deadline_s
            assert parent.poll() is None
            time.sleep(0.02)
        pids = descendants(parent.pid)
        assert pids
        parent.send_signal(signal.SIGKILL)
    try:
        wait_until_gone(pids, GONE_WITHIN_S)
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_job_with_what_is_done_committed(docs, expected, tmp_path, name):
    out = tmp_path / "out"
    with start_job(docs, out) as parent:
        pids = read_until(parent, 60) | descendants(parent.pid)
        start_s = time.monotonic()
        parent.send_signal(getattr(signal, name))
        rest = parent.stdout.read()
    elapsed_s = time.monotonic() - start_s
    print(f"{name}: ended after {elapsed_s:.2f} s")
    assert "done" not in rest
    assert parent.returncode == 1  # the script does not catch Stopped
    assert elapsed_s < 10
    wait_until_gone(pids, GONE_WITHIN_S)
    done = run(docs, out, task=FakeTask())
    assert done.summary["rows_resumed"] > 0
    assert bytes_of(out) == expected


def test_a_second_signal_ends_it_at_once_with_130(docs, expected, tmp_path):
    text = json.loads(docs.read_text().splitlines()[700])["text"]
    out = tmp_path / "out"
    with start_job(docs, out, 0, text) as parent:
        pids = read_until(parent, 5) | descendants(parent.pid)
        time.sleep(0.5)  # until it hangs
        parent.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert parent.poll() is None
        start_s = time.monotonic()
        parent.send_signal(signal.SIGINT)
        parent.stdout.read()
        parent.wait(timeout=5)
    assert parent.returncode == 130
    assert time.monotonic() - start_s < 2
    wait_until_gone(pids, GONE_WITHIN_S)
    run(docs, out, task=FakeTask())
    assert bytes_of(out) == expected


def test_one_signal_ends_a_job_whose_worker_hangs_within_the_grace(docs, expected, tmp_path):
    text = json.loads(docs.read_text().splitlines()[700])["text"]
    out = tmp_path / "out"
    with start_job(docs, out, 0, text) as parent:
        pids = read_until(parent, 5) | descendants(parent.pid)
        time.sleep(0.5)  # until it hangs
        start_s = time.monotonic()
        parent.send_signal(signal.SIGINT)
        parent.stdout.read()
    elapsed_s = time.monotonic() - start_s
    print(f"one signal ended a job with a hanging worker after {elapsed_s:.1f} s")
    assert elapsed_s < 13
    assert parent.returncode == 1
    wait_until_gone(pids, GONE_WITHIN_S)
    run(docs, out, task=FakeTask())
    assert bytes_of(out) == expected
