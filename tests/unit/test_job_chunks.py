"""Texts cut into parts, from request to result, without torch: every part once, beside its record."""

from __future__ import annotations

import csv
import json
import random
import string
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fanfold.errors import Stopped
from fanfold.job import engines
from fanfold.job import run as run_module
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.tasks.chunking import Chunking, mean_of_parts, spans
from fanfold.testing.fakes import FakeTask

SIZE, OVERLAP = 16, 3
NUM_ROWS = 55


@pytest.fixture(scope="module", autouse=True)
def _workers_end_with_the_module():
    yield
    engines.shutdown()


pytestmark = pytest.mark.usefixtures("small_windows")


def text_of(row):
    return f"{row:02d} " + "".join(random.Random(row).choices(string.ascii_lowercase, k=row * 7 % 90))


def parts_of(text):
    return [text[start:stop] for start, stop in spans(len(text), SIZE, OVERLAP)]


ALL = [(row, part) for row in range(NUM_ROWS) for part in range(len(parts_of(text_of(row))))]


@pytest.fixture
def docs(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{row}", "text": text_of(row)}) + "\n" for row in range(NUM_ROWS)))
    return path


def run(inputs, out, *, merge=None, faults=None, on="inline", display=None, **options):
    task = FakeTask(chunking=Chunking(tokens=SIZE, overlap=OVERLAP, merge=merge), faults=faults or {})
    request = Request(inputs=(str(inputs),), out=out, on=on, id="id", sync=False, **options)
    return run_job(task, request, display)


def vectors_of(table):
    return table.column("embedding").combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def test_one_row_a_part_in_order_beside_the_kept_columns(docs, tmp_path):
    done = run(docs, tmp_path / "out")
    table = done.table()
    assert table.column_names == ["record", "part", "id", "text", "embedding"]
    assert list(zip(*(table.column(name).to_pylist() for name in ("record", "part")), strict=True)) == ALL
    assert table.column("id").to_pylist() == [f"d{row}" for row, _ in ALL]
    assert table.column("text").to_pylist() == [text_of(row) for row, _ in ALL]
    summary = done.summary
    assert (summary["rows_in"], summary["rows_ok"], summary["rows_failed"]) == (len(ALL), len(ALL), 0)
    assert (summary["records_in"], summary["chunks"]) == (NUM_ROWS, len(ALL))


def test_a_part_computes_to_what_its_text_alone_would(docs, tmp_path):
    """With one row a batch, nothing depends on how the texts were cut."""
    texts = tmp_path / "parts.jsonl"
    texts.write_text("".join(json.dumps({"text": parts_of(text_of(row))[part]}) + "\n" for row, part in ALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_numerics", lambda task, kind: replace(BASE, batch_tokens=1))
        alone = run_job(FakeTask(), Request(inputs=(str(texts),), out=tmp_path / "alone", on="inline"))
        parts = run(docs, tmp_path / "parts")
    assert vectors_of(parts.table()).tobytes() == vectors_of(alone.table()).tobytes()


BASE = run_module._numerics(FakeTask(), "cpu")


@pytest.mark.parametrize("merge", [None, "mean"])
def test_the_same_bytes_on_any_number_of_units(docs, tmp_path, merge):
    inline = run(docs, tmp_path / "inline", merge=merge)
    for on in ("cpu:1", "cpu:2"):
        other = run(docs, tmp_path / on.replace(":", ""), merge=merge, on=on)
        assert other.summary["output_sha256"] == inline.summary["output_sha256"]


def test_merged_rows_are_the_means_of_the_parts(docs, tmp_path):
    parts = run(docs, tmp_path / "parts").table()
    merged = run(docs, tmp_path / "merged", merge="mean")
    table = merged.table()
    assert table.column("row").to_pylist() == [*range(NUM_ROWS)]
    assert "part" not in table.column_names
    assert merged.summary["rows_in"] == NUM_ROWS
    records = np.array(parts.column("record").to_pylist())
    for row in range(NUM_ROWS):
        tokens = [len(part) for part in parts_of(text_of(row))]
        expected = mean_of_parts(vectors_of(parts)[records == row], tokens, normalize=False)
        assert vectors_of(table)[row].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl", "out.csv"])
def test_every_format_holds_the_same(docs, tmp_path, name):
    expected = run(docs, tmp_path / "folder").table()
    run(docs, tmp_path / name)
    path = tmp_path / name
    if name.endswith("parquet"):
        rows = pq.read_table(path).to_pylist()
    elif name.endswith("jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with path.open(newline="") as file:
            rows = [{**row, "embedding": json.loads(row["embedding"])} for row in csv.DictReader(file)]
    assert [(int(row["record"]), int(row["part"])) for row in rows] == ALL
    found = np.array([row["embedding"] for row in rows], dtype=np.float32)
    assert found.tobytes() == vectors_of(expected).tobytes()


# -- rows that fail -----------------------------------------------------------------------------------

BAD = (23, 3)  # record and part


@pytest.fixture
def poison():
    return {parts_of(text_of(BAD[0]))[BAD[1]]: "raise"}


def test_a_part_that_fails_is_set_aside_alone(docs, tmp_path, poison):
    whole = run(docs, tmp_path / "whole").table()
    done = run(docs, tmp_path / "out", faults=poison)
    assert done.exit_code == 3
    assert (done.summary["rows_ok"], done.summary["rows_failed"]) == (len(ALL) - 1, 1)
    table = done.table()
    kept = [i for i, place in enumerate(ALL) if place != BAD]
    assert vectors_of(table).tobytes() == vectors_of(whole)[kept].tobytes()
    (failure,) = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert (failure["row"], failure["part"], failure["id"], failure["error"]) == (*BAD, "d23", "ValueError")
    assert f"row {BAD[0]} part {BAD[1]}: ValueError" in done.report


def test_a_failed_part_stands_as_null(docs, tmp_path, poison):
    table = run(docs, tmp_path / "out", faults=poison, on_error="null").table()
    assert len(table) == len(ALL)
    missing = [ALL[i] for i, value in enumerate(table.column("embedding").to_pylist()) if value is None]
    assert missing == [BAD]


@pytest.mark.parametrize("on_error", ["quarantine", "null"])
def test_a_merged_text_fails_with_any_of_its_parts(docs, tmp_path, poison, on_error):
    whole = vectors_of(run(docs, tmp_path / "whole", merge="mean").table())
    poison |= {parts_of(text_of(BAD[0]))[0]: "raise"}  # two parts of one text are one failed row
    done = run(docs, tmp_path / "out", merge="mean", faults=poison, on_error=on_error)
    assert (done.summary["rows_in"], done.summary["rows_failed"]) == (NUM_ROWS, 1)
    (failure,) = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert (failure["row"], failure["part"]) == (BAD[0], 0)
    rows = dict(zip(*(done.table().column(name).to_pylist() for name in ("row", "embedding")), strict=True))
    assert (rows[BAD[0]] is None) if on_error == "null" else (BAD[0] not in rows)
    for row in set(range(NUM_ROWS)) - {BAD[0]}:
        assert np.float32(rows[row]).tobytes() == whole[row].tobytes()


@pytest.mark.parametrize("merge", [None, "mean"])
@pytest.mark.parametrize("on_error", ["quarantine", "null"])
def test_records_that_cannot_be_read_are_one_row_each(docs, tmp_path, merge, on_error):
    lines = docs.read_text().splitlines()
    lines[4], lines[31] = '{"id": "d4", "text": null}', "not JSON"
    docs.write_text("\n".join(lines) + "\n")
    done = run(docs, tmp_path / "out", merge=merge, on_error=on_error)
    good = [place for place in ALL if place[0] not in (4, 31)]
    total = NUM_ROWS if merge else len(good) + 2
    assert (done.summary["rows_in"], done.summary["rows_failed"]) == (total, 2)
    assert len(done.table()) == (total if on_error == "null" else total - 2)


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.jsonl", "out.csv"])
@pytest.mark.parametrize("merge", [None, "mean"])
def test_failed_parts_are_tried_again_and_all_others_stay(docs, tmp_path, poison, merge, name):
    whole = run(docs, tmp_path / f"whole-{name}", merge=merge)
    first = run(docs, tmp_path / name, merge=merge, faults=poison)
    assert first.summary["rows_failed"] == 1
    again = run(docs, tmp_path / name, merge=merge, retry_failed=True)
    assert again.summary["rows_failed"] == 0
    assert again.summary["output_sha256"] == whole.summary["output_sha256"]


class Stop:
    """Stops the job after some batches, as a signal would."""

    def __init__(self, after):
        self.left = after

    def __call__(self, event):
        from fanfold.events import Batch

        if isinstance(event, Batch):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def start(self, rows_done): ...
    def say(self, text): ...
    def stop(self): ...


@pytest.mark.parametrize("merge", [None, "mean"])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(docs, tmp_path, merge):
    whole = run(docs, tmp_path / "whole", merge=merge)
    for after in (3, 9, 20):
        with pytest.raises((KeyboardInterrupt, Stopped)):
            run(docs, tmp_path / "out", merge=merge, display=Stop(after))
    done = run(docs, tmp_path / "out", merge=merge)
    assert done.summary["rows_resumed"] > 0
    assert done.summary["output_sha256"] == whole.summary["output_sha256"]
