"""Texts cut into parts with a real tokenizer and model: against transformers' own parts and an unsplit forward."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pyarrow.parquet as pq
import pytest

import fanfold as ff
from fanfold.errors import DifferenceFound, PlanError
from fanfold.job import engines
from fanfold.plan.numerics import Numerics
from fanfold.plan.plan import Unit
from fanfold.tasks.embed import make_embed
from fanfold.tasks.task import ModelBatch

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
]

CHUNK, OVERLAP = 24, 5


@pytest.fixture(scope="module", autouse=True)
def _workers_end_with_the_module():
    yield
    engines.shutdown()


@pytest.fixture(scope="module")
def texts(documents):
    return [document["text"] for document in documents[:40]]


@pytest.fixture(scope="module")
def docs(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("chunks") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def opened(model, **options):
    task = make_embed(model=str(model), chunk=CHUNK, overlap=OVERLAP, **options)
    return task.open(Unit(name="test", device="cpu"), Numerics())


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "t5"])
def test_parts_are_those_of_transformers(built, texts, family):
    from transformers import AutoTokenizer

    model = built(family)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    found = opened(model).prepare(texts)
    expected = tokenizer(texts, truncation=True, max_length=CHUNK, stride=OVERLAP, return_overflowing_tokens=True)
    assert [row.tolist() for row in found.ids] == expected["input_ids"]
    assert max(found.parts) > 3
    counts = np.bincount(expected["overflow_to_sample_mapping"], minlength=len(texts))
    assert found.parts == counts.tolist()


def test_every_part_begins_with_the_prompt(built, texts):
    unit = opened(built("bert"), prefix_text="passage: ")
    found = unit.prepare(texts)
    plain = opened(built("bert")).prepare(["passage:"]).ids[0][:-1]
    assert all(row[: len(plain)].tolist() == plain.tolist() for row in found.ids)
    assert all(len(row) <= CHUNK for row in found.ids)


def test_vectors_are_those_of_an_unsplit_forward(built, docs, texts, tmp_path):
    """Each part alone through the model, on one unit, without our batches."""
    model = built("bert")
    table = ff.embed(docs, tmp_path / "out", model=str(model), chunk=CHUNK, overlap=OVERLAP, on="cpu:2").table()
    unit = opened(model)
    alone = np.concatenate(
        [unit.compute(ModelBatch(ids=[row], length=len(row)))["embedding"] for row in unit.prepare(texts).ids]
    )
    found = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(alone.shape)
    assert np.abs(found - alone).max() <= 1e-5 * np.abs(alone).max()


def test_a_text_that_fits_gets_the_vector_it_has_without_parts(built, docs, texts, tmp_path):
    model = str(built("bert"))
    merged = ff.embed(docs, tmp_path / "merged", model=model, chunk=64, overlap=8, merge="mean", on="inline").table()
    whole = ff.embed(docs, tmp_path / "whole", model=model, max_length=64, on="inline").table()
    parts = (
        make_embed(model=model, chunk=64, overlap=8).open(Unit(name="test", device="cpu"), Numerics()).prepare(texts)
    )
    fits = [row for row, count in enumerate(parts.parts) if count == 1]
    assert 5 < len(fits) < len(texts)
    for row in fits:
        a, b = (np.array(table.column("embedding")[row].as_py()) for table in (merged, whole))
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("merge", [None, "mean"])
def test_the_same_bytes_on_one_unit_and_on_two_and_verify_finds_changes(built, docs, tmp_path, merge):
    options = {"model": str(built("bert")), "chunk": CHUNK, "overlap": OVERLAP, "merge": merge}
    runs = [ff.embed(docs, tmp_path / f"{on[-1]}.parquet", on=on, **options) for on in ("cpu:1", "cpu:2")]
    assert runs[0].summary["output_sha256"] == runs[1].summary["output_sha256"]
    out = tmp_path / "2.parquet"
    verdict = ff.verify(out, sample=30)
    assert verdict.rows_compared >= 30
    assert not verdict.differing
    # a changed row is found
    table = pq.read_table(out)
    vectors = table.column("embedding").combine_chunks().flatten().to_numpy().copy()
    vectors[5] += 1
    import pyarrow as pa

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors), table.schema.field("embedding").type.list_size)
    pq.write_table(table.set_column(table.schema.get_field_index("embedding"), "embedding", column), out)
    with pytest.raises(DifferenceFound):
        ff.verify(out, sample=30)


def test_in_memory_one_vector_a_text(built, texts):
    model = str(built("bert"))
    vectors = ff.embed(texts, model=model, chunk=CHUNK, merge="mean", on="inline")
    assert vectors.shape[0] == len(texts)
    with pytest.raises(PlanError, match="several vectors for one text"):
        ff.embed(texts, model=model, chunk=CHUNK, on="inline")
