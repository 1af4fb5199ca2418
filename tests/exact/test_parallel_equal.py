"""Split models against whole ones in float64: outputs, loss and every gradient, for every family.

One process a rank, kept for all families; heads, inner widths and vocabulary do not go up in the number of ranks.
"""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch
import transformers
from tiny_models import config_named
from transformers import AutoConfig

from fanfold.errors import PlanError
from fanfold.parallel import equal
from fanfold.parallel.mesh import Split
from fanfold.parallel.split import architecture, config_of
from fanfold.parallel.tiny import tiny_model
from fanfold.planner.methods.tensor import collectives

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(300)]

# model type -> class, and settings that differ from the family's defaults
MODELS = {
    "bert": ("BertForMaskedLM", {}),
    "bert base": ("BertModel", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {}),
    "modernbert": ("ModernBertForMaskedLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 untied": ("GPT2LMHeadModel", {"tie_word_embeddings": False}),
    "opt": ("OPTForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {"alibi": False}),
    "falcon alibi": ("FalconForCausalLM", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "falcon grouped": ("FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 8, "alibi": False}),
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 8}),
    "llama one kv head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 8}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 8}),
    "gemma": ("GemmaForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 8}),
    "olmo2": ("Olmo2ForCausalLM", {}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A tiny checkpoint of the family, made once for each number of ranks."""
    made = {}

    def make(name, ways):
        if (name, ways) not in made:
            config = config_named(name, *MODELS[name])
            folder = tmp_path_factory.mktemp("tiny")
            tiny_model(config, architecture(config), ways).save_pretrained(folder)
            made[name, ways] = folder
        return made[name, ways]

    return make


def compared(ranks, folder, ways, stages=1, dtype="float64"):
    return tiny_models.compared(ranks(Split(tensor=ways, pipeline=stages)), folder, dtype=dtype)


def check(record, name):
    allowed = equal.promise_of(name.split()[0], "float64")
    errors = {key: record[key] for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad")}
    assert all(not math.isnan(error) and error <= allowed for error in errors.values()), record
    assert record["num_grads"] > 10
    assert record["collectives"]["all_reduce"] >= 4


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_with_uneven_shares_are_the_whole_model(ranks, folder_of, name):
    check(compared(ranks, folder_of(name, 2), 2), name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ways", [3, 4])
def test_more_ranks_are_the_whole_model(ranks, folder_of, name, ways):
    check(compared(ranks, folder_of(name, ways), ways), name)


@pytest.mark.parametrize("name", MODELS)
def test_two_pipeline_stages_are_the_whole_model_to_the_bit(ranks, folder_of, name):
    record = compared(ranks, folder_of(name, 2), 1, stages=2)
    assert record["bitwise"]
    assert max(record[key] for key in ("max_rel_logits", "max_rel_loss")) == 0
    assert record["max_rel_grad"] <= equal.promise_of(name.split()[0], "float64"), record


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_stages_whose_layers_are_split_are_the_whole_model(ranks, folder_of, name):
    check(compared(ranks, folder_of(name, 2), 2, stages=2), name)


@pytest.mark.parametrize("name", ["bert", "bert base", "gpt2", "opt", "gpt_neox", "llama", "mistral", "gemma", "phi3"])
def test_the_planner_predicts_what_is_called(ranks, folder_of, name):
    folder = folder_of(name, 2)
    record = compared(ranks, folder, 2)
    config = AutoConfig.from_pretrained(folder)
    cut = name != "gemma"  # its embedding scales what it looks up, so it and the head stay whole
    predicted = collectives(
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        tokens=3 * 17,
        num_bytes=8,
        head=cut and name != "bert base",
        backward=True,
        embedding=cut,
    )
    counted = {kind: record["collectives"].get(kind, 0) for kind in ("all_reduce", "all_gather")}
    assert counted == {"all_reduce": predicted.all_reduce, "all_gather": predicted.all_gather}
    num_bytes = {kind: record["bytes"].get(kind, 0) for kind in ("all_reduce", "all_gather")}
    assert num_bytes == {"all_reduce": predicted.all_reduce_bytes, "all_gather": predicted.all_gather_bytes}


def test_three_ranks_share_the_queries_of_two_key_value_heads(ranks, tmp_path):
    config = config_named("qwen3", *MODELS["qwen3"])
    config.num_attention_heads, config.num_key_value_heads, config.hidden_size = 6, 2, 48
    model = tiny_model(config, architecture(config), 3)
    settings = {**model.config.to_dict(), "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
    torch.manual_seed(3)
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)).save_pretrained(tmp_path)
    check(compared(ranks, tmp_path, 3), "qwen3")


def test_a_rank_reads_and_holds_its_share_only(folder_of):
    from fanfold.parallel.comm import Comm
    from fanfold.parallel.split import load_share

    class Alone:
        """A transport that is never used."""

        def __init__(self, rank, size):
            self.rank, self.size = rank, size

    folder = folder_of("llama", 2)
    whole = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(folder).parameters())
    held = []
    for rank in range(2):
        share = load_share(folder, Comm(Alone(rank, 2)), torch.float64)
        held.append(sum(p.numel() for p in share.model.parameters()))
        assert all(p.device.type == "cpu" for p in share.model.parameters())
    norms = sum(
        p.numel()
        for name, p in transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters()
        if "norm" in name
    )
    assert sum(held) == whole + norms  # norms are whole on both
    assert max(held) < 0.62 * whole


@pytest.mark.parametrize(
    ("name", "ways", "found"), [("bert", 13, "12 attention heads"), ("llama one kv head", 33, "32 attention heads")]
)
def test_more_ranks_than_heads_are_refused_with_what_is_possible(name, ways, found):
    from fanfold.parallel.rules import heads_of

    with pytest.raises(PlanError) as caught:
        heads_of(config_named(name, *MODELS[name]), 0, ways)
    assert caught.value.found == found
    assert "tensor=1 to tensor=" in caught.value.allowed


def test_a_config_that_names_quantised_weights_is_refused(folder_of, tmp_path):
    import json
    import shutil

    folder = tmp_path / "quantised"
    shutil.copytree(folder_of("llama", 2), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError) as caught:
        config_of(folder)
    assert caught.value.found == "quantised weights"
