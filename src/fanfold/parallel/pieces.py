"""Experts that a checkpoint stores one by one, read as the one tensor that the model holds: those of a unit only."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fanfold.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.weights import Cut, Files

_NUMBER = re.compile(r"\.experts\.(\d+)\.")
_KNOWN = [["MergeModulelist"], ["MergeModulelist", "Concatenate"]]


@dataclass(slots=True)
class Pieces:
    """[E, rows, columns]: of every expert one file's tensor, or several, rows one under the other (gate and up)."""

    parts: dict[tuple[int, int], str] = field(default_factory=dict)  # (expert, part) -> name

    def shape(self, files: Files) -> tuple[int, ...]:
        experts = {expert for expert, _ in self.parts}
        shapes = [files.shape(name) for (expert, _), name in sorted(self.parts.items()) if expert == 0]
        return (len(experts), sum(shape[0] for shape in shapes), shapes[0][1])

    def read(self, files: Files, cut: Cut | None, make: Callable[[int, list[int]], Cut]) -> torch.Tensor:
        count, _, _ = self.shape(files)
        inner = cut.then if cut is not None else None
        return torch.stack([self._one(files, e, inner, make) for e in (cut.index if cut else range(count))])

    def _one(self, files: Files, expert: int, inner: Cut | None, make: Callable[..., Cut]) -> torch.Tensor:
        names = [name for (number, _), name in sorted(self.parts.items()) if number == expert]
        if inner is None:
            return torch.cat([files.read(name, None) for name in names])
        if inner.dim == 2:
            return torch.cat([files.read(name, make(1, inner.index)) for name in names])
        found, start = [], 0
        for name in names:
            rows = files.shape(name)[0]
            found.append(files.read(name, make(0, [i - start for i in inner.index if start <= i < start + rows])))
            start += rows
        return torch.cat(found)


def add_piece(pieces: dict[str, Pieces], target: str, name: str, pattern: str, converter: Any, shown: str) -> None:
    """Remember a stored tensor as a piece of the model's `target`. Raises PlanError for what is not an expert's."""
    number = _NUMBER.search(name)
    kinds = [type(operation).__name__ for operation in converter.operations]
    if number is None or kinds not in _KNOWN:
        raise PlanError(
            f"splitting {shown}",
            found=f"{name} is stored in pieces that transformers puts together while loading",
            allowed="checkpoints whose tensors are stored as the model holds them, and experts one by one",
            do="load it once with transformers and save it again with save_pretrained(save_original_format=False)",
        )
    part = list(converter.source_patterns).index(pattern)
    pieces.setdefault(target, Pieces()).parts[int(number.group(1)), part] = name
