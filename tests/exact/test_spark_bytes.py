"""On Spark as inline: the real model from the command line, functions of one's own, DataFrames and RDDs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fanfold as ff
import fanfold.spark
from fanfold.engine import post
from fanfold.engine.spark import Spark
from fanfold.errors import PieceFailed, PlanError
from fanfold.job import engines
from fanfold.merge import fold as fold_parts
from fanfold.tasks.embed import make_embed
from fanfold.testing.fakes import FakeTask

pytestmark = [
    pytest.mark.spark,
    pytest.mark.torch,
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # py4j leaves its sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CLUSTER = "local-cluster[2,1,1024]"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "on", "through", "grass"]


def texts(count):
    return [" ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(1 + i * i % 60)) for i in range(count)]


def write(path, count):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts(count))))
    return path


def command(*words, **variables):
    run = [sys.executable, "-m", "fanfold.cli.main", *map(str, words)]
    return subprocess.run(run, capture_output=True, text=True, env={**os.environ, **variables}, timeout=200)


def sha256_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}


# -- the command line -------------------------------------------------------------------------------------


def test_embed_on_two_executors_writes_the_files_of_inline(tmp_path):
    inputs = write(tmp_path / "in.jsonl", 300)
    assert command("embed", inputs, "-o", tmp_path / "inline", "--on", "inline").returncode == 0
    done = command("embed", inputs, "-o", tmp_path / "spark", "--on", CLUSTER, "--json")
    assert done.returncode == 0, done.stderr
    assert sha256_of(tmp_path / "spark") == sha256_of(tmp_path / "inline")
    summary = json.loads(done.stdout)
    assert (summary["units_used"], summary["level"], summary["retries"]) == (2, "B", {})
    assert "2 executor(s) with 2 slot(s) of 1 core(s)" in done.stderr
    assert "FutureWarning" not in done.stderr
    again = command("embed", inputs, "-o", tmp_path / "spark", "--on", "cpu:2")
    assert again.returncode == 0
    assert "already finished" in again.stderr


@pytest.mark.slow
def test_a_split_model_on_an_executor_gives_the_vectors_of_inline(tmp_path):
    inputs = write(tmp_path / "in.jsonl", 100)
    assert command("embed", inputs, "-o", tmp_path / "inline", "--on", "inline").returncode == 0
    split = command("embed", inputs, "-o", tmp_path / "spark", "--on", "local[2]", "--layout", "tensor=2")
    assert split.returncode == 0, split.stderr
    assert "1 executor(s) with 1 slot(s) of 2 core(s)" in split.stderr
    vectors = [
        np.stack(pq.read_table(tmp_path / name / "data")["embedding"].to_pylist()) for name in ("inline", "spark")
    ]
    assert np.abs(vectors[0] - vectors[1]).max() <= 1e-5
    verified = command("verify", tmp_path / "spark", "--sample", "20")
    assert (verified.returncode, "level T" in verified.stdout + verified.stderr) == (0, True)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or ())]


def test_a_split_model_needs_executors_with_a_core_for_each_process(tmp_path):
    inputs = write(tmp_path / "in.jsonl", 3)
    done = command("embed", inputs, "-o", tmp_path / "out", "--on", CLUSTER, "--layout", "tensor=2")
    assert done.returncode == 2
    assert "2 executor(s) of 1 core(s)" in done.stderr
    assert "executors of at least 2 core(s)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_embed_on_a_standalone_master_writes_the_files_of_inline(tmp_path, standalone):
    inputs = write(tmp_path / "in.jsonl", 100)
    assert command("embed", inputs, "-o", tmp_path / "inline", "--on", "inline").returncode == 0
    done = command("embed", inputs, "-o", tmp_path / "spark", "--on", standalone, SPARK_LOCAL_IP="127.0.0.1")
    assert done.returncode == 0, done.stderr
    assert sha256_of(tmp_path / "spark") == sha256_of(tmp_path / "inline")
    assert f"warning: spark.authenticate is off on {standalone}" in done.stderr


def test_machine_shows_the_executors_of_a_master(standalone):
    done = command("machine", "--on", standalone, SPARK_LOCAL_IP="127.0.0.1")
    assert done.returncode == 0, done.stderr
    assert f"spark:    {standalone}, 2 executor(s), 2 slot(s)" in done.stdout
    assert "on 127.0.0.2, 1 core(s)" in done.stdout
    assert "warning: spark.authenticate is off" in done.stdout


def test_a_python_without_the_packages_is_refused_by_name(tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    inputs = write(tmp_path / "in.jsonl", 10)
    python = str(bare / "bin" / "python")
    done = command("embed", inputs, "-o", tmp_path / "out", "--on", "local[2]", PYSPARK_PYTHON=python)
    assert done.returncode == 2, done.stderr
    assert "the executors' Python does not answer" in done.stderr
    assert "No module named" in done.stderr
    assert python in done.stderr
    assert not (tmp_path / "out").exists()


# -- one context for the rest -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours():
    yield
    engines.shutdown()


def test_a_function_mapped_on_executors_gives_the_bits_of_inline(ours):
    x = np.random.default_rng(0).normal(size=200_000)

    def f(piece):
        return np.exp(-(piece**2)) + np.cumsum(piece)

    here, there = ff.map(f, x, on="inline"), ff.map(f, x, on=CLUSTER)
    assert here.tobytes() == there.tobytes()
    rows = [f"row {i}" for i in range(1000)]
    assert ff.map(lambda row: row[::-1], rows, each=True, on=CLUSTER) == [row[::-1] for row in rows]
    found = ff.fold(np.sin, x, {"mean": ff.Mean(), "rows": ff.Count()}, on=CLUSTER, explain=True)
    assert found.value == ff.fold(np.sin, x, {"mean": ff.Mean(), "rows": ff.Count()}, on="inline")
    assert found.on == CLUSTER


def test_a_function_that_writes_to_its_piece_or_raises_is_told(ours):
    x = np.ones(100_000)

    def writes(piece):
        piece += 1
        return piece

    with pytest.raises(PieceFailed) as caught:
        ff.map(writes, x, on=CLUSTER)
    assert "change a copy" in caught.value.do


def test_a_folder_that_executors_do_not_share_is_refused_before_anything_is_written(tmp_path, ours):
    engines.shutdown()
    spark = Spark(CLUSTER, imports=FakeTask().imports)
    try:
        with pytest.raises(PlanError) as caught:
            # Each process has its own: the driver's is this one, an executor's its work folder.
            spark.roll_call(folder=Path("/proc/self/cwd"))
        assert "2 of 2 slots do not share it with the driver" in caught.value.found
        assert not list(Path.cwd().glob(".probe-*"))
        members = spark.roll_call(tmp_path)
        assert len({member.place.executor for member in members}) == 2
        assert not list(tmp_path.iterdir())
    finally:
        spark.close()


def test_versions_that_differ_from_the_executors_are_refused(monkeypatch, ours):
    engines.shutdown()
    spark = Spark("local[1]")
    try:
        real = post.software
        other = post.Software(python="3.9.1", packages=(("fanfold", "0.0.1"), *real(()).packages[1:]))
        monkeypatch.setattr(post, "software", lambda imports: other)
        with pytest.raises(PlanError) as caught:
            spark.roll_call()
        assert f"fanfold {ff.__version__}, the driver has 0.0.1" in caught.value.found
        assert "the driver has 3.9.1" in caught.value.found
    finally:
        spark.close()


def test_more_threads_a_unit_than_cores_an_executor_are_refused(ours):
    with pytest.raises(PlanError) as caught:
        Spark("local[2]", threads=3)
    assert "core" in caught.value.found


# -- DataFrames and RDDs of a session that the caller has -------------------------------------------------


@pytest.fixture(scope="module")
def session():
    engines.shutdown()
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    made = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    yield made
    made.stop()
    from pyspark import SparkContext

    gateway, SparkContext._gateway, SparkContext._jvm = SparkContext._gateway, None, None
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(20)


def test_embed_adds_two_columns_lazily_and_keeps_rows_in_order(session):
    rows = [(i, text) for i, text in enumerate(texts(150))]
    rows[40] = (40, None)
    df = session.createDataFrame(rows, "id int, text string").coalesce(1)
    begun_s = time.monotonic()
    lazy = fanfold.spark.embed(df, column="text")
    assert time.monotonic() - begun_s < 5
    assert lazy.schema.simpleString() == "struct<id:int,text:string,embedding:array<float>,error:string>"
    table = lazy.toArrow()
    assert table.column("id").to_pylist() == list(range(150))
    errors = table.column("error").to_pylist()
    assert [i for i, error in enumerate(errors) if error is not None] == [40]
    assert errors[40] == "NullText: column 'text' is null"
    found = table.column("embedding").to_pylist()
    assert found[40] is None
    reference = ff.embed([text for _, text in rows], on="inline", on_error="null")
    good = [i for i in range(150) if i != 40]
    # one window of the same rows: the same batches, the same bytes
    assert np.array([found[i] for i in good], dtype=np.float32).tobytes() == reference[good].tobytes()


def test_embed_of_wide_rows_sends_batches_of_bounded_size(session):
    df = session.range(300).selectExpr("id", "repeat('x', 200000) as wide", "concat('row ', id) as text").coalesce(1)
    found = fanfold.spark.embed(df).selectExpr("id", "length(wide) as w", "size(embedding) as d").toArrow()
    assert found.column("id").to_pylist() == list(range(300))
    assert set(found.column("w").to_pylist()) == {200_000}
    assert set(found.column("d").to_pylist()) == {384}
    # What goes back to Spark, before Spark makes batches of its own of it:
    wide = pa.record_batch({"wide": ["x" * 200_000] * 300, "text": [f"row {i}" for i in range(300)]})
    partition = fanfold.spark._embed_partition
    sent = list(partition(cloudpickle.dumps(make_embed()), "text", ("embedding", "error"), {}, [wide]))
    engines.shutdown()
    assert sum(batch.num_rows for batch in sent) == 300
    assert max(batch.nbytes for batch in sent) <= fanfold.spark._BATCH_BYTES
    assert len(sent) == 4


def test_rows_that_crash_or_hang_their_process_are_null_with_the_reason(session, monkeypatch):
    """A model that dies of two rows, in place of the real one; everything else is the way of every DataFrame."""
    task = FakeTask(faults={"row 7": "segfault", "row 33": "hang", "row 60": "raise"})
    monkeypatch.setattr("fanfold.tasks.embed.make_embed", lambda **_: task)
    df = session.range(100).selectExpr("id", "concat('row ', id) as text").coalesce(1)
    found = fanfold.spark.embed(df, timeout_batch="1.5s").toArrow()
    assert found.column("id").to_pylist() == list(range(100))
    errors = dict(enumerate(found.column("error").to_pylist()))
    bad = {i: error.partition(":")[0] for i, error in errors.items() if error is not None}
    assert bad == {7: "Segfault", 33: "Hang", 60: "ValueError"}
    widths = [vector and len(vector) for vector in found.column("embedding").to_pylist()]
    assert [i for i, width in enumerate(widths) if width is None] == [7, 33, 60]


def test_rows_that_are_all_bad_do_not_fail_the_stage(session):
    df = session.createDataFrame([(None,), (None,)], "text string")
    found = fanfold.spark.embed(df, output="v", error="why").collect()
    assert [row.v for row in found] == [None, None]
    assert all(row.why.startswith("NullText") for row in found)


def test_embed_refuses_what_it_cannot_take(session):
    df = session.range(3)
    with pytest.raises(PlanError) as caught:
        fanfold.spark.embed(df, column="id")
    assert caught.value.found == "it is bigint"
    with pytest.raises(PlanError) as caught:
        fanfold.spark.embed(df.selectExpr("'a' as text", "id as error"))
    assert "df has error already" in caught.value.found
    with pytest.raises(PlanError) as caught:
        fanfold.spark.embed(df.selectExpr("'a' as text"), chunk=3)
    assert "chunk" in caught.value.asked


def test_spark_connect_sessions_are_taken_too(tmp_path):
    """In a process of its own: one process speaks to Spark in one way."""
    pytest.importorskip("grpc", reason="Spark Connect needs grpcio: pip install 'pyspark[connect]'")
    python = tmp_path / "python"  # the server's Python workers do not get our environment
    path = f"{Path(ff.__file__).parents[1]}:$PYTHONPATH"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    variables = {**os.environ, "PYSPARK_PYTHON": str(python), "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", CONNECT], capture_output=True, text=True, env=variables, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "errors": [None, None, None, "NullText: column 'text' is null", None],
        "widths": [384, 384, 384, None, 384],
        "fold": [49.5, 100],
        "cause": "ZeroDivisionError",
    }


CONNECT = """
import json
from pyspark.sql import SparkSession
import fanfold as ff, fanfold.spark
from fanfold.errors import PieceFailed
session = SparkSession.builder.remote("local[2]").config("spark.ui.enabled", "false").getOrCreate()
rows = [(i, None if i == 3 else f"row {i}") for i in range(5)]
df = session.createDataFrame(rows, "id int, text string").repartition(2)
found = fanfold.spark.embed(df).orderBy("id").collect()
ids = lambda table: table.column("id").to_numpy()
folded = fanfold.spark.fold(session.range(100, numPartitions=4), ids, {"mean": ff.Mean(), "count": ff.Count()})
try:
    fanfold.spark.fold(session.range(10, numPartitions=2), lambda table: 1 / 0, ff.Mean())
except PieceFailed as error:
    cause = type(error.__cause__).__name__
print(json.dumps({
    "errors": [row.error for row in found],
    "widths": [row.embedding and len(row.embedding) for row in found],
    "fold": [folded["mean"], folded["count"]],
    "cause": cause,
}))
session.stop()
"""


@pytest.mark.parametrize("slices", [1, 2, 7])
def test_fold_over_an_rdd_has_the_bits_of_the_fixed_tree(session, slices):
    x = np.random.default_rng(1).normal(size=10_000) * 1e8
    rdd = session.sparkContext.parallelize(x.tolist(), slices)
    merge = ff.Mean()
    parts = [merge.lift(np.sin(np.array(part)), len(part)) for part in rdd.glom().collect()]
    expected = merge.finish(fold_parts(merge, parts))
    assert fanfold.spark.fold(rdd, lambda rows: np.sin(np.array(rows)), merge) == expected


def test_fold_over_a_data_frame_takes_arrow_tables_and_several_merges(session):
    df = session.range(1000, numPartitions=5)
    found = fanfold.spark.fold(df, lambda t: t.column("id").to_numpy(), {"mean": ff.Mean(), "all": ff.Concat()})
    assert found["mean"] == 499.5
    assert found["all"].tolist() == list(range(1000))
    assert fanfold.spark.fold(df.where("id < 0"), lambda t: t.column("id").to_numpy(), ff.Count()) == 0


def test_fold_names_the_partition_whose_function_raised(session):
    rdd = session.sparkContext.parallelize(range(8), 4)
    with pytest.raises(PieceFailed) as caught:
        fanfold.spark.fold(rdd, lambda rows: [1 / (row - 5) for row in rows], ff.Sum())
    assert "partition 2 (2 row(s))" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_job_of_ours_beside_a_session_is_refused_with_what_to_do(session):
    with pytest.raises(PlanError) as caught:
        ff.map(len, ["a"], on="local[1]")
    assert "fanfold.spark.embed(df, ...)" in caught.value.do
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


def test_the_output_of_a_job_is_readable_by_spark(tmp_path, session):
    inputs = write(tmp_path / "in.jsonl", 20)
    assert command("embed", inputs, "-o", tmp_path / "out", "--on", "inline").returncode == 0
    read = session.read.parquet(str(tmp_path / "out" / "data")).orderBy("row").collect()
    table = pq.read_table(tmp_path / "out" / "data")
    assert [row.embedding for row in read] == table.column("embedding").to_pylist()
