"""The next token from logits: the most probable one, or one drawn by a counter, so that draws know no batch.

Formulas and their order are those of transformers' logits processors: repetition penalty, temperature, top-k,
top-p, min-p. A draw depends on the seed, the row and the position alone.

Shapes: B sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fanfold.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; greedy where no flag asks for a draw."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check("--temperature", self.temperature, "0 (greedy) or more", lambda t: 0 <= t < float("inf"))
        _check("--top-k", self.top_k, "1 or more", lambda k: k >= 1)
        _check("--top-p", self.top_p, "above 0, at most 1", lambda p: 0 < p <= 1)
        _check("--min-p", self.min_p, "0 to 1", lambda p: 0 <= p <= 1)
        _check("--repetition-penalty", self.repetition_penalty, "above 0; 1 is none", lambda r: 0 < r < float("inf"))
        _check("--seed", self.seed, "0 to 2**63 - 1", lambda s: 0 <= s < 2**63)

    @property
    def greedy(self) -> bool:
        drawn = (self.temperature, self.top_k, self.top_p, self.min_p)
        return self.temperature == 0 or all(flag is None for flag in drawn)

    @property
    def record(self) -> dict[str, Any]:
        """What shapes the result: nothing but the penalty where the choice is greedy."""
        if self.greedy:
            return {"greedy": True, "repetition_penalty": self.repetition_penalty}
        return {"greedy": False, **asdict(self)}

    @property
    def shown(self) -> str:
        penalty = f", repetition penalty {self.repetition_penalty:g}" if self.repetition_penalty else ""
        if self.greedy:
            return "greedy: the most probable token" + penalty
        words = [f"temperature {1 if self.temperature is None else self.temperature:g}"]
        words += [f"top-k {self.top_k}"] if self.top_k is not None else []
        words += [f"top-p {self.top_p:g}"] if self.top_p is not None else []
        words += [f"min-p {self.min_p:g}"] if self.min_p is not None else []
        return f"sampled: {', '.join(words)}{penalty}, seed {self.seed}"


def _check(flag: str, value: Any, allowed: str, fits: Any) -> None:
    if value is not None and not fits(value):
        raise RequestError(f"{flag} {value}", found=f"{value}", allowed=allowed, do="choose such a number")


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) of 53 bits, the same for the same three numbers.

    >>> uniform(0, 0, 0) == uniform(0, 0, 0) != uniform(0, 0, 1)
    True
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, row, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def choose(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    seen: Sequence[Sequence[int]],
    rows: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """One token a sequence from float32 [B, V], which is overwritten.

    seen: ids before it, prompt included; rows and positions: what the draw depends on.
    """
    import torch

    if sampling.repetition_penalty not in (None, 1.0):
        _penalise(logits, seen, sampling.repetition_penalty or 1.0)
    if sampling.greedy:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    kept = filtered(logits, sampling)
    cumulated = torch.softmax(kept, dim=-1).double().cumsum(dim=-1)
    draws = [uniform(sampling.seed, row, position) for row, position in zip(rows, positions, strict=True)]
    wanted = torch.tensor(draws, dtype=torch.float64)[:, None] * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, wanted, right=True)[:, 0]
    return [int(token) for token in tokens.clamp(max=logits.shape[-1] - 1).tolist()]


def _penalise(logits: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> None:
    """Tokens that stand in prompt or completion: positive logits divided, negative ones multiplied."""
    import torch

    for number, ids in enumerate(seen):
        index = torch.tensor(sorted(set(ids)))
        scores = logits[number, index]
        logits[number, index] = torch.where(scores < 0, scores * penalty, scores / penalty)


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits after temperature, top-k, top-p and min-p; what is left out is -inf. Source: transformers' warpers."""
    import torch

    nothing = -float("inf")
    if sampling.temperature is not None:
        logits = logits / sampling.temperature
    if sampling.top_k is not None:
        lowest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, nothing)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort(descending=False)
        out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        out[:, -1:] = False
        logits = logits.masked_fill(out.scatter(1, order, out), nothing)
    if sampling.min_p is not None:
        shares = torch.softmax(logits, dim=-1)
        out = shares < sampling.min_p * shares.max(dim=-1, keepdim=True).values
        logits = logits.masked_fill(out, nothing)
    return logits
