"""Which families' sequences can be cut over units, and how: what the tables of `families.py` are for layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.parallel.families_seq2seq import BART, T5, VIT
from fanfold.parallel.mesh import head_shares
from fanfold.parallel.rules import heads_of

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "xlm-roberta-xl", "distilbert", "modernbert")
DECODERS = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2",
            "mixtral", "qwen2_moe", "qwen3_moe")  # fmt: skip
STACKS = (*T5.types, *BART.types, *VIT.types)  # cut behind their embeddings: `stack_sequence.py`


def sees_all(config: Any) -> bool:
    """Whether every token sees the whole sequence."""
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


def has_windows(config: Any) -> bool:
    """Whether some layer's tokens see their neighbourhood only."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    if config.model_type == "modernbert":
        return True
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def check_context(config: Any, split: Split) -> None:
    """PlanError for a sequence that cannot be cut so; it names a variant that can, where there is one."""
    asked = f"--layout {split}"
    if config.model_type not in (*ENCODERS, *DECODERS, *STACKS):
        raise PlanError(
            asked,
            found=f"a {config.model_type}, whose attention is its own code or is not known",
            allowed=", ".join((*ENCODERS, *DECODERS, *STACKS)),
            do="use tensor=N, which cuts its heads and leaves sequences whole",
        )
    if config.model_type in STACKS:
        _check_stacks(config, split, asked)
    if split.context_method == "ring" and has_windows(config):
        raise PlanError(
            asked,
            found=f"a {config.model_type} with sliding windows: a ring would pass on keys that nobody sees",
            allowed=f"context={split.context}:allgather, context={split.context}:ulysses",
            do=f"use context={split.context}:allgather",
        )
    if split.context_method == "ulysses":
        for rank in range(split.tensor):
            heads = heads_of(config, rank, split.tensor)
            try:
                head_shares(len(heads.heads), len(heads.kv), split.context)
            except PlanError as error:
                raise PlanError(asked, found=error.found, allowed=error.allowed, do=error.do) from None


def _check_stacks(config: Any, split: Split, asked: str) -> None:
    alone = [name for name in config.architectures or () if name.endswith("ForCausalLM")]
    if alone:
        raise PlanError(
            asked,
            found=f"{alone[0]}, a decoder without its encoder",
            allowed="the whole encoder-decoder, or its encoder",
            do="use tensor=N or pipeline=N",
        )
    if split.pipeline > 1:
        raise PlanError(
            asked,
            found=f"a {config.model_type}, whose first and last block cut the sequence and put it together",
            allowed="context with tensor, or pipeline with tensor",
            do=f"use context={split.context} and tensor={split.pipeline}",
        )
