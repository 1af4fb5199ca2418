"""What dies on Spark: executors, Python workers, units, drivers, rows. The bytes are those of `inline` all the same."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from fanfold.engine import spark_java
from fanfold.engine.spark import Spark
from fanfold.errors import PlanError
from fanfold.events import Batch, Note, UnitDied
from fanfold.job import engines
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

pytestmark = [pytest.mark.spark, pytest.mark.timeout(280)]

CLUSTER = "local-cluster[2,1,1024]"
NUM_ROWS = 6_000


class Listener:
    """A display that remembers events, and calls `on_event` with each."""

    def __init__(self, on_event=lambda event: None):
        self.events = []
        self.said = []
        self.on_event = on_event

    def __call__(self, event):
        self.events.append(event)
        self.on_event(event)

    def start(self, rows_done):
        pass

    def say(self, text):
        self.said.append(text)

    def stop(self):
        pass


@pytest.fixture(autouse=True, scope="module")
def ended():
    yield
    engines.shutdown()
    left = [child.cmdline() for child in of_spark(psutil.Process())]
    left = [
        words for words in left if not any("org.apache.spark.deploy.worker" in w or "deploy.master" in w for w in words)
    ]
    assert not left, "Spark's processes outlive the shutdown"


def of_spark(process):
    """Java processes below this one."""
    return [child for child in process.children(recursive=True) if child.name() == "java"]


def executors():
    found = []
    for child in of_spark(psutil.Process()):
        try:
            if "CoarseGrainedExecutorBackend" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            pass
    return found


def write(path, num_rows=NUM_ROWS, special=None):
    """`special`: row -> text."""
    texts = [f"row {i} " + "x" * (i % 40) for i in range(num_rows)]
    for row, text in (special or {}).items():
        texts[row] = text
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def embed(inputs, out, on=CLUSTER, listener=None, task=None, **request):
    task = task or FakeTask()
    return run_job(task, Request(inputs=(str(inputs),), out=out, on=on, **request), listener or Listener())


def data_of(out):
    """Name and hash of every part, and the quarantined rows."""
    parts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}
    quarantine = out / "quarantine.jsonl"
    failed = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    return parts, [(failure["row"], failure["error"]) for failure in failed]


def check_log(out):
    """Every piece of every window stands in exactly one committed lease, and nothing is left in the folder."""
    entries = [json.loads(line[9:]) for line in (out / "commits.log").read_bytes().splitlines()]
    pieces = {entry["window"]: len(entry["costs"]) for entry in entries if entry["kind"] == "window"}
    for window, count in pieces.items():
        leases = [entry for entry in entries if entry["kind"] == "lease" and entry["window"] == window]
        covered = sorted(piece for entry in leases for piece in range(entry["first"], entry["last"] + 1))
        assert covered == list(range(count)), f"window {window}"
    left = sorted(path.name for path in out.iterdir())
    assert left == sorted(
        {".lock", "_SUCCESS", "commits.log", "data", "run.json", "summary.json", "trace.json.gz"}
        | ({"quarantine.jsonl"} if (out / "quarantine.jsonl").exists() else set())
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = embed(write(folder / "in.jsonl"), folder / "out", on="inline")
    return folder / "in.jsonl", run.summary["output_sha256"], data_of(folder / "out")


def test_two_executors_write_the_bytes_of_inline(tmp_path, whole):
    inputs, sha256, data = whole
    run = embed(inputs, tmp_path / "out", task=FakeTask(token_s=1e-5))
    assert run.summary["output_sha256"] == sha256
    assert data_of(tmp_path / "out") == data
    assert run.summary["units_used"] == 2
    assert run.summary["retries"] == {}
    assert run.plan["engine"] == "spark"
    check_log(tmp_path / "out")


def test_an_executor_killed_at_five_random_moments_changes_nothing(tmp_path, whole, seed):
    inputs, sha256, data = whole
    chance = random.Random(seed)
    over = threading.Event()
    killed = []

    def kill():
        while len(killed) < 5 and not over.wait(chance.uniform(1.0, 4.0)):
            found = executors()
            if found:
                victim = chance.choice(found)
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    listener = Listener(lambda event: isinstance(event, Batch) and not killer.ident and killer.start())
    try:
        run = embed(inputs, tmp_path / "out", listener=listener, task=FakeTask(token_s=2e-4))
    finally:
        over.set()
        if killer.ident:
            killer.join()
    print(f"{len(killed)} executors killed; {run.summary['retries']}, {run.summary['elapsed_s']} s")
    assert len(killed) == 5, "the job was over too soon"
    assert run.exit_code == 0
    assert run.summary["output_sha256"] == sha256
    assert data_of(tmp_path / "out") == data
    check_log(tmp_path / "out")


def test_an_executor_that_goes_is_told(tmp_path, whole):
    inputs, sha256, _ = whole
    killed = []

    def kill_busy_one():
        victim = executors()[0]
        victim.kill()
        killed.append(victim.pid)

    later = threading.Timer(1.0, kill_busy_one)  # in the middle of a lease; batches are told of at a lease's end
    listener = Listener(lambda event: isinstance(event, Batch) and not later.ident and later.start())
    run = embed(inputs, tmp_path / "out", listener=listener, task=FakeTask(token_s=2e-4))
    later.join()
    notes = [event.text for event in listener.events if isinstance(event, Note)]
    assert killed
    assert any("Spark gave it the work of a task that was lost (attempt 2)" in note for note in notes), notes
    assert run.summary["output_sha256"] == sha256


def test_a_python_worker_that_is_killed_is_replaced(tmp_path, whole):
    inputs, sha256, _ = whole
    killed = []

    def kill_one(event):
        if isinstance(event, Batch) and not killed:
            for executor in executors():
                for daemon in executor.children():
                    for worker in daemon.children():
                        if not killed:
                            worker.kill()
                            killed.append(worker.pid)

    run = embed(inputs, tmp_path / "out", listener=Listener(kill_one), task=FakeTask(token_s=2e-5))
    assert killed
    assert run.summary["output_sha256"] == sha256
    check_log(tmp_path / "out")


def test_a_unit_that_segfaults_once_costs_a_retry_and_no_row(tmp_path, whole):
    inputs, sha256, _ = whole
    text = "row 77 " + "x" * (77 % 40)
    listener = Listener()
    task = FakeTask(faults={text: "once:segfault"}, once_path=str(tmp_path / "once"))
    run = embed(inputs, tmp_path / "out", listener=listener, task=task)
    assert run.exit_code == 0
    assert run.summary["output_sha256"] == sha256
    assert run.summary["retries"] == {"Segfault": 1}
    assert [event.cause for event in listener.events if isinstance(event, UnitDied)] == ["killed by SIGSEGV"]
    check_log(tmp_path / "out")


def test_a_row_that_crashes_its_unit_is_the_only_one_set_aside_of_20_000(tmp_path):
    inputs = write(tmp_path / "in.jsonl", 20_000, {12_345: "poison"})
    task = FakeTask(faults={"poison": "segfault"})
    run = embed(inputs, tmp_path / "out", task=task)
    assert run.exit_code == 3
    assert (run.summary["rows_ok"], run.summary["rows_failed"]) == (19_999, 1)
    parts, failed = data_of(tmp_path / "out")
    assert failed == [(12_345, "Segfault")]
    message = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["message"]
    assert re.search(r"killed by SIGSEGV in string_at \(__init__.py, line \d+\)", message), message
    check_log(tmp_path / "out")
    again = embed(inputs, tmp_path / "local", on="cpu:2", task=task)
    assert data_of(tmp_path / "local") == (parts, failed)
    assert again.summary["output_sha256"] == run.summary["output_sha256"]


SCRIPT = """
import sys, json
from pathlib import Path
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask
class Display:
    def __call__(self, event):
        if type(event).__name__ == "Batch":
            print("batch", flush=True)
    start = say = lambda *_: None
    stop = lambda *_: None
inputs, out, on, token_s = sys.argv[1:5]
request = Request(inputs=(inputs,), out=Path(out), on=on)
run = run_job(FakeTask(token_s=float(token_s)), request, Display(), signals=True)
print(json.dumps(run.summary))
"""


def begun(inputs, out, on, batches=20, token_s=1e-4):
    """A job in a process of its own, once it has told of so many batches."""
    words = [sys.executable, "-c", SCRIPT, str(inputs), str(out), on, str(token_s)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(batches):
        assert process.stdout.readline() == "batch\n", process.stderr.read()
    return process


def gone(pids, within_s=15.0):
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        left = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not left:
            return True
        time.sleep(0.1)
    return False


def test_a_driver_that_is_killed_leaves_no_process_and_is_resumed_on_cpu(tmp_path, whole):
    inputs, sha256, data = whole
    process = begun(inputs, tmp_path / "out", "local[2]")
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) >= 4  # Java, the daemon, Python workers, units
    process.kill()
    process.communicate()
    assert gone(children), "processes outlive the driver"
    run = embed(inputs, tmp_path / "out", on="cpu:2")
    assert 0 < run.summary["rows_resumed"] < NUM_ROWS
    assert run.summary["output_sha256"] == sha256
    assert data_of(tmp_path / "out") == data
    check_log(tmp_path / "out")


def test_a_job_begun_on_cpu_and_killed_is_resumed_on_spark(tmp_path, whole):
    inputs, sha256, data = whole
    process = begun(inputs, tmp_path / "out", "cpu:2")
    process.kill()
    process.communicate()
    run = embed(inputs, tmp_path / "out")
    assert 0 < run.summary["rows_resumed"] < NUM_ROWS
    assert run.summary["output_sha256"] == sha256
    assert data_of(tmp_path / "out") == data
    check_log(tmp_path / "out")


def test_ctrl_c_leaves_a_folder_that_goes_on_and_no_process(tmp_path, whole):
    inputs, sha256, _ = whole
    process = begun(inputs, tmp_path / "out", "local[2]")
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Stopped: the job in" in errors
    assert gone(children)
    run = embed(inputs, tmp_path / "out", on="cpu:2")
    assert 0 < run.summary["rows_resumed"] < NUM_ROWS
    assert run.summary["output_sha256"] == sha256


def test_with_speculation_a_task_and_its_twin_are_one_commit(tmp_path, whole, standalone):
    """Spark starts a twin on another host only."""
    inputs, sha256, data = whole
    engines.shutdown()
    conf = {
        "spark.speculation": "true",
        "spark.speculation.interval": "50ms",
        "spark.speculation.task.duration.threshold": "300ms",
        "spark.speculation.minTaskRuntime": "100ms",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
    }
    spark = Spark(standalone, imports=("fanfold.job.ready", *FakeTask().imports), conf=conf)
    engines._spark = spark
    # One unit at work leaves a slot free for its twins.
    spark.cluster = replace(spark.cluster, slots=1)
    try:
        task = FakeTask(token_s=2e-5, calls_path=str(tmp_path / "calls"))
        run = embed(inputs, tmp_path / "out", on=standalone, task=task)
    finally:
        engines.shutdown()
    assert run.summary["output_sha256"] == sha256
    assert data_of(tmp_path / "out") == data
    check_log(tmp_path / "out")
    entries = [json.loads(line[9:]) for line in (tmp_path / "out" / "commits.log").read_bytes().splitlines()]
    num_batches = sum(len(entry["costs"]) for entry in entries if entry["kind"] == "window")
    assert (tmp_path / "calls").stat().st_size > num_batches, "no task had a twin"


def test_a_port_that_takes_connections_and_is_no_master_is_refused_in_time(monkeypatch):
    engines.shutdown()
    assert spark_java.REGISTER_S <= 25, "a master that cannot be reached is told within 30 s"
    monkeypatch.setattr(spark_java, "REGISTER_S", 3.0)
    before = {child.pid for child in of_spark(psutil.Process())}
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(PlanError) as caught:
            Spark(f"spark://127.0.0.1:{port}")
    assert "Spark did not start: no answer within" in caught.value.found
    assert "is it a Spark master" in caught.value.do
    assert {child.pid for child in of_spark(psutil.Process())} <= before


def test_a_master_without_executors_is_told(monkeypatch, standalone):
    monkeypatch.setattr("fanfold.engine.spark.EXECUTORS_S", 4.0)
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    with pytest.raises(PlanError) as caught:
        Spark(standalone, conf={"spark.executor.memory": "900g"})
    assert caught.value.found == "no executor has come within 4 s"
    assert "workers, with free cores and memory" in caught.value.do
