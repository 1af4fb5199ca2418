"""Attention and masks of a model whose sequences are cut, as transformers calls them, by one registered name.

A model asks for a mask and gets a `Mask`, which it hands to attention, which finds there how the sequence is cut.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F

from fanfold.errors import InternalError, PlanError
from fanfold.parallel.context import METHODS, Over
from fanfold.parallel.tiles import Bias, Mask, Pattern

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.decoding import Decoding
    from fanfold.parallel.mesh import ContextMethod
    from fanfold.parallel.positions import Positions

ATTENTION = "fanfold_context"
CROSS = ("EncDecAttention", "encoder_attn")  # names of a decoder's attention to its encoder
_OWN_KEYWORDS = ("softcap", "s_aux", "head_mask", "indices")


class Sequenced(Protocol):
    """This unit's part in a model over units that cut the sequence."""

    comm: Comm
    method: ContextMethod

    def name_of(self, module: Any) -> str: ...


@dataclass
class Run:
    """One forward: how its sequence is cut, and its encoder's; `decoding` where it is one token behind a prompt."""

    sequence: Sequenced
    cut: Positions | None = None
    keys: Positions | None = None
    decoding: Decoding | None = None
    sees_all: bool = False  # attention without a mask is over everything


RUN: ContextVar[Run | None] = ContextVar("the cut of the forward that is running", default=None)


def called(call: Callable[..., Any], run: Run, inputs: dict[str, Any]) -> Any:
    """What call(**inputs) gives, cut as `run` says."""
    token = RUN.set(run)
    try:
        return call(**inputs)
    finally:
        RUN.reset(token)


def every_position(x: torch.Tensor, comm: Comm, cut: Positions, name: str) -> torch.Tensor:
    """[B, s, ...] -> [B, S, ...] on every unit."""
    whole: torch.Tensor = _Positions.apply(x, comm, cut, name)
    return whole


class _Positions(torch.autograd.Function):  # type: ignore[misc]
    """Own positions -> all; what comes after is the same on every unit, so each takes its own share of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, cut: Positions, name: str) -> torch.Tensor:
        ctx.mine = cut.of_rank[comm.rank]
        whole = comm.side_by_side(x.transpose(0, 1).contiguous(), name, cut.sizes, 0)
        if cut.back is not None:
            whole = whole[cut.back]
        return whole.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad[:, ctx.mine], None, None, None


def mean_loss(logits: torch.Tensor, labels: torch.Tensor, comm: Comm, cut: Positions) -> torch.Tensor:
    """The mean over all tokens that have a label: logits [B, s, V] of own positions, labels [B, S] of all."""
    mine = labels[:, cut.of_rank[comm.rank]].clamp(min=0)
    chosen = F.log_softmax(logits, -1).gather(-1, mine[..., None])[..., 0]
    every = every_position(chosen, comm, cut, "loss")
    return F.nll_loss(every.reshape(-1, 1), torch.where(labels == -100, -100, 0).reshape(-1))


# -- what transformers calls ----------------------------------------------------------------------------------


def use_attention(model: Any) -> None:
    """The model asks for its masks and attention here from now on."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, make_mask)
    model.set_attn_implementation(ATTENTION)


def make_mask(*, mask_function: Any, attention_mask: torch.Tensor | None = None, **settings: Any) -> Mask:
    """In place of a mask tensor. `mask_function` is of positions in the whole sequence."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    run = RUN.get()
    if run is None:
        raise InternalError(
            "a mask for a cut sequence",
            found="a forward that nobody has cut",
            allowed="calls of the group",
            do="report it",
        )
    pattern: Pattern = "other"
    if mask_function is causal_mask_function:
        pattern = "causal"
    elif mask_function is bidirectional_mask_function:
        pattern = "full"
    seen = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    return Mask(run, pattern, mask_function, seen)


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """[B, N, s, H] -> [B, s, N, H], over the keys of all units. Raises PlanError for what cannot be cut."""
    from transformers.masking_utils import bidirectional_mask_function

    run = RUN.get() if attention_mask is None else getattr(attention_mask, "run", None)
    crosses = run is not None and run.sequence.name_of(module).endswith(CROSS)
    mask = attention_mask
    if mask is None and run is not None and (crosses or run.sees_all):
        mask = Mask(run, "full", bidirectional_mask_function, None)
    own = [name for name in _OWN_KEYWORDS if settings.get(name) is not None]
    bias = settings.get("position_bias")
    if torch.is_tensor(bias) and not getattr(module, "has_relative_attention_bias", True):
        bias = None  # zeros, of attention without one
    if not isinstance(bias, Bias | None):
        own.append("position_bias")
    if run is None or not isinstance(mask, Mask) or own or dropout:
        found = f"attention with {', '.join(own)}" if own else "dropout in attention" if dropout else "no mask"
        raise PlanError(
            f"{type(module).__name__} over a cut sequence",
            found=found,
            allowed="softmax attention with masks, without dropout",
            do="use --layout tensor",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sequence = run.sequence
    name = sequence.name_of(module)
    if run.decoding is not None:
        visible = mask.of_token(run.decoding.length, run.decoding.positions)
        out = run.decoding.attend(query, key, value, visible, scale, name)
        return out.transpose(1, 2).contiguous(), None
    if mask.pattern == "other" and sequence.method == "ring":
        raise PlanError(
            f"context={sequence.comm.size}:ring",
            found="a mask of the model's own (windows, blocks)",
            allowed="tokens that see all, or all before them, with padding",
            do=f"use context={sequence.comm.size}:allgather",
        )
    assert run.cut is not None
    keys = run.keys if crosses and run.keys is not None else run.cut
    over = Over(cut=run.cut, keys=keys, mask=mask, scale=scale, bias=bias)
    out = METHODS[sequence.method](sequence.comm, over, query, key, value, name)
    return out.transpose(1, 2).contiguous(), None
