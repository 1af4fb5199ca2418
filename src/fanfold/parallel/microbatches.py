"""`generate` of a model in stages: micro-batches go round, each with keys and values of its own on every stage."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from fanfold.parallel.mesh import shares
from fanfold.parallel.pipeline import Stop
from fanfold.parallel.ring import Tokens, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.tensors import TensorGroup


class Take(LogitsProcessor):  # type: ignore[misc]
    """The last processor: what it returns has one choice, the one that all ranks take."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._tokens.agree(lambda: scores.argmax(dim=-1).tolist())
        forced = torch.full_like(scores, -float("inf"))
        forced[torch.arange(len(scores)), torch.tensor(chosen)] = 0.0
        return forced


def generate_in_turns(
    one: Callable[..., torch.Tensor],
    world: TensorGroup,
    lead: int,
    *,
    micro_batches: int,
    threads: int,
    pad: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Token ids [B, prompt + new]; rows that end earlier than others are filled up with `pad`.

    `one(ids, mask, first_row, last)` generates one micro-batch with `last` as its last processor.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask

    def job(rows: range, turn: Callable[[], None]) -> torch.Tensor:
        mine = slice(rows.start, rows.stop)
        return one(input_ids[mine], mask[mine], rows.start, Take(Tokens(world, lead, turn)))

    jobs = [partial(job, rows) for rows in shares(len(input_ids), micro_batches)]
    found = take_turns(jobs, begin=lambda: torch.set_num_threads(threads))
    longest = max(ids.shape[1] for ids in found)
    return torch.cat([torch.nn.functional.pad(ids, (0, longest - ids.shape[1]), value=pad) for ids in found])


def logits_or_nothing(forward: Callable[..., Any], config: Any, *args: Any, **inputs: Any) -> Any:
    """For transformers' own `generate`: logits of nothing on a stage that has none, as they are not looked at."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    try:
        return forward(*args, **inputs)
    except Stop:
        nothing = torch.zeros(1).expand(len(inputs["input_ids"]), 1, config.vocab_size)
        return CausalLMOutputWithPast(logits=nothing, past_key_values=inputs.get("past_key_values"))
