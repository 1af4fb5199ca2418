"""Two workers hold one copy of the weights: the pages of the safetensors file, mapped by both."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import checkpoints
import psutil
import pytest

import fanfold as ff

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="needs the extra 'torch'"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/smaps, which only Linux has"),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A BERT whose layers hold about 200 MB."""
    settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16}
    return checkpoints.write_model(tmp_path_factory.mktemp("large") / "model", "bert", **settings)


def mappings(pid, suffix):
    """Bytes of a process by field of smaps: of mappings of files that end so, and "all" of every mapping."""
    mapped, everything, inside = {}, {}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(suffix)
        elif found := re.match(r"(\w+): +(\d+) kB", line):
            name, value = found[1], int(found[2]) * 1024
            everything[name] = everything.get(name, 0) + value
            if inside:
                mapped[name] = mapped.get(name, 0) + value
    return mapped, everything


def test_two_workers_share_one_copy_of_the_weights(large):
    weights = (large / "model.safetensors").stat().st_size
    assert 180e6 < weights < 260e6
    texts = [f"{'some words ' * (1 + i % 40)} {i}" for i in range(60)]  # many pieces: both units load the model
    ff.shutdown()
    try:
        vectors = ff.embed(texts, model=str(large), on="cpu:2")
        workers = {}
        children = psutil.Process().children(recursive=True)
        for process in children:
            mapped, everything = mappings(process.pid, ".safetensors")
            if mapped:
                workers[process.pid] = (mapped, everything)
    finally:
        ff.shutdown()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, "nothing stays behind"
    assert vectors.shape == (60, 1024)
    assert len(workers) == 2, "both workers have the file mapped"
    shared = sum(mapped["Pss"] for mapped, _ in workers.values())
    resident = [mapped["Rss"] for mapped, _ in workers.values()]
    own = [everything["Private_Dirty"] - mapped["Private_Dirty"] for _, everything in workers.values()]
    print(
        f"weights {weights / 1e6:.0f} MB; resident {[round(value / 1e6) for value in resident]}, "
        f"proportional {shared / 1e6:.0f} in all, private memory of a whole worker {[round(p / 1e6) for p in own]}"
    )
    assert min(resident) > 0.9 * weights, "each worker reads the weights where they are mapped"
    assert 0.9 * weights < shared < 1.1 * weights, "one copy, not two"
    assert sum(mapped["Anonymous"] for mapped, _ in workers.values()) == 0, "no page was copied on a write"
    assert max(own) < weights, "and no second copy in a worker's own memory"
