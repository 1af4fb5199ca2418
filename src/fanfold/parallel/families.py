"""The tables: what is cut how in each family of models. Names end as in transformers' own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.parallel.experts_families import TYPES as EXPERT_TYPES
from fanfold.parallel.experts_families import check_experts
from fanfold.parallel.families_seq2seq import BART, T5, VIT, check_encoder_decoder, num_blocks
from fanfold.parallel.rules import Family, Kind, What, heads_of
from fanfold.parallel.sequence_families import check_context

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split

_BERT = Family(
    types=("bert", "roberta", "xlm-roberta", "electra", "camembert", "xlm-roberta-xl"),
    attention="attention.self",
    rules={
        "attention.self.query": ("column", "heads"),
        "attention.self.key": ("column", "heads"),
        "attention.self.value": ("column", "heads"),
        "attention.output.dense": ("row", "heads"),
        "intermediate.dense": ("column", "inner"),
        "output.dense": ("row", "inner"),
    },
)
_DISTILBERT = Family(
    types=("distilbert",),
    attention="attention",
    rules={
        "attention.q_lin": ("column", "heads"),
        "attention.k_lin": ("column", "heads"),
        "attention.v_lin": ("column", "heads"),
        "attention.out_lin": ("row", "heads"),
        "ffn.lin1": ("column", "inner"),
        "ffn.lin2": ("row", "inner"),
    },
)
_MODERNBERT = Family(
    types=("modernbert",),
    attention="attn",
    rules={
        "attn.Wqkv": ("column", "qkv"),
        "attn.Wo": ("row", "heads"),
        "mlp.Wi": ("column", "inner2"),
        "mlp.Wo": ("row", "inner"),
    },
)
_GPT2 = Family(
    types=("gpt2",),
    attention="attn",
    rules={
        "attn.c_attn": ("column", "qkv"),
        "attn.c_proj": ("row", "heads"),
        "mlp.c_fc": ("column", "inner"),
        "mlp.c_proj": ("row", "inner"),
    },
    attributes={"split_size": "features", "num_heads": "heads"},
)
_OPT = Family(
    types=("opt",),
    attention="self_attn",
    rules={
        "self_attn.q_proj": ("column", "heads"),
        "self_attn.k_proj": ("column", "heads"),
        "self_attn.v_proj": ("column", "heads"),
        "self_attn.out_proj": ("row", "heads"),
        "fc1": ("column", "inner"),
        "fc2": ("row", "inner"),
    },
    attributes={"num_heads": "heads"},
)
_NEOX = Family(
    types=("gpt_neox",),
    attention="attention",
    rules={
        "attention.query_key_value": ("column", "per_head"),
        "attention.dense": ("row", "heads"),
        "mlp.dense_h_to_4h": ("column", "inner"),
        "mlp.dense_4h_to_h": ("row", "inner"),
    },
)
_GPTJ = Family(
    types=("gptj",),
    attention="attn",
    rules={
        "attn.q_proj": ("column", "heads"),
        "attn.k_proj": ("column", "heads"),
        "attn.v_proj": ("column", "heads"),
        "attn.out_proj": ("row", "heads"),
        "mlp.fc_in": ("column", "inner"),
        "mlp.fc_out": ("row", "inner"),
    },
    attributes={"num_attention_heads": "heads"},
)
_LLAMA_RULES: dict[str, tuple[Kind, What | None]] = {
    "self_attn.q_proj": ("column", "heads"),
    "self_attn.k_proj": ("column", "kv"),
    "self_attn.v_proj": ("column", "kv"),
    "self_attn.o_proj": ("row", "heads"),
    "mlp.gate_proj": ("column", "inner"),
    "mlp.up_proj": ("column", "inner"),
    "mlp.down_proj": ("row", "inner"),
}
_LLAMA = Family(
    types=("llama", "mistral", "qwen2", "gemma"),
    attention="self_attn",
    rules=_LLAMA_RULES,
    attributes={"num_key_value_groups": "groups"},
)
_MOE_RULES: dict[str, tuple[Kind, What | None]] = {
    **_LLAMA_RULES,
    "shared_expert.gate_proj": ("column", "inner"),
    "shared_expert.up_proj": ("column", "inner"),
    "shared_expert.down_proj": ("row", "inner"),
}
_MOE = Family(  # the experts themselves: parallel/experts.py
    types=("mixtral", "qwen2_moe"),
    attention="self_attn",
    rules=_MOE_RULES,
    attributes={"num_key_value_groups": "groups"},
)
_QWEN3 = Family(
    types=("qwen3", "qwen3_moe"),
    attention="self_attn",
    rules={**_LLAMA_RULES, "self_attn.q_norm": ("sum_gradient", None), "self_attn.k_norm": ("sum_gradient", None)},
    attributes={"num_key_value_groups": "groups"},
)
_OLMO2 = Family(
    types=("olmo2",),
    attention="self_attn",
    rules={**_LLAMA_RULES, "self_attn.q_norm": ("head_norm", "heads"), "self_attn.k_norm": ("head_norm", "kv")},
    attributes={"num_key_value_groups": "groups"},
)
_PHI3 = Family(
    types=("phi3",),
    attention="self_attn",
    rules={
        "self_attn.qkv_proj": ("column", "qkv"),
        "self_attn.o_proj": ("row", "heads"),
        "mlp.gate_up_proj": ("column", "inner2"),
        "mlp.down_proj": ("row", "inner"),
    },
    attributes={
        "num_key_value_groups": "groups",
        "num_key_value_heads": "kv",
        "config.num_attention_heads": "heads",
        "config.num_key_value_heads": "kv",
    },
)
_BLOOM = Family(
    types=("bloom",),
    attention="self_attention",
    rules={
        "self_attention.query_key_value": ("column", "per_head"),
        "self_attention.dense": ("row", "heads"),
        "mlp.dense_h_to_4h": ("column", "inner"),
        "mlp.dense_4h_to_h": ("row", "inner"),
    },
    attributes={"num_heads": "heads"},
    head_inputs=("alibi",),
)
_FALCON_RULES = {
    "self_attention.dense": ("row", "heads"),
    "mlp.dense_h_to_4h": ("column", "inner"),
    "mlp.dense_4h_to_h": ("row", "inner"),
}


def _falcon(config: Any) -> Family:
    fused = "per_group" if config.new_decoder_architecture else "shared_kv" if config.multi_query else "per_head"
    return Family(
        types=("falcon",),
        attention="self_attention",
        rules={**_FALCON_RULES, "self_attention.query_key_value": ("column", fused)},  # type: ignore[dict-item]
        attributes={"num_heads": "heads", "num_kv_heads": "kv"},
        head_inputs=("alibi", "attention_mask"),
    )


FAMILIES = (
    _BERT, _DISTILBERT, _MODERNBERT, _GPT2, _OPT, _NEOX, _GPTJ, _LLAMA, _QWEN3, _OLMO2, _PHI3, _BLOOM,
    T5, BART, VIT, _MOE,
)  # fmt: skip


def check_split(config: Any, split: Split) -> None:
    """PlanError for a layout that a model of this config cannot have."""
    blocks = num_blocks(config)
    if split.pipeline > blocks:
        raise PlanError(
            f"--layout {split}",
            found=f"{blocks} layers",
            allowed=f"pipeline=1 to pipeline={blocks}: a stage holds a layer at the least",
            do=f"use pipeline={blocks}",
        )
    check_experts(config, split)
    if split.context > 1:
        check_context(config, split)
    if split.tensor > 1:
        check_encoder_decoder(config, split)
        check_heads(config, split)


def check_heads(config: Any, split: Split) -> None:
    """PlanError where there are too few heads."""
    for rank in range(split.tensor):
        heads_of(config, rank, split.tensor)


def has_table(config: Any) -> bool:
    """Whether a table of this file is for the model's family; else one may be derived."""
    if config.model_type in EXPERT_TYPES:  # their experts are cut without one
        return True
    return config.model_type == "falcon" or any(config.model_type in family.types for family in FAMILIES)


_derived: dict[str, Family] = {}  # in this process, by type


def use_derived(table: Family) -> None:
    """From now on `family_of` gives this table for its family, which has none of its own."""
    _derived.update(dict.fromkeys(table.types, table))


def family_of(config: Any) -> Family:
    """The table for a model's config. Raises PlanError."""
    if config.model_type == "falcon":
        return _falcon(config)
    for family in FAMILIES:
        if config.model_type in family.types:
            return family
    if config.model_type in _derived:
        return _derived[config.model_type]
    known = sorted({"falcon", *(name for family in FAMILIES for name in family.types)})
    raise PlanError(
        f"splitting a {config.model_type}",
        found="no table says how its layers are cut",
        allowed=", ".join(known),
        do="use --layout data, or add a table in parallel/families.py",
    )
