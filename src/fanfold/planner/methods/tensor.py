"""Tensor parallel: how many collectives one step of a split model calls, and how many bytes they hold.

Per block two sums forward (attention's output, the MLP's) and two backward (the gradients of their inputs), each of the
hidden states; the embedding one forward, the head one backward, and its logits are put side by side once
(Megatron-LM, arXiv 1909.08053, section 3). `parallel/comm.py` counts what is really called; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """Calls, and bytes of the whole tensors in them, of one rank and one step."""

    all_reduce: int
    all_reduce_bytes: int
    all_gather: int
    all_gather_bytes: int


def collectives(
    *,
    blocks: int,
    hidden: int,
    vocabulary: int,
    tokens: int,
    num_bytes: int,
    head: bool,
    backward: bool,
    embedding: bool = True,
) -> Collectives:
    """For a batch of `tokens` tokens, padding included, in a type of `num_bytes`.

    head: whether the model has an output head that is cut; embedding: whether its word embedding is cut.
    """
    sums = 2 * blocks + embedding
    if backward:
        sums += 2 * blocks + head
    gathers = 1 if head else 0
    return Collectives(
        all_reduce=sums,
        all_reduce_bytes=sums * tokens * hidden * num_bytes,
        all_gather=gathers,
        all_gather_bytes=gathers * tokens * vocabulary * num_bytes,
    )
