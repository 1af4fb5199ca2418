"""The tables of encoder-decoders (T5, BART, Whisper) and of ViT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.parallel.rules import Family, Kind, What

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split

_T5_RULES: dict[str, tuple[Kind, What | None]] = {
    f"{attention}.{leaf}": ("row" if leaf == "o" else "column", "heads")
    for attention in ("SelfAttention", "EncDecAttention")
    for leaf in "qkvo"
}
T5 = Family(
    types=("t5", "mt5", "umt5"),
    attention=("SelfAttention", "EncDecAttention"),
    rules={
        **_T5_RULES,
        "relative_attention_bias": ("lookup", "numbers"),
        "DenseReluDense.wi": ("column", "inner"),
        "DenseReluDense.wi_0": ("column", "inner"),
        "DenseReluDense.wi_1": ("column", "inner"),
        "DenseReluDense.wo": ("row", "inner"),
    },
    attributes={"n_heads": "heads"},
)
_BART_RULES: dict[str, tuple[Kind, What | None]] = {
    f"{attention}.{leaf}_proj": ("row" if leaf == "out" else "column", "heads")
    for attention in ("self_attn", "encoder_attn")
    for leaf in ("q", "k", "v", "out")
}
BART = Family(
    types=("bart", "mbart", "whisper"),
    attention=("self_attn", "encoder_attn"),
    rules={**_BART_RULES, "fc1": ("column", "inner"), "fc2": ("row", "inner")},
    attributes={"num_heads": "heads"},
)
VIT = Family(
    types=("vit",),
    attention="attention",
    rules={
        "attention.q_proj": ("column", "heads"),
        "attention.k_proj": ("column", "heads"),
        "attention.v_proj": ("column", "heads"),
        "attention.o_proj": ("row", "heads"),
        "mlp.fc1": ("column", "inner"),
        "mlp.fc2": ("row", "inner"),
    },
)


def num_blocks(config: Any) -> int:
    """Of an encoder-decoder, both sides'."""
    count = int(config.num_hidden_layers)
    if getattr(config, "is_encoder_decoder", False):
        for name in ("num_decoder_layers", "decoder_layers"):
            if getattr(config, name, None):
                return count + int(getattr(config, name))
    return count


def check_encoder_decoder(config: Any, split: Split) -> None:
    """PlanError where encoder and decoder have different heads: one share of heads stands for both."""
    here, there = (getattr(config, f"{side}_attention_heads", None) for side in ("encoder", "decoder"))
    if here is not None and there is not None and here != there:
        raise PlanError(
            f"--layout {split}",
            found=f"{here} attention heads in the encoder, {there} in the decoder",
            allowed="tensor=1, or as many heads on both sides",
            do="use pipeline",
        )


def check_generate(config: Any, split: Split) -> None:
    """PlanError for a model that cannot generate token ids from token ids in this layout."""
    from fanfold.parallel.split import architecture

    cls = architecture(config)
    shown = f"generate of a {cls.__name__}"
    if not cls.can_generate() or cls.main_input_name != "input_ids":
        raise PlanError(
            shown,
            found=f"it takes {cls.main_input_name}" if cls.can_generate() else "no output head for next tokens",
            allowed="models that make token ids out of token ids",
            do="call the model itself: model(...)",
        )
    if config.is_encoder_decoder and (split.pipeline > 1 or split.context > 1):
        raise PlanError(
            shown,
            found=f"an encoder-decoder in layout {split}",
            allowed="pipeline=1 and context=1: transformers calls the encoder apart from the decoder",
            do=f"use tensor={split.units}",
        )
