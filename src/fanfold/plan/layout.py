"""How many units each method gets."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`data` copies of the model, each computing its own pieces; `split` says how each of them is cut."""

    data: int = 1
    split: str = "whole"

    @property
    def num_units(self) -> int:
        return self.data

    def __str__(self) -> str:
        return f"data={self.data}" + ("" if self.split == "whole" else f" {self.split}")


def processes_of(split: str) -> int:
    """Over how many processes one model is cut."""
    return math.prod(int(value.partition(":")[0]) for value in _values(split))


def product_of(split: str) -> str:
    """The arithmetic behind it: `pipeline=2 x tensor=2 = 4`."""
    factors = [word for word in split.split() if "=" in word]
    return " x ".join(factors) + (f" = {processes_of(split)}" if len(factors) > 1 else "")


def _values(split: str) -> list[str]:
    return [word.partition("=")[2] for word in split.split() if "=" in word]
