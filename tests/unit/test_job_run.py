"""Jobs from request to result, without torch: FakeTask through run_job."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.data import journal
from fanfold.errors import DataError, FanfoldError, InputError, RequestError, ResumeError, Stopped
from fanfold.events import Batch
from fanfold.job import engines
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.plan.numerics import Numerics
from fanfold.plan.plan import Unit
from fanfold.split.batch import cut
from fanfold.tasks.task import ModelBatch
from fanfold.testing.fakes import FakeTask

# DESIGN.md, run folder; the ones behind are extras of ours, and adding one is a decision
SUMMARY_KEYS = {
    *("rows_in", "rows_ok", "rows_failed", "rows_resumed", "truncated", "elapsed_s", "load_s", "rows_per_s"),
    *("tokens_per_s", "padding_share", "peak_pss_bytes", "retries", "idle_share", "units_used", "level"),
    "output_sha256",
    *("first_commit_s", "tokens", "windows", "parts", "output", "file_sha256"),
}
TASK = FakeTask()
POISONED = 7  # row of the failing inputs below


@pytest.fixture(scope="module", autouse=True)
def _workers_end_with_the_module():
    yield
    engines.shutdown()


@pytest.fixture
def small(monkeypatch):
    """Call it to make windows, batches and parts so small that a few rows fill many of them."""

    def set_numerics(*, window_rows=20, batch_tokens=64, windows_per_part=1):
        def numerics(task, kind):
            return Numerics(window_rows=window_rows, batch_tokens=batch_tokens, windows_per_part=windows_per_part)

        monkeypatch.setattr(job_run, "_numerics", numerics)

    return set_numerics


class Listener:
    """A display that remembers, and calls `on_event(number, event)`."""

    def __init__(self, on_event=lambda number, event: None):
        self.events = []
        self.said = []
        self.on_event = on_event
        self.rows_at_start = None

    def __call__(self, event):
        self.events.append(event)
        self.on_event(len(self.events), event)

    def start(self, rows_done):
        self.rows_at_start = rows_done

    def say(self, text):
        self.said.append(text)

    def stop(self):
        pass


class Crash(BaseException):
    """What no code of a job may catch: stands for the death of the process."""


def crash_at(number, kind=object):
    """The death of the process while event `number` of this kind is told."""
    left = number

    def on_event(found, event):
        nonlocal left
        left -= isinstance(event, kind)
        if left == 0:
            raise Crash

    return Listener(on_event)


def stop_at_batch(number):
    """Ctrl-C while batch `number` of the run is told."""
    left = number

    def on_event(found, event):
        nonlocal left
        left -= isinstance(event, Batch)
        if left == 0:
            left = -1
            signal.raise_signal(signal.SIGINT)

    return Listener(on_event)


def texts_of(count):
    """Texts of many lengths, no two the same, one of them empty, some not ASCII."""
    texts = [f"{i} " + "word über "[: 1 + i % 9] * (i * i % 13) for i in range(count)]
    if count > 5:
        texts[5] = ""
    return texts


def records_of(count):
    return [{"id": f"r{i}", "text": text, "n": i} for i, text in enumerate(texts_of(count))]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_input(folder, form, records):
    """The records as a file of that form; (inputs, stdin)."""
    path = folder / f"in.{form}"
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if form == "stdin":
        return ("-",), io.BytesIO(lines)
    if form == "jsonl":
        path.write_bytes(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif form == "txt":
        path.write_text("".join(record["text"] + "\n" for record in records), encoding="utf-8")
    elif form == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    return (str(path),), None


def read_rows(out):
    """The rows of an output as dicts; `embedding` as an array of float32, None where it is empty."""
    if out.is_dir() or out.suffix == ".parquet":
        files = sorted((out / "data").glob("part-*.parquet")) if out.is_dir() else [out]
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    elif out.suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        with out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["row"] = int(row["row"])
            row["embedding"] = json.loads(row["embedding"]) if row["embedding"] else None
    for row in rows:
        if row.get("embedding") is not None:
            row["embedding"] = np.array(row["embedding"], dtype=np.float32)
    return rows


def vectors_of(texts, numerics=None):
    """What each text's vector must be: windows, batches and the fake model, without any of the job's code."""
    numerics = numerics or Numerics()
    unit = TASK.open(Unit(name="test"), numerics)
    found = [None] * len(texts)
    for start in range(0, len(texts), numerics.window_rows):
        ids = unit.prepare(texts[start : start + numerics.window_rows]).ids
        plan = cut(range(len(ids)), [len(row) for row in ids], batch_tokens=numerics.batch_tokens)
        for piece in plan.pieces:
            for batch in piece:
                rows = plan.order[batch.start : batch.stop]
                values = unit.compute(ModelBatch(ids=[ids[row] for row in rows], length=batch.length))["embedding"]
                for row, value in zip(rows, values, strict=True):
                    found[start + row] = value
    return found


def bytes_of(out):
    """name -> sha256 of everything that is output: the file, or the parts of the folder."""
    files = [out] if out.is_file() else sorted((out / "data").iterdir())
    return {file.name if out.is_dir() else "": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run(source, out, *, task=TASK, display=None, signals=False, on="inline", **settings):
    inputs = source if isinstance(source, tuple) else (str(source),)
    return run_job(task, Request(inputs=inputs, out=Path(out), on=on, **settings), display, signals=signals)


# -- formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl", "out.csv"])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet", "txt", "stdin"])
def test_every_input_format_reaches_every_output_format(tmp_path, form, out_name):
    records = records_of(30)
    inputs, stdin = write_input(tmp_path, form, records)
    done = run(inputs, tmp_path / out_name, stdin=stdin)
    rows = read_rows(tmp_path / out_name)
    texts = [record["text"] for record in records]
    assert [row["row"] for row in rows] == list(range(30))
    assert [row["text"] for row in rows] == texts
    if form != "txt":
        assert [row["id"] for row in rows] == [record["id"] for record in records]
        assert [int(row["n"]) for row in rows] == [record["n"] for record in records]
    for row, expected in zip(rows, vectors_of(texts), strict=True):
        assert np.array_equal(row["embedding"], expected), row["row"]
    assert done.exit_code == 0
    assert done.summary["rows_in"] == done.summary["rows_ok"] == 30


def test_parquet_output_has_row_then_kept_columns_then_results(tmp_path):
    run(write_jsonl(tmp_path / "in.jsonl", records_of(3)), tmp_path / "out.parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["row", "id", "text", "n", "embedding"]
    assert schema.field("row").type == pa.int64()
    assert schema.field("n").type == pa.int64()
    assert schema.field("embedding").type == pa.list_(pa.float32(), 8)


def test_kept_columns_of_parquet_keep_their_types_and_nulls(tmp_path):
    table = pa.table(
        {
            "text": ["a", "b", "c"],
            "when": pa.array([1, None, 3], pa.timestamp("us", "UTC")),
            "tags": pa.array([["x"], [], None], pa.list_(pa.string())),
            "kind": pa.array(["k", "k", None]).dictionary_encode(),
            "point": pa.array([{"x": 1}, None, {"x": 3}], pa.struct([("x", pa.int8())])),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").select(table.column_names)
    assert found.schema.types == table.schema.types
    assert found.to_pylist() == table.to_pylist()


def test_jsonl_records_come_out_as_they_went_in(tmp_path):
    lines = ['{"text": "a", "n": 1.50, "deep": {"z": [1, {"y": null}]}}', '{"n":1e3,"text":"b","new":"\\u00e9"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = (tmp_path / "out.jsonl").read_text().splitlines()
    for line, given in zip(found, lines, strict=True):
        assert given[1:-1] in line


def test_run_table_is_the_whole_output_in_order(tmp_path, small):
    small(window_rows=10)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(35))
    for name in ("out", "out.parquet"):
        table = run(source, tmp_path / name).table()
        assert table.column("row").to_pylist() == list(range(35))


def test_keep_none_leaves_row_and_results(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    run(source, tmp_path / "out.parquet", keep="none")
    assert pq.read_schema(tmp_path / "out.parquet").names == ["row", "embedding"]
    run(source, tmp_path / "out.jsonl", keep="none")
    assert set(read_rows(tmp_path / "out.jsonl")[0]) == {"row", "embedding"}


def test_keep_a_list_keeps_these_columns(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    run(source, tmp_path / "out.parquet", keep=("n", "id"))
    assert pq.read_schema(tmp_path / "out.parquet").names == ["row", "n", "id", "embedding"]
    run(source, tmp_path / "out.jsonl", keep=("n", "id"))
    assert set(read_rows(tmp_path / "out.jsonl")[2]) == {"row", "n", "id", "embedding"}


@pytest.mark.parametrize("taken", ["row", "embedding"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_result_name_that_the_input_has_is_refused_until_prefixed(tmp_path, taken, form):
    inputs, _ = write_input(tmp_path, form, [{"text": "a", taken: "mine"}])
    out = tmp_path / "out.parquet"
    with pytest.raises(RequestError) as caught:
        run(inputs, out)
    assert caught.value.exit_code == 2
    assert taken in str(caught.value)
    assert "--prefix" in str(caught.value)
    assert not out.exists()
    assert not out.with_name("out.parquet.run").exists()
    run(inputs, out, prefix="new_")
    (row,) = pq.read_table(out).to_pylist()
    assert row[taken] == "mine"
    assert row["new_row"] == 0
    assert len(row["new_embedding"]) == 8


@pytest.mark.parametrize("taken", ["row", "embedding"])
def test_a_result_name_that_a_json_record_has_is_not_written_twice(tmp_path, taken):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "a", taken: "mine"}])
    out = tmp_path / "out.jsonl"
    with pytest.raises(RequestError) as caught:
        run(source, out)
    assert caught.value.exit_code == 2
    assert "--prefix" in str(caught.value)


# -- sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 7, 20, 21, 100])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_limit_takes_the_first_rows(tmp_path, small, limit, form):
    small(window_rows=10)
    inputs, _ = write_input(tmp_path, form, records_of(25))
    done = run(inputs, tmp_path / "out.parquet", limit=limit)
    assert pq.read_table(tmp_path / "out.parquet").column("row").to_pylist() == list(range(min(limit, 25)))
    assert done.summary["rows_in"] == min(limit, 25)
    assert done.exit_code == 0


@pytest.mark.parametrize("on", ["inline", "cpu:2"])
@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl", "out.csv"])
def test_no_rows_in_gives_an_output_without_rows(tmp_path, on, out_name):
    (tmp_path / "in.jsonl").write_bytes(b"")
    out = tmp_path / out_name
    done = run(tmp_path / "in.jsonl", out, on=on)
    assert done.exit_code == 0
    assert done.summary["rows_in"] == done.summary["rows_ok"] == 0
    assert read_rows(out) == []
    if out_name in ("out", "out.parquet"):
        assert done.table().schema.names == ["row", "embedding"]
    if out_name == "out.csv":
        assert out.read_text() == "row,embedding\n"
    assert (done.folder / "_SUCCESS").exists()
    again = run(tmp_path / "in.jsonl", out, on=on)
    assert again.summary == done.summary


@pytest.mark.slow
def test_three_windows_of_real_size_come_back_in_order(tmp_path):
    records = records_of(12_000)
    source = write_jsonl(tmp_path / "in.jsonl", records)
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    done = run(source, one)
    assert done.summary["windows"] == 3
    rows = read_rows(one)
    assert [row["n"] for row in rows] == [row["row"] for row in rows] == list(range(12_000))
    for row, expected in zip(rows, vectors_of([record["text"] for record in records]), strict=True):
        assert np.array_equal(row["embedding"], expected)
    spread = run(source, two, on="cpu:2")
    assert bytes_of(one) == bytes_of(two)
    assert spread.summary["output_sha256"] == done.summary["output_sha256"]


@pytest.mark.parametrize("num_rows", [39, 40, 41])
@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl", "out.csv"])
def test_parts_are_joined_into_one_file_in_row_order(tmp_path, small, out_name, num_rows):
    small(window_rows=10, windows_per_part=2)
    out = tmp_path / out_name
    texts = texts_of(num_rows)
    done = run(write_jsonl(tmp_path / "in.jsonl", records_of(num_rows)), out)
    rows = read_rows(out)
    assert done.summary["parts"] == -(-num_rows // 20)
    assert [row["row"] for row in rows] == list(range(num_rows))
    assert [row["text"] for row in rows] == texts
    expected = vectors_of(texts, Numerics(window_rows=10, batch_tokens=64))
    assert all(np.array_equal(row["embedding"], value) for row, value in zip(rows, expected, strict=True))
    if out_name == "out.csv":
        with out.open(newline="", encoding="utf-8") as file:
            assert sum(line[:1] == ["row"] for line in csv.reader(file)) == 1


def test_joined_csv_has_one_header_even_where_its_names_need_quotes(tmp_path, small):
    small(window_rows=2)
    records = [{"text": f"t{i}", 'a "b",\nç': i} for i in range(7)]
    inputs, _ = write_input(tmp_path, "csv", records)
    run(inputs, tmp_path / "out.csv")
    rows = read_rows(tmp_path / "out.csv")
    assert [row['a "b",\nç'] for row in rows] == [str(i) for i in range(7)]


def test_one_file_and_parts_hold_the_same_rows(tmp_path, small):
    small(window_rows=10)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(45))
    folder, file = run(source, tmp_path / "out"), run(source, tmp_path / "out.parquet")
    assert folder.table().equals(file.table())
    assert folder.summary["output_sha256"] == file.summary["output_sha256"]
    assert file.summary["file_sha256"] == hashlib.sha256((tmp_path / "out.parquet").read_bytes()).hexdigest()


@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl", "out.csv"])
def test_two_units_write_the_same_bytes_as_one(tmp_path, small, out_name):
    small(window_rows=20, windows_per_part=2)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(130))
    names = [tmp_path / "one" / out_name, tmp_path / "two" / out_name]
    for name, on in zip(names, ("inline", "cpu:2"), strict=True):
        name.parent.mkdir()
        run(source, name, on=on)
    assert bytes_of(names[0]) == bytes_of(names[1])


def test_texts_longer_than_the_model_are_counted(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "x" * n} for n in (1, 64, 65, 1000)])
    assert run(source, tmp_path / "out").summary["truncated"] == 2


# -- failed rows --------------------------------------------------------------------------------------


def failing_input(folder, num_rows=30, failed=(POISONED,)):
    records = [{**record, "text": None} if i in failed else record for i, record in enumerate(records_of(num_rows))]
    return write_jsonl(folder / "in.jsonl", records)


@pytest.mark.parametrize("on", ["inline", "cpu:2"])
def test_quarantined_rows_are_absent_and_named(tmp_path, small, on):
    small(window_rows=10)
    failed = (0, POISONED, 15, 29)
    done = run(failing_input(tmp_path, failed=failed), tmp_path / "out", id="id", on=on)
    assert done.exit_code == 3
    assert (done.summary["rows_in"], done.summary["rows_ok"], done.summary["rows_failed"]) == (30, 26, 4)
    assert done.table().column("row").to_pylist() == [row for row in range(30) if row not in failed]
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == list(failed)
    assert [line["id"] for line in lines] == [f"r{row}" for row in failed]
    for line in lines:
        assert set(line) == {"row", "id", "error", "message", "piece", "attempts"}
        assert line["error"] == "NullText"
        assert f"in.jsonl, line {line['row'] + 1}" in line["message"]


def test_failed_rows_do_not_change_other_rows_kept_columns(tmp_path, small):
    small(window_rows=10)
    run(failing_input(tmp_path, failed=(0, 9, 10)), tmp_path / "out")
    for row in read_rows(tmp_path / "out"):
        assert row["id"] == f"r{row['row']}"
        assert row["n"] == row["row"]


@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl", "out.csv"])
def test_null_keeps_failed_rows_with_empty_results(tmp_path, small, out_name):
    small(window_rows=10)
    out = tmp_path / out_name
    done = run(failing_input(tmp_path, failed=(0, POISONED, 29)), out, on_error="null")
    rows = read_rows(out)
    assert done.exit_code == 3
    assert (done.summary["rows_ok"], done.summary["rows_failed"]) == (27, 3)
    assert [row["row"] for row in rows] == list(range(30))
    assert [row["row"] for row in rows if row["embedding"] is None] == [0, POISONED, 29]
    assert (done.folder / "quarantine.jsonl").exists()


def test_a_window_whose_rows_all_fail_is_no_trouble(tmp_path, small):
    small(window_rows=10)
    source = failing_input(tmp_path, failed=range(10, 20))
    for policy, present in (("quarantine", 20), ("null", 30)):
        done = run(source, tmp_path / policy, on_error=policy)
        assert done.table().num_rows == present
        assert done.summary["rows_failed"] == 10


def test_stop_names_the_row_and_keeps_what_was_committed(tmp_path, small):
    small(window_rows=10)
    out = tmp_path / "out"
    source = failing_input(tmp_path, num_rows=60, failed=(45,))
    with pytest.raises(DataError) as caught:
        run(source, out, on_error="stop")
    assert caught.value.exit_code == 1
    assert "row 45: NullText" in str(caught.value)
    assert "--on-error" in str(caught.value)
    assert (out / "run.json").exists()
    assert not (out / "_SUCCESS").exists()
    committed = sum(entry["rows"] for entry in log_of(out) if entry["kind"] == "lease")
    assert committed > 0
    done = run(source, out, on_error="quarantine")
    assert done.summary["rows_resumed"] == committed
    assert done.exit_code == 3
    run(source, tmp_path / "whole")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_stop_stops_again_until_the_policy_is_changed(tmp_path, small):
    small(window_rows=10)
    source = failing_input(tmp_path, num_rows=60, failed=(45,))
    for _ in range(2):
        with pytest.raises(DataError, match="row 45"):
            run(source, tmp_path / "out", on_error="stop")


@pytest.mark.parametrize("limit", ["3", "2%"])
def test_more_failures_than_allowed_end_the_job_and_it_can_go_on(tmp_path, small, limit):
    small(window_rows=50)
    out = tmp_path / "out"
    source = failing_input(tmp_path, num_rows=300, failed=range(120, 132))
    with pytest.raises(DataError) as caught:
        run(source, out, max_failures=limit)
    assert caught.value.exit_code == 1
    assert "--max-failures" in str(caught.value)
    assert not (out / "_SUCCESS").exists()
    done = run(source, out, max_failures="20")
    assert done.exit_code == 3
    assert done.summary["rows_failed"] == 12
    assert done.summary["rows_resumed"] > 0


def test_failures_below_the_limit_do_not_end_the_job(tmp_path, small):
    small(window_rows=50)
    source = failing_input(tmp_path, num_rows=300, failed=range(120, 132))
    assert run(source, tmp_path / "out", max_failures="12").exit_code == 3


@pytest.mark.parametrize("policy", ["quarantine", "null"])
def test_not_one_successful_row_is_a_failure(tmp_path, policy):
    source = failing_input(tmp_path, num_rows=5, failed=range(5))
    for _ in range(2):  # asked again, the answer is the same
        with pytest.raises(DataError) as caught:
            run(source, tmp_path / "out", on_error=policy)
        assert caught.value.exit_code == 1
        assert "none of 5 rows succeeded" in str(caught.value)
        assert "NullText" in str(caught.value)
    assert (tmp_path / "out" / "quarantine.jsonl").exists()


def test_lines_that_are_no_records_are_failed_rows_with_their_place(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "a"}\n{nonsense\n{"text": "\xff"}\n{"text": 5}\n[1]\n{"text": "b"}\n')
    done = run(source, tmp_path / "out", keep="none")
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["row"], line["error"]) for line in lines] == [
        *((1, "BadRecord"), (2, "BadUtf8"), (3, "NotText"), (4, "BadRecord"))
    ]
    assert done.table().column("row").to_pylist() == [0, 5]
    assert "{nonsense" in lines[0]["message"]


# -- records of a run ---------------------------------------------------------------------------------


def log_of(out):
    """The entries of a folder's log."""
    return [journal.decode(line) for line in (out / "commits.log").read_bytes().splitlines()]


@pytest.mark.parametrize("on", ["inline", "cpu:2"])
def test_a_run_leaves_summary_trace_and_plan(tmp_path, small, on):
    small(window_rows=10)
    out = tmp_path / "out"
    done = run(write_jsonl(tmp_path / "in.jsonl", records_of(40)), out, on=on)
    summary = json.loads((out / "summary.json").read_text())
    assert summary == done.summary
    assert set(summary) == SUMMARY_KEYS
    assert summary["level"] == "B"
    assert summary["rows_resumed"] == 0
    assert summary["retries"] == {}
    assert summary["peak_pss_bytes"] > 0
    assert 0 <= summary["idle_share"] <= 1
    assert 0 <= summary["padding_share"] < 1

    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    tracks = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    kinds = {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert tracks <= ({"inline"} if on == "inline" else {"cpu:0", "cpu:1"})
    assert kinds - {"load"} == {"prepare", "compute", "write", "assemble"}  # a warm worker does not load

    stored = json.loads((out / "run.json").read_text())
    assert stored["plan"]["numerics"] == stored["fingerprint"]["numerics"]
    assert stored["plan"]["numerics"]["window_rows"] == 10
    assert stored["plan"]["engine"] == ("inline" if on == "inline" else "local")
    assert stored["level"] == "B"
    assert stored["fingerprint"]["task"] == TASK.record
    assert set(stored["fingerprint"]) == {"inputs", "task", "settings", "numerics", "versions", "cpu"}
    assert stored["fingerprint"]["inputs"][0]["bytes"] == (tmp_path / "in.jsonl").stat().st_size

    left = {path.name for path in out.iterdir()} - {".lock"}
    assert left == {"run.json", "commits.log", "summary.json", "trace.json.gz", "_SUCCESS", "data"}


def test_the_records_of_a_file_stand_beside_it(tmp_path):
    done = run(write_jsonl(tmp_path / "in.jsonl", records_of(4)), tmp_path / "out.parquet")
    assert done.folder == tmp_path / "out.parquet.run"
    assert (done.folder / "_SUCCESS").exists()
    assert not list((done.folder / "data").iterdir())


def test_a_dry_run_says_the_plan_and_writes_nothing(tmp_path):
    listener = Listener()
    done = run(write_jsonl(tmp_path / "in.jsonl", records_of(4)), tmp_path / "out", dry_run=True, display=listener)
    assert done.plan["engine"] == "inline"
    assert any(line.startswith("plan:") for line in listener.said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


# -- the same command again ---------------------------------------------------------------------------


def poisoned(texts):
    """The same task by its record, which fails as soon as it computes one of these."""
    return FakeTask(faults=dict.fromkeys(texts, "raise"))


@pytest.mark.parametrize("out_name", ["out", "out.parquet"])
def test_a_finished_job_says_so_and_computes_nothing(tmp_path, out_name):
    out = tmp_path / out_name
    source = write_jsonl(tmp_path / "in.jsonl", records_of(10))
    done = run(source, out)
    before = bytes_of(out)
    listener = Listener()
    again = run(source, out, task=replace(poisoned(texts_of(10)), load_fault="raise"), display=listener)
    assert again.summary == done.summary
    assert again.plan == done.plan
    assert again.exit_code == 0
    assert bytes_of(out) == before
    assert any("already finished" in line for line in listener.said)
    assert listener.events == []


def test_a_finished_job_whose_file_is_gone_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(4))
    run(source, tmp_path / "out.parquet")
    (tmp_path / "out.parquet").unlink()
    with pytest.raises(ResumeError, match=r"out\.parquet is gone"):
        run(source, tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"task": FakeTask(version=2)}, ["task.version: 1 then, 2 now"]),
        ({"task": FakeTask(width=16)}, ["task.width: 8 then, 16 now"]),
        ({"prefix": "p_"}, ["settings.prefix"]),
        ({"keep": "none", "limit": 3}, ["settings.keep: 'all' then, 'none' now", "settings.limit: None then, 3 now"]),
        ({"on_error": "null"}, ["settings.failed_as_null: False then, True now"]),
        ({"id": "id"}, ["settings.id"]),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_job_in_the_folder_is_refused_with_the_keys_that_differ(tmp_path, small, change, keys, finished):
    small(window_rows=5)
    out = tmp_path / "out"
    source = write_jsonl(tmp_path / "in.jsonl", records_of(20))
    if finished:
        run(source, out)
    else:
        with pytest.raises(Stopped):
            run(source, out, display=stop_at_batch(3), signals=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ResumeError) as caught:
        run(source, out, **change)
    assert caught.value.exit_code == 2
    for key in keys:
        assert key in str(caught.value)
    assert "--overwrite" in str(caught.value)
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_changed_input_is_refused_with_its_key(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(4))
    run(source, tmp_path / "out")
    write_jsonl(source, records_of(5))
    with pytest.raises(ResumeError, match=r"in\.jsonl: size was"):
        run(source, tmp_path / "out")


def test_other_numerics_are_refused(tmp_path, small):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(4))
    run(source, tmp_path / "out")
    small(window_rows=5)
    with pytest.raises(ResumeError, match=r"numerics\.window_rows: 4096 then, 5 now"):
        run(source, tmp_path / "out")


def test_where_it_runs_may_differ(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(4))
    done = run(source, tmp_path / "out")
    assert run(source, tmp_path / "out", on="cpu:2").summary == done.summary


@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl"])
def test_overwrite_starts_anew(tmp_path, small, out_name):
    small(window_rows=5)
    out = tmp_path / out_name
    first = write_jsonl(tmp_path / "first.jsonl", records_of(33))
    second = write_jsonl(tmp_path / "second.jsonl", records_of(8))
    run(first, out)
    done = run(second, out, overwrite=True)
    assert done.summary["rows_in"] == 8
    assert done.summary["rows_resumed"] == 0
    assert [row["row"] for row in read_rows(out)] == list(range(8))


def test_overwrite_starts_anew_after_a_stop(tmp_path, small):
    small(window_rows=5)
    out = tmp_path / "out"
    source = write_jsonl(tmp_path / "in.jsonl", records_of(40))
    with pytest.raises(Stopped):
        run(source, out, display=stop_at_batch(5), signals=True)
    done = run(source, out, task=FakeTask(version=2), overwrite=True)
    assert done.summary["rows_resumed"] == 0
    assert done.table().num_rows == 40


def test_a_file_that_no_run_made_is_not_overwritten(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    (tmp_path / "out.parquet").write_text("mine")
    with pytest.raises(ResumeError, match="no run of Fanfold stands beside it"):
        run(source, tmp_path / "out.parquet")
    assert (tmp_path / "out.parquet").read_text() == "mine"


def test_an_input_is_not_overwritten(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    with pytest.raises(RequestError, match="the same file is an input"):
        run(source, source, overwrite=True)
    assert len(source.read_text().splitlines()) == 3


def test_two_runs_in_one_folder_the_second_names_the_first(tmp_path, small):
    small(window_rows=5)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(20))
    refused = []

    def on_event(number, event):
        if number == 3:
            with pytest.raises(ResumeError) as caught:
                run(source, tmp_path / "out")
            refused.append(str(caught.value))

    run(source, tmp_path / "out", display=Listener(on_event))
    assert "another run holds it" in refused[0]
    assert '"pid"' in refused[0]


# -- going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("again_on", ["inline", "cpu:2"])
@pytest.mark.parametrize("first_on", ["inline", "cpu:2"])
def test_a_stopped_job_goes_on_to_the_same_bytes(tmp_path, small, first_on, again_on):
    small(window_rows=20, windows_per_part=2)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(150))
    run(source, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(Stopped) as caught:
        run(source, out, on=first_on, display=stop_at_batch(12), signals=True, task=FakeTask(token_s=0.00001))
    assert caught.value.exit_code == 4
    assert "run the same command again" in str(caught.value)
    listener = Listener()
    done = run(source, out, on=again_on, display=listener)
    assert 0 < done.summary["rows_resumed"] < 150
    assert done.summary["rows_in"] == done.summary["rows_ok"] == 150
    assert listener.rows_at_start == done.summary["rows_resumed"]
    assert any(line.startswith("going on:") for line in listener.said)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_what_was_committed_is_not_computed_again(tmp_path, small):
    small(window_rows=20)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(60))
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(source, out, display=stop_at_batch(10), signals=True)
    committed = sum(entry["rows"] for entry in log_of(out) if entry["kind"] == "lease")
    listener = Listener()
    done = run(source, out, display=listener)
    computed = sum(event.rows for event in listener.events if isinstance(event, Batch))
    assert computed == 60 - committed
    assert done.summary["rows_resumed"] == committed


def test_rates_of_a_resumed_run_count_only_its_own_work(tmp_path, small):
    small(window_rows=20)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{i:010d}"} for i in range(100)])  # 10 tokens a row
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", display=stop_at_batch(10), signals=True)
    summary = run(source, tmp_path / "out").summary
    assert summary["rows_resumed"] >= 40
    assert summary["tokens_per_s"] == pytest.approx(10 * summary["rows_per_s"], rel=0.01)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "parquet", "stdin"])
def test_every_input_format_can_go_on(tmp_path, small, form):
    small(window_rows=10, windows_per_part=2)
    records = records_of(75)
    inputs, stdin = write_input(tmp_path, form, records)
    run(inputs, tmp_path / "whole", stdin=stdin)
    inputs, stdin = write_input(tmp_path, form, records) if form == "stdin" else (inputs, None)
    with pytest.raises(Stopped):
        run(inputs, tmp_path / "out", stdin=stdin, display=stop_at_batch(9), signals=True)
    inputs, stdin = write_input(tmp_path, form, records) if form == "stdin" else (inputs, None)
    done = run(inputs, tmp_path / "out", stdin=stdin)
    assert done.summary["rows_resumed"] > 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("out_name", ["out", "out.parquet", "out.jsonl", "out.csv"])
def test_a_crash_at_any_event_loses_nothing(tmp_path, small, out_name):
    """The process dies at the n-th event, for every n; then the same command is given again."""
    small(window_rows=6, windows_per_part=2, batch_tokens=100)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(23))
    whole = Listener()
    (tmp_path / "whole").mkdir()
    run(source, tmp_path / "whole" / out_name, display=whole)
    expected = bytes_of(tmp_path / "whole" / out_name)
    for number in range(1, len(whole.events) + 1):
        folder = tmp_path / f"at{number}"
        folder.mkdir()
        try:
            run(source, folder / out_name, display=crash_at(number), sync=False)
        except Crash:
            pass
        done = run(source, folder / out_name, sync=False)
        assert bytes_of(folder / out_name) == expected, number
        assert done.summary["rows_in"] == 23


def test_a_job_that_crashes_again_and_again_still_ends(tmp_path, small):
    small(window_rows=6, windows_per_part=2)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(40))
    run(source, tmp_path / "whole")
    rounds = 0
    done = None
    while done is None:
        rounds += 1
        assert rounds < 100
        try:
            done = run(source, tmp_path / "out", display=crash_at(4, Batch), sync=False)
        except Crash:
            pass
    assert rounds > 2
    assert done.summary["rows_resumed"] > 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def two_prepared_windows(tmp_path, small):
    """A job that crashed with windows 0 and 1 prepared and nothing computed: (source, log path, entries)."""
    small(window_rows=10)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(45))
    run(source, tmp_path / "whole")

    with pytest.raises(Crash):
        run(source, tmp_path / "out", display=crash_at(1, Batch))
    path = tmp_path / "out" / "commits.log"
    entries = log_of(tmp_path / "out")
    assert [(entry["kind"], entry["window"]) for entry in entries] == [("window", 0), ("window", 1)]
    return source, path, entries


@pytest.mark.timeout(60)
def test_windows_that_two_units_prepared_out_of_order_are_each_taken_once(tmp_path, small):
    """Two units prepare windows 0 and 1 side by side; the second may be first in the log."""
    source, path, entries = two_prepared_windows(tmp_path, small)
    path.write_bytes(b"".join(journal.encode(entry) for entry in reversed(entries)))
    done = run(source, tmp_path / "out")
    assert done.summary["rows_in"] == 45
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.timeout(60)
def test_a_window_that_was_not_prepared_before_the_crash_is_not_lost(tmp_path, small):
    """As before, but the crash comes when only the second window's line stands in the log."""
    source, path, entries = two_prepared_windows(tmp_path, small)
    path.write_bytes(journal.encode(entries[1]))
    done = run(source, tmp_path / "out")
    assert done.summary["rows_in"] == 45
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_torn_last_line_of_the_log_costs_only_its_own_work(tmp_path, small):
    small(window_rows=10)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(45))
    run(source, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", display=stop_at_batch(12), signals=True)
    path = tmp_path / "out" / "commits.log"
    path.write_bytes(path.read_bytes()[:-7])
    done = run(source, tmp_path / "out")
    assert done.summary["rows_resumed"] > 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_lost_window_file_is_made_again(tmp_path, small):
    small(window_rows=10)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(45))
    run(source, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", display=stop_at_batch(12), signals=True)
    for path in (tmp_path / "out" / "windows").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    run(source, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_model_that_does_not_load_ends_the_job_which_goes_on_once_it_does(tmp_path, small):
    small(window_rows=10)
    source = write_jsonl(tmp_path / "in.jsonl", records_of(45))
    run(source, tmp_path / "whole")
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", display=stop_at_batch(12), signals=True)
    with pytest.raises(FanfoldError) as caught:
        run(source, tmp_path / "out", task=FakeTask(load_fault="raise"))
    assert caught.value.exit_code == 1
    assert "ValueError: this row is poison" in str(caught.value)
    done = run(source, tmp_path / "out")
    assert done.summary["rows_resumed"] > 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# -- refusals before anything is made -----------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu:0", "cpu:9999", "nonsense", "cpu:", "cuda:9"])
def test_a_place_that_is_not_there_is_refused_before_a_folder_is_made(tmp_path, where):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    with pytest.raises(RequestError) as caught:
        run(source, tmp_path / "out", on=where)
    assert caught.value.exit_code == 2
    assert f"--on {where}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["max_failures", "memory_per_unit"])
def test_a_setting_that_cannot_be_read_is_refused_before_a_folder_is_made(tmp_path, setting):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    with pytest.raises(RequestError) as caught:
        run(source, tmp_path / "out", **{setting: "lots"})
    assert "--" + setting.replace("_", "-") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_refused_before_a_folder_is_made(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    with pytest.raises(InputError, match="column 'body'"):
        run(source, tmp_path / "out", column="body")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", records_of(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ResumeError, match=r"holds something else: mine\.txt"):
            run(source, tmp_path / "out", overwrite=overwrite)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
