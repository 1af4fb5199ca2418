"""`classify --layout` and `generate --layout`: what a split model says is what the whole one says."""

from __future__ import annotations

import json

import label_models
import language_models
import pyarrow.parquet as pq
import pytest

import fanfold as ff
from fanfold.errors import PlanError
from fanfold.job import engines

pytestmark = [pytest.mark.torch, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    texts = [" ".join(f"word{(i * 7 + j) % 50}" for j in range(1 + i * i % 20)) for i in range(24)]
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(autouse=True)
def ended():
    yield
    engines.shutdown()


def rows(run):
    return pq.read_table(run.out / "data").to_pylist()


def same_labels(found, expected):
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert max(abs(a["score"] - b["score"]) for a, b in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize(
    ("family", "layout", "on"),
    [
        ("bert", "tensor=2", "cpu:4"),
        pytest.param("gpt2-no-pad", "pipeline=2", "cpu:2", marks=pytest.mark.nightly),
        pytest.param("llama", "tensor=2,pipeline=2", "cpu:4", marks=pytest.mark.nightly),
        pytest.param("gpt2-no-pad", "tensor=2", "cpu:2", marks=pytest.mark.nightly),
        pytest.param("bert", "pipeline=2", "cpu:2", marks=pytest.mark.nightly),
    ],
)
def test_classify_gives_the_labels_and_scores_of_the_whole_model(docs, tmp_path, family, layout, on):
    model = tmp_path / "model"
    label_models.write_labels(model, family)
    whole = ff.classify(docs, tmp_path / "whole", model=str(model), on="inline")
    run = ff.classify(docs, tmp_path / "out", model=str(model), on=on, layout=layout)
    same_labels(rows(run), rows(whole))
    groups = {"cpu:4": 2 if layout == "tensor=2" else 1, "cpu:2": 1}[on]
    assert run.plan["layout"] == f"data={groups} {layout.replace(',', ' ')}".replace(
        "tensor=2 pipeline=2", "pipeline=2 tensor=2"
    )
    assert run.summary["level"] == "T"
    verdict = ff.verify(tmp_path / "out", sample=8)
    assert verdict.level == "T"
    assert verdict.max_difference <= 1e-5


@pytest.mark.parametrize(
    ("family", "layout", "on"),
    [
        ("Llama", "tensor=2", "cpu:4"),
        ("GPT2", "pipeline=2", "cpu:2"),
        pytest.param("Bloom", "pipeline=2", "cpu:2", marks=pytest.mark.nightly),  # by transformers' own generate
        pytest.param("GPT2", "tensor=2", "cpu:2", marks=pytest.mark.nightly),
        pytest.param("Llama", "tensor=2,pipeline=2", "cpu:4", marks=pytest.mark.nightly),
        pytest.param("Bloom", "tensor=2", "cpu:2", marks=pytest.mark.nightly),
        pytest.param("T5", "tensor=2", "cpu:2", marks=pytest.mark.nightly),
        pytest.param("Qwen2", "pipeline=3", "cpu:3", marks=pytest.mark.nightly),
    ],
)
def test_generate_gives_the_texts_of_the_whole_model(docs, tmp_path, family, layout, on):
    model = tmp_path / "model"
    language_models.write_language_model(model, family)
    options = {"model": str(model), "max_new_tokens": 12, "kv_memory": "4MB"}
    whole = ff.generate(docs, tmp_path / "whole", on="inline", **options)
    run = ff.generate(docs, tmp_path / "out", on=on, layout=layout, **options)
    assert rows(run) == rows(whole)
    assert run.summary["level"] == "T"
    verdict = ff.verify(tmp_path / "out", sample=8)
    assert verdict.level == "T"


@pytest.mark.nightly
def test_draws_stop_strings_and_schemas_are_those_of_the_whole_model(docs, tmp_path):
    model = tmp_path / "model"
    language_models.write_language_model(model, "Llama")
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    for name, more in (
        ("drawn", {"temperature": 1.2, "top_k": 20, "seed": 3, "stop": ["e"], "max_new_tokens": 8}),
        ("json", {"json_schema": schema, "max_new_tokens": 40}),
    ):
        options = {"model": str(model), "kv_memory": "4MB", **more}
        whole = ff.generate(docs, tmp_path / f"{name}-whole", on="inline", **options)
        run = ff.generate(docs, tmp_path / name, on="cpu:2", layout="pipeline=2", **options)
        assert rows(run) == rows(whole)


def test_several_models_are_refused_with_a_layout(docs, tmp_path):
    model = tmp_path / "model"
    label_models.write_labels(model, "bert")
    with pytest.raises(PlanError) as caught:
        ff.classify(docs, tmp_path / "out", model=[str(model)] * 2, merge="mean", layout="tensor=2")
    assert "several models" in caught.value.found
