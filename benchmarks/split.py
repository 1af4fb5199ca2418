"""A model over two units (tensor=2, one thread each) against the whole one on the same two cores, in turns.

    scripts/bench split [--models gpt2,bert,llama] [--turns 3]

Random weights of the size of GPT-2, of BERT-large and of a Llama of half a billion parameters, float32. Prefill: one
sequence of 512 tokens. Decode: the 32 tokens after 64. `tp_plan`: transformers' own, over gloo (Llama only).
`tensor=1` is our loader without a cut, against plain transformers: one thread, one process, step by step in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from generate import LLAMA

PREFILL, PROMPT, NEW, REPEATS = 512, 64, 32, 5
RANKS = 2


def write_model(folder: Path, kind: str) -> None:
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if kind == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config())
    elif kind == "bert":
        model = tf.BertModel(
            tf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    else:
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA))
    model.save_pretrained(folder)


def times_of(model, forward=None) -> dict[str, float]:
    """Medians in seconds: a prefill, a step of decoding."""
    import torch

    forward = forward or model
    chance = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30_000, (1, PREFILL), generator=chance)
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    decodes = model.config.model_type != "bert"
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            start_s = time.perf_counter()
            forward(input_ids=ids)
            if repeat:
                found["prefill"].append(time.perf_counter() - start_s)
            if not decodes:
                continue
            out = forward(input_ids=ids[:, :PROMPT], use_cache=True)
            start_s = time.perf_counter()
            for step in range(NEW):
                token = ids[:, PROMPT + step : PROMPT + step + 1]
                out = forward(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            if repeat:
                found["decode"].append((time.perf_counter() - start_s) / NEW)
    return {name: statistics.median(values) for name, values in found.items() if values}


class Timed:
    """A transport that adds up how long its calls take."""

    def __init__(self, transport) -> None:
        self.rank, self.size, self.transport, self.seconds = transport.rank, transport.size, transport, 0.0

    def __getattr__(self, name):
        call = getattr(self.transport, name)

        def timed(*args, **options):
            start_s = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start_s

        return timed


def whole(folder: str, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    return times_of(plain(folder))


def plain(folder: str):
    import transformers

    loader = transformers.AutoModel if "bert" in folder else transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder).eval()


def share(folder: str, rank: int, path: str) -> dict[str, float]:
    """One rank's times, and of them what its exchanges took: waiting for the other rank counts."""
    import torch

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.groups import Groups
    from fanfold.parallel.mesh import Split
    from fanfold.parallel.split import load_share

    torch.set_num_threads(1)
    split = Split(tensor=RANKS)
    groups = Groups(path, rank, split, 600.0)
    transport = Timed(groups.along("tensor"))
    try:
        model = load_share(folder, Comm(transport), torch.float32, split=split).model
        groups.world.barrier("loaded")
        start_s = time.perf_counter()
        found = times_of(model)
        found["exchanges"] = transport.seconds / (time.perf_counter() - start_s)
        return found
    finally:
        groups.close()


def overhead(folder: str, path: str) -> dict[str, float]:
    """tensor=1 over plain transformers in time: medians of ratios of neighbours, both orders alike."""
    import torch

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.groups import Groups
    from fanfold.parallel.mesh import Split
    from fanfold.parallel.split import load_share

    torch.set_num_threads(1)
    groups = Groups(path, 0, Split(), 600.0)
    models = [
        plain(folder),
        load_share(folder, Comm(groups.along("tensor")), torch.float32, split=Split()).model,
    ]
    ids = torch.randint(5, 30_000, (1, PREFILL), generator=torch.Generator().manual_seed(1))
    found: dict[str, list[float]] = {"prefill": [], "decode": []}

    def seconds(call) -> float:
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    with torch.no_grad():
        kept = [model(input_ids=ids[:, :PROMPT]) for model in models]
        for turn in range(2 * REPEATS):
            order = (0, 1) if turn % 2 else (1, 0)
            took = {which: seconds(lambda which=which: models[which](input_ids=ids)) for which in order}
            found["prefill"].append(took[1] / took[0])
        for step in range(2 * NEW if "bert" not in folder else 0):
            token = ids[:, PROMPT + step : PROMPT + step + 1]
            order = (0, 1) if step % 2 else (1, 0)
            took = {}
            for which in order:
                cache = kept[which].past_key_values
                took[which] = seconds(
                    lambda which=which, cache=cache, token=token: models[which](input_ids=token, past_key_values=cache)
                )
            found["decode"].append(took[1] / took[0])
    groups.close()
    return {name: statistics.median(values) for name, values in found.items() if values}


def tp_plan(folder: str, rank: int) -> dict[str, float]:
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    return times_of(model)


def run(what: str, folder: str) -> dict[str, float]:
    """The slowest rank's times of one fresh start."""
    from fanfold.engine.supervisor import child_environment
    from fanfold.parallel.shared_file import new_path

    size = RANKS if what in ("tensor=2", "tp_plan") else 1
    path = new_path() if what in ("tensor=2", "overhead") else ""
    processes = []
    for rank in range(size):
        environment = {**child_environment(threads=2 if what == "whole" else 1), "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        words = [sys.executable, __file__, "--one", what, folder, str(rank), path]
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    answers = [process.communicate(timeout=600) for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            raise RuntimeError(f"{what}: {errors.decode().strip().splitlines()[-1:]}")
    records = [json.loads(out.decode().splitlines()[-1]) for out, _ in answers]
    return {name: max(record[name] for record in records) for name in records[0]}


def one(what: str, folder: str, rank: int, path: str) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if what == "tp_plan":
        found = tp_plan(folder, rank)
    elif what == "overhead":
        found = overhead(folder, path)
    elif what == "tensor=2":
        found = share(folder, rank, path)
    else:
        found = whole(folder, 2 if what == "whole" else 1)
    print(json.dumps(found))


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        what, folder, rank, path = sys.argv[2:6]
        one(what, folder, int(rank), path)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,bert,llama")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    for kind in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(Path(scratch) / kind)
            write_model(Path(folder), kind)
            names = ["whole", "tensor=2", "one thread", *(["tp_plan"] if kind == "llama" else [])]
            found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(arguments.turns):
                for name in names:
                    try:
                        found[name].append(run(name, folder))
                    except RuntimeError as error:
                        print(error, flush=True)
            print(f"\n{kind}: medians of {arguments.turns} turns, times as a ratio to the whole model on two threads")
            base = medians(found["whole"])
            for name in filter(lambda name: found[name], names):
                own = medians(found[name])
                shown = [f"{key} {own[key] * 1e3:.1f} ms ({base[key] / own[key]:.2f}x)" for key in base]
                shown += [f"exchanges {own['exchanges']:.1%}"] if "exchanges" in own else []
                print(f"| {name} | {' | '.join(shown)} |", flush=True)
            for key, ratio in run("overhead", folder).items():
                print(f"tensor=1 takes {ratio:.3f} of plain transformers' time ({key}, one thread)", flush=True)


def medians(records: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(record[name] for record in records) for name in records[0]}


if __name__ == "__main__":
    main()
