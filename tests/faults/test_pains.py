"""Thirty pains of parallel Python, as people have reported them: none of them comes back.

A test's number is the pain's. Most are small and direct, on fakes; the full tests of the same pain are named in PAINS.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import cloudpickle
import numpy as np
import psutil
import pytest

import fanfold as ff
from fanfold.engine import local
from fanfold.errors import FanfoldError, InternalError, PieceFailed, Stopped, UnitLost
from fanfold.events import Batch, Note, ProcessStarted, UnitDied, UnitReady
from fanfold.job import agenda as job_agenda
from fanfold.job import engines
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.job.verbs import MAKERS
from fanfold.machine.discover import discover
from fanfold.testing.fakes import FakeOnUnit, FakeTask

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

# The full tests of a pain, where there are any.
PAINS = {
    1: ["tests/exact/test_memory_api.py::test_from_any_kind_of_program"],
    2: ["tests/exact/test_memory_api.py::test_from_any_kind_of_program"],
    3: ["tests/engines/test_engines.py::test_a_lambda_from_a_caller_travels_by_value"],
    6: ["tests/exact/test_memory_api.py::test_inline_computes_on_one_thread_where_the_caller_chose_more"],
    8: [
        "tests/unit/test_machine_discover.py::test_a_quota_counts_whole_cores_and_at_least_one",
        "tests/unit/test_machine_real_cgroup.py::test_discover_in_a_group_of_one_and_a_half_cores_and_half_a_gigabyte",
    ],
    9: ["tests/unit/test_planner_units.py::test_memory_bounds_the_units_and_says_so"],
    10: [
        "tests/unit/test_machine_cgroup.py::test_v2_parent_wins_where_it_is_smaller",
        "tests/unit/test_machine_cgroup.py::test_v1_limit_of_a_parent_the_container_cannot_see_is_found_in_memory_stat",
        "tests/unit/test_machine_real_cgroup.py::test_discover_in_a_group_of_one_and_a_half_cores_and_half_a_gigabyte",
    ],
    11: ["tests/unit/test_machine_real_cgroup.py::test_a_process_killed_for_memory_is_counted_in_its_group"],
    12: ["tests/faults/test_rows.py::test_only_the_poison_row_is_set_aside"],
    13: ["tests/faults/test_workers.py::test_a_load_that_raises_is_an_error_of_ours_that_names_the_cause"],
    14: ["tests/faults/test_workers.py::test_a_killed_worker_is_replaced_soon_and_no_byte_changes"],
    15: ["tests/faults/test_workers.py::test_a_worker_that_dies_while_loading_is_named_within_seconds"],
    16: [
        "tests/unit/test_engine_schedule.py::test_losses_stops_twins_and_damage_commit_every_piece_exactly_once",
        "tests/faults/test_commit_protocol.py::test_a_late_twin_is_ignored",
    ],
    17: ["tests/faults/test_rows.py::test_only_the_poison_row_is_set_aside"],
    18: [
        "tests/faults/test_workers.py::test_workers_that_die_again_and_again_end_the_job_which_can_go_on",
        "tests/faults/test_rows.py::test_several_poison_rows_of_one_batch_are_all_found",
    ],
    19: [
        "tests/faults/test_workers.py::test_a_signal_ends_the_job_with_what_is_done_committed",
        "tests/cli/test_terminal.py::test_ctrl_c_twice_ends_at_once_with_130",
    ],
    20: [
        "tests/faults/test_workers.py::test_workers_go_with_a_killed_parent_and_the_same_command_finishes",
        "tests/faults/test_kill.py::test_a_worker_stuck_in_c_code_goes_with_its_parent",
    ],
    22: ["tests/faults/test_system.py::test_shared_memory_that_is_tiny_or_read_only_is_not_needed"],
    24: ["tests/engines/test_engines.py::test_workers_forked_together_hold_no_end_of_each_others_channel"],
    25: ["tests/exact/test_memory_api.py::test_from_two_threads_at_once"],
    26: [
        "tests/exact/test_bytes.py::test_the_whole_file_is_the_same_for_every_unit_count",
        "tests/exact/test_bytes.py::test_the_real_model_is_what_encode_gives",
    ],
    27: [
        "tests/cli/test_terminal.py::test_off_a_terminal_there_is_no_bar_and_json_is_all_of_stdout",
        "tests/unit/test_report.py::test_off_a_terminal_there_is_at_most_one_plain_line_in_30_s",
    ],
    28: ["tests/faults/test_kill.py::test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes"],
}
NOT_HERE = {
    30: "FFmpeg: nothing reads sound or video yet",
}

NUM_ROWS = 1500  # one window, about 20 batches
SLOW = 0.000_01  # seconds a token takes: about 20 ms a batch
GONE_WITHIN_S = 2.0

# What workers are forked with, so that one that replaces another is there soon.
ROOMS = ("assemble", "compute", "prepare", "work")
IMPORTED = ("numpy", "pyarrow", "fanfold.testing.fakes", *(f"fanfold.job.{room}" for room in ROOMS))

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, which is there on Linux only")


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing(FakeTask):
    """A FakeTask whose unit also calls these functions, which travel to it by value."""

    modules: tuple[str, ...] = ()
    on_prepare: Callable | None = None
    on_load: Callable | None = None
    on_compute: Callable | None = None  # given the token ids of the batch
    on_result: Callable | None = None  # vectors -> vectors

    @property
    def imports(self):
        return (*IMPORTED, *self.modules)

    def open(self, unit, numerics):
        return DoingOnUnit(self)


class DoingOnUnit(FakeOnUnit):
    def prepare(self, texts, rows):
        if self.task.on_prepare:
            self.task.on_prepare()
        return FakeOnUnit.prepare(self, texts, rows)

    def load(self):
        if self.task.on_load:
            self.task.on_load()
        FakeOnUnit.load(self)

    def compute(self, batch):
        if self.task.on_compute:
            self.task.on_compute(batch.ids)
        results = FakeOnUnit.compute(self, batch)
        return {name: self.task.on_result(value) for name, value in results.items()} if self.task.on_result else results


class Listener:
    """A display that remembers events and calls `on_event` with each."""

    def __init__(self, on_event=lambda event: None):
        self.events = []
        self.on_event = on_event

    def __call__(self, event):
        self.events.append(event)
        self.on_event(event)

    def start(self, rows_done):
        pass

    def say(self, text):
        pass

    def stop(self):
        pass

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def workers(self):
        """unit -> the pid that it has now."""
        return {event.unit: event.pid for event in self.of(UnitReady)}

    @property
    def zygote(self):
        return self.of(ProcessStarted)[-1].pid


@pytest.fixture(scope="module", autouse=True)
def _workers():
    """Tests share warm workers; what they define here travels by value, as from a notebook."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    engines.shutdown()
    engines.warm_up(IMPORTED, 1)
    yield
    engines.shutdown()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def fresh():
    """Workers of this test's own."""
    engines.shutdown()
    yield
    engines.shutdown()
    engines.warm_up(IMPORTED, 1)


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("docs") / "docs.jsonl")


@pytest.fixture(scope="module")
def expected(docs):
    """The bytes of the undisturbed run on one unit."""
    out = docs.parent / "whole"
    run(docs, out, on="inline")
    return bytes_of(out)


def text_of(row, word="word"):
    return f"{row} " + f"{word} " * (2 + row * row % 9)


def write(path, num_rows=NUM_ROWS, word="word"):
    path.write_text("".join(json.dumps({"id": i, "text": text_of(i, word)}) + "\n" for i in range(num_rows)))
    return path


def run(docs, out, task=None, display=None, *, on="cpu:2", signals=False, **options):
    request = Request(inputs=(str(docs),), out=Path(out), on=on, sync=False, **options)
    return run_job(task or FakeTask(), request, display, signals=signals)


def bytes_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}


def at_batch(number, do):
    """A listener that calls `do` with itself and the event of this batch."""
    batches = itertools.count(1)

    def on_event(event):
        if isinstance(event, Batch) and next(batches) == number:
            do(listener, event)

    listener = Listener(on_event)
    return listener


def kill_worker(listener, event):
    os.kill(listener.workers[event.unit], signal.SIGKILL)


def once(path):
    """True for the first process that asks."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def note(path, **values):
    """One line more in a file that several processes write."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, json.dumps(values).encode() + b"\n")
    os.close(fd)


def notes(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def alive(process):
    """Whether it runs; one that is only not yet waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def still_there(processes, within_s=GONE_WITHIN_S):
    """Those of these psutil processes that have not ended in time; they are ended here."""
    deadline_s = time.monotonic() + within_s
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for process in left:
        process.kill()
    return left


# -- programs of their own ----------------------------------------------------------------------------

IMPORTS = """
import os, signal, sys, threading, time
from pathlib import Path
import numpy as np
from fanfold.events import Batch, UnitReady
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.report.progress import Progress
from fanfold.testing.fakes import FakeOnUnit, FakeTask
"""

# Says so when both workers are there and so many batches are done; argv: input, output, seconds a token, batches.
LONG_JOB = (
    IMPORTS
    + """
docs, out, token_s, num_batches = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
class Show:
    batches = units = 0
    def __call__(self, event):
        self.batches += isinstance(event, Batch)
        self.units += isinstance(event, UnitReady)
        if self.batches >= num_batches and self.units >= 2:
            self.batches = -10**9
            print("running", flush=True)
    def start(self, rows_done): pass
    def say(self, text): pass
    def stop(self): pass
run_job(FakeTask(token_s=token_s), Request(inputs=(docs,), out=out, on="cpu:2"), Show(), signals=True)
print("done", flush=True)
"""
)


def python(*words, folder, stdin="", **variables):
    """A program of its own with every warning an error; it ends by itself or is ended."""
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, **variables},
    )


class LongJob:
    """LONG_JOB in a process group of its own, once it runs, with the processes it has started."""

    def __init__(self, docs, out, *, token_s=5e-5, num_batches=3):
        self.out = out
        words = [sys.executable, "-c", LONG_JOB, str(docs), str(out), str(token_s), str(num_batches)]
        self.popen = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self.popen.pid
        self.children = []

    def __enter__(self):
        try:
            line = self.popen.stdout.readline()
            assert line == "running\n", self.popen.communicate(timeout=20)[1]
            self.children = psutil.Process(self.pid).children(recursive=True)
            assert len(self.children) >= 2
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.popen.kill()  # nothing, where it has ended
        self.popen.communicate(timeout=20)
        still_there(self.children)

    def end(self):
        """What it said until it ended."""
        return self.popen.communicate(timeout=20)


# -- 1 to 4: how a program is started -----------------------------------------------------------------


def test_pain_01_no_main_guard_on_a_three_line_script(docs, tmp_path):
    (tmp_path / "script.py").write_text(
        "from pathlib import Path; from fanfold.job import request, run; from fanfold.testing import fakes\n"
        f"asked = request.Request(inputs=({str(docs)!r},), out=Path('out'), on='cpu:2')\n"
        "print(run.run_job(fakes.FakeTask(), asked).summary['rows_ok'])\n"
    )
    done = python("script.py", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{NUM_ROWS}\n"  # once: no worker ran the script again


CELL = """
run = run_job(FakeTask(), Request(inputs=(docs,), out=Path("out"), on="cpu:2", overwrite=True))
print(run.summary["rows_ok"])
"""
NOTEBOOK = """
import asyncio, sys
main = sys.modules["__main__"]
vars(main).pop("__file__", None)
async def kernel(cells):
    for number, cell in enumerate(cells):
        exec(compile(cell, f"<ipython-input-{number}>", "exec"), vars(main))
asyncio.run(kernel([%r, %r, %r]))
"""


def test_pain_02_never_returns_in_a_notebook(docs, tmp_path):
    """No file that a worker could run, an event loop that runs, and a cell that is run twice."""
    program = f"{IMPORTS}docs = {str(docs)!r}\n"
    done = python("-c", NOTEBOOK % (program, CELL, CELL), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{NUM_ROWS}\n" * 2


CLASSES = """
from dataclasses import dataclass
double = lambda number: 2 * number

@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths(FakeTask):
    plus: int = 1
    def open(self, unit, numerics):
        class OnUnit(FakeOnUnit):
            def compute(self, batch):
                vectors = np.zeros((len(batch.ids), 8), np.float32)
                vectors[:, 0] = [double(len(row)) + self.task.plus for row in batch.ids]
                return {"embedding": vectors}
        return OnUnit(self)

run = run_job(Lengths(plus=5), Request(inputs=(docs,), out=Path("out"), on="cpu:2"))
table = run.table()
lengths = [min(64, len(text)) for text in table["text"].to_pylist()]
print([vector[0] for vector in table["embedding"].to_pylist()] == [2 * n + 5 for n in lengths], len(lengths))
"""


def test_pain_03_lambdas_and_notebook_classes_travel(docs, tmp_path):
    """From a program that came through stdin: workers cannot import what it defines."""
    done = python("-", stdin=f"{IMPORTS}docs = {str(docs)!r}\n{CLASSES}", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"True {NUM_ROWS}\n"


# A module that runs a job while it is imported. A worker that would start a process from there ends instead and
# leaves the file `nested`: without that, workers would start workers without end.
AT_IMPORT = (
    IMPORTS
    + """
import subprocess
first = os.environ.setdefault("FIRST_PID", str(os.getpid()))
class Popen(subprocess.Popen):
    def __init__(self, words, *more, **options):
        if "fanfold.engine._worker" in words and first != str(os.getpid()):
            Path("nested").touch()
            os._exit(9)
        super().__init__(words, *more, **options)
subprocess.Popen = Popen
class Mine(FakeTask):
    __slots__ = ()
"""
)


def import_jobs(folder, docs, *, task, out):
    request = f"Request(inputs=({str(docs)!r},), out=Path({out}), on='cpu:1')"
    (folder / "jobs.py").write_text(AT_IMPORT + f"run = run_job({task}(), {request})\n")
    start_s = time.monotonic()
    done = python("-c", "import jobs; print(jobs.run.summary['rows_ok'])", folder=folder)
    print(f"exit {done.returncode} after {time.monotonic() - start_s:.1f} s\n{done.stderr}")
    return done


def test_pain_04_work_at_import_time(docs, tmp_path):
    done = import_jobs(tmp_path, docs, task="FakeTask", out="'out'")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{NUM_ROWS}\n")


def test_pain_04_a_job_inside_a_worker_is_refused(docs, tmp_path):
    """The workers import the module for its class, and so begin its job again, each in a folder of its own."""
    done = import_jobs(tmp_path, docs, task="Mine", out="f'out-{os.getpid()}'")
    assert not (tmp_path / "nested").exists(), "a worker has started workers"
    assert done.returncode == 1
    assert "inside a worker" in done.stderr


# -- 5 to 8: cores and threads ------------------------------------------------------------------------


def threads_now():
    """What a unit may run: the environment's word, and the numbers of the pools that are there."""
    import pyarrow as pa
    import threadpoolctl

    np.ones((300, 300)) @ np.ones((300, 300))
    return {
        "pid": os.getpid(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS"),
        "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS"),
        "pools": [pool["num_threads"] for pool in threadpoolctl.threadpool_info()],
        "arrow": pa.cpu_count(),
        "running": psutil.Process().num_threads(),
    }


def test_pain_05_processes_times_threads(docs, tmp_path, monkeypatch, fresh):
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "16")
    path = tmp_path / "notes"
    task = Doing(on_compute=lambda ids: note(path, **threads_now()), token_s=SLOW)
    run(docs, tmp_path / "out", task, on="cpu:2")
    found = notes(path)
    assert len({entry["pid"] for entry in found}) == 2
    for entry in found:
        assert [entry[name] for name in entry if name.endswith("_THREADS")] == ["1"] * 3
        assert set(entry["pools"]) <= {1}
        assert entry["arrow"] == 1
        assert entry["running"] <= 4  # its own, and Arrow's one for computing and a few that wait for the disk


def test_pain_06_set_num_threads_is_verified_not_believed(docs, tmp_path, monkeypatch):
    """A model that raises the number while it loads; and a pool that does not obey at all."""
    import threadpoolctl

    if not threadpoolctl.threadpool_info():
        pytest.skip("this numpy has no pool of threads that could be set")
    path, pools = tmp_path / "notes", tmp_path / "pools"

    def raise_number():
        threadpoolctl.threadpool_limits(limits=4)
        note(pools, pools=threads_now()["pools"])

    task = Doing(on_load=raise_number, on_compute=lambda ids: note(path, **threads_now()))
    run(docs, tmp_path / "out", task, on="cpu:1")
    assert 4 in notes(pools)[0]["pools"]
    assert {number for entry in notes(path) for number in entry["pools"]} == {1}

    stubborn = [{"internal_api": "stubborn", "num_threads": 8}]
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: stubborn)
    with pytest.raises(InternalError, match=r"1 thread\(s\) on this unit") as caught:
        run(docs, tmp_path / "out2", on="inline")
    assert "stubborn 8" in str(caught.value)


@pytest.mark.torch
@pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'")
def test_pain_06_torch_in_a_worker_obeys_too(docs, tmp_path, monkeypatch, fresh):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    path = tmp_path / "notes"

    def numbers():
        import torch

        pools = re.findall(r"_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
        return {"torch": torch.get_num_threads(), "pools": [int(number) for number in pools]}

    def raise_number():
        import torch

        torch.set_num_threads(3)
        note(path, when="load", **numbers())

    task = Doing(modules=("torch",), on_load=raise_number, on_compute=lambda ids: note(path, when="now", **numbers()))
    run(docs, tmp_path / "out", task, on="cpu:1", limit=100)
    first, *later = notes(path)
    assert first["torch"] == 3
    assert later
    for entry in later:
        assert {entry["torch"], *entry["pools"]} == {1}


def test_pain_07_threads_are_the_planners_and_it_says_how_many(docs, tmp_path, monkeypatch, fresh):
    """A launcher's OMP_NUM_THREADS=1 neither slows a plan of two threads down nor hides what was chosen."""
    numerics_of = job_run._numerics
    monkeypatch.setattr(job_run, "_numerics", lambda *args: replace(numerics_of(*args), threads_per_unit=2))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "notes"
    done = run(docs, tmp_path / "out", Doing(on_compute=lambda ids: note(path, **threads_now())), on="cpu:1")
    for entry in notes(path):
        assert [entry[name] for name in entry if name.endswith("_THREADS")] == ["2"] * 3
        assert max(entry["pools"], default=2) <= 2
    assert done.plan["numerics"]["threads_per_unit"] == 2
    assert "2 thread(s) a unit" in done.report


@pytest.fixture
def container(tmp_path, monkeypatch):
    """container(files) -> from now on a machine of 64 cores and 64 GB, its control group of these files."""

    def make(**files):
        texts = {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
            "proc/meminfo": "MemTotal: 62500000 kB\n",
            **{f"sys/fs/cgroup/{name.replace('_', '.')}": text for name, text in files.items()},
        }
        for name, text in texts.items():
            (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "root" / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: 64)
            patch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
            machine = discover(tmp_path / "root")
        monkeypatch.setattr(job_run, "discover", lambda: machine)
        return machine

    return make


@on_linux
def test_pain_08_as_many_workers_as_cores_are_allowed(docs, tmp_path, container):
    assert container().cores == 64
    assert len(run(docs, tmp_path / "all", on="cpu", dry_run=True).plan["units"]) > 2
    container(cpu_max="200000 100000\n")
    plan = run(docs, tmp_path / "two", on="cpu", dry_run=True).plan
    assert plan["units"] == ["cpu:0", "cpu:1"]
    assert "the CPU quota is 2" in plan["reasons"][0]


@on_linux
def test_pain_08_one_core_that_may_be_used_gets_one_worker(docs, tmp_path):
    allowed = os.sched_getaffinity(0)
    listener = Listener()
    os.sched_setaffinity(0, {min(allowed)})
    try:
        done = run(docs, tmp_path / "out", display=listener, on="cpu")
    finally:
        os.sched_setaffinity(0, allowed)
    assert done.plan["units"] == ["cpu:0"]
    assert len(listener.of(UnitReady)) == 1


# -- 9 to 13: memory, and causes that are said --------------------------------------------------------


@on_linux
def test_pain_09_no_tuner_grows_into_the_oom_killer(docs, tmp_path, container):
    """The plan keeps below the limit from the start; a unit that wants more fails its row, and none is added."""
    container(memory_max="1000000000\n")
    plan = run(docs, tmp_path / "dry", on="cpu", dry_run=True).plan
    assert len(plan["units"]) * plan["unit_memory_bytes"] <= 1_000_000_000
    assert "memory for 3" in " ".join(plan["reasons"])

    most = 0

    def on_event(event):
        nonlocal most
        if isinstance(event, Batch):
            most = max(most, len(psutil.Process(listener.zygote).children()))

    listener = Listener(on_event)
    task = FakeTask(faults={text_of(700): "memory"})
    done = run(docs, tmp_path / "out", task, listener, memory_per_unit="300MB")
    assert done.plan["units"] == ["cpu:0", "cpu:1"]
    assert most == 2
    assert (done.summary["rows_ok"], done.summary["rows_failed"]) == (NUM_ROWS - 1, 1)
    assert "--memory-per-unit" in (tmp_path / "out" / "quarantine.jsonl").read_text()


@on_linux
def test_pain_10_the_containers_memory_counts_not_the_hosts(docs, tmp_path, container):
    assert container().memory_bytes == 64_000_000_000
    machine = container(memory_max="536870912\n")
    assert machine.memory_bytes == 536_870_912
    plan = run(docs, tmp_path / "out", on="cpu", dry_run=True).plan
    assert plan["units"] == ["cpu:0"]
    assert "memory for 1" in " ".join(plan["reasons"])


def test_pain_11_a_worker_killed_for_memory_is_noticed_at_once_and_called_so(docs, expected, tmp_path, monkeypatch):
    kills = itertools.count()  # the system's counter has risen whenever it is read
    monkeypatch.setattr(local, "read_oom_kills", lambda: next(kills))
    killed_s = []

    def kill(listener, event):
        killed_s.append(time.monotonic())
        kill_worker(listener, event)

    listener = at_batch(4, kill)
    done = run(docs, tmp_path / "out", FakeTask(token_s=SLOW), listener)
    (died,) = listener.of(UnitDied)
    assert died.at_s - killed_s[0] < 2
    assert died.cause.startswith("out of memory: killed by SIGKILL")
    assert done.summary["retries"] == {"OutOfMemory": 1}
    assert bytes_of(tmp_path / "out") == expected


def test_pain_12_what_died_of_what_and_where_is_said(docs, tmp_path):
    """Unit, signal, window and piece at once; the row and its id in the end."""
    listener = Listener()
    run(docs, tmp_path / "out", FakeTask(faults={text_of(3): "segfault"}), listener, id="id", limit=5)
    for died in listener.of(UnitDied):
        assert died.unit.startswith("cpu:")
        assert died.cause.startswith("killed by SIGSEGV")
    said = listener.of(Note)[0].text
    assert re.match(r"a unit killed by SIGSEGV.* in window 0 \(from row 0\), piece 0: ", said), said
    (line,) = notes(tmp_path / "out" / "quarantine.jsonl")
    assert (line["row"], line["id"], line["error"]) == (3, 3, "Segfault")
    assert "SIGSEGV" in line["message"]


def test_pain_12_out_of_memory_is_said_with_what_was_held_and_what_is_allowed(docs, expected, tmp_path, monkeypatch):
    weighed = []

    def heavy_at_first(pid):
        weighed.append(pid)
        return 5_000_000_000 if len(weighed) == 1 else 1_000_000

    monkeypatch.setattr(local, "private_bytes", heavy_at_first)
    monkeypatch.setattr(local, "_WEIGH_EVERY_S", 0.0)
    listener = Listener()
    run(docs, tmp_path / "out", FakeTask(token_s=SLOW), listener, memory_per_unit="400MB")
    (died,) = listener.of(UnitDied)
    assert "out of memory: it held 5.00 GB of its own, 400 MB are allowed (--memory-per-unit)" in died.cause
    assert bytes_of(tmp_path / "out") == expected


def test_pain_13_the_root_cause_itself_is_in_the_error(docs, tmp_path):
    def read_vocabulary():
        raise KeyError("no such token: [HUH]")

    with pytest.raises(PieceFailed) as caught:
        run(docs, tmp_path / "raised", Doing(on_prepare=read_vocabulary))
    assert "KeyError: 'no such token: [HUH]'" in str(caught.value)
    assert "in read_vocabulary" in str(caught.value)  # the worker's own traceback

    def die_loudly():
        for number in range(80):
            print(f"line {number}", file=sys.stderr)
        os.write(2, b"libmodel: version 3 of the file is not known")
        os._exit(7)

    with pytest.raises(UnitLost) as caught:
        run(docs, tmp_path / "died", Doing(on_load=die_loudly))
    assert "ended with exit code 7" in str(caught.value)
    assert "line 79\nlibmodel: version 3 of the file is not known" in str(caught.value)
    assert "line 29\n" not in str(caught.value)  # the last 50 lines are enough


# -- 14 to 18: workers that die, hang, or are stopped -------------------------------------------------


def test_pain_14_one_dead_worker_leaves_the_others_usable(docs, expected, tmp_path):
    victims = []

    def kill(listener, event):
        victims.append(event.unit)
        kill_worker(listener, event)

    first = at_batch(4, kill)
    run(docs, tmp_path / "first", FakeTask(token_s=SLOW), first)
    before = {event.unit: event.pid for event in reversed(first.of(UnitReady))}
    second = Listener()
    run(docs, tmp_path / "second", FakeTask(token_s=SLOW), second)
    survivor = ({"cpu:0", "cpu:1"} - set(victims)).pop()
    assert second.workers == first.workers  # warm
    assert first.workers[survivor] == before[survivor]
    assert first.workers[victims[0]] != before[victims[0]]
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second") == expected


def test_pain_15_a_worker_that_dies_while_it_loads_orphans_nothing(docs, expected, tmp_path):
    task = FakeTask(load_fault="once:exit", once_path=str(tmp_path / "once"))
    done = run(docs, tmp_path / "out", task)
    assert (tmp_path / "once").exists()
    assert (done.exit_code, done.summary["rows_ok"]) == (0, NUM_ROWS)
    assert sum(done.summary["retries"].values()) == 1
    assert bytes_of(tmp_path / "out") == expected


def test_pain_16_nothing_is_lost_when_a_stop_meets_a_result(docs, expected, tmp_path, seed):
    """Stopped again and again at random moments, each time a result is about to arrive."""
    chance = random.Random(seed)
    exit_codes = []
    for _ in range(5):
        listener = at_batch(chance.randrange(1, 6), lambda listener, event: os.kill(os.getpid(), signal.SIGINT))
        try:
            run(docs, tmp_path / "out", FakeTask(token_s=chance.choice([0.0, SLOW])), listener, signals=True)
        except Stopped as error:
            exit_codes.append(error.exit_code)
    done = run(docs, tmp_path / "out")
    print(f"stopped {len(exit_codes)} times; {done.summary['rows_resumed']} rows resumed")
    assert set(exit_codes) == {4}
    assert (done.summary["rows_in"], done.summary["rows_ok"]) == (NUM_ROWS, NUM_ROWS)
    assert bytes_of(tmp_path / "out") == expected


def spin_in_python():
    while True:
        pass


def spin_in_c():
    sum(itertools.repeat(0))  # never looks at signals, never gives the interpreter lock back


@pytest.mark.parametrize("spin", [spin_in_python, spin_in_c])
def test_pain_17_a_worker_at_full_speed_is_killed_after_its_time(docs, expected, tmp_path, spin):
    path = tmp_path / "once"
    start_s = time.monotonic()
    listener = Listener()
    task = Doing(on_compute=lambda ids: spin() if once(path) else None)
    done = run(docs, tmp_path / "out", task, listener, timeout_batch="1s")
    assert time.monotonic() - start_s < 20
    assert path.exists()
    assert done.exit_code == 0
    assert done.summary["retries"] == {"Hang": 1}
    (died,) = listener.of(UnitDied)
    assert "no sign of life for 1 s (--timeout-batch): killed" in died.cause
    (old,) = {event.pid for event in listener.of(UnitReady)} - set(listener.workers.values())
    assert not psutil.pid_exists(old) or not alive(psutil.Process(old))
    assert bytes_of(tmp_path / "out") == expected


def test_pain_18_many_faults_end_with_an_answer(docs, tmp_path):
    """A fault in every batch, and one that kills: each is found, all other rows are computed."""
    num_rows = 300
    faults = {row: "raise" for row in range(20, num_rows, 20)} | {103: "exit"}
    start_s = time.monotonic()
    listener = Listener()
    task = FakeTask(faults={text_of(row): fault for row, fault in faults.items()})
    done = run(docs, tmp_path / "out", task, listener, limit=num_rows)
    print(f"{len(listener.of(UnitDied))} deaths in {time.monotonic() - start_s:.1f} s")
    assert done.exit_code == 3
    assert sorted(line["row"] for line in notes(tmp_path / "out" / "quarantine.jsonl")) == sorted(faults)
    assert done.table()["row"].to_pylist() == [row for row in range(num_rows) if row not in faults]
    assert time.monotonic() - start_s < 30


def test_pain_18_nothing_but_faults_ends_with_an_answer(docs, tmp_path, monkeypatch):
    monkeypatch.setattr(job_agenda, "MAX_DEATHS_IN_A_ROW", 6)
    listener = Listener()
    start_s = time.monotonic()
    with pytest.raises(UnitLost) as caught:
        run(docs, tmp_path / "out", Doing(on_compute=lambda ids: os._exit(11)), listener)
    print(f"given up after {time.monotonic() - start_s:.1f} s")
    assert len(listener.of(UnitDied)) <= 10
    assert "deaths of units in a row; the last: ended with exit code 11" in str(caught.value)
    assert time.monotonic() - start_s < 30


# -- 19 to 24: what is left behind --------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(docs, tmp_path_factory):
    """A job whose parent was killed: its folder, its processes and those of them that were left."""
    job = LongJob(docs, tmp_path_factory.mktemp("killed") / "out", num_batches=12)
    with job:
        job.commands = [" ".join(child.cmdline()) for child in job.children]
        job.popen.send_signal(signal.SIGKILL)
        job.end()
        job.left = still_there(job.children)
    return job


def test_pain_19_ctrl_c_leaves_no_process_that_could_hold_memory(docs, tmp_path):
    """A terminal sends Ctrl-C to the whole group. (What a GPU keeps, it keeps for a process: none is left.)"""
    with LongJob(docs, tmp_path / "out") as job:
        os.killpg(job.pid, signal.SIGINT)
        output, errors = job.end()
        assert not still_there(job.children)
    assert "done" not in output
    assert job.popen.returncode == 1  # the script does not catch Stopped
    assert errors.splitlines()[0].startswith("Traceback")
    assert errors.count("Traceback") == 1  # no worker wrote one of its own
    assert "fanfold.errors.Stopped" in errors


def test_pain_20_no_orphans_after_the_parent_was_killed(killed):
    assert killed.popen.returncode == -signal.SIGKILL
    assert len(killed.children) >= 2
    assert not killed.left


def test_pain_21_only_processes_of_our_own_are_killed(docs, tmp_path, monkeypatch):
    """Others of the same group and the same parent live on: after a kill for time, an abandoned job, a shutdown."""
    sent = []
    kill = os.kill

    def watched(pid, number):
        sent.append(pid)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", watched)
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("a whole group was signalled"))
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        path = tmp_path / "once"
        first, second = Listener(), Listener()
        task = Doing(on_compute=lambda ids: time.sleep(60) if once(path) else None)
        run(docs, tmp_path / "out", task, first, timeout_batch="1s")
        with pytest.raises(FanfoldError):
            run(docs, tmp_path / "out2", FakeTask(load_fault="raise"), second)
        engines.shutdown()
        ours = {event.pid for listener in (first, second) for event in listener.of((UnitReady, ProcessStarted))}
        assert sent
        assert set(sent) <= ours
        assert bystander.poll() is None
        assert os.getpgid(bystander.pid) == os.getpgid(0)
    finally:
        bystander.communicate(b"\n", timeout=20)
    assert bystander.returncode == 0


@on_linux
def test_pain_22_nothing_is_put_into_dev_shm(docs, tmp_path):
    shm = Path("/dev/shm")
    held, appeared = set(), set()

    def names():
        return set(os.listdir(shm)) if shm.exists() else set()

    def look(event):
        appeared.update(names() - before)
        if not isinstance(event, Batch) or len(listener.events) % 4:
            return
        for pid in (listener.zygote, *listener.workers.values()):
            held.update(re.findall(r"/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text()))
            held.update(str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink())

    for attempt in range(3):  # what somebody else has put there does not appear every time
        before = names()
        appeared.clear()
        listener = Listener(look)
        run(docs, tmp_path / f"out{attempt}", FakeTask(token_s=SLOW), listener)
        assert len(listener.of(Batch)) > 5
        if not appeared:
            break
    assert not [path for path in held if path.startswith(str(shm))]
    assert not appeared


def test_pain_23_no_talk_of_leaks_and_none(docs, killed, tmp_path):
    """What a killed run has left is gone after the next; no watcher of shared objects runs beside it."""
    assert all("fanfold.engine._worker" in command for command in killed.commands), killed.commands
    out = tmp_path / "out"
    shutil.copytree(killed.out, out)
    (out / "tmp").mkdir(exist_ok=True)
    (out / "tmp" / "of-a-killed-worker").write_text("half a piece")
    words = f"run_job(FakeTask(), Request(inputs=({str(docs)!r},), out=Path('out'), on='cpu:2'))"
    done = python("-c", IMPORTS + words, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".lock")
    assert left == [
        *("_SUCCESS", "commits.log", "data/part-000000000.parquet", "run.json", "summary.json", "trace.json.gz")
    ]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, from now on; `ff.embed` computes with the fake."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setitem(MAKERS, "embed", lambda: lambda model=None: FakeTask(faults={"bad": "raise"}))
    return tmp_path / "tmp"


def test_pain_23_data_in_memory_leave_no_file(temporary):
    assert ff.embed(["a text"] * 200, on="cpu:2").shape == (200, 8)
    with pytest.raises(FanfoldError, match="every row without an error"):
        ff.embed(["good", "bad"], on="cpu:2")
    assert not list(temporary.iterdir())


IN_MEMORY = (
    IMPORTS
    + """
import fanfold as ff
from fanfold.job.verbs import MAKERS
MAKERS["embed"] = lambda: lambda model=None: FakeTask(token_s=10)
ff.embed(["a text"] * 200, on="cpu:2")
"""
)


def test_pain_23_data_in_memory_of_a_killed_process_are_gone_after_the_next(temporary):
    variables = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen([sys.executable, "-c", IN_MEMORY], env=variables) as killed:
        try:
            deadline_s = time.monotonic() + 30
            while not list(temporary.glob("*/out/run.json")) and time.monotonic() < deadline_s:
                time.sleep(0.02)
        finally:
            killed.kill()
    if not list(temporary.iterdir()):
        pytest.skip("it was killed before it had begun")
    assert ff.embed(["a text"] * 200, on="cpu:2").shape == (200, 8)
    assert not list(temporary.iterdir())


@on_linux
def test_pain_24_a_process_that_has_threads_is_never_forked(docs, expected, tmp_path, monkeypatch):
    """The caller has threads, so it starts a process that has one, and that one forks."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("the caller was forked"))
    threads = []
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(60,))
    thread.start()

    def on_event(event):
        if isinstance(event, Batch):
            threads.append(psutil.Process(listener.zygote).num_threads())

    listener = Listener(on_event)
    try:
        run(docs, tmp_path / "out", FakeTask(token_s=SLOW), listener)
    finally:
        stop.set()
        thread.join(5)
    assert threads
    assert set(threads) == {1}
    assert psutil.Process(listener.zygote).ppid() == os.getpid()
    assert {psutil.Process(pid).ppid() for pid in listener.workers.values()} == {listener.zygote}
    assert bytes_of(tmp_path / "out") == expected


@on_linux
def test_pain_24_an_import_that_starts_a_thread_means_no_fork(docs, expected, tmp_path, monkeypatch, fresh):
    (tmp_path / "has_a_thread.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    listener = Listener()
    run(docs, tmp_path / "out", Doing(modules=("has_a_thread",)), listener)
    assert psutil.Process(listener.zygote).num_threads() == 2
    assert {psutil.Process(pid).ppid() for pid in listener.workers.values()} == {os.getpid()}
    assert len(listener.workers) == 2
    assert bytes_of(tmp_path / "out") == expected


# -- 25 to 29: results, and what a person sees --------------------------------------------------------


def test_pain_25_callers_side_by_side_get_their_own_rows(tmp_path):
    words = ("one", "other")
    inputs = {word: write(tmp_path / f"{word}.jsonl", 300 + 100 * len(word), word) for word in words}
    whole = {word: run(inputs[word], tmp_path / f"{word}-whole", on="inline").table() for word in words}
    found = {}

    def call(word):
        found[word] = run(inputs[word], tmp_path / f"{word}-out").table()

    threads = [threading.Thread(target=call, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(words)
    for word in words:
        assert found[word].equals(whole[word])
        assert found[word]["row"].to_pylist() == found[word]["id"].to_pylist() == list(range(len(whole[word])))


@pytest.mark.parametrize("change", [lambda vectors: vectors[:-1], lambda vectors: np.concatenate([vectors, vectors])])
def test_pain_25_results_that_are_not_one_a_row_are_refused(docs, tmp_path, change):
    with pytest.raises(FanfoldError) as caught:
        run(docs, tmp_path / "out", Doing(on_result=change))
    assert "values of embedding" in str(caught.value)
    assert "one value a row" in str(caught.value)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize(("on", "token_s"), [("cpu:1", 0.0), ("cpu:2", 0.0), ("cpu:2", SLOW)])
def test_pain_26_the_same_bytes_however_the_work_is_dealt(docs, expected, tmp_path, on, token_s):
    """The fake's vectors depend on the shape of their batch: batches must not depend on units or their speed."""
    run(docs, tmp_path / "out", FakeTask(token_s=token_s), on=on)
    assert bytes_of(tmp_path / "out") == expected


NOISY = """
class Noisy(FakeTask):
    __slots__ = ()
    def open(self, unit, numerics):
        class OnUnit(FakeOnUnit):
            def load(self):
                print("loading", "\\r" + "#" * 200, flush=True)
                FakeOnUnit.load(self)
            def compute(self, batch):
                for number in range(200):  # in all more than a pipe holds
                    print("\\rBatches: 50%|#####     |", "x" * 100, end="", file=sys.stderr, flush=True)
                    print("log line", number, "x" * 100, flush=True)
                return FakeOnUnit.compute(self, batch)
        return OnUnit(self)
run_job(Noisy(), Request(inputs=(docs,), out=Path("out"), on="cpu:2"), Progress())
print("done")
"""


def test_pain_27_no_garbled_bars_and_no_flood_of_lines(docs, tmp_path):
    done = python("-c", f"{IMPORTS}docs = {str(docs)!r}\n{NOISY}", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert not re.search(r"[\r\x1b]|Batches|log line|#", done.stderr)
    assert "plan:    data=2 on cpu:0, cpu:1" in done.stderr
    assert len(done.stderr.splitlines()) < 10


def test_pain_28_what_a_killed_run_has_done_is_on_disk_and_stays(docs, expected, killed, tmp_path):
    out, calls = tmp_path / "out", tmp_path / "calls"
    shutil.copytree(killed.out, out)
    pieces = {path.name: path.stat().st_ino for path in (out / "pieces").iterdir()}
    assert pieces
    overwritten = {}

    def on_event(event):
        for path in (out / "pieces").glob("*.arrow"):
            if pieces.get(path.name, path.stat().st_ino) != path.stat().st_ino:
                overwritten[path.name] = event

    done = run(docs, out, FakeTask(calls_path=str(calls)), Listener(on_event), on="inline")
    print(f"{done.summary['rows_resumed']} rows were on disk")
    assert done.summary["rows_resumed"] > 0
    assert not overwritten
    run(docs, tmp_path / "whole", FakeTask(calls_path=str(tmp_path / "whole-calls")), on="inline")
    assert calls.stat().st_size < (tmp_path / "whole-calls").stat().st_size
    assert bytes_of(out) == expected


TOKENIZE = """
from tokenizers import Tokenizer, models, pre_tokenizers
tokenizer = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.encode_batch(["word " * 20] * 500)  # the caller's threads are there now

class Tokenizing(FakeTask):
    __slots__ = ()
    imports = ("numpy", "tokenizers", "fanfold.testing.fakes")
    def open(self, unit, numerics):
        class OnUnit(FakeOnUnit):
            def load(self):
                os.dup2(os.open(f"stderr-{os.getpid()}", os.O_WRONLY | os.O_CREAT), 2)  # of a worker: kept in a file
                FakeOnUnit.load(self)
            def compute(self, batch):
                assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
                assert len(tokenizer.encode_batch(["word " * 20] * len(batch.ids))) == len(batch.ids)
                return FakeOnUnit.compute(self, batch)
        return OnUnit(self)
run = run_job(Tokenizing(), Request(inputs=(docs,), out=Path("out"), on="cpu:2"))
print(run.summary["rows_ok"], "TOKENIZERS_PARALLELISM" in os.environ)
"""


@pytest.mark.torch
@pytest.mark.skipif(find_spec("tokenizers") is None, reason="needs the extra 'torch'")
def test_pain_29_no_warning_of_tokenizers(docs, tmp_path):
    """Neither the caller, who has used one on all its threads, nor a worker, who then gets it, hears of forks."""
    program = f"{IMPORTS}docs = {str(docs)!r}\nos.environ.pop('TOKENIZERS_PARALLELISM', None)\n{TOKENIZE}"
    done = python("-c", program, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{NUM_ROWS} False\n"  # and the caller's own setting is left alone
    said = {path.name: path.read_text() for path in tmp_path.glob("stderr-*")}
    assert len(said) == 2
    assert set(said.values()) == {""}


# -- the list -----------------------------------------------------------------------------------------


def test_every_pain_has_a_test_or_a_reason():
    here = {int(found[1]) for name in globals() if (found := re.match(r"test_pain_(\d\d)_", name))}
    assert here | PAINS.keys() | NOT_HERE.keys() == set(range(1, 31))
    assert not NOT_HERE.keys() & (here | PAINS.keys())
    assert all(NOT_HERE.values())


def test_every_test_that_is_named_exists():
    root = Path(__file__).resolve().parents[2]
    defined = {}
    for pain, names in PAINS.items():
        assert names, pain
        for name in names:
            path, _, test = name.partition("::")
            if path not in defined:
                tree = ast.parse((root / path).read_text())
                defined[path] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert test in defined[path], f"pain {pain}: there is no {name}"
