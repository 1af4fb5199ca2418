"""How many units each method gets."""

from __future__ import annotations

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
