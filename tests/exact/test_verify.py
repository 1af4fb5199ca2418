"""`verify` passes on what a run has written, and names what somebody changed since."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fanfold as ff
from fanfold.cli.main import run as command
from fanfold.errors import DifferenceFound, ResumeError

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
]

ROWS = 60
CHANGED = 17


@pytest.fixture(scope="module")
def finished(built, documents, written, tmp_path_factory):
    """A folder with the input, the model and a finished run as one file; copied for every test."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(built("bert"), root / "model")
    shutil.copy(written("verify", documents[:ROWS])["jsonl"], root / "docs.jsonl")
    return root


@pytest.fixture
def job(finished, tmp_path):
    """job(suffix) -> the output of a run over a copy of the input and the model."""

    def carry_out(name="a.parquet", **options):
        for entry in ("model", "docs.jsonl"):
            source, target = finished / entry, tmp_path / entry
            shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
        out = tmp_path / name
        ff.embed(str(tmp_path / "docs.jsonl"), out, model=str(tmp_path / "model"), on="inline", **options)
        return out

    return carry_out


def run_folder(out):
    return out if out.is_dir() else out.with_name(out.name + ".run")


def change_row(path, row, change):
    """Write the Parquet file again with one float of one row changed."""
    table = pq.read_table(path)
    column = table.column("embedding").combine_chunks()
    width = column.type.list_size
    vectors = column.flatten().to_numpy().copy().reshape(-1, width)
    place = table.column("row").to_pylist().index(row)
    vectors[place, 3] = change(vectors[place, 3])
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    pq.write_table(table.set_column(table.schema.get_field_index("embedding"), "embedding", array), path)


def forge_sums(out):
    """Make every recorded checksum agree with the changed file: only computing again can tell."""
    summary = run_folder(out) / "summary.json"
    record = json.loads(summary.read_text())
    record["file_sha256"] = hashlib.sha256(out.read_bytes()).hexdigest()
    summary.write_text(json.dumps(record))


def next_float(value):
    return np.nextafter(value, np.float32(9), dtype=np.float32)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv", "folder"])
def test_it_passes_on_a_finished_run(name, job, capsys):
    out = job(name)
    verdict = ff.verify(out, sample=ROWS)
    assert (verdict.rows_in, verdict.rows_compared, verdict.differing) == (ROWS, ROWS, ())
    assert (verdict.max_difference, verdict.level) == (0, "B")
    assert command(["verify", str(out), "--sample", "10", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows_compared"] >= 10
    assert record["differing_rows"] == []


def test_it_passes_with_the_options_of_the_run(job, capsys):
    out = job(prefix="my_", max_length=12, prefix_text="query: ", limit=33, keep=("id", "count"))
    verdict = ff.verify(out, sample=100)
    assert (verdict.rows_in, verdict.rows_compared, verdict.max_difference) == (33, 33, 0)


def test_it_passes_on_a_run_of_two_units(finished, tmp_path):
    for entry in ("model", "docs.jsonl"):
        os.symlink(finished / entry, tmp_path / entry)
    ff.embed(str(tmp_path / "docs.jsonl"), tmp_path / "a.parquet", model=str(tmp_path / "model"), on="cpu:2")
    assert ff.verify(tmp_path / "a.parquet", sample=100).rows_compared == ROWS


def test_one_changed_float_is_found_and_the_file_named(job, capsys):
    out = job()
    change_row(out, CHANGED, next_float)
    with pytest.raises(DifferenceFound) as caught:
        ff.verify(out)
    assert str(out) in str(caught.value)
    assert command(["verify", str(out)]) == 5
    told = capsys.readouterr().err
    assert str(out) in told
    assert "Traceback" not in told


@pytest.mark.parametrize("change", [next_float, lambda value: value + 1, lambda value: np.nan], ids=["bit", "1", "nan"])
def test_one_changed_float_is_found_even_where_the_checksums_agree(change, job, capsys):
    out = job()
    change_row(out, CHANGED, change)
    forge_sums(out)
    with pytest.raises(DifferenceFound) as caught:
        ff.verify(out, sample=ROWS)
    assert f"1 of {ROWS} recomputed rows differ" in str(caught.value)
    assert f"rows {CHANGED}" in str(caught.value)
    assert command(["verify", str(out), "--sample", str(ROWS)]) == 5
    assert f"rows {CHANGED}" in capsys.readouterr().err


def test_a_row_that_is_gone_is_found_even_where_the_checksums_agree(job):
    out = job()
    table = pq.read_table(out)
    pq.write_table(pa.concat_tables([table.slice(0, CHANGED), table.slice(CHANGED + 1)]), out)
    forge_sums(out)
    with pytest.raises(DifferenceFound, match=f"rows {CHANGED}"):
        ff.verify(out, sample=ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_one_changed_digit_of_a_text_output_is_found(name, job):
    out = job(name)
    whole = out.read_bytes().decode()
    if name == "a.csv":
        cell = list(csv.DictReader(whole.splitlines(keepends=True)))[CHANGED]["embedding"]
    else:
        line = whole.splitlines()[CHANGED]
        cell = line[line.index('"embedding"') :]
    place = cell.rindex("]") - 1
    changed = cell[:place] + str((int(cell[place]) + 5) % 10) + cell[place + 1 :]
    assert whole.count(cell) == 1
    out.write_bytes(whole.replace(cell, changed).encode())
    with pytest.raises(DifferenceFound, match=out.name):
        ff.verify(out)
    forge_sums(out)
    with pytest.raises(DifferenceFound, match=f"rows {CHANGED}"):
        ff.verify(out, sample=ROWS)


def test_a_flipped_byte_of_a_part_is_found(job):
    out = job("folder")
    part = next((out / "data").glob("part-*.parquet"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.chmod(0o644)
    part.write_bytes(data)
    with pytest.raises(DifferenceFound) as caught:
        ff.verify(out)
    assert part.name in str(caught.value)
    assert command(["verify", str(out), "--sample", "0"]) == 5


def test_a_file_that_is_gone_is_found(job):
    out = job()
    out.unlink()
    with pytest.raises(DifferenceFound, match="gone"):
        ff.verify(out)


def test_a_changed_input_is_refused(job, tmp_path, capsys):
    out = job()
    path = tmp_path / "docs.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"count": 0', b'"count": 9'))
    with pytest.raises(ResumeError) as caught:
        ff.verify(out)
    assert "docs.jsonl" in str(caught.value) or "inputs" in str(caught.value)
    assert command(["verify", str(out)]) == 2
    assert "inputs" in capsys.readouterr().err


def test_a_changed_input_of_the_same_size_and_time_is_found(job, tmp_path):
    """Size and time of change are what the run remembers of a file; the tokens still tell."""
    out = job()
    path = tmp_path / "docs.jsonl"
    stat = path.stat()
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[CHANGED])
    text = record["text"]
    record["text"] = ("zq" if not text.startswith("zq") else "qz") + text[2:]
    lines[CHANGED] = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    path.write_bytes(b"".join(lines))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(DifferenceFound) as caught:
        ff.verify(out, sample=ROWS)
    assert "did the input change?" in str(caught.value)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_content_of_the_models_folder_is_refused(file, job, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    out = job()
    path = tmp_path / "model" / file
    if file == "model.safetensors":
        weights = load_file(path)
        weights["embeddings.word_embeddings.weight"][7, 7] += 1e-6
        save_file(weights, path, metadata={"format": "pt"})
    else:
        path.write_text(path.read_text() + "\n")
    with pytest.raises(ResumeError) as caught:
        ff.verify(out)
    assert file in str(caught.value)
    assert command(["verify", str(out)]) == 2
    assert file in capsys.readouterr().err


def test_a_moved_model_is_named_with_model(job, tmp_path, capsys):
    out = job()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert command(["verify", str(out)]) == 2
    assert "model" in capsys.readouterr().err
    assert command(["verify", str(out), "--model", str(tmp_path / "elsewhere"), "--sample", "5"]) == 0


def test_a_text_that_failed_is_no_difference(built, tmp_path):
    records = [{"text": "fine"}, {"text": None}, {"text": "fine too"}]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for policy, rows in (("quarantine", 2), ("null", 3)):
        out = tmp_path / f"{policy}.parquet"
        ff.embed(str(tmp_path / "docs.jsonl"), out, model=str(built("bert")), on="inline", on_error=policy)
        assert len(pq.read_table(out)) == rows
        assert ff.verify(out, sample=3).rows_compared == 2
