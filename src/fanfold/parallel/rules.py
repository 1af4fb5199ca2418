"""How a family's layers are cut: a table of patterns, and from it the rows and columns that one rank holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fanfold.errors import PlanError
from fanfold.parallel.mesh import shares

# column: outputs are cut, the input is whole; row: inputs are cut, outputs are summed; sum_gradient: a whole parameter
# that works on a rank's heads only; head_norm: a norm over all heads' features, cut like them; lookup: an embedding
# that is cut by columns.
Kind = Literal["column", "row", "sum_gradient", "head_norm", "lookup"]
# heads: features of query heads; numbers: one value a query head;
# kv: of key-value heads; qkv: both side by side (query, key, value); per_head: query,
# key and value of one head after the other; per_group: the queries of a key-value head, its key, its value; shared_kv:
# all queries, then the one key and value; inner: the MLP's; inner2: gate and up side by side.
What = Literal["heads", "numbers", "kv", "qkv", "per_head", "per_group", "shared_kv", "inner", "inner2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One table. rules: end of a module's name -> kind and what; attributes of the attention module: what they count.

    attention: the end, or ends, of the names of attention modules. The word embedding and the output head need no rule.
    """

    types: tuple[str, ...]
    attention: str | tuple[str, ...]
    rules: dict[str, tuple[Kind, What | None]]
    attributes: dict[str, Literal["heads", "kv", "groups", "features"]] = field(default_factory=dict)
    head_inputs: tuple[str, ...] = ()  # keywords of the attention module that hold one value or row a head

    @property
    def attentions(self) -> tuple[str, ...]:
        return (self.attention,) if isinstance(self.attention, str) else self.attention


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one rank: query heads and key-value heads as numbers of the whole model's."""

    heads: range
    kv: range
    num_heads: int
    num_kv: int
    size: int

    @property
    def replicated(self) -> bool:
        """Whether other ranks hold the same key-value head."""
        return len(self.heads) * self.num_kv < len(self.kv) * self.num_heads


def heads_of(config: Any, rank: int, ways: int) -> Heads:
    """Key-value heads in consecutive shares; where there are too few, several ranks hold one and share its queries."""
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    num_heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    num_kv = _num_kv(config, num_heads)
    width = _first(config, "hidden_size", "n_embd", "dim")
    size = getattr(config, "head_dim", None) or width // num_heads
    if ways > num_heads:
        raise PlanError(
            f"--layout tensor={ways}",
            found=f"{num_heads} attention heads",
            allowed=f"tensor=1 to tensor={num_heads}: a head stays whole",
            do=f"use tensor={num_heads} and pipeline for the rest",
        )
    group = num_heads // num_kv
    if ways <= num_kv:
        kv = shares(num_kv, ways)[rank]
        return Heads(range(kv.start * group, kv.stop * group), kv, num_heads, num_kv, size)
    ranks = shares(ways, num_kv)  # the ranks of each key-value head
    head = next(i for i, of_head in enumerate(ranks) if rank in of_head)
    if len(ranks[head]) > group:
        raise PlanError(
            f"--layout tensor={ways}",
            found=f"{num_kv} key-value heads with {group} query heads each",
            allowed=f"at most {group} ranks for one key-value head: tensor=1 to tensor={num_heads}",
            do=f"use tensor={num_kv}, or a number it divides",
        )
    mine = shares(group, len(ranks[head]))[rank - ranks[head].start]
    first = head * group
    return Heads(range(first + mine.start, first + mine.stop), range(head, head + 1), num_heads, num_kv, size)


def _num_kv(config: Any, num_heads: int) -> int:
    if config.model_type == "falcon":
        if config.new_decoder_architecture:
            return int(config.num_kv_heads)
        return 1 if config.multi_query else num_heads
    found = getattr(config, "num_key_value_heads", None)
    return int(found or num_heads)


def _first(config: Any, *names: str) -> int:
    for name in names:
        if getattr(config, name, None):
            return int(getattr(config, name))
    raise PlanError(
        f"splitting a {config.model_type}",
        found=f"no {' or '.join(names)} in its config",
        allowed="a transformer with attention heads",
        do="report this with the model's name",
    )


def index_of(what: What, heads: Heads, width: int, rank: int, ways: int) -> list[int]:
    """Which of a layer's `width` features a rank holds, in their order."""
    size = heads.size
    q = _blocks(heads.heads, size)
    kv = _blocks(heads.kv, size)
    match what:
        case "heads":
            return q
        case "numbers":
            return list(heads.heads)
        case "kv":
            return kv
        case "qkv":
            keys = heads.num_heads * size
            values = keys + heads.num_kv * size
            return [*q, *(keys + i for i in kv), *(values + i for i in kv)]
        case "per_head":
            return _blocks(heads.heads, 3 * size)
        case "per_group":
            return _blocks(heads.kv, (heads.num_heads // heads.num_kv + 2) * size)
        case "shared_kv":
            return [*q, *range(heads.num_heads * size, (heads.num_heads + 2) * size)]
        case "inner":
            return list(shares(width, ways)[rank])
        case "inner2":
            half = width // 2
            mine = shares(half, ways)[rank]
            return [*mine, *(half + i for i in mine)]


def _blocks(numbers: range, size: int) -> list[int]:
    return list(range(numbers.start * size, numbers.stop * size))
