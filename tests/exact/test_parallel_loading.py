"""What a rank holds while it loads: its share of the weights, and little more."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import fanfold as ff

pytestmark = [
    pytest.mark.torch,
    pytest.mark.nightly,
    pytest.mark.timeout(280),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status, which only Linux has"),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of about 0.9 GB; what its weights are does not matter here."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=3, num_attention_heads=16, vocab_size=16000
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights = {name: torch.full(tuple(p.shape), 0.01) for name, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def peak_bytes(pid):
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024


@pytest.mark.parametrize("layout", ["tensor=2", "pipeline=2"])
def test_a_rank_that_loads_peaks_at_its_share_of_the_weights(large, layout):
    total = (large / "model.safetensors").stat().st_size
    assert 0.8e9 < total < 1.2e9
    with ff.parallel(str(large), layout=layout) as model:
        model(input_ids=torch.tensor([[1, 2, 3]]))  # slices of the file are mapped: now all of their pages are read
        peaks = [peak_bytes(pid) for pid in model.pids]
    assert sum(peaks) > total, "together they hold the whole model"
    largest = {"tensor=2": 0.51, "pipeline=2": 0.55}[layout] * total
    print(json.dumps({"total_mb": total // 10**6, "peaks_mb": [peak // 10**6 for peak in peaks]}))
    assert max(peaks) <= 1.1 * largest + 400e6
