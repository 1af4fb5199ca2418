"""Keys and values of many sequences in one arena, and attention over sequences of different lengths, unpadded.

A step feeds the model one line of tokens [1, T]: the next token of every sequence that decodes, and stretches of
prompts. Linear layers see T rows and no padding; only attention must know which tokens belong together, and it is
told by `Segments`. The model is transformers' own: it is loaded with the attention function registered here and
given an `ArenaCache` as `past_key_values`, both public interfaces.

Shapes: T tokens of a step, H key/value heads, G query heads for each of them, D head size, L tokens seen so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTENTION = "fanfold_segments"


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """`tokens` places of the arena from `start` on: a sequence's keys and values."""

    start: int
    tokens: int


class Places:
    """Which places of the arena are taken: first fit, so where a region lies depends on the calls alone."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._free = [(0, tokens)]  # (start, tokens), by start

    @property
    def free_tokens(self) -> int:
        return sum(tokens for _, tokens in self._free)

    def take(self, tokens: int) -> Region | None:
        """None where no hole is wide enough."""
        for number, (start, width) in enumerate(self._free):
            if width >= tokens:
                rest = [(start + tokens, width - tokens)] if width > tokens else []
                self._free[number : number + 1] = rest
                return Region(start=start, tokens=tokens)
        return None

    def give_back(self, region: Region) -> None:
        holes = sorted([*self._free, (region.start, region.tokens)])
        self._free = holes[:1]
        for start, tokens in holes[1:]:
            before, width = self._free[-1]
            if before + width == start:
                self._free[-1] = (before, width + tokens)
            else:
                self._free.append((start, tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens [first, first + length) of the step's line follow `past` tokens whose keys and values are in `region`."""

    first: int
    length: int
    past: int
    region: Region


@dataclass(slots=True)
class Segments:
    """What one step's line holds."""

    each: Sequence[Segment]
    _places: dict[int, torch.Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def places(self, num_heads: int) -> torch.Tensor:
        """Rows of the arena's [tokens * H, D] table for the step's keys, int64[T * H], token by token."""
        if num_heads not in self._places:
            base: list[int] = []
            stride: list[int] = []
            for segment in self.each:
                start = segment.region.start * num_heads + segment.past
                base += range(start, start + segment.length)
                stride += [segment.region.tokens] * segment.length
            heads = torch.arange(num_heads)
            table = torch.tensor(base)[:, None] + torch.tensor(stride)[:, None] * heads[None, :]
            self._places[num_heads] = table.reshape(-1)
        return self._places[num_heads]

    def mask(self, number: int, window: int | None) -> torch.Tensor:
        """Which of its L keys each token of segment `number` sees: bool[length, L]."""
        if (number, window) not in self._masks:
            segment = self.each[number]
            total = segment.past + segment.length
            query = torch.arange(segment.past, total)[:, None]
            key = torch.arange(total)[None, :]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            self._masks[number, window] = seen
        return self._masks[number, window]


class ArenaLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, allocated at the first update and never moved."""

    def __init__(self, cache: ArenaCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        tokens = self._cache.places.tokens
        self.num_heads = key_states.shape[1]
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (tokens * self.num_heads, states.shape[-1])
            setattr(self, name, torch.empty(shape, dtype=states.dtype, device=states.device))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values [1, H, T, D] to their places; attention reads them there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        places = self._cache.segments.places(self.num_heads).to(self.keys.device)
        for table, states in ((self.keys, key_states), (self.values, value_states)):
            table.index_copy_(0, places, states[0].transpose(0, 1).reshape(-1, states.shape[-1]))
        self._cache.layer = self
        return key_states, value_states

    def of(self, table: torch.Tensor, region: Region) -> torch.Tensor:
        """The region as [H, tokens, D]."""
        rows = table.narrow(0, region.start * self.num_heads, region.tokens * self.num_heads)
        return rows.view(self.num_heads, region.tokens, -1)

    def copy(self, source: Region, target: Region, tokens: int) -> None:
        """The first `tokens` of `source` stand in `target`, too."""
        for table in (self.keys, self.values):
            self.of(table, target)[:, :tokens] = self.of(table, source)[:, :tokens]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class ArenaCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers for at most `tokens` tokens of all sequences together."""

    def __init__(self, num_layers: int, tokens: int) -> None:
        self.places = Places(tokens)
        self.segments = Segments(())
        self.layer: ArenaLayer | None = None  # the one that was updated last
        super().__init__(layers=[ArenaLayer(self) for _ in range(num_layers)])

    def copy(self, source: Region, target: Region, tokens: int) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.copy(source, target, tokens)


_ACTIVE: list[ArenaCache] = []  # the cache of the forward pass that runs; a unit runs one at a time


class active:
    """Within it, attention of models loaded with ATTENTION goes by this cache's segments."""

    def __init__(self, cache: ArenaCache) -> None:
        self._cache = cache

    def __enter__(self) -> None:
        _ACTIVE.append(self._cache)

    def __exit__(self, *_: object) -> None:
        _ACTIVE.pop()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H * G, T, D] -> [1, T, H * G, D]."""
    cache = _ACTIVE[-1]
    layer, segments = cache.layer, cache.segments
    if layer is None or attention_mask is not None:
        raise NotImplementedError("attention that does not go by the cache")
    num_heads = layer.num_heads
    grouped = query[0].unflatten(0, (num_heads, -1))  # H, G, T, D
    plain = softcap is None and s_aux is None
    found = []
    for number, segment in enumerate(segments.each):
        seen = segment.past + segment.length
        first = 0 if sliding_window is None else max(0, segment.past - sliding_window + 1)
        keys = layer.of(layer.keys, segment.region)[:, first:seen]
        values = layer.of(layer.values, segment.region)[:, first:seen]
        part = grouped[:, :, segment.first : segment.first + segment.length]  # H, G, n, D
        if not plain:
            mask = segments.mask(number, sliding_window)[:, first:].to(query.device)
            out = _softmax_attention(part, keys, values, mask, scaling, softcap, s_aux)
        elif segment.length == 1:  # one query sees all keys: its group of heads stands in for a sequence
            single = part[:, :, 0][None]  # 1, H, G, D
            out = F.scaled_dot_product_attention(single, keys[None], values[None], scale=scaling)[0][:, :, None]
        else:
            # The heads of a group share keys without a copy: H is the batch, G the heads, expanded with stride 0.
            group = part.shape[1]
            keys, values = (table[:, None].expand(-1, group, -1, -1) for table in (keys, values))
            causal = segment.past == 0 and (sliding_window is None or seen <= sliding_window)
            mask = None if causal else segments.mask(number, sliding_window)[:, first:].to(query.device)
            out = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, is_causal=causal, scale=scaling)
        found.append(out.flatten(0, 1).transpose(0, 1))  # n, H * G, D
    return torch.cat(found)[None], None


def _softmax_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention written out, for scores that are capped (Gemma 2) or have sinks (gpt-oss)."""
    scores = query @ keys[:, None].transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.reshape(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out: torch.Tensor = shares[..., : keys.shape[1]] @ values[:, None]
    return out


AttentionInterface.register(ATTENTION, _attend)
