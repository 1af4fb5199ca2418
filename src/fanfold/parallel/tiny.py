"""A tiny random copy of a model's architecture: the same family and options, awkward sizes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 101
_INNER = 37
_HEAD = 8
_LAYERS = 2
_NO_RANDOMNESS = ("dropout", "pdrop", "drop_prob", "layerdrop")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "decoder_start_token_id")


def tiny_config(config: Any, tensor: int, pipeline: int = 1, expert: int = 1) -> Any:
    """The config with few, uneven heads: one more key-value head than ranks that share layers (one stays one)."""
    tiny = copy.deepcopy(config)
    group = max(1, config.num_attention_heads // _kv(config))
    kv = 1 if _kv(config) == 1 and group > 1 else max(3, tensor + 1)
    heads = kv * min(group, 2) if kv > 1 else max(3, tensor + 1)
    layers = max(_LAYERS, pipeline + 1)
    values: dict[str, Any] = {
        "hidden_size": heads * _HEAD,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "decoder_attention_heads": heads,
        "decoder_layers": layers,
        "num_decoder_layers": layers,
        "vocab_size": VOCABULARY,
        "intermediate_size": _INNER,
        "ffn_dim": _INNER,
        "encoder_ffn_dim": _INNER,
        "decoder_ffn_dim": _INNER,
        "d_ff": _INNER,
        "hidden_dim": _INNER,
        "n_inner": _INNER,
        "ffn_hidden_size": _INNER,
        "word_embed_proj_dim": heads * _HEAD,
        "embedding_size": 16,
        "head_dim": _HEAD,
        "rotary_dim": 4,
        "num_key_value_heads": kv,
        "num_kv_heads": kv,
        "max_position_embeddings": 64,
        "num_local_experts": max(5, expert + 1),
        "num_experts": max(5, expert + 1),
        "n_routed_experts": max(5, expert + 1),
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11,
        "shared_expert_intermediate_size": 13,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": _HEAD,
        "qk_nope_head_dim": 4,
        "v_head_dim": _HEAD,
        "max_source_positions": 19,
        "max_target_positions": 64,
        "num_mel_bins": 6,
        "image_size": 12,
        "patch_size": 4,
        "pooler_output_size": heads * _HEAD,
        "sliding_window": 7,
        "local_attention": 8,
        "max_window_layers": 1,
    }
    for name, value in values.items():
        if name in _own(tiny) and getattr(tiny, name) is not None:
            setattr(tiny, name, value)
    for name in list(_own(tiny)):
        if any(word in name for word in _NO_RANDOMNESS) and isinstance(getattr(tiny, name), float):
            setattr(tiny, name, 0.0)
        if name in _TOKENS and isinstance(getattr(tiny, name), int):
            setattr(tiny, name, min(getattr(tiny, name), _TOKENS.index(name) + 1))
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(tiny, name, None), list):
            kinds = list(dict.fromkeys(getattr(config, name)))
            setattr(tiny, name, (kinds * layers)[:layers])
    return tiny


def _own(config: Any) -> set[str]:
    """The names of a config's settings, those that stand for others included."""
    return {*config.to_dict(), *getattr(config, "attribute_map", {})}


def _kv(config: Any) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else int(config.num_attention_heads)
    found = getattr(config, "num_kv_heads" if config.model_type == "falcon" else "num_key_value_heads", None)
    return int(found or config.num_attention_heads)


def save_tiny(config: Any, folder: Path, tensor: int, pipeline: int = 1, seed: int = 0, expert: int = 1) -> None:
    """A tiny copy of what the config describes, as a checkpoint."""
    import transformers

    from fanfold.parallel.split import architecture

    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tiny_model(config, architecture(config), tensor, pipeline, seed, expert).save_pretrained(folder)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def tiny_model(config: Any, cls: Any, tensor: int, pipeline: int = 1, seed: int = 0, expert: int = 1) -> Any:
    """Random weights from a fixed seed; norms and biases are random too, so that an error in them shows."""
    import torch

    torch.manual_seed(seed)
    model = cls(tiny_config(config, tensor, pipeline, expert))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
    return model.eval()
