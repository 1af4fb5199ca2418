"""Rows of mixed lengths through `fanfold generate` and through what users pick today; whole jobs, interleaved.

    scripts/bench generate [--model gpt2|llama] [--rows 64] [--turns 1] [--only fanfold,batched-8,...]

Random weights of the size of GPT-2 and of a Llama of half a billion parameters; prompts of 10 to 500 tokens,
answers of 5 to 200 (no token ends one, so that every tool must give as many). What counts is useful completion
tokens over the seconds of the whole job, start-up included: a JSONL file in, a Parquet file out, all cores.
CTranslate2 takes part where it is installed (pip install ctranslate2).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

BATCHED = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
import torch, transformers
source, out, model, size = sys.argv[1:5]
rows = [json.loads(line) for line in open(source)]
tokenizer = transformers.AutoTokenizer.from_pretrained(model, padding_side="left")
model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["text"]))
texts = [""] * len(rows)
for start in range(0, len(rows), int(size)):
    batch = order[start : start + int(size)]
    inputs = tokenizer([rows[i]["text"] for i in batch], padding=True, return_tensors="pt")
    limit = max(rows[i]["n"] for i in batch)
    inputs.pop("token_type_ids", None)
    found = model.generate(**inputs, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    for i, ids in zip(batch, found[:, inputs["input_ids"].shape[1] :]):
        texts[i] = tokenizer.decode(ids[: rows[i]["n"]])
pq.write_table(pa.table({"generated_text": texts}), out)
"""

CONTINUOUS = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig
source, out, model = sys.argv[1:4]
rows = [json.loads(line) for line in open(source)]
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
model = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=tokenizer.pad_token_id, max_new_tokens=200)
texts = [""] * len(rows)
settings = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=256)
with model.continuous_batching_context_manager(
    generation_config=config, continuous_batching_config=settings, warmup=False
) as manager:
    for i, row in enumerate(rows):
        manager.add_request(tokenizer(row["text"])["input_ids"], request_id=str(i), max_new_tokens=row["n"])
    for _ in rows:
        found = manager.get_result()
        while found is None:
            found = manager.get_result()
        texts[int(found.request_id)] = tokenizer.decode(found.generated_tokens)
pq.write_table(pa.table({"generated_text": texts}), out)
"""

CTRANSLATE = """
import json, sys
import pyarrow as pa, pyarrow.parquet as pq
import ctranslate2, transformers
source, out, model, size, units = sys.argv[1:6]
rows = [json.loads(line) for line in open(source)]
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
generator = ctranslate2.Generator(model + "-ct2", device="cpu", compute_type="float32",
                                  inter_threads=int(units), intra_threads=1)
order = sorted(range(len(rows)), key=lambda i: -rows[i]["n"])
texts = [""] * len(rows)
waiting = []
for start in range(0, len(rows), int(size)):
    batch = order[start : start + int(size)]
    prompts = [rows[i]["text"].split() for i in batch]
    limit = max(rows[i]["n"] for i in batch)
    waiting.append((batch, generator.generate_batch(
        prompts, max_length=limit, min_length=limit, include_prompt_in_result=False, asynchronous=True)))
for batch, results in waiting:
    for i, result in zip(batch, results):
        texts[i] = " ".join(result.result().sequences[0][: rows[i]["n"]])
pq.write_table(pa.table({"generated_text": texts}), out)
"""


# A Llama of half a billion parameters.
LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, kind: str) -> None:
    """Random weights, and a tokenizer whose words t0, t1, ... are its tokens."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None)
    else:
        config = transformers.LlamaConfig(**LLAMA, bos_token_id=None, eos_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    special = ("pad", "bos", "eos", "unk")
    words = {f"<{role}>": i for i, role in enumerate(special)}
    words |= {f"t{i}": i for i in range(len(special), config.vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    roles = {f"{role}_token": f"<{role}>" for role in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained(folder)


def write_rows(path: Path, count: int) -> int:
    """Prompts and limits; the sum of the limits."""
    chance = random.Random(1)
    total = 0
    with path.open("w") as file:
        for _ in range(count):
            prompt = " ".join(f"t{chance.randrange(4, 30_000)}" for _ in range(chance.randint(10, 500)))
            limit = chance.randint(5, 200)
            total += limit
            file.write(json.dumps({"text": prompt, "n": limit}) + "\n")
    return total


def command(name: str, source: Path, out: Path, model: Path, units: int) -> list[str]:
    kind, _, size = name.partition("-")
    if kind == "fanfold":
        flags = ["--model", str(model), "--max-new-tokens", "n", "--quiet", *(["--on", size] if size else [])]
        return [sys.executable, "-m", "fanfold.cli.main", "generate", str(source), "-o", str(out), *flags]
    script = {"batched": BATCHED, "continuous": CONTINUOUS, "ctranslate2": CTRANSLATE}[kind]
    return [sys.executable, "-c", script, str(source), str(out), str(model), size or "16", str(units)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["gpt2", "llama"], default="gpt2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    units = len(os.sched_getaffinity(0))
    names = ["fanfold", "batched-8", "batched-16", "batched-32", "continuous"]
    names += ["ctranslate2-16", "ctranslate2-32"] if find_spec("ctranslate2") else []
    names = arguments.only.split(",") if arguments.only else names
    with tempfile.TemporaryDirectory() as scratch:
        model, source = Path(scratch) / "model", Path(scratch) / "rows.jsonl"
        write_model(model, arguments.model)
        useful = write_rows(source, arguments.rows)
        if any(name.startswith("ctranslate2") for name in names):
            from ctranslate2.converters import TransformersConverter

            TransformersConverter(str(model)).convert(f"{model}-ct2", quantization="float32")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(arguments.turns):
            for name in names:
                out = Path(scratch) / f"{name}-{turn}.parquet"
                start_s = time.monotonic()
                done = subprocess.run(
                    command(name, source, out, model, units), capture_output=True, text=True, check=False
                )
                if done.returncode:
                    print(f"{name}: failed: {done.stderr.strip().splitlines()[-1:]}", flush=True)
                    continue
                seconds[name].append(time.monotonic() - start_s)
                print(
                    f"{name}: {seconds[name][-1]:.1f} s, {useful / seconds[name][-1]:.1f} useful tokens/s", flush=True
                )
        bound(model)
        medians = {name: statistics.median(found) for name, found in seconds.items() if found}
        print(f"\n{arguments.model}, {arguments.rows} rows, {useful:,} completion tokens, {units} core(s)")
        for name, median in sorted(medians.items(), key=lambda item: item[1]):
            ratio = median / medians[names[0]]
            print(
                f"| {name} | {median:.1f} s | {useful / median:.1f} useful tokens/s | {ratio:.2f} times {names[0]}'s |"
            )


def bound(model: Path) -> None:
    """What the machine allows, measured in the same run."""
    from fanfold.job.machine import machine_record
    from fanfold.tasks.checkpoint import num_matmul_weights

    probe = machine_record(measure=True)["probe"]
    gemm = probe["gemm_all_cores_flop_per_s"] / 1e9
    copy = probe["copy_bytes_per_s"] / 1e9
    print(f"{num_matmul_weights(model) / 1e6:.0f} M weights in products; {gemm:.0f} GFLOP/s, copies {copy:.0f} GB/s")


if __name__ == "__main__":
    main()
