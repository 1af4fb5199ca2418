"""Mixtures of experts, split against whole in float64; experts stored one by one; what is read, counted, refused."""

from __future__ import annotations

import math
import os
import re
import signal
import time

import pytest
import tiny_models
import torch
import transformers
from tiny_models import config_named
from transformers import AutoConfig

import fanfold as ff
from fanfold.errors import PlanError, UnitLost
from fanfold.parallel import equal
from fanfold.parallel.comm import Comm
from fanfold.parallel.families import check_split
from fanfold.parallel.mesh import Split, parse_split
from fanfold.parallel.split import architecture, load_share
from fanfold.parallel.tiny import tiny_model
from fanfold.planner.methods.expert import collectives

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(300)]

MODELS = {
    "mixtral": ("MixtralForCausalLM", {"output_router_logits": True}),  # its loss has the routers' own in it
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"num_key_value_heads": 8}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"output_router_logits": True}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {}),
}
NIGHTLY = [
    *(("expert", {"expert": 3}, name) for name in MODELS),
    *((key, split, name) for key, split in (("tensor", {"tensor": 2}), ("both", {"tensor": 2, "expert": 2}))
      for name in MODELS if name != "deepseek_v3"),
]  # fmt: skip


def saved(name, folder, split, **options):
    config = config_named(name, *MODELS[name])
    model = tiny_model(config, architecture(config), split.tensor)
    model.save_pretrained(folder, **options)
    return model


def compared(ranks, folder, split, **values):
    return tiny_models.compared(ranks(split), folder, **values)


def errors_of(record):
    return [record[key] for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad")]


def check(record):
    assert all(not math.isnan(error) and error <= equal.FLOAT64_PROMISE for error in errors_of(record)), record
    assert record["num_grads"] == record["num_grads_whole"] >= 20
    loads = record["expert_load"].values()
    assert loads
    assert all(sum(load) == 2 * 3 * 17 and len(load) == 5 for load in loads)  # two experts of five for every token


@pytest.mark.parametrize("name", MODELS)
def test_five_experts_on_two_units_are_the_whole_model(ranks, tmp_path, name):
    split = Split(expert=2)
    saved(name, tmp_path, split)
    check(compared(ranks, tmp_path, split))


@pytest.mark.nightly
@pytest.mark.parametrize(("key", "split", "name"), NIGHTLY)
def test_experts_and_their_columns_over_units_are_the_whole_model(ranks, tmp_path, key, split, name):
    split = Split(**split)
    saved(name, tmp_path, split)
    check(compared(ranks, tmp_path, split))


ROUTERS = "output_router_logits: the auxiliary loss needs the routers of all layers, for all tokens"
OVER_POSITIONS = ["context=2:ring,expert=2"]
OVER_POSITIONS += [
    pytest.param(layout, marks=pytest.mark.nightly)
    for layout in ("context=2", "context=2:ulysses", "context=2:ring", "context=3", "context=3:ring",
                   "context=2,expert=2", "context=2:ulysses,expert=2", "context=2:ring,tensor=2",
                   "context=2:ulysses,tensor=2,expert=2", "context=2,pipeline=2,expert=2", "pipeline=2,expert=2")
]  # fmt: skip


@pytest.mark.parametrize("layout", OVER_POSITIONS)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_go_with_cut_sequences_and_with_stages(ranks, tmp_path, name, layout):
    split = parse_split(layout)
    config = config_named(name, MODELS[name][0], {"num_key_value_heads": 8})
    ways = max(2, split.tensor) * (split.context if split.context_method == "ulysses" else 1)
    tiny_model(config, architecture(config), ways).save_pretrained(tmp_path)
    record = compared(ranks, tmp_path, split)
    assert max(errors_of(record)) <= equal.promise_of(name, "float64", context=split.context), record
    assert record["num_grads"] == record["num_grads_whole"] >= 20
    assert all(sum(load) == 2 * 3 * 17 for load in record["expert_load"].values())


def test_experts_stored_in_one_tensor_and_one_by_one_are_read_alike(tmp_path):
    split, shares, keys = Split(expert=2), [], []
    for original in (True, False):
        folder = tmp_path / str(original)
        saved("mixtral", folder, split, save_original_format=original)
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            keys.append(set(file.keys()))
        share = load_share(folder, Comm(Nobody(0, 1)), torch.float32, expert=Comm(Nobody(1, 2)))
        shares.append(dict(share.model.named_parameters()))
    assert any(".experts.4." in key for key in keys[0])
    assert not any(".experts.4." in key for key in keys[1])
    assert all(torch.equal(value, shares[1][name]) for name, value in shares[0].items())


class Nobody:
    """A transport that is never used."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_a_unit_reads_and_holds_its_experts_only(tmp_path, monkeypatch):
    from fanfold.parallel.weights import Files

    model = saved("mixtral", tmp_path, Split(expert=2))
    read, real = [], Files.read
    monkeypatch.setattr(Files, "read", lambda self, name, cut: (read.append(name), real(self, name, cut))[1])
    share = load_share(tmp_path, Comm(Nobody(0, 1)), torch.float32, expert=Comm(Nobody(1, 2)))
    numbers = {int(number) for name in read for number in re.findall(r"\.experts\.(\d+)\.", name)}
    assert numbers == {3, 4}
    whole = dict(model.named_parameters())
    held = dict(share.model.named_parameters())
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(held[name], whole[name][3:])


def test_the_planner_predicts_the_sums_of_experts(ranks, tmp_path):
    split = Split(expert=2)
    model = saved("mixtral", tmp_path, split)
    record = compared(ranks, tmp_path, split)
    calls, num_bytes = collectives(
        layers=model.config.num_hidden_layers,
        tokens=3 * 17,
        hidden=model.config.hidden_size,
        chosen=model.config.num_experts_per_tok,
        num_bytes=8,
        backward=True,
    )
    assert record["collectives"] == {"all_reduce": calls}
    assert record["bytes"] == {"all_reduce": num_bytes}


@pytest.mark.nightly
def test_every_sum_of_experts_is_needed(ranks, tmp_path):
    split = Split(expert=2)
    saved("mixtral", tmp_path, split)
    assert tiny_models.idle_collectives(ranks(split), tmp_path, equal.FLOAT64_PROMISE) == (6, [])


def test_a_rank_that_sleeps_among_experts_is_named_with_its_layer(tmp_path):
    saved("mixtral", tmp_path, Split(expert=2))
    ids = torch.randint(5, 101, (2, 7))
    with ff.parallel(str(tmp_path), layout="expert=2", timeout_s=3.0) as model:
        whole = transformers.MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
        whole = whole(input_ids=ids).logits
        assert (model(input_ids=ids).logits - whole).abs().max() <= 1e-5 * whole.abs().max()
        os.kill(model.pids[1], signal.SIGSTOP)
        begun_s = time.monotonic()
        with pytest.raises(UnitLost) as caught:
            model(input_ids=ids)
    assert time.monotonic() - begun_s < 30
    assert re.search(r"all_reduce#\d+ model\.layers\.0\.mlp\.experts float32 \(14, \d+\)", str(caught.value))
    assert "rank 1" in str(caught.value)


def test_a_rank_that_is_killed_among_experts_is_named(tmp_path):
    saved("mixtral", tmp_path, Split(expert=2))
    ids = torch.randint(5, 101, (2, 7))
    with ff.parallel(str(tmp_path), layout="expert=2") as model:
        model(input_ids=ids)
        os.kill(model.pids[1], signal.SIGKILL)
        begun_s = time.monotonic()
        with pytest.raises(UnitLost) as caught:
            model(input_ids=ids)
    assert time.monotonic() - begun_s < 30
    assert "rank 1" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "split", "found"),
    [
        ("mixtral", {"expert": 9}, "8 experts"),
        ("llama", {"expert": 2}, "a llama, which has no experts that are known"),
        ("deepseek_v3", {"tensor": 2}, "attention over a latent that all heads share, which no table cuts"),
        ("mixtral", {"pipeline": 2}, ROUTERS),
        ("mixtral", {"context": 2}, ROUTERS),
    ],
)
def test_layouts_that_cannot_be_are_refused(name, split, found):
    config = AutoConfig.for_model(name, **(MODELS[name][1] if name in MODELS else {}))
    with pytest.raises(PlanError) as caught:
        check_split(config, Split(**split))
    assert caught.value.found == found
