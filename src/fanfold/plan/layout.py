"""How many units each method gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`data` copies of the model, each computing its own pieces."""

    data: int = 1

    @property
    def num_units(self) -> int:
        return self.data

    def __str__(self) -> str:
        return f"data={self.data}"
