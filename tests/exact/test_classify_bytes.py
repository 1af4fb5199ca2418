"""Classify: the same bytes on one unit and on several, after a kill and a resume, and with a neighbour that fails."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import label_models
import pyarrow.parquet as pq
import pytest

import fanfold as ff
from fanfold.cli.main import run as command_line

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TAGS = ("O", "B-PER", "I-PER")
KINDS = {
    "sequence": ({}, ["--top-k", "2"]),
    "token": ({"labels": TAGS, "tokens": True}, []),
    "zero-shot": ({"labels": ("entailment", "neutral", "contradiction")}, ["--labels", "urgent,a much longer label"]),
    "pair": ({"labels": ("relevant",)}, ["--pair", "id"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = {}

    def build(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("model") / kind
            made[kind] = str(label_models.write_labels(folder, "bert", **KINDS[kind][0]))
        return made[kind]

    return build


@pytest.fixture(scope="module")
def inputs(written, documents):
    return written("documents", documents)


def classify(*words):
    """Exit code of the command, in this process."""
    return command_line(["classify", *map(str, words), "--quiet"])


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_units_writes_the_same_bytes(kind, model, inputs, documents, tmp_path):
    words = [*KINDS[kind][1], "--model", model(kind), "--prefix", "new_"]
    tables = []
    for on, suffix in (("inline", "jsonl"), ("cpu:1", "jsonl"), ("cpu:2", "parquet")):
        out = tmp_path / f"{on.replace(':', '')}.parquet"
        assert classify(inputs[suffix], "-o", out, "--on", on, *words) == 0
        tables.append(pq.read_table(out))
    assert tables[0].num_rows == len(documents)
    for table in tables[1:]:
        assert table.equals(tables[0])
    assert command_line(["verify", str(tmp_path / "cpu2.parquet"), "--sample", "40"]) == 0


def test_text_outputs_hold_the_same_values(model, inputs, tmp_path):
    for suffix in ("jsonl", "parquet", "csv"):
        words = ["--model", model("token"), "--on", "inline"]
        assert classify(inputs["jsonl"], "-o", tmp_path / f"a.{suffix}", *words) == 0
    import csv

    table = pq.read_table(tmp_path / "a.parquet").column("entities").to_pylist()
    assert any(table)
    records = [json.loads(line)["entities"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        cells = [json.loads(row["entities"]) for row in csv.DictReader(file)]
    assert records == table
    assert cells == table


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["token"])
def test_a_job_that_is_killed_ends_with_the_same_bytes(kind, model, documents, tmp_path, seed):
    inputs = tmp_path / "in.jsonl"
    inputs.write_text(
        "".join(json.dumps({**row, "id": f"{row['id']}-{i}"}) + "\n" for i in range(8) for row in documents)
    )
    words = [str(inputs), *KINDS[kind][1], "--model", model(kind), "--prefix", "new_", "--quiet"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert command_line(["classify", *words, "-o", str(whole), "--on", "inline"]) == 0
    ff.shutdown()
    command = [sys.executable, "-m", "fanfold.cli.main", "classify", *words, "-o", str(out), "--on", "cpu:2"]
    chance = random.Random(seed)
    landed = 0
    for _ in range(2):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        end_s = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end_s and leases(out) <= landed:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 0.3))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        landed = leases(out)
    assert landed, "killed after something was committed"
    assert subprocess.run(command, timeout=120, stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert json.loads((out / "summary.json").read_text())["rows_resumed"] > 0
    assert pq.read_table(out / "data").equals(pq.read_table(whole / "data"))


def leases(out):
    try:
        return (out / "commits.log").read_bytes().count(b'"lease"')
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("kind", ["sequence", "zero-shot", "token"])
def test_neighbours_of_a_row_that_fails_keep_their_bytes(kind, model):
    """The unit is given the same batch with some rows left out: the others' results are the same bits."""
    import numpy as np

    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.classify import make_classify
    from fanfold.tasks.task import ModelBatch

    names = {"labels": "urgent,odd"} if kind == "zero-shot" else {}
    unit = make_classify(model=model(kind), **names).open(Unit(name="x", device="cpu"), Numerics())
    texts = ["a", "one text of some length " * 4, "another", "the longest of them all, by far " * 6, "last"]
    prepared = unit.prepare(texts, range(5))
    ids, more, length = prepared.ids, prepared.more or [], max(prepared.costs)
    whole = unit.compute(ModelBatch(ids=ids, length=length, more=more))
    filler = unit.filler()[:length]
    for bad in (0, 3):
        changed = [filler if i == bad else row for i, row in enumerate(ids)]
        others = unit.compute(ModelBatch(ids=changed, length=length, more=more, left_out=frozenset({bad})))
        for name, values in whole.items():
            kept = [np.asarray(values, dtype=object)[i] for i in range(5) if i != bad]
            assert kept == [np.asarray(others[name], dtype=object)[i] for i in range(5) if i != bad]
