"""Model families: from the keys of a Hugging Face config.json to the matrices of `plan/model.py`.

Sizes are those of the classes in transformers (`AutoModelForCausalLM`, `...ForConditionalGeneration`, and
`AutoModel` for encoders), counted parameter by parameter; tests compare them on the meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from fanfold.plan.model import Attention, Block, Layer, Linear, Model

if TYPE_CHECKING:
    from collections.abc import Callable

Config: TypeAlias = dict[str, Any]


def mlp(hidden: int, ffn: int, *, gated: bool, bias: bool, experts: int = 0, chosen: int = 1) -> tuple[Linear, ...]:
    up = Linear(
        name="gate_up" if gated else "up",
        inputs=hidden,
        outputs=2 * ffn if gated else ffn,
        bias=bias,
        experts=experts,
        chosen=chosen,
    )
    down = Linear(name="down", inputs=ffn, outputs=hidden, bias=bias, split="row", experts=experts, chosen=chosen)
    return up, down


def attention(
    hidden: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    causal: bool = True,
    window: int | None = None,
) -> tuple[tuple[Linear, ...], Attention]:
    kv_heads = kv_heads or heads
    head_dim = head_dim or hidden // heads
    width, kv = heads * head_dim, kv_heads * head_dim
    linears = (
        Linear(name="qkv", inputs=hidden, outputs=width + 2 * kv, bias=qkv_bias),
        Linear(name="out", inputs=width, outputs=hidden, bias=out_bias, split="row"),
    )
    seen = Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        cache_width=2 * kv,
        causal=causal,
        window=window,
    )
    return linears, seen


def gpt_like(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocab: int,
    ffn: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    positions: int = 0,
    gated: bool = False,
    bias: bool = True,
    tied: bool = True,
    norm_width: int = 2,
    causal: bool = True,
    experts: int = 0,
    chosen: int = 1,
    expert_ffn: int | None = None,
    shared_ffn: int = 0,
    dense_layers: int = 0,
    every: int = 1,
) -> Model:
    """A decoder from its dimensions alone, for tables that publish no more than these.

    With experts, `dense_layers` come first and of the others each `every`-th has experts.
    """
    ffn = ffn or 4 * hidden
    attend, seen = attention(
        hidden, heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=bias, out_bias=bias, causal=causal
    )
    vectors = 2 * norm_width * hidden
    dense = Layer(
        linears=(*attend, *mlp(hidden, ffn, gated=gated, bias=bias)),
        attention=(seen,),
        norms=2,
        vectors=vectors,
        gated=gated,
        ffn=ffn,
    )
    blocks = [Block(layer=dense, count=layers)]
    if experts:
        width = expert_ffn or ffn
        router = Linear(name="router", inputs=hidden, outputs=experts, split="none")
        shared = mlp(hidden, shared_ffn, gated=gated, bias=bias) if shared_ffn else ()
        routed = mlp(hidden, width, gated=gated, bias=bias, experts=experts, chosen=chosen)
        sparse = Layer(
            linears=(*attend, router, *shared, *routed),
            attention=(seen,),
            norms=2,
            vectors=vectors,
            gated=gated,
            ffn=chosen * width + shared_ffn,
        )
        with_experts = (layers - dense_layers) // every
        blocks = [Block(layer=sparse, count=with_experts)]
        if layers > with_experts:
            blocks.insert(0, Block(layer=dense, count=layers - with_experts))
    return Model(
        name=name,
        family="gpt",
        hidden=hidden,
        vocab=vocab,
        blocks=tuple(blocks),
        embedding_params=(vocab + positions) * hidden,
        other_params=norm_width * hidden,
        head=Linear(name="head", inputs=hidden, outputs=vocab),
        tied=tied,
    )


def _bert(c: Config) -> Model:
    h, ffn = c["hidden_size"], c["intermediate_size"]
    attend, seen = attention(h, c["num_attention_heads"], qkv_bias=True, out_bias=True, causal=False)
    layer = Layer(
        linears=(*attend, *mlp(h, ffn, gated=False, bias=True)),
        attention=(seen,),
        norms=2,
        vectors=4 * h,
        ffn=ffn,
    )
    types = c.get("type_vocab_size", 2)
    if c["model_type"] == "distilbert":
        types = 0
    pooler = 0 if c["model_type"] == "distilbert" else h * h + h
    return Model(
        name=str(c.get("_name_or_path") or c["model_type"]),
        family=c["model_type"],
        hidden=h,
        vocab=c["vocab_size"],
        blocks=(Block(layer=layer, count=c["num_hidden_layers"], side="encoder"),),
        embedding_params=(c["vocab_size"] + c["max_position_embeddings"] + types) * h + 2 * h,
        other_params=pooler,
        max_length=c["max_position_embeddings"],
    )


def _gpt2(c: Config) -> Model:
    h = c["n_embd"]
    return gpt_like(
        c["model_type"],
        layers=c["n_layer"],
        hidden=h,
        heads=c["n_head"],
        vocab=c["vocab_size"],
        ffn=c.get("n_inner") or 4 * h,
        positions=c["n_positions"],
    )


def _opt(c: Config) -> Model:
    return gpt_like(
        "opt",
        layers=c["num_hidden_layers"],
        hidden=c["hidden_size"],
        heads=c["num_attention_heads"],
        vocab=c["vocab_size"],
        ffn=c["ffn_dim"],
        positions=c["max_position_embeddings"] + 2,
    )


def _bloom(c: Config) -> Model:
    h = c["hidden_size"]
    model = gpt_like("bloom", layers=c["n_layer"], hidden=h, heads=c["n_head"], vocab=c["vocab_size"])
    return _replaced(model, other_params=model.other_params + 2 * h)  # a norm after the table


def _neox(c: Config) -> Model:
    return gpt_like(
        "gpt_neox",
        layers=c["num_hidden_layers"],
        hidden=c["hidden_size"],
        heads=c["num_attention_heads"],
        vocab=c["vocab_size"],
        ffn=c["intermediate_size"],
        tied=bool(c.get("tie_word_embeddings", False)),
    )


def _mpt(c: Config) -> Model:
    return gpt_like(
        "mpt",
        layers=c["n_layers"],
        hidden=c["d_model"],
        heads=c["n_heads"],
        vocab=c["vocab_size"],
        ffn=int(c.get("expansion_ratio", 4)) * c["d_model"],
        bias=False,
        norm_width=1,
    )


def _llama_like(c: Config) -> Model:
    """Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3, Phi-3, and their mixtures of experts."""
    kind = c["model_type"]
    h, ffn, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    head_dim = c.get("head_dim") or h // heads
    kv_heads = c.get("num_key_value_heads") or heads
    bias = bool(c.get("attention_bias", False))
    attend, seen = attention(
        h,
        heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias or kind in ("qwen2", "qwen2_moe", "gpt_oss"),
        out_bias=bias or kind == "gpt_oss",
        window=None,
    )
    wide = 4 if kind in ("gemma2", "gemma3_text") else 2
    vectors = wide * h
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        vectors += 2 * head_dim
    if kind == "gpt_oss":
        vectors += heads  # sinks
    layers = c["num_hidden_layers"]
    mlp_bias = bool(c.get("mlp_bias", False))
    dense = Layer(
        linears=(*attend, *mlp(h, ffn, gated=True, bias=mlp_bias)),
        attention=(seen,),
        norms=wide,
        vectors=vectors,
        gated=True,
        ffn=ffn,
    )
    experts = c.get("num_local_experts") or c.get("num_experts") or 0
    counts = [(dense, layers)]
    if experts:
        chosen = c.get("num_experts_per_tok") or 2
        width = c.get("moe_intermediate_size") or ffn
        own_bias = kind == "gpt_oss"
        router = Linear(name="router", inputs=h, outputs=experts, bias=own_bias, split="none")
        shared: tuple[Linear, ...] = ()
        if kind == "qwen2_moe":
            gate = Linear(name="shared_gate", inputs=h, outputs=1, split="none")
            shared = (*mlp(h, c["shared_expert_intermediate_size"], gated=True, bias=False), gate)
        routed = mlp(h, width, gated=True, bias=own_bias, experts=experts, chosen=chosen)
        sparse = Layer(
            linears=(
                *attend,
                router,
                *shared,
                *routed,
            ),
            attention=(seen,),
            norms=wide,
            vectors=vectors,
            gated=True,
            ffn=chosen * width + c.get("shared_expert_intermediate_size", 0),
        )
        every = c.get("decoder_sparse_step") or 1
        only = set(c.get("mlp_only_layers") or ())
        num = sum(1 for i in range(layers) if i not in only and (i + 1) % every == 0)
        counts = [(dense, layers - num), (sparse, num)]
    tied = bool(c.get("tie_word_embeddings", kind.startswith("gemma")))
    return Model(
        name=str(c.get("_name_or_path") or kind),
        family=kind,
        hidden=h,
        vocab=c["vocab_size"],
        blocks=tuple(Block(layer=layer, count=count) for layer, count in counts if count),
        embedding_params=c["vocab_size"] * h,
        other_params=h,
        head=Linear(name="head", inputs=h, outputs=c["vocab_size"]),
        tied=tied,
        max_length=c.get("max_position_embeddings"),
    )


def mla(c: Config) -> tuple[tuple[Linear, ...], Attention, int]:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): its matrices, heads, and norm weights."""
    h, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    kv_rank, q_rank = c["kv_lora_rank"], c.get("q_lora_rank")
    bias = bool(c.get("attention_bias", False))
    queries = heads * (nope + rope)
    to_q: tuple[Linear, ...]
    if q_rank:
        to_q = (
            Linear(name="q_down", inputs=h, outputs=q_rank, bias=bias, split="none"),
            Linear(name="q_up", inputs=q_rank, outputs=queries),
        )
    else:
        to_q = (Linear(name="q", inputs=h, outputs=queries),)
    linears = (
        *to_q,
        Linear(name="kv_down", inputs=h, outputs=kv_rank + rope, bias=bias, split="none"),
        Linear(name="kv_up", inputs=kv_rank, outputs=heads * (nope + value)),
        Linear(name="out", inputs=heads * value, outputs=h, bias=bias, split="row"),
    )
    seen = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=nope + rope,
        value_dim=value,
        cache_width=kv_rank + rope,
    )
    return linears, seen, kv_rank + (q_rank or 0)


def _deepseek(c: Config) -> Model:
    h, layers = c["hidden_size"], c["num_hidden_layers"]
    attend, seen, ranks = mla(c)
    ffn, width = c["intermediate_size"], c["moe_intermediate_size"]
    experts, chosen, shared = c["n_routed_experts"], c["num_experts_per_tok"], c.get("n_shared_experts") or 0
    vectors = 2 * h + ranks
    dense = Layer(
        linears=(*attend, *mlp(h, ffn, gated=True, bias=False)),
        attention=(seen,),
        norms=2,
        vectors=vectors,
        gated=True,
        ffn=ffn,
    )
    router = Linear(name="router", inputs=h, outputs=experts, split="none")
    sparse = Layer(
        linears=(*attend, router)
        + (mlp(h, shared * width, gated=True, bias=False) if shared else ())
        + mlp(h, width, gated=True, bias=False, experts=experts, chosen=chosen),
        attention=(seen,),
        norms=2,
        vectors=vectors,
        gated=True,
        ffn=(chosen + shared) * width,
    )
    first = min(c.get("first_k_dense_replace", 0), layers)
    counts = [(dense, first), (sparse, layers - first)]
    return Model(
        name=str(c.get("_name_or_path") or c["model_type"]),
        family=c["model_type"],
        hidden=h,
        vocab=c["vocab_size"],
        blocks=tuple(Block(layer=layer, count=count) for layer, count in counts if count),
        embedding_params=c["vocab_size"] * h,
        other_params=h,
        head=Linear(name="head", inputs=h, outputs=c["vocab_size"]),
        tied=bool(c.get("tie_word_embeddings", False)),
        max_length=c.get("max_position_embeddings"),
    )


def _t5(c: Config) -> Model:
    h, heads, kv, ffn = c["d_model"], c["num_heads"], c["d_kv"], c["d_ff"]
    gated = str(c.get("feed_forward_proj", "relu")).startswith("gated")
    feed = mlp(h, ffn, gated=gated, bias=False)
    own, seen = attention(h, heads, head_dim=kv, causal=False)
    _, masked = attention(h, heads, head_dim=kv)
    _, crossed = _cross(h, heads, kv)
    encoder = Layer(linears=(*own, *feed), attention=(seen,), norms=2, vectors=2 * h, gated=gated, ffn=ffn)
    decoder = Layer(
        linears=(*own, *_cross(h, heads, kv)[0], *feed),
        attention=(masked, crossed),
        norms=3,
        vectors=3 * h,
        gated=gated,
        ffn=ffn,
    )
    buckets = c.get("relative_attention_num_buckets", 32)
    return Model(
        name=str(c.get("_name_or_path") or "t5"),
        family="t5",
        hidden=h,
        vocab=c["vocab_size"],
        blocks=(
            Block(layer=encoder, count=c["num_layers"], side="encoder"),
            Block(layer=decoder, count=c.get("num_decoder_layers") or c["num_layers"]),
        ),
        embedding_params=c["vocab_size"] * h,
        other_params=2 * h + 2 * buckets * heads,
        head=Linear(name="head", inputs=h, outputs=c["vocab_size"]),
        tied=bool(c.get("tie_word_embeddings", True)),
    )


def _cross(
    hidden: int, heads: int, head_dim: int, *, bias: bool = False, key_bias: bool | None = None
) -> tuple[tuple[Linear, ...], Attention]:
    width = heads * head_dim
    key_bias = bias if key_bias is None else key_bias
    linears = (
        Linear(name="cross_q", inputs=hidden, outputs=width, bias=bias),
        Linear(name="cross_k", inputs=hidden, outputs=width, bias=key_bias),
        Linear(name="cross_v", inputs=hidden, outputs=width, bias=bias),
        Linear(name="cross_out", inputs=width, outputs=hidden, bias=bias, split="row"),
    )
    seen = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_dim=head_dim,
        cache_width=2 * width,
        causal=False,
        cross=True,
    )
    return linears, seen


def _whisper(c: Config) -> Model:
    h, ffn_e, ffn_d = c["d_model"], c["encoder_ffn_dim"], c["decoder_ffn_dim"]
    heads_e, heads_d = c["encoder_attention_heads"], c["decoder_attention_heads"]

    def own(heads: int, causal: bool) -> tuple[tuple[Linear, ...], Attention]:  # keys have no bias
        _, seen = attention(h, heads, causal=causal)
        return (
            Linear(name="q", inputs=h, outputs=h, bias=True),
            Linear(name="k", inputs=h, outputs=h),
            Linear(name="v", inputs=h, outputs=h, bias=True),
            Linear(name="out", inputs=h, outputs=h, bias=True, split="row"),
        ), seen

    linears_e, seen_e = own(heads_e, False)
    linears_d, seen_d = own(heads_d, True)
    crossed, seen_x = _cross(h, heads_d, h // heads_d, bias=True, key_bias=False)
    encoder = Layer(
        linears=(*linears_e, *mlp(h, ffn_e, gated=False, bias=True)),
        attention=(seen_e,),
        norms=2,
        vectors=4 * h,
        ffn=ffn_e,
    )
    decoder = Layer(
        linears=(*linears_d, *crossed, *mlp(h, ffn_d, gated=False, bias=True)),
        attention=(seen_d, seen_x),
        norms=3,
        vectors=6 * h,
        ffn=ffn_d,
    )
    convolutions = 3 * c["num_mel_bins"] * h + h + 3 * h * h + h
    positions = (c["max_source_positions"] + c["max_target_positions"]) * h
    return Model(
        name=str(c.get("_name_or_path") or "whisper"),
        family="whisper",
        hidden=h,
        vocab=c["vocab_size"],
        blocks=(
            Block(layer=encoder, count=c["encoder_layers"], side="encoder"),
            Block(layer=decoder, count=c["decoder_layers"]),
        ),
        embedding_params=c["vocab_size"] * h + positions,
        other_params=convolutions + 4 * h,
        head=Linear(name="head", inputs=h, outputs=c["vocab_size"]),
        tied=True,
        max_length=c["max_target_positions"],
    )


def _vit(c: Config) -> Model:
    h, ffn = c["hidden_size"], c["intermediate_size"]
    attend, seen = attention(
        h, c["num_attention_heads"], qkv_bias=bool(c.get("qkv_bias", True)), out_bias=True, causal=False
    )
    layer = Layer(
        linears=(*attend, *mlp(h, ffn, gated=False, bias=True)), attention=(seen,), norms=2, vectors=4 * h, ffn=ffn
    )
    patches = (c["image_size"] // c["patch_size"]) ** 2
    table = c["patch_size"] ** 2 * c.get("num_channels", 3) * h + h
    return Model(
        name=str(c.get("_name_or_path") or "vit"),
        family="vit",
        hidden=h,
        vocab=0,
        blocks=(Block(layer=layer, count=c["num_hidden_layers"], side="encoder"),),
        embedding_params=table + h + (patches + 1) * h,
        other_params=2 * h + h * h + h,
        max_length=patches + 1,
    )


def _replaced(model: Model, **values: Any) -> Model:
    from dataclasses import replace

    return replace(model, **values)


FAMILIES: dict[str, Callable[[Config], Model]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "camembert"), _bert),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe",
         "gpt_oss", "phi3"),
        _llama_like,
    ),
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _neox,
    "mpt": _mpt,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "t5": _t5,
    "whisper": _whisper,
    "vit": _vit,
}  # fmt: skip
