"""Going on with a finished job: failed rows once more, appended rows, inputs that were only touched."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.errors import ResumeError
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

pytestmark = pytest.mark.usefixtures("small_windows")


def write(path, rows):
    path.write_text("".join(json.dumps({"id": i, "text": f"row {i} " + "x" * (i % 17)}) + "\n" for i in rows))
    return path


def run(inputs, out, *, faults=None, **options):
    names = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    task = FakeTask(faults={f"row {i} " + "x" * (i % 17): fault for i, fault in (faults or {}).items()})
    return run_job(task, Request(inputs=tuple(names), out=out, on="inline", id="id", sync=False, **options))


def rows_of(run):
    return run.table().column("row").to_pylist()


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.jsonl", "out.csv"])
def test_failed_rows_are_tried_again_and_all_others_stay(tmp_path, name):
    source = write(tmp_path / "in.jsonl", range(55))
    whole = run(source, tmp_path / f"whole-{name}")
    faults = {7: "raise", 33: "raise", 38: "raise"}
    first = run(source, tmp_path / name, faults=faults)
    assert first.exit_code == 3
    assert first.summary["rows_failed"] == 3
    again = run(source, tmp_path / name, faults={33: "raise"}, retry_failed=True)
    assert again.exit_code == 3
    assert (again.summary["rows_ok"], again.summary["rows_failed"]) == (54, 1)
    assert rows_of(again) == [i for i in range(55) if i != 33]
    last = run(source, tmp_path / name, retry_failed=True)
    assert last.exit_code == 0
    assert last.table().equals(whole.table())
    assert last.summary["output_sha256"] == whole.summary["output_sha256"]
    assert not (last.folder / "quarantine.jsonl").exists()


def test_a_retry_computes_only_the_pieces_of_the_failed_rows(tmp_path):
    source = write(tmp_path / "in.jsonl", range(55))
    run(source, tmp_path / "out", faults={33: "raise"})
    # Every row outside the failed row's piece would raise now; none of them is computed.
    poison = {i: "raise" for i in range(55) if not 30 <= i < 40}
    assert run(source, tmp_path / "out", faults=poison, retry_failed=True).exit_code == 0


def test_a_retry_leaves_other_parts_untouched(tmp_path):
    source = write(tmp_path / "in.jsonl", range(55))
    run(source, tmp_path / "out", faults={33: "raise"})
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "data").iterdir()}
    run(source, tmp_path / "out", retry_failed=True)
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out" / "data").iterdir()}
    assert sorted(after) == ["part-000000000.parquet", "part-000000001.g1.parquet", "part-000000002.parquet"]
    assert after["part-000000000.parquet"] == before["part-000000000.parquet"]


def test_a_retry_without_failed_rows_says_that_the_job_is_finished(tmp_path):
    source = write(tmp_path / "in.jsonl", range(12))
    run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", faults=dict.fromkeys(range(12), "raise"), retry_failed=True).exit_code == 0


def test_rows_that_could_not_be_read_are_not_tried_again(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 0, "text": "a"}\n{"id": 1, "text": null}\n')
    assert run(source, tmp_path / "out").exit_code == 3
    assert run(source, tmp_path / "out", retry_failed=True).exit_code == 3


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.jsonl", "out.csv"])
@pytest.mark.parametrize("count", [20, 25, 40])
def test_appended_rows_are_computed_and_committed_ones_stay(tmp_path, name, count):
    source = write(tmp_path / "in.jsonl", range(count))
    first = run(source, tmp_path / name).table()
    with source.open("a") as file:
        file.write(write(tmp_path / "more.jsonl", range(count, count + 13)).read_text())
    with pytest.raises(ResumeError) as refused:
        run(source, tmp_path / name)
    assert "in.jsonl: size was" in str(refused.value)
    poison = dict.fromkeys(range(count), "raise")  # what was computed is not computed again
    grown = run(source, tmp_path / name, faults=poison, allow_append=True)
    assert grown.exit_code == 0
    assert rows_of(grown) == list(range(count + 13))
    assert grown.table().slice(0, count).to_pylist() == first.to_pylist()
    assert grown.summary["rows_in"] == count + 13
    assert run(source, tmp_path / name).summary["rows_in"] == count + 13  # finished; no flag is needed any more


def test_files_may_be_added_behind_the_old_ones(tmp_path):
    tables = [pa.table({"id": range(at, at + 15), "text": [f"row {i}" for i in range(at, at + 15)]}) for at in (0, 15)]
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"in-{number}.parquet")
    run(tmp_path / "in-0.parquet", tmp_path / "out")
    both = [tmp_path / "in-0.parquet", tmp_path / "in-1.parquet"]
    assert rows_of(run(both, tmp_path / "out", allow_append=True)) == list(range(30))


def test_an_append_twice_and_a_retry_in_between(tmp_path):
    source = write(tmp_path / "in.jsonl", range(15))
    run(source, tmp_path / "out", faults={3: "raise"})
    write(source, range(29))
    run(source, tmp_path / "out", faults={20: "raise"}, allow_append=True)
    assert rows_of(run(source, tmp_path / "out", retry_failed=True)) == list(range(29))
    write(source, range(50))
    assert rows_of(run(source, tmp_path / "out", allow_append=True)) == list(range(50))


def test_changed_rows_are_refused_with_allow_append_too(tmp_path):
    source = write(tmp_path / "in.jsonl", range(25))
    run(source, tmp_path / "out")
    text = source.read_text().replace("row 3 ", "ROW 3 ")
    source.write_text(text + '{"id": 25, "text": "new"}\n')
    with pytest.raises(ResumeError) as refused:
        run(source, tmp_path / "out", allow_append=True)
    assert "rows 0 to 9 have changed" in str(refused.value)


def test_a_last_line_without_its_end_cannot_be_appended_to(tmp_path):
    source = write(tmp_path / "in.jsonl", range(5))
    source.write_text(source.read_text().rstrip("\n"))
    run(source, tmp_path / "out")
    source.write_text(source.read_text() + ' \n{"id": 5, "text": "new"}\n')
    with pytest.raises(ResumeError) as refused:
        run(source, tmp_path / "out", allow_append=True)
    assert "did not end with a line end" in str(refused.value)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_input_that_was_only_touched_is_read_again_and_accepted(tmp_path, form):
    source = write(tmp_path / "in.jsonl", range(25))
    if form == "parquet":
        pq.write_table(
            pa.Table.from_pylist([json.loads(x) for x in source.read_text().splitlines()]), tmp_path / "in.parquet"
        )
        source = tmp_path / "in.parquet"
    run(source, tmp_path / "out")
    os.utime(source, ns=(1, 1))
    assert run(source, tmp_path / "out", faults=dict.fromkeys(range(25), "raise")).exit_code == 0


def test_an_input_of_the_same_size_with_other_bytes_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", range(25))
    run(source, tmp_path / "out")
    source.write_text(source.read_text().replace("row 3 ", "ROW 3 "))
    with pytest.raises(ResumeError) as refused:
        run(source, tmp_path / "out")
    assert "rows 0 to 9 have changed" in str(refused.value)
