"""Tiny random language models of many families, and what transformers' own `generate` makes of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checkpoints import VOCAB, WIDTH, _trained, edit_json

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = 128
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>", "<s>")
END, PAD, START = 2, 3, 4
SPREAD = 0.3  # wide: the two best tokens are far apart, and rounding does not choose
_USUAL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "initializer_range": SPREAD,
}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SLIDING = {"sliding_window": 16}
FAMILIES = {
    "GPT2": {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, "initializer_range": SPREAD},
    "OPT": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "init_std": SPREAD,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": WIDTH,
    },
    "GPTNeoX": _USUAL,
    "Llama": _GROUPED,
    "Mistral": {**_GROUPED, **_SLIDING, "head_dim": 12},
    "Qwen2": {**_GROUPED, **_SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "Qwen3": {**_GROUPED, "head_dim": 16},
    "Gemma": {**_GROUPED, "head_dim": 16},
    "Gemma2": {**_GROUPED, **_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "Phi": _USUAL,
    "Mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**_GROUPED, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "Bloom": {"hidden_size": WIDTH, "n_layer": 3, "n_head": 4, "initializer_range": SPREAD},
    "T5": {"d_model": WIDTH, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD},
    "Bart": {
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "max_position_embeddings": CONTEXT,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "init_std": SPREAD,
        "decoder_start_token_id": END,
        "forced_eos_token_id": END,
    },
}
SEQ2SEQ = ("T5", "Bart")


def write_language_model(
    folder: Path,
    family: str = "GPT2",
    *,
    seed: int = 0,
    start: bool = False,
    chat: bool = False,
    padding_side: str = "right",
    extra_tokens: tuple[str, ...] = (),
    generation: dict | None = None,
    **settings,
) -> Path:
    """A checkpoint as save_pretrained writes it. `start` puts a token before every text."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import processors

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, bos_token_id=START, eos_token_id=END, pad_token_id=PAD, **{**FAMILIES[family], **settings}
    )
    loader = transformers.AutoModelForSeq2SeqLM if family in SEQ2SEQ else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = loader.from_config(config).eval()
        for value in model.parameters():
            if value.dim() == 1:
                value.data.add_(torch.randn(value.shape) * 0.05)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    made = tokenizers.Tokenizer.from_str(_trained("bpe", SPECIALS))
    if start:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        padding_side=padding_side,
        additional_special_tokens=list(extra_tokens),
    )
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    if generation:
        edit_json(folder / "generation_config.json", **generation)
    return folder


class Oracle:
    """transformers' `generate`, row by row, greedy unless told otherwise."""

    def __init__(self, folder: Path) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.seq2seq = transformers.AutoConfig.from_pretrained(folder).is_encoder_decoder
        loader = transformers.AutoModelForSeq2SeqLM if self.seq2seq else transformers.AutoModelForCausalLM
        self.model = loader.from_pretrained(folder).eval()

    def ids(self, prompt: list[int], limit: int, **settings) -> list[int]:
        """The completion's ids; the gap between the two best tokens is wide enough that rounding cannot choose."""
        line = self.torch.tensor([prompt])
        out = self.model.generate(
            line,
            attention_mask=self.torch.ones_like(line),
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        for logits in out.logits:
            best, second = logits[0].topk(2).values.tolist()
            assert best - second > 1e-4, "rounding could choose: take another seed"
        return out.sequences[0, 1 if self.seq2seq else len(prompt) :].tolist()

    def text(self, prompt: str, limit: int, **settings) -> str:
        ids = self.ids(self.tokenizer(prompt)["input_ids"], limit, **settings)
        return self.tokenizer.decode(ids, skip_special_tokens=True)
