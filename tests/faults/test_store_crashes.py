"""A job that dies at any of its requests to an object store: the same command ends with the same bytes."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.data import journal, objects, run_folder
from fanfold.data.run_folder import RunFolder
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.plan.numerics import Numerics
from fanfold.testing.fakes import FakeTask
from fanfold.testing.stores import MemoryObjects

pytestmark = [pytest.mark.faults, pytest.mark.timeout(280)]

POISON = "poison"
TASK = FakeTask(width=4, faults={POISON: "raise"})
TEXTS = ["one", "two words", POISON, "", "a longer text than the others", "six", "seven of them", "8"]


class Crash(BaseException):
    """What no code of a job may catch: stands for the death of the process."""


class Dying:
    """Objects whose caller dies at call `at`, before it takes effect or after; then nothing answers any more."""

    def __init__(self, held, at, after):
        self.held, self.left, self.after = held, at, after

    def __getattr__(self, verb):
        real = getattr(self.held, verb)

        def call(*arguments):
            self.left -= 1
            if self.left < 0 or (self.left == 0 and not self.after):
                raise Crash
            answer = real(*arguments)
            if self.left == 0:
                raise Crash
            return answer

        return call


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(
        job_run, "_numerics", lambda task, kind: Numerics(window_rows=4, batch_tokens=32, windows_per_part=1)
    )
    monkeypatch.setattr(objects, "is_dead", lambda stamp: True)  # the holder is this process, which did not die
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    return path


def run(monkeypatch, source, held, **settings):
    for store in run_folder._OPENED.values():
        store._ends.close()
    run_folder._OPENED.clear()  # as another process
    monkeypatch.setattr(run_folder, "_objects", lambda url: (held, "out"))
    return run_job(TASK, Request(inputs=(str(source),), out="s3://bucket/out", on="inline", **settings))


def outcome(held):
    """What counts of a finished job: parts, failed rows, and what the log says in the end."""
    files = {name: data for name, data in held.held.items() if name.startswith(("out/data/", "out/quarantine"))}
    summary = json.loads(held.held["out/summary.json"])
    return files, {key: summary[key] for key in ("rows_in", "rows_ok", "rows_failed", "output_sha256")}


@pytest.mark.parametrize("after", [False, True])
def test_a_job_that_dies_at_any_request_is_finished_by_the_same_command(source, monkeypatch, after):
    whole = MemoryObjects()
    run(monkeypatch, source, whole)
    expected = outcome(whole)
    assert len(expected[0]) == 3  # two parts and the failed row
    deaths, count = 0, len(whole.calls)
    for at in range(1, count + 1):
        held = MemoryObjects()
        try:
            run(monkeypatch, source, Dying(held, at, after))
        except Crash:
            deaths += 1
        if "out/_SUCCESS" in held.held:  # it says that all is there
            assert outcome(held) == expected, at
        run(monkeypatch, source, held)
        assert outcome(held) == expected, at
        rest = {name.removeprefix("out/").partition("/")[0] for name in held.held}
        kept = {"run.json", "commits.log", "data", "quarantine.jsonl", "summary.json", "trace.json.gz", "_SUCCESS"}
        assert rest - {".lock"} - {name for name in rest if name.startswith(objects.PROBE)} == kept, at
        entries = journal.load(RunFolder(place="s3://bucket/out").open_to_write())
        leases = [(entry["window"], entry["first"]) for entry in entries if entry["kind"] == "lease"]
        assert len(leases) == len(set(leases)), at  # each piece was committed once
    assert deaths == count > 50


@pytest.mark.parametrize("after", [False, True])
def test_starting_anew_that_dies_at_any_request_leaves_what_can_be_started_anew(source, monkeypatch, after):
    whole = MemoryObjects()
    run(monkeypatch, source, whole)
    finished = dict(whole.held)
    whole.calls.clear()
    run(monkeypatch, source, whole, overwrite=True)
    expected = outcome(whole)
    deaths, count = 0, len(whole.calls)
    for at in range(1, count + 1):
        held = MemoryObjects()
        held.held.update(finished)
        try:
            run(monkeypatch, source, Dying(held, at, after), overwrite=True)
        except Crash:
            deaths += 1
        run(monkeypatch, source, held, overwrite=True)
        assert outcome(held) == expected, at
    assert deaths == count > 50


class Unreliable:
    """Every call fails twice, before it takes effect or after, and is answered the third time."""

    def __init__(self, held, after):
        self.held, self.after, self.tries = held, after, {}

    def __getattr__(self, verb):
        real = getattr(self.held, verb)

        def call(*arguments):
            key = (verb, *arguments[:1])
            self.tries[key] = self.tries.get(key, 0) + 1
            if self.tries[key] % 3 == 0:
                return real(*arguments)
            if self.after:
                real(*arguments)
            raise TimeoutError("no answer")

        return call


@pytest.mark.parametrize("after", [False, True])
def test_a_job_whose_every_request_is_answered_only_the_third_time_ends_well(source, monkeypatch, after):
    monkeypatch.setattr(run_folder, "PAUSE_S", 0.0)
    whole = MemoryObjects()
    run(monkeypatch, source, whole)
    held = MemoryObjects()
    run(monkeypatch, source, Unreliable(held, after))
    assert len(held.calls) >= len(whole.calls)
    assert outcome(held) == outcome(whole)
