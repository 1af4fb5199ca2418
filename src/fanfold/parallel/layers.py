"""Layers that hold one rank's share and give what the whole layer would.

Shapes: [..., I] in, [..., O] out; a rank holds o of O outputs or i of I inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from fanfold.parallel.comm import Comm


class Column(nn.Module):  # type: ignore[misc]
    """[..., I] -> [..., o]: the outputs are cut. `transposed`: the weight lies as [I, o], as in GPT-2."""

    def __init__(self, comm: Comm, name: str, weight: Any, bias: Any, *, transposed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self._comm, self._name = comm, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(self._comm.copy(x, self._name), self.weight, self.bias, self.transposed)


class Row(nn.Module):  # type: ignore[misc]
    """[..., i] -> [..., O]: the inputs are cut, the outputs summed over ranks, then the bias added once."""

    def __init__(self, comm: Comm, name: str, weight: Any, bias: Any, *, transposed: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed = weight, bias, transposed
        self._comm, self._name = comm, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._comm.reduce(_product(x, self.weight, None, self.transposed), self._name)
        return y if self.bias is None else y + self.bias


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    shape = (*x.shape[:-1], weight.shape[1])
    flat = x.reshape(-1, x.shape[-1])
    return (flat @ weight if bias is None else torch.addmm(bias, flat, weight)).view(shape)


class Embedding(nn.Module):  # type: ignore[misc]
    """ids -> [..., H]: the rows of the vocabulary are cut; each id is looked up where it lies, then scaled."""

    def __init__(
        self, comm: Comm, name: str, weight: Any, rows: range, padding_idx: int | None, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.embed_scale = scale
        self.weight = weight
        self._comm, self._name, self._rows = comm, name, rows
        self._padding = None if padding_idx is None or padding_idx not in rows else padding_idx - rows.start
        self.padding_idx = padding_idx
        self.embedding_dim = weight.shape[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        here = (ids >= self._rows.start) & (ids < self._rows.stop)
        local = torch.where(here, ids - self._rows.start, 0)
        # Not by padding_idx: row 0 stands in for ids of other ranks, and their gradient must not be lost with it.
        found = F.embedding(local, self.weight)
        keep = here if self._padding is None else here & (local != self._padding)
        if torch.is_grad_enabled() and self._padding is not None:
            found = torch.where((here & ~keep).unsqueeze(-1), found.detach(), found)
        found = self._comm.reduce(found * here.unsqueeze(-1).to(found.dtype), self._name)
        return found if self.embed_scale == 1.0 else found * self.embed_scale


class Head(nn.Module):  # type: ignore[misc]
    """[..., H] -> [..., V]: the vocabulary is cut, the logits put side by side again."""

    def __init__(self, comm: Comm, name: str, weight: Any, bias: Any, sizes: list[int]) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._comm, self._name, self._sizes = comm, name, sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mine = F.linear(self._comm.copy(x, self._name), self.weight, self.bias)
        return self._comm.gather(mine, self._name, self._sizes)


class HeadNorm(nn.Module):  # type: ignore[misc]
    """RMS norm over the features of all heads, of which a rank holds some: the sum of squares is a sum over ranks."""

    def __init__(self, comm: Comm, name: str, weight: Any, width: int, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._comm, self._name, self._width, self._eps = comm, name, width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        wide = x.to(torch.float32)
        squares = self._comm.reduce_both(wide.pow(2).sum(-1, keepdim=True), self._name)
        return (self.weight * (wide * torch.rsqrt(squares / self._width + self._eps))).to(dtype)
