"""A transformer as the planner sees it: its matrices, layer by layer, exactly; nothing of it is ever loaded.

Parameters, FLOPs and bytes follow from the records below; `plan/workload.py` builds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["column", "row", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`outputs x inputs` weights, and how a tensor group would cut them.

    With experts there are so many copies, and a token goes through `chosen` of them.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    split: Split = "column"
    experts: int = 0
    chosen: int = 1

    @property
    def params(self) -> int:
        return max(1, self.experts) * (self.inputs * self.outputs + (self.outputs if self.bias else 0))

    @property
    def active_params(self) -> int:
        """Weights that one token meets."""
        return self.params if not self.experts else self.params // self.experts * self.chosen

    @property
    def flops_per_token(self) -> int:
        """Multiply and add count two."""
        return 2 * self.chosen * self.inputs * self.outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Heads and what a token leaves in the key/value cache (numbers, not bytes)."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    cache_width: int  # numbers kept per token: keys and values, or the latent of MLA
    causal: bool = True
    window: int | None = None  # keys a token can see, itself included
    cross: bool = False  # keys of the encoder

    def keys_seen(self, length: int) -> float:
        """Mean number of keys per query over a sequence of this length."""
        if self.window is not None and self.window < length:
            early = self.window * (self.window + 1) / 2
            return (early + (length - self.window) * self.window) / length
        return (length + 1) / 2 if self.causal else float(length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One transformer layer."""

    linears: tuple[Linear, ...]
    attention: tuple[Attention, ...]
    norms: int  # norm operations over the width
    vectors: int  # parameters outside matrices: norms, gates, positions
    gated: bool = False
    ffn: int = 0  # width inside the feed-forward part, of the experts a token meets together

    @property
    def params(self) -> int:
        return self.vectors + sum(linear.params for linear in self.linears)

    @property
    def active_params(self) -> int:
        return self.vectors + sum(linear.active_params for linear in self.linears)

    @property
    def expert_params(self) -> int:
        return sum(linear.params for linear in self.linears if linear.experts)

    @property
    def experts(self) -> int:
        return max((linear.experts for linear in self.linears), default=0)

    @property
    def chosen(self) -> int:
        return max((linear.chosen for linear in self.linears if linear.experts), default=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`count` equal layers, on the encoder's or the decoder's side."""

    layer: Layer
    count: int
    side: Literal["decoder", "encoder"] = "decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model's matrices and dimensions. `head` is None where no token is predicted (encoders)."""

    name: str
    family: str
    hidden: int
    vocab: int
    blocks: tuple[Block, ...]
    embedding_params: int  # token, position and type tables, patches
    other_params: int = 0  # final norms, poolers
    head: Linear | None = None
    tied: bool = False  # the head's weights are the token table
    max_length: int | None = None

    @property
    def layers(self) -> int:
        return sum(block.count for block in self.blocks)

    @property
    def num_params(self) -> int:
        """All parameters, as `sum(p.numel() for p in model.parameters())` counts them."""
        return self.embedding_params + self.other_params + self.head_params + self._over_layers("params")

    @property
    def head_params(self) -> int:
        return 0 if self.head is None or self.tied else self.head.params

    @property
    def active_params(self) -> int:
        """Parameters that one token meets; all of them in a dense model."""
        return self.embedding_params + self.other_params + self.head_params + self._over_layers("active_params")

    @property
    def heads(self) -> int:
        return max((a.heads for block in self.blocks for a in block.layer.attention), default=0)

    @property
    def kv_heads(self) -> int:
        return min((a.kv_heads for block in self.blocks for a in block.layer.attention), default=0)

    @property
    def experts(self) -> int:
        return max(block.layer.experts for block in self.blocks)

    @property
    def cache_per_token(self) -> int:
        """Numbers that one more token leaves in the key/value cache, over all layers; 0 for an encoder."""
        return sum(
            block.count * a.cache_width
            for block in self.blocks
            if block.side == "decoder"
            for a in block.layer.attention
            if a.causal and not a.cross
        )

    def matrix_params_met(self) -> int:
        """Weights that a token is multiplied with: active, the head included, tables left out."""
        head = self.head.params if self.head is not None else 0
        return head + sum(
            block.count * sum(linear.active_params for linear in block.layer.linears) for block in self.blocks
        )

    def forward_flops_per_token(self, length: int, *, masked: bool = True) -> float:
        """Forward FLOPs per token of a sequence; `masked` counts only the keys that a token sees.

        Published model FLOPs count all keys (PaLM, appendix B): `masked=False`.
        """
        flops = float(self.head.flops_per_token if self.head is not None else 0)
        for block in self.blocks:
            each = float(sum(linear.flops_per_token for linear in block.layer.linears))
            for a in block.layer.attention:
                keys = a.keys_seen(length) if masked else length
                each += 2 * a.heads * (a.head_dim + a.value_dim) * keys
            flops += block.count * each
        return flops

    def _over_layers(self, name: str) -> int:
        return sum(block.count * int(getattr(block.layer, name)) for block in self.blocks)
