"""Tensors over groups that carry arrays: the same memory, no copy more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fanfold.parallel.gloo import GlooGroup
from fanfold.parallel.shared import SharedGroup

if TYPE_CHECKING:
    from numpy.typing import NDArray


def array_of(x: torch.Tensor) -> NDArray[Any]:
    """The tensor's own memory; bfloat16, which NumPy lacks, as its bits."""
    x = x.detach()
    found: NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


def tensor_of(array: NDArray[Any]) -> torch.Tensor:
    """The array's own memory as a tensor."""
    return torch.from_numpy(array)


class Alone:
    """One rank that has nobody to talk to."""

    rank, size = 0, 1

    def all_reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, name: str, sizes: list[int], dim: int = -1) -> torch.Tensor:
        return x

    def all_to_all(self, parts: list[torch.Tensor], sizes: list[list[int]], name: str) -> list[torch.Tensor]:
        return parts


class _Tensors:
    """A group's collectives for CPU tensors. Sums of bfloat16 are taken in float32 and rounded once."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.size > 1:
            if x.dtype == torch.bfloat16:
                wide = x.detach().float()
                super().all_reduce(wide.numpy(), name)  # type: ignore[misc]
                x.detach().copy_(wide)
            else:
                super().all_reduce(array_of(x), name)  # type: ignore[misc]
        return x

    def all_gather(self, x: torch.Tensor, name: str, sizes: list[int], dim: int = -1) -> torch.Tensor:
        """All ranks' tensors side by side along `dim`, of which rank r has sizes[r]."""
        if self.size == 1:
            return x
        first = array_of(x.transpose(0, dim).contiguous())
        parts = super().all_gather(first, name)  # type: ignore[misc]
        whole = torch.from_numpy(np.concatenate(parts)).transpose(0, dim)
        return (whole.view(x.dtype) if x.dtype == torch.bfloat16 else whole).contiguous()

    def all_to_all(self, parts: list[torch.Tensor], sizes: list[list[int]], name: str) -> list[torch.Tensor]:
        """parts[r], flat, goes to rank r; what each rank has for this one, in rank order."""
        if self.size == 1:
            return parts
        got = super().all_to_all([array_of(part) for part in parts], sizes, name)  # type: ignore[misc]
        return [tensor_of(array).view(part.dtype) for array, part in zip(got, parts, strict=True)]


class TensorGroup(_Tensors, SharedGroup):  # type: ignore[misc]
    """Tensors over shared memory."""


class GlooTensorGroup(_Tensors, GlooGroup):  # type: ignore[misc]
    """Tensors over gloo."""
