"""Sampling as taking the largest of logits plus Gumbel noise, where the noise depends on seed, row and position alone.

The maximum of log p + Gumbel is distributed as p (Gumbel 1954; the "Gumbel-max trick"), so every rank that has the
same logits takes the same token, and a row's tokens do not depend on the rows beside it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import LogitsProcessor


class Draws(LogitsProcessor):  # type: ignore[misc]
    """Behind the warpers; greedy choice of what it returns is a draw."""

    def __init__(self, seed: int, prompt: int, first_row: int = 0) -> None:
        self._seed, self._prompt, self._first_row = seed, prompt, first_row

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = input_ids.shape[1] - self._prompt
        noise = torch.empty(scores.shape, dtype=torch.float64)
        for row in range(len(scores)):
            digest = hashlib.sha256(f"{self._seed} {self._first_row + row} {position}".encode()).digest()
            chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            noise[row].exponential_(generator=chance)
        return (scores.double().cpu() - noise.log()).to(scores.device)


def take_warpers(options: dict[str, Any]) -> list[Any]:
    """transformers' own warpers for temperature, top_k, top_p and min_p, which are taken out of the options."""
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    made: list[Any] = []
    makers = (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    )
    for name, maker in makers:
        if (value := options.pop(name, None)) is not None:
            made.append(maker(value))
    return made
