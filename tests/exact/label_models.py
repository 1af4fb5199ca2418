"""Tiny random checkpoints with heads of classification, of many families; nothing is downloaded.

`write_labels(folder, family, ...)` gives what `save_pretrained` gives, like checkpoints.write_model, with a tokenizer
that knows pairs too. Seeds are fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import checkpoints
from checkpoints import FAMILIES, OTHERS, POSITIONS, WIDTH, Family

if TYPE_CHECKING:
    from pathlib import Path

_BERT_TOKENS = {name: getattr(FAMILIES["bert"], name) for name in ("tokens", "specials", "roles", "template")}
_ROBERTA_TOKENS = {name: getattr(FAMILIES["roberta"], name) for name in ("tokens", "specials", "roles", "template")}
_DECODER = {
    "tokens": "bpe",
    "specials": ("<|endoftext|>", "<|pad|>"),
    "roles": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "template": "",
}
_USUAL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": POSITIONS,
}
MORE = {
    "deberta": Family(
        config="DebertaV2Config",
        settings={
            **_USUAL,
            "relative_attention": True,
            "position_buckets": 16,
            "pos_att_type": ["p2c", "c2p"],
            "type_vocab_size": 0,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        **_BERT_TOKENS,
    ),
    "gpt2": Family(
        config="GPT2Config",
        settings={"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "pad_token_id": 1}
        | {"bos_token_id": 0, "eos_token_id": 0},
        **_DECODER,
    ),
    "gpt2-no-pad": Family(
        config="GPT2Config",
        settings={"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
        | {"bos_token_id": 0, "eos_token_id": 0},
        **{**_DECODER, "roles": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}},
    ),
    "llama": Family(
        config="LlamaConfig",
        settings={**_USUAL, "num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0},
        **{**_DECODER, "template": "<|endoftext|> $A"},
        padding_side="left",
    ),
    "bart": Family(
        config="BartConfig",
        settings={"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96}
        | {"decoder_ffn_dim": 96, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"max_position_embeddings": POSITIONS, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        | {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "init_std": checkpoints.SPREAD},
        tokens="bpe",
        **{name: value for name, value in _ROBERTA_TOKENS.items() if name != "tokens"},
    ),
    "xlnet": Family(
        config="XLNetConfig",
        settings={"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 96, "pad_token_id": 0},
        tokens="unigram",
        specials=("<pad>", "<unk>", "<cls>", "<sep>"),
        roles={"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>"},
        template="$A <sep> <cls>",
        padding_side="left",
    ),
}
OTHERS.update(MORE)
_PAIRS = {  # a family's template -> of a text, of a pair; behind a colon the token's type
    "[CLS] $A [SEP]": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "<s> $A </s>": ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    "$A <sep> <cls>": ("$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2"),
    "$A <|endoftext|>": ("$A <|endoftext|>", "$A <|endoftext|> $B <|endoftext|>"),
    "<|endoftext|> $A": ("<|endoftext|> $A", "<|endoftext|> $A <|endoftext|> $B"),
    "": ("$A", "$A <|endoftext|> $B"),
}
_NO_TYPES = ("distilbert", "modernbert", "roberta", "gpt2", "gpt2-no-pad", "llama", "bart", "qwen3")


def write_labels(
    folder: Path, family: str, *, labels=("calm", "urgent", "odd"), tokens: bool = False, seed: int = 0, **settings
) -> Path:
    """A checkpoint with a head that gives these labels, of sequences or of tokens."""
    from transformers import AutoTokenizer

    head = "AutoModelForTokenClassification" if tokens else "AutoModelForSequenceClassification"
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    checkpoints.write_model(folder, family, seed=seed, model=head, **names, **settings)
    _teach_pairs(folder, family)
    AutoTokenizer.from_pretrained(folder)  # it can be read again
    return folder


def _teach_pairs(folder: Path, family: str) -> None:
    import tokenizers
    from tokenizers import processors

    kind = {**FAMILIES, **OTHERS}[family]
    path = str(folder / "tokenizer.json")
    made = tokenizers.Tokenizer.from_file(path)
    single, pair = _PAIRS[kind.template]
    names = {name.split(":")[0] for name in pair.split() if "$" not in name}
    made.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(name, made.token_to_id(name)) for name in sorted(names)],
    )
    made.save(path)
    inputs = ["input_ids", *([] if family in _NO_TYPES else ["token_type_ids"]), "attention_mask"]
    checkpoints.edit_json(folder / "tokenizer_config.json", model_input_names=inputs, model_max_length=POSITIONS)
