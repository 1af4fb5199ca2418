"""Parameters of a model from its config are those that transformers counts, and those that papers give."""

from __future__ import annotations

import pytest

from fanfold.errors import PlanError
from fanfold.machine.catalogue import table
from fanfold.plan.workload import catalogue_names, from_catalogue, from_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
HALF = {**SMALL, "num_key_value_heads": 2}
# (config class, its arguments, the class of the model); without arguments the released size
FAMILIES = [
    ("BertConfig", {}, "AutoModel"),
    ("RobertaConfig", {}, "AutoModel"),
    ("DistilBertConfig", {}, "AutoModel"),
    ("GPT2Config", {}, "AutoModelForCausalLM"),
    ("OPTConfig", {}, "AutoModelForCausalLM"),
    ("BloomConfig", {"hidden_size": 256, "n_layer": 3, "n_head": 8}, "AutoModelForCausalLM"),
    ("GPTNeoXConfig", {}, "AutoModelForCausalLM"),
    ("MptConfig", {"d_model": 256, "n_heads": 4, "n_layers": 2}, "AutoModelForCausalLM"),
    ("LlamaConfig", {}, "AutoModelForCausalLM"),
    ("LlamaConfig", {**HALF, "attention_bias": True, "mlp_bias": True}, "AutoModelForCausalLM"),
    ("MistralConfig", {}, "AutoModelForCausalLM"),
    ("Qwen2Config", HALF, "AutoModelForCausalLM"),
    ("Qwen3Config", {**HALF, "head_dim": 32}, "AutoModelForCausalLM"),
    ("GemmaConfig", {}, "AutoModelForCausalLM"),
    ("Gemma2Config", {}, "AutoModelForCausalLM"),
    ("Gemma3TextConfig", {**HALF, "head_dim": 16, "eos_token_id": 1}, "AutoModelForCausalLM"),
    ("MixtralConfig", {}, "AutoModelForCausalLM"),
    ("Qwen3MoeConfig", {**HALF, "num_experts": 8, "moe_intermediate_size": 32}, "AutoModelForCausalLM"),
    (
        "Qwen2MoeConfig",
        {**HALF, "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        "AutoModelForCausalLM",
    ),
    ("DeepseekV3Config", {"num_hidden_layers": 5}, "AutoModelForCausalLM"),
    ("GptOssConfig", {"num_hidden_layers": 3}, "AutoModelForCausalLM"),
    ("T5Config", {}, "T5ForConditionalGeneration"),
    ("WhisperConfig", {}, "WhisperForConditionalGeneration"),
    ("ViTConfig", {}, "AutoModel"),
]


@pytest.mark.torch
@pytest.mark.parametrize(("config", "values", "model"), FAMILIES)
def test_parameters_of_a_family_are_those_of_transformers(config, values, model):
    import torch
    import transformers

    made = getattr(transformers, config)(**values)
    kind = getattr(transformers, model)
    with torch.device("meta"):
        real = kind.from_config(made) if model.startswith("Auto") else kind(made)
    assert from_config(made.to_dict()).num_params == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("name", sorted(table("models")))
def test_dimensions_of_the_catalogue_give_the_published_parameters(name):
    published = table("models")[name]["published_params"]
    assert from_catalogue(name).num_params == pytest.approx(published, rel=0.015)


def test_every_alias_stands_for_a_model():
    for name in catalogue_names():
        assert from_catalogue(name).layers > 0


def test_active_parameters_of_experts_are_those_a_token_meets():
    mixtral = from_catalogue("mixtral-8x7b")
    assert mixtral.active_params == pytest.approx(12.9e9, rel=0.01)  # the release notes
    assert from_catalogue("deepseek-v3").active_params == pytest.approx(37.6e9, rel=0.01)


def test_forward_flops_are_two_per_weight_and_what_attention_adds():
    model = from_catalogue("gpt3-175b")
    linears = 2 * model.matrix_params_met()
    length, hidden, layers = 2048, 12288, 96
    biases = 2 * sum(b.count * sum(n.outputs for n in b.layer.linears if n.bias) for b in model.blocks)
    attention = 4 * layers * hidden * length  # PaLM, appendix B: 12 L h s for forward and backward
    assert model.forward_flops_per_token(length, masked=False) == linears - biases + attention


def test_an_unknown_name_gets_the_closest_ones():
    with pytest.raises(PlanError) as caught:
        from_catalogue("lama-3-70b")
    assert "llama-3-70b" in str(caught.value)


def test_a_missing_key_is_named():
    with pytest.raises(PlanError) as caught:
        from_config({"model_type": "llama", "hidden_size": 64})
    assert "intermediate_size" in str(caught.value)


@pytest.mark.parametrize("hidden", [0, -64, "64", None, 64.5])
def test_sizes_that_cannot_be_are_refused(hidden):
    config = {"model_type": "llama", **HALF, "hidden_size": hidden, "head_dim": 16}
    with pytest.raises(PlanError):
        from_config(config)
