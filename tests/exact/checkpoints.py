"""Tiny random checkpoints of many families, written as their makers would write them; nothing is downloaded.

`write_model(folder, family)` gives what `save_pretrained` gives: config.json, model.safetensors, a tokenizer
trained on the docstrings of the standard library. `write_head(folder, ...)` adds the files of
sentence-transformers. Seeds are fixed: the same call writes the same weights.
"""

from __future__ import annotations

import ast
import functools
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

WIDTH = 48  # the hidden size of every family
POSITIONS = 128
MAX_LENGTH = 40  # tokens, in the sentence-transformers files: some of the texts are longer
VOCAB = 1200
MODULES = (
    *("argparse", "collections/__init__", "dataclasses", "datetime", "email/message", "functools", "heapq"),
    *("inspect", "json/decoder", "pathlib", "random", "statistics", "textwrap", "zipfile"),
)
SPREAD = 0.15  # standard deviation of the weights: wide enough that every token tells in the result


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model family is built. `specials` in the order of their ids."""

    config: str
    settings: dict
    tokens: str  # wordpiece, bpe, unigram
    specials: tuple[str, ...]
    roles: dict[str, str]  # of the special tokens, as PreTrainedTokenizerFast names them
    template: str  # $A with the special tokens around it
    model: str = "AutoModel"
    padding_side: str = "right"


_BERT = {
    "tokens": "wordpiece",
    "specials": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roles": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "template": "[CLS] $A [SEP]",
}
_ROBERTA = {
    "specials": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "roles": {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    },
    "template": "<s> $A </s>",
}
_USUAL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": POSITIONS,
}
_OFFSET = {**_USUAL, "max_position_embeddings": POSITIONS + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

FAMILIES = {
    "bert": Family(config="BertConfig", settings=_USUAL, **_BERT),
    "roberta": Family(config="RobertaConfig", settings={**_OFFSET, "type_vocab_size": 1}, tokens="bpe", **_ROBERTA),
    "distilbert": Family(
        config="DistilBertConfig",
        settings={"dim": WIDTH, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": POSITIONS},
        **_BERT,
    ),
    "modernbert": Family(
        config="ModernBertConfig",
        settings={
            **_USUAL,
            "num_hidden_layers": 3,
            "local_attention": 16,
            "pad_token_id": 0,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
        **_BERT,
    ),
    "mpnet": Family(config="MPNetConfig", settings=_OFFSET, tokens="wordpiece", **_ROBERTA),
    "xlm-roberta": Family(
        config="XLMRobertaConfig", settings={**_OFFSET, "type_vocab_size": 1}, tokens="unigram", **_ROBERTA
    ),
    "electra": Family(config="ElectraConfig", settings={**_USUAL, "embedding_size": 32}, **_BERT),
    "albert": Family(config="AlbertConfig", settings={**_USUAL, "embedding_size": 32}, **_BERT),
    "t5": Family(
        config="T5Config",
        settings={"d_model": WIDTH, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "n_positions": POSITIONS},
        tokens="unigram",
        specials=("<pad>", "</s>", "<unk>"),
        roles={"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
        template="$A </s>",
        model="T5EncoderModel",
    ),
    "qwen3": Family(
        config="Qwen3Config",
        settings={
            **_USUAL,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
        },
        tokens="bpe",
        specials=("<|endoftext|>", "<|im_end|>"),
        roles={"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        template="$A <|endoftext|>",
        padding_side="left",
    ),
}

OTHERS: dict[str, Family] = {}  # families that are not for embedding: label_models.py


@functools.cache
def docstrings() -> tuple[str, ...]:
    """The docstrings of some modules of the standard library, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for name in MODULES:
        tree = ast.parse((library / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    found.append(text)
    return tuple(found)


@functools.cache
def _trained(tokens: str, specials: tuple[str, ...]) -> str:
    """tokenizer.json of a small tokenizer, without its template."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    usual = {"special_tokens": list(specials), "vocab_size": VOCAB, "show_progress": False}
    if tokens == "wordpiece":
        unknown = next(name for name in specials if "unk" in name.lower())
        made = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown, max_input_chars_per_word=100))
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**usual)
    elif tokens == "bpe":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**usual, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**usual, unk_token="<unk>")
    made.train_from_iterator(docstrings(), trainer)
    return made.to_str()


def write_tokenizer(folder: Path, family: str, *, template: str | None = None, **settings) -> None:
    """tokenizer.json and tokenizer_config.json. `template` "" puts no special tokens around a text."""
    import tokenizers
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    kind = FAMILIES.get(family) or OTHERS[family]
    made = tokenizers.Tokenizer.from_str(_trained(kind.tokens, kind.specials))
    around = kind.template if template is None else template
    if around:
        names = [name for name in around.split() if name != "$A"]
        made.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(name, made.token_to_id(name)) for name in dict.fromkeys(names)]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side=kind.padding_side, **{**kind.roles, **settings}
    )
    wrapped.save_pretrained(folder)


def write_model(folder: Path, family: str, *, seed: int = 0, model: str | None = None, **settings) -> Path:
    """A plain checkpoint, as save_pretrained writes it: no file of sentence-transformers."""
    import torch
    import transformers

    kind = FAMILIES.get(family) or OTHERS[family]
    options = {"vocab_size": VOCAB, "initializer_range": SPREAD, **kind.settings, **settings}
    if family in ("distilbert", "t5"):
        options.pop("initializer_range")
    if family == "t5":
        options["initializer_factor"] = 1.0
    config = getattr(transformers, kind.config)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loader = getattr(transformers, model or kind.model)
        made = loader.from_config(config) if hasattr(loader, "from_config") else loader(config)
        if "initializer_range" not in options and family != "t5":
            for name, value in made.named_parameters():
                if value.dim() > 1 and "LayerNorm" not in name:
                    torch.nn.init.normal_(value, std=SPREAD)
        for value in made.parameters():
            if value.dim() == 1:  # biases and norms away from 0 and 1: a lost one is seen
                value.data.add_(torch.randn(value.shape) * 0.05)
        words = made.get_input_embeddings().weight.data  # a real padding token has an embedding too
        words[config.pad_token_id or 0] = torch.randn(words.shape[1]) * SPREAD
    folder.mkdir(parents=True, exist_ok=True)
    made.eval().save_pretrained(folder)
    write_tokenizer(folder, family)
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def edit_json(path: Path, **values: object) -> None:
    """Change keys of a JSON object; None removes one."""
    old = json.loads(path.read_text(encoding="utf-8"))
    new = {key: value for key, value in {**old, **values}.items() if value is not None}
    path.write_text(json.dumps(new, indent=2), encoding="utf-8")


_LEGACY_NAMES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def write_head(
    folder: Path,
    *,
    pooling: str | tuple[str, ...] = "mean",
    normalize: bool = False,
    dense: int | None = None,
    activation: str = "torch.nn.modules.activation.Tanh",
    bias: bool = True,
    include_prompt: bool = True,
    max_length: int | None = MAX_LENGTH,
    lower_case: bool = False,
    prompts: dict | None = None,
    default_prompt: str | None = None,
    new_format: bool = False,
    more: dict | None = None,
) -> Path:
    """The files of sentence-transformers, in the format of its releases up to 4 or (new_format) of 6."""
    modes = (pooling,) if isinstance(pooling, str) else pooling
    if new_format:
        settings = {"embedding_dimension": WIDTH, "pooling_mode": pooling if len(modes) == 1 else list(modes)}
    else:
        settings = {"word_embedding_dimension": WIDTH}
        settings |= {key: mode in modes for mode, key in _LEGACY_NAMES.items()}
    write_json(folder / "1_Pooling" / "config.json", {**settings, "include_prompt": include_prompt})
    old = "sentence_transformers.models."
    names = {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Dense": "sentence_transformers.base.modules.dense.Dense",
        "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    }
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if dense is not None:
        modules.append(("Dense", f"{len(modules)}_Dense"))
        _write_dense(folder / modules[-1][1], WIDTH * len(modes), dense, activation=activation, bias=bias)
    if normalize:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": names[kind] if new_format else old + kind}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": lower_case})
    versions = {"sentence_transformers": "3.0.0", "transformers": "4.40.0", "pytorch": "2.2.0"}
    write_json(
        folder / "config_sentence_transformers.json",
        {"__version__": versions, "prompts": prompts or {}, "default_prompt_name": default_prompt, **(more or {})},
    )
    return folder


def _write_dense(folder: Path, width: int, out: int, *, activation: str, bias: bool) -> None:
    import torch
    from safetensors.torch import save_file

    write_json(
        folder / "config.json",
        {"in_features": width, "out_features": out, "bias": bias, "activation_function": activation},
    )
    chance = torch.Generator().manual_seed(7)
    weights = {"linear.weight": torch.randn(out, width, generator=chance) / width**0.5}
    if bias:
        weights["linear.bias"] = torch.randn(out, generator=chance)
    save_file(weights, folder / "model.safetensors")


def mixed_texts() -> list[str]:
    """60 texts: none, one word, far longer than the limit, many scripts, ten that are the same."""
    odd = [
        "",
        " ",
        "word",
        "a",
        "?!",
        "naïve café Ångström Straße",
        "Ünïcödé ＦＵＬＬＷＩＤＴＨ ﬁne ½",
        "日本語の文章です。短い。",
        "Привет, мир! Как дела?",
        "مرحبا بالعالم",
        "हिन्दी में एक वाक्य",
        "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 between words 🚀",
        "tabs\tand\nnew lines\r\n  and   spaces  ",
        "zero\u200bwidth\u00adsoft\ufeffmark\x00null\x07bell",
        "MiXeD CaSe TEXT With Capitals",
        "longer than the limit " * 60,
        "x" * 1500,
    ]
    same = ["the same sentence ten times"] * 10
    docs = docstrings()
    chosen = [docs[(37 * i) % len(docs)] for i in range(60 - len(odd) - len(same))]
    return [*odd[:8], *same[:5], *chosen, *odd[8:], *same[5:]]
