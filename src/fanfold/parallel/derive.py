"""A table for a family that has none, guessed from the names and shapes of its layers. Only a check can accept it.

The guess is made on a tiny copy, whose heads, inner width and hidden width differ. What transformers itself says
(`base_model_tp_plan` of the config) goes before names; a style in it that is not known here is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from fanfold.errors import PlanError
from fanfold.parallel.rules import Family, heads_of
from fanfold.parallel.stacks import stacks_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.parallel.rules import Heads, Kind, What

    Rules = dict[str, tuple[Kind, What | None]]

_ATTENTION = re.compile(r"(^|[._])(attn|attention|self)", re.IGNORECASE)
_OUT = re.compile(r"^(o|out|output|dense|wo|c_proj|to_out)(_|$)|_out$|out_proj|o_proj", re.IGNORECASE)
_KEY_OR_VALUE = re.compile(r"^(k|v|key|value|wk|wv)(_|$)", re.IGNORECASE)
_DOWN = re.compile(r"down|fc2|fc_out|output|c_proj|4h_to_h|w2|lin2|wo", re.IGNORECASE)
_COUNTS: dict[str, Any] = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "n_head": "heads",
    "num_key_value_heads": "kv",
    "num_kv_heads": "kv",
    "num_key_value_groups": "groups",
}
_WIDTHS: dict[str, Any] = dict.fromkeys(("split_size", "all_head_size", "embed_dim", "hidden_size"), "features")
_PER_HEAD_INPUTS = ("alibi", "position_bias")
_STYLES = {
    "colwise": "column",
    "colwise_gather_output": "column",  # of the output head, which needs no rule
    "colwise_rep": "column",
    "packed_colwise": "column",
    "rowwise": "row",
    "rowwise_rep": "row",
    "packed_rowwise": "row",
    "replicated_with_grad_allreduce": "sum_gradient",
    "sequence_parallel": "",
}


def derived_tables(model: Any) -> Iterator[Family]:
    """Tables that fit the tiny model's names and shapes, the likeliest first. Raises PlanError where none does."""
    config = model.config
    if config.is_encoder_decoder:
        raise _underivable(config, "an encoder and a decoder")
    block = stacks_of(model)[0].blocks[0]
    told = _told(config)
    heads = heads_of(config, 0, 1)
    layers = [(name, module) for name, module in block.named_modules() if _is_linear(module)]
    of_attention = [(name, module) for name, module in layers if _ATTENTION.search(name)]
    if not of_attention:
        raise _underivable(config, "no linear layers of attention in its blocks")
    others = [(name, module) for name, module in layers if not _ATTENTION.search(name)]
    rules: Rules = _mlp(others, config.hidden_size, told)
    fused: str | None = None
    parents: list[str] = []
    for name, module in of_attention:
        found = _of_attention(name, module, heads, config.hidden_size, told)
        if found == "fused":
            fused = name
        elif found is not None:
            rules[name] = found
        if found == "fused" or (found is not None and found[0] == "column"):
            parents.append(name.rpartition(".")[0])
    if not parents:
        raise _underivable(config, "no layers of query, key and value that can be told by name or shape")
    attention = parents[0]
    holder = block.get_submodule(attention) if attention else block
    rules |= _norms(attention, holder, heads, set(rules))
    inputs = tuple(name for name in _PER_HEAD_INPUTS if name in holder.forward.__code__.co_varnames)
    counts = {name: what for name, what in _COUNTS.items() if isinstance(getattr(holder, name, None), int)}
    widths = {name: what for name, what in _WIDTHS.items() if isinstance(getattr(holder, name, None), int)}
    whats: list[What | None] = [None]
    if fused is not None:
        whats = ["qkv", "per_head"] if heads.num_kv == heads.num_heads else ["qkv", "per_group"]
    for what in whats:
        for attributes in [{**counts, **widths}, counts] if widths else [counts]:
            yield Family(
                types=(config.model_type,),
                attention=attention,
                rules={**rules, **({fused: ("column", what)} if fused else {})},
                attributes=attributes,
                head_inputs=inputs,
            )


def no_table(config: Any) -> Family:
    """For layouts that cut no layer."""
    return Family(types=(config.model_type,), attention="", rules={})


def _told(config: Any) -> dict[str, str]:
    """What transformers' own plan says of layers: the end of a name -> column, row, sum_gradient, nothing."""
    found = {}
    for pattern, style in (getattr(config, "base_model_tp_plan", None) or {}).items():
        if style not in _STYLES:
            raise _underivable(config, f"{style!r} of {pattern} in transformers' plan for it")
        found[pattern.rpartition("*.")[2]] = _STYLES[style]
    return found


def _is_linear(module: Any) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _sizes(module: Any) -> tuple[int, int]:
    """Outputs, inputs."""
    first, second = module.weight.shape
    return (second, first) if type(module).__name__ == "Conv1D" else (first, second)


def _of_attention(name: str, module: Any, heads: Heads, width: int, told: dict[str, str]) -> Any:
    """A rule, "fused", or None for what stays whole."""
    outputs, inputs = _sizes(module)
    leaf = name.rpartition(".")[2]
    q, kv = heads.num_heads * heads.size, heads.num_kv * heads.size
    says = told.get(name)
    out = says == "row" if says else bool(_OUT.search(leaf)) or "output" in name
    if out and inputs == q and outputs == width:
        return ("row", "heads")
    if inputs != width or out:
        return None
    if outputs == q + 2 * kv:
        return "fused"
    if outputs == kv and (kv != q or _KEY_OR_VALUE.search(leaf)):
        return ("column", "kv")
    return ("column", "heads") if outputs == q else None


def _mlp(layers: list[tuple[str, Any]], width: int, told: dict[str, str]) -> Rules:
    """Up and down again: both are cut, or none."""
    up: Rules = {}
    down: Rules = {}
    inner: set[int] = set()
    for name, module in layers:
        outputs, inputs = _sizes(module)
        row = told[name] == "row" if told.get(name) else inputs != width or bool(_DOWN.search(name))
        if row and outputs == width:
            down[name] = ("row", "inner")
            inner.add(inputs)
    for name, module in layers:
        outputs, inputs = _sizes(module)
        if name not in down and inputs == width and (outputs in inner or outputs // 2 in inner):
            up[name] = ("column", "inner" if outputs in inner else "inner2")
    return {**up, **down} if up and down else {}


def _norms(attention: str, holder: Any, heads: Heads, cut: set[str]) -> Rules:
    """Parameters of one head, which all heads use: each rank sees its own heads' part of the gradient."""
    found: Rules = {}
    for name, module in holder.named_modules():
        whole = f"{attention}.{name}" if attention and name else name
        sizes = {tuple(parameter.shape) for parameter in module.parameters(recurse=False)}
        if name and whole not in cut and sizes == {(heads.size,)}:
            found[whole] = ("sum_gradient", None)
    return found


def _underivable(config: Any, found: str) -> PlanError:
    return PlanError(
        f"splitting a {config.model_type}, a family without a table",
        found=found,
        allowed="decoders and encoders of blocks with linear layers of query, key and value, named as is usual",
        do="use --layout data, or add a table in parallel/families.py",
    )
