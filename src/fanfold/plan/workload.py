"""A model from the keys of a Hugging Face config.json, from the catalogue, or from a table's dimensions."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import Any

from fanfold.errors import PlanError
from fanfold.machine.catalogue import table
from fanfold.plan.families import FAMILIES, gpt_like, mla
from fanfold.plan.model import Block, Model

_DISTILBERT = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}


def from_config(config: dict[str, Any], *, name: str | None = None) -> Model:
    """The model that a config.json describes; PlanError names the key that is missing or cannot be."""
    kind = config.get("model_type")
    if kind not in FAMILIES and isinstance(config.get("text_config"), dict):
        return from_config(config["text_config"], name=name)
    if kind not in FAMILIES:
        raise PlanError(
            f"a model of model_type {kind!r}",
            found="no family of that name",
            allowed=", ".join(sorted(FAMILIES)),
            do="use one of these, or a name of the catalogue",
        )
    if kind == "distilbert":
        config = {_DISTILBERT.get(key, key): value for key, value in config.items()}
    try:
        model = FAMILIES[kind](config)
        _check(model)
    except KeyError as error:
        raise PlanError(
            f"a config.json of model_type {kind!r}",
            found=f"no key {error}",
            allowed="the keys that transformers writes",
            do="add the key, or save the config again with config.save_pretrained()",
        ) from None
    except (TypeError, ZeroDivisionError, ValueError) as error:
        raise PlanError(
            f"a config.json of model_type {kind!r}",
            found=f"sizes that cannot be: {error}",
            allowed="positive whole numbers",
            do="correct the config",
        ) from None
    return replace(model, name=name) if name else model


def _check(model: Model) -> None:
    """ValueError where a matrix or a count is not a positive whole number."""
    for block in model.blocks:
        if isinstance(block.count, bool) or not isinstance(block.count, int) or block.count < 1:
            raise ValueError(f"{block.count!r} layers")
        for linear in block.layer.linears:
            for size in (linear.inputs, linear.outputs):
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    raise ValueError(f"{linear.name} of {linear.outputs!r} x {linear.inputs!r}")
    if not isinstance(model.vocab, int) or model.vocab < 0:
        raise ValueError(f"a vocabulary of {model.vocab!r}")


def from_catalogue(name: str) -> Model:
    """The model of that name; PlanError with the closest names where there is none."""
    entry_name = catalogue_name(name)
    if entry_name is None:
        names = catalogue_names()
        close = difflib.get_close_matches(_key(name), [_key(one) for one in names], n=3, cutoff=0.4)
        shown = [one for one in names if _key(one) in close][:3]
        raise PlanError(
            f"model {name[:80]!r}",
            found="no such model in the catalogue",
            allowed="closest: " + ", ".join(shown) if shown else f"{len(names)} names, such as gpt3-175b, llama-3-70b",
            do="use one of these names, or a path to a config.json",
        )
    entry = table("models")[entry_name]
    return from_dimensions(entry_name, **{key: entry[key] for key in DIMENSIONS if key in entry})


DIMENSIONS = (
    "layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "gated", "bias", "tied", "positions", "causal", "head_dim",
    "experts", "chosen", "expert_ffn", "shared_ffn", "dense_layers", "every", "mla",
)  # fmt: skip


def catalogue_names() -> list[str]:
    """Every name and alias."""
    return [name for entry, values in table("models").items() for name in (entry, *values["aliases"])]


def catalogue_name(name: str) -> str | None:
    """The entry that a name or alias stands for, whatever its case and dashes."""
    wanted = _key(name)
    for entry, values in table("models").items():
        if wanted in (_key(entry), *(_key(alias) for alias in values["aliases"])):
            return entry
    return None


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.rpartition("/")[2].lower().removesuffix("-instruct"))


def from_dimensions(
    name: str,
    *,
    layers: int,
    hidden: int,
    heads: int,
    vocab: int,
    mla: dict[str, int] | None = None,
    causal: bool = True,
    **more: Any,
) -> Model:
    """A decoder, or with causal=False an encoder, from the numbers of a table."""
    bias = more.get("bias", True)
    more.setdefault("norm_width", 2 if bias else 1)
    model = gpt_like(name, layers=layers, hidden=hidden, heads=heads, vocab=vocab, causal=causal, **more)
    if not causal:
        blocks = tuple(replace(block, side="encoder") for block in model.blocks)
        # token types and a norm after the tables, and a pooler: BERT
        model = replace(
            model,
            family="bert",
            blocks=blocks,
            embedding_params=model.embedding_params + 4 * hidden,
            other_params=hidden * hidden + hidden,
        )
    return _with_mla(model, hidden, heads, mla) if mla else model


def _with_mla(model: Model, hidden: int, heads: int, ranks: dict[str, int]) -> Model:
    linears, seen, rank_norms = mla({**ranks, "hidden_size": hidden, "num_attention_heads": heads})
    blocks = []
    for block in model.blocks:
        rest = tuple(linear for linear in block.layer.linears if linear.name not in ("qkv", "out"))
        layer = replace(
            block.layer,
            linears=(*linears, *rest),
            attention=(seen,),
            vectors=block.layer.vectors + rank_norms,
        )
        blocks.append(Block(layer=layer, count=block.count, side=block.side))
    return replace(model, blocks=tuple(blocks))
