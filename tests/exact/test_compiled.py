"""--compile: within level T of eager, the same bytes on any number of units, and said where it cannot be."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

import fanfold as ff
from fanfold.errors import PlanError, RequestError
from fanfold.job import compiling
from fanfold.tasks import compiled

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
]
TEXTS = ["one", "", "two words", *(f"text {i} " + "and more of it " * (i % 9) for i in range(60)), "x" * 900]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Libraries of these tests alone: each is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def vectors(run):
    return run.table().column("embedding").combine_chunks().flatten().to_numpy()


def test_any_number_of_units_gives_the_same_bytes_close_to_eager(docs, built, tmp_path):
    model = str(built("bert"))
    eager = vectors(ff.embed(docs, tmp_path / "eager", model=model, on="inline"))
    runs = {
        on: ff.embed(docs, tmp_path / on.replace(":", ""), model=model, on=on, compile="on")
        for on in ("cpu:2", "cpu:1", "inline")
    }
    found = {on: vectors(run) for on, run in runs.items()}
    assert found["cpu:1"].tobytes() == found["cpu:2"].tobytes() == found["inline"].tobytes()
    worst = float(np.abs(found["inline"] - eager).max() / np.abs(eager).max())
    print(f"largest difference to eager, of the largest value: {worst:.1e}")
    assert worst <= 1e-5
    assert found["inline"].tobytes() != eager.tobytes(), "it was really compiled"
    assert runs["inline"].summary["level"] == "T"
    assert runs["inline"].plan["numerics"]["compiled"] is True
    assert ff.verify(tmp_path / "cpu2", sample=20).max_difference == 0


def test_a_row_alone_and_the_shortest_batches_are_filled_up_without_a_trace(built):
    model = str(built("bert"))
    alone = ff.embed(["one"], model=model, on="inline", compile="on")
    eager = ff.embed(["one"], model=model, on="inline")
    assert alone.shape == eager.shape
    assert np.abs(alone - eager).max() <= 1e-5 * np.abs(eager).max()


def test_a_compiled_job_and_another_are_not_the_same_job(docs, built, tmp_path):
    model = str(built("bert"))
    ff.embed(docs, tmp_path / "out", model=model, on="inline", compile="on")
    with pytest.raises(RequestError, match=r"numerics\.compiled: True then, False now"):
        ff.embed(docs, tmp_path / "out", model=model, on="inline")


# -- auto ---------------------------------------------------------------------------------------------


def test_auto_leaves_a_short_job_as_it_is_and_says_why(docs, built, tmp_path):
    run = ff.embed(docs, tmp_path / "out", model=str(built("bert")), on="inline", compile="auto")
    assert run.plan["numerics"]["compiled"] is False
    assert run.plan["reasons"][-1].startswith("not compiled: about ")


def test_auto_compiles_a_long_job_and_a_resume_keeps_what_was_decided(docs, built, tmp_path, monkeypatch):
    model = str(built("bert"))
    monkeypatch.setattr(compiling, "WORTH_FLOPS", 1.0)
    run = ff.embed(docs, tmp_path / "out", model=model, on="inline", compile="auto")
    assert run.plan["numerics"]["compiled"] is True
    monkeypatch.setattr(compiling, "WORTH_FLOPS", 1e99)
    (tmp_path / "out" / "_SUCCESS").unlink()
    again = ff.embed(docs, tmp_path / "out", model=model, on="inline", compile="auto")
    assert again.plan["numerics"]["compiled"] is True
    assert again.summary["output_sha256"] == run.summary["output_sha256"]


def test_auto_goes_on_without_where_the_model_cannot_be_compiled(docs, built, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PlanError("--compile on", found="torch cannot compile this model", allowed="others", do="nothing")

    monkeypatch.setattr(compiling, "WORTH_FLOPS", 1.0)
    monkeypatch.setattr(compiled, "build", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    run = ff.embed(docs, tmp_path / "out", model=str(built("bert")), on="inline", compile="auto")
    assert run.plan["numerics"]["compiled"] is False
    assert run.plan["reasons"][-1] == "not compiled: torch cannot compile this model"


def test_a_library_that_fails_on_a_shape_is_not_used(docs, built, tmp_path, monkeypatch):
    def fails(ids, mask):
        raise RuntimeError(f"no kernel for {tuple(ids.shape)}")

    monkeypatch.setattr(compiling, "WORTH_FLOPS", 1.0)
    monkeypatch.setattr(compiled, "build", lambda model, path, **_: path.write_bytes(b""))
    monkeypatch.setattr(compiled, "load", lambda path: fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "fanfold" / "compiled").mkdir(parents=True)
    model = str(built("bert"))
    run = ff.embed(docs, tmp_path / "out", model=model, on="inline", compile="auto")
    assert run.plan["numerics"]["compiled"] is False
    assert run.plan["reasons"][-1].startswith("not compiled: compiled, it fails on 1 rows of ")
    with pytest.raises(PlanError, match="no kernel for"):
        ff.embed(docs, tmp_path / "other", model=model, on="inline", compile="on")


# -- refusals -----------------------------------------------------------------------------------------


def test_without_a_compiler_it_is_said_before_anything_is_made(docs, built, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(PlanError, match="apt install g") as caught:
        ff.embed(docs, tmp_path / "out", model=str(built("bert")), on="inline", compile="on")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_library_that_differs_from_eager_is_refused(docs, built, tmp_path, monkeypatch):
    """As a compiler's fault would be found: a library of another model stands in for the right one."""
    real = compiled.load

    def wrong(path):
        forward = real(path)
        return lambda ids, mask: forward(ids, mask) * 1.001 + 0.01

    monkeypatch.setattr(compiled, "load", wrong)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(PlanError, match="differ from eager"):
        ff.embed(docs, tmp_path / "out", model=str(built("bert")), on="inline", compile="on")


def test_an_unknown_choice_is_refused(docs, tmp_path):
    with pytest.raises(RequestError, match="off, on, auto"):
        ff.embed(docs, tmp_path / "out", compile="maybe")
