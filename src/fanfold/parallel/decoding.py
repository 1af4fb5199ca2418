"""Tokens one by one over keys and values that stay where their positions lie: each unit attends to its own.

The prompt is computed as any cut sequence. Every later token's query is on every unit; its key and value are kept by
one of them, in turns. The units' outputs are joined by `fanfold.merge.softmax`, in rank order, so all hold the same
bits and take the same token. A unit holds the keys and values of its share of the positions, and never others'.

Shapes: B rows, N query heads, M key-value heads, H head size, K positions of this unit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from fanfold.errors import PlanError
from fanfold.merge.softmax import SoftmaxPart, SoftmaxParts
from fanfold.parallel.attention import attend_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.comm import Comm

_MERGE = SoftmaxParts()


@dataclass
class Decoding:
    """One generation: which positions this unit holds, and whether it keeps the token that is being computed."""

    comm: Comm
    positions: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # int64 [K]
    length: int = 0  # tokens seen by all units
    keeps: bool = True

    def prompt(self, positions: torch.Tensor, length: int) -> None:
        self.positions, self.length = positions, length

    def begin_token(self) -> None:
        """The next token's key and value go to the units in turns."""
        self.keeps = self.length % self.comm.size == self.comm.rank
        if self.keeps:
            self.positions = torch.cat([self.positions, torch.tensor([self.length])])

    def end_token(self) -> None:
        self.length += 1

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float, name: str
    ) -> torch.Tensor:
        """[B, N, 1, H] over the keys of all units. visible: [B or 1, 1, 1, K], which of this unit's keys count."""
        out, lse = attend_all(q, k, v, visible, scale)
        mine = torch.cat([out.to(lse.dtype), lse[..., None]], -1)
        every = self.comm.side_by_side(mine, name, [1] * self.comm.size, 2)
        total = _MERGE.empty()
        for rank in range(self.comm.size):
            one = every[:, :, rank : rank + 1]
            total = _MERGE.join(total, SoftmaxPart.of(one[..., :-1], one[..., -1]))
        found: torch.Tensor = _MERGE.finish(total)
        return found.to(q.dtype)


class CutLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values of this unit's positions. Its length is that of the whole sequence."""

    def __init__(self, decoding: Decoding) -> None:
        super().__init__()
        self._decoding = decoding

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self._decoding.keeps:
            return super().update(key_states, value_states, *args, **kwargs)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._decoding.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._decoding.length + query_length, 0


def cut_cache(decoding: Decoding, layers: int) -> Any:
    """For transformers' own generate."""
    return Cache(layers=[CutLayer(decoding) for _ in range(layers)])


def stepping(forward: Callable[..., Any], sequence: Any, decoding: Decoding) -> Callable[..., Any]:
    """The model's forward as generate calls it: the prompt is cut, later tokens are computed everywhere."""

    @functools.wraps(forward)
    def step(*args: Any, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        if decoding.length == 0:
            return sequence.prompt(forward, inputs, decoding)
        if ids.shape[1] != 1:
            raise PlanError(
                f"generate with context={decoding.comm.size}",
                found=f"{ids.shape[1]} tokens at once behind the prompt",
                allowed="one token at a time",
                do="leave assisted generation away, or use --layout tensor",
            )
        return sequence.token(forward, inputs, decoding)

    return step
