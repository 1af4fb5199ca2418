"""A sequence over two units by each variant against the whole model on one: time, memory, bytes that travel.

scripts/bench context [--tokens 1024,4096,...] [--layers 2] [--model bert|llama]

The model has the shape of the small BERT (384 wide, 12 heads, 1,536 inner) or of a small causal model with as many
parameters a layer, random weights, and as many layers as are asked for. One thread a unit. Memory is the largest
resident set of a unit during a call less that before it (VmHWM is reset through /proc), so weights are not in it.
Besides the time on the clock stands the processor time of the busiest unit, which other work on the machine does not
stretch as much.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from fanfold.parallel.mesh import head_shares, parse_split
from fanfold.parallel.positions import cut_positions
from fanfold.planner.methods.context import Attention, moved
from fanfold.tasks.parallel_model import ParallelModel

LAYOUTS = ("tensor=1", "context=2:allgather", "context=2:ulysses", "context=2:ring")
HEADS, KV, SIZE = 12, 4, 32


def save(kind: str, layers: int, longest: int, folder: str) -> None:
    torch.manual_seed(0)
    shape = {
        "hidden_size": HEADS * SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": 1536,
        "max_position_embeddings": longest,
        "vocab_size": 1000,
    }
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False)
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**shape, num_key_value_heads=KV))
    model.save_pretrained(folder)


def status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(model: ParallelModel, ids: torch.Tensor) -> tuple[float, float, int, torch.Tensor]:
    """Seconds, processor seconds of the busiest unit, and the most bytes that a unit held more than before."""
    before, used = [], [cpu_s(pid) for pid in model.pids]
    for pid in model.pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before.append(status(pid, "VmRSS"))
    start_s = time.perf_counter()
    out = model(input_ids=ids).last_hidden_state
    elapsed_s = time.perf_counter() - start_s
    busy_s = max(cpu_s(pid) - b for pid, b in zip(model.pids, used, strict=True))
    return elapsed_s, busy_s, max(status(pid, "VmHWM") - b for pid, b in zip(model.pids, before, strict=True)), out


def travelled(kind: str, layout: str, layers: int, tokens: int) -> int:
    """Bytes of attention's calls, as the planner predicts them; a test compares these with counted ones."""
    split = parse_split(layout)
    if split.context == 1:
        return 0
    kv = HEADS if kind == "bert" else KV
    at = Attention(
        rank=0,
        layers=layers,
        rows=1,
        tokens=cut_positions(tokens, split.context, balanced=kind != "bert").sizes,
        num_kv=kv,
        head_size=SIZE,
        num_bytes=4,
        heads=[(len(q), len(k)) for q, k in head_shares(HEADS, kv, split.context)],
    )
    return moved(split.context_method, at, backward=False).bytes.total()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--model", choices=["bert", "llama"], default="bert")
    asked = parser.parse_args()
    lengths = [int(word) for word in asked.tokens.split(",")]
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    found: dict[tuple[str, int], tuple[float, float, int, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save(asked.model, asked.layers, max(lengths), folder)
        for layout in LAYOUTS:
            with ParallelModel(folder, parse_split(layout), dtype="float32", timeout_s=300.0) as model:
                model(input_ids=torch.randint(5, 900, (1, 256)))
                for tokens in lengths:
                    ids = torch.randint(5, 900, (1, tokens), generator=torch.Generator().manual_seed(tokens))
                    runs = [measure(model, ids) for _ in range(3 if tokens <= 8192 else 1)]
                    least = [min(run[i] for run in runs) for i in (0, 1)]
                    found[layout, tokens] = (*least, max(run[2] for run in runs), runs[0][3])
    print(f"{asked.model}, {asked.layers} layers, 1 row, float32, 1 thread a unit")
    columns = ("tokens", "layout", "time", "of whole", "CPU of a unit", "of whole", "memory of a unit", "of whole")
    print("| " + " | ".join((*columns, "moved", "difference")) + " |")
    print("|" + "---|" * (len(columns) + 2))
    for tokens in lengths:
        whole_s, whole_cpu_s, whole_bytes, whole = found[LAYOUTS[0], tokens]
        for layout in LAYOUTS:
            elapsed_s, busy_s, held, out = found[layout, tokens]
            moves = travelled(asked.model, layout, asked.layers, tokens)
            far = float((out - whole).abs().max() / whole.abs().max())
            cells = (
                f"{tokens:,}",
                "whole" if layout == LAYOUTS[0] else layout,
                f"{elapsed_s:.2f} s",
                f"{elapsed_s / whole_s:.2f}",
                f"{busy_s:.2f} s",
                f"{busy_s / whole_cpu_s:.2f}",
                f"{held / 1e6:.0f} MB",
                f"{held / whole_bytes:.2f}",
                f"{moves / 1e6:.1f} MB",
                f"{far:.0e}",
            )
            print("| " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
