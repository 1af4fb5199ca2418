"""One poison row among many, whatever it does: only it is set aside, all others keep their bytes."""

from __future__ import annotations

import json
import math
import os
import time

import pyarrow.compute as pc
import pytest

from fanfold.errors import InternalError, OutOfMemory, UnitLost
from fanfold.job import engines
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeOnUnit, FakeTask

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

NUM_ROWS, POISON = 2000, 1234


@pytest.fixture(scope="module", autouse=True)
def workers():
    yield
    engines.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("poison") / "in.jsonl"
    rows = ({"id": f"k{i}", "text": "poison" if i == POISON else f"row {i} " + "x" * (i % 30)} for i in range(NUM_ROWS))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(inputs, out, on="cpu:2", *, faults=None, **options):
    task = FakeTask(faults=faults or {}, calls_path=str(out) + ".calls")
    return run_job(task, Request(inputs=(str(inputs),), out=out, on=on, id="id", sync=False, **options))


def calls(out):
    """How often the model was called."""
    return os.path.getsize(str(out) + ".calls")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return run(inputs, out, "inline").table(), calls(out)


FAULTS = {
    "raise": ("ValueError", "this row is poison", {}),
    "segfault": ("Segfault", "killed by SIGSEGV in string_at (__init__.py, line ", {}),
    "exit": ("UnitLost", "ended with exit code 7", {}),
    "hang": ("Hang", "no sign of life for 1 s", {"timeout_batch": "1s"}),
    "spin": ("Hang", "no sign of life for 1 s", {"timeout_batch": "1s"}),
    "memory": ("OutOfMemory", "--memory-per-unit", {"memory_per_unit": "300MB"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_only_the_poison_row_is_set_aside(tmp_path, inputs, whole, fault):
    error, words, options = FAULTS[fault]
    table, calls_without = whole
    done = run(inputs, tmp_path / "out", faults={"poison": fault}, **options)
    assert done.exit_code == 3
    (line,) = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert (line["row"], line["id"], line["error"]) == (POISON, f"k{POISON}", error)
    assert words in line["message"]
    assert done.table().equals(table.filter(pc.not_equal(table["row"], POISON)))
    assert done.summary["rows_in"] == done.summary["rows_ok"] + done.summary["rows_failed"] == NUM_ROWS
    if fault in ("raise", "memory"):  # found on the unit itself: no work is lost with a process
        batch_rows = max(1, 2048 // len("poison"))
        assert calls(tmp_path / "out") - calls_without <= math.ceil(math.log2(batch_rows)) + 1


@pytest.mark.parametrize("fault", ["raise", "segfault"])
def test_a_poison_row_may_stay_as_null(tmp_path, inputs, whole, fault):
    done = run(inputs, tmp_path / "out", faults={"poison": fault}, on_error="null")
    table = done.table()
    assert table.num_rows == NUM_ROWS
    assert [row for row in range(NUM_ROWS) if table["embedding"][row].as_py() is None] == [POISON]
    assert table["id"].to_pylist() == whole[0]["id"].to_pylist()


@pytest.mark.parametrize("fault", ["raise", "exit"])
def test_a_fault_that_does_not_come_back_fails_no_row(tmp_path, inputs, whole, fault):
    task = FakeTask(faults={"poison": f"once:{fault}"}, once_path=str(tmp_path / "once"))
    done = run_job(task, Request(inputs=(str(inputs),), out=tmp_path / "out", on="cpu:2", id="id", sync=False))
    assert done.exit_code == 0
    assert done.table().equals(whole[0])


def test_several_poison_rows_of_one_batch_are_all_found(tmp_path, inputs, whole):
    faults = {f"row {i} " + "x" * (i % 30): fault for i, fault in ((31, "raise"), (61, "raise"), (91, "segfault"))}
    done = run(inputs, tmp_path / "out", faults=faults)
    rows = [json.loads(x)["row"] for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert rows == [31, 61, 91]
    assert done.summary["rows_ok"] == NUM_ROWS - 3


def test_a_batch_that_fails_with_fillers_alone_is_not_laid_to_its_rows(tmp_path, inputs, monkeypatch):
    def always(self, batch):
        raise RuntimeError("the model is broken")

    monkeypatch.setattr(FakeOnUnit, "compute", always)
    with pytest.raises(InternalError) as caught:
        run(inputs, tmp_path / "out", "inline")
    assert "it fails whatever rows it holds: RuntimeError: the model is broken" in str(caught.value)


def test_a_batch_that_never_fits_into_memory_says_so(tmp_path, inputs, monkeypatch):
    def always(self, batch):
        raise MemoryError

    monkeypatch.setattr(FakeOnUnit, "compute", always)
    with pytest.raises(OutOfMemory) as caught:
        run(inputs, tmp_path / "out", "inline")
    assert "--memory-per-unit" in str(caught.value)


def test_units_that_die_of_everything_end_the_job_with_the_cause(tmp_path, inputs):
    start_s = time.monotonic()
    task = FakeTask(load_fault="exit")
    with pytest.raises(UnitLost) as caught:
        run_job(task, Request(inputs=(str(inputs),), out=tmp_path / "out", on="cpu:2", sync=False))
    assert "ended with exit code 7" in str(caught.value)
    assert time.monotonic() - start_s < 30
