"""`embed --layout`: a unit is a group of processes that share one model; the rows, and what happens when one dies."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

import fanfold as ff
from fanfold.job import engines

pytestmark = [pytest.mark.torch, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    texts = [" ".join(f"word{(i * 7 + j) % 50}" for j in range(1 + i * i % 40)) for i in range(120)]
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def whole(docs, tmp_path_factory):
    return vectors(ff.embed(docs, tmp_path_factory.mktemp("whole") / "out", on="inline"))


@pytest.fixture(autouse=True)
def ended():
    yield
    engines.shutdown()


def vectors(run):
    return np.stack(pq.read_table(run.out / "data")["embedding"].to_pylist())


@pytest.mark.parametrize(
    "layout",
    [
        "tensor=2",
        "pipeline=2",
        "context=2:ring",
        pytest.param("context=2", marks=pytest.mark.nightly),
        pytest.param("context=2:ulysses", marks=pytest.mark.nightly),
    ],
)
def test_split_units_give_the_vectors_of_whole_ones_and_pass_verify(docs, whole, tmp_path, layout):
    run = ff.embed(docs, tmp_path / "out", on="cpu:2", layout=layout)
    assert np.abs(vectors(run) - whole).max() <= 1e-5
    if layout == "pipeline=2":
        assert vectors(run).tobytes() == whole.tobytes()
    assert run.plan["layout"] == f"data=1 {layout}"
    assert (run.summary["level"], run.summary["units_used"]) == ("T", 1)
    verdict = ff.verify(tmp_path / "out", sample=20)
    assert verdict.level == "T"
    assert verdict.max_difference <= 1e-5


def test_verify_leaves_no_process_of_a_split_model(docs, tmp_path):
    ff.embed(docs, tmp_path / "out", on="cpu:2", layout="tensor=2")
    engines.shutdown()
    gc.disable()
    try:
        ff.verify(tmp_path / "out", sample=5)
        assert not psutil.Process().children(recursive=True)
    finally:
        gc.enable()


def test_a_process_of_a_group_that_dies_costs_a_retry_and_no_row(docs, whole, tmp_path):
    """The group is replaced as a whole."""
    killed = []

    def kill():
        deadline_s = time.monotonic() + 120
        while not killed and time.monotonic() < deadline_s:
            time.sleep(0.05)
            for line in (tmp_path / "out" / "pieces").glob("*") if (tmp_path / "out" / "pieces").exists() else ():
                ranks = [p for p in psutil.Process().children(recursive=True) if in_group(p)]
                if line and ranks:
                    killed.append(ranks[-1].pid)
                    os.kill(ranks[-1].pid, signal.SIGKILL)
                    return

    thread = threading.Thread(target=kill)
    thread.start()
    run = ff.embed(docs, tmp_path / "out", on="cpu:4", layout="tensor=2")
    thread.join()
    assert np.abs(vectors(run) - whole).max() <= 1e-5
    assert run.exit_code == 0


def in_group(process):
    """Whether the process holds a group's shared memory."""
    try:
        return any("fanfold-group" in region.path for region in process.memory_maps())
    except psutil.Error:
        return False
