"""Attention of some queries over some keys, tile by tile, and its gradient; tiles are joined by `fanfold.merge`.

Shapes: q [B, N, Q, H]; k, v [B, M, K, H]; B rows, N query heads, M key-value heads, H head size; lse [B, N, Q].
The kernel is torch's own for CPUs. It gives log-sum-exp with the output, and its backward takes the output and
log-sum-exp over all keys, so a tile's share of the gradient needs nothing of the other tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fanfold.merge.softmax import SoftmaxPart, SoftmaxParts

if TYPE_CHECKING:
    from fanfold.parallel.tiles import Mask, Tile

_MERGE = SoftmaxParts()
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Attended:
    """The output so far for all queries at hand; tiles of keys are added in any number of steps."""

    def __init__(self, q: torch.Tensor, width: int) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self._dtype = q.dtype
        self._peak = q.new_full((*q.shape[:3], 1), float("-inf"), dtype=wide)
        self._weight = q.new_zeros((*q.shape[:3], 1), dtype=wide)
        self._value = q.new_zeros((*q.shape[:3], width), dtype=wide)

    def add(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, tiles: list[Tile], scale: float
    ) -> None:
        for tile in tiles:
            out, lse = attend(q, k, v, mask, tile, scale)
            rows = (slice(None), slice(None), tile.rows)
            before = SoftmaxPart(self._peak[rows], self._weight[rows], self._value[rows])
            after = _MERGE.join(before, SoftmaxPart.of(out.to(lse.dtype), lse))
            self._peak[rows], self._weight[rows], self._value[rows] = after.peak, after.weight, after.value

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, Q, H], 0 for queries without a key, and lse."""
        part = SoftmaxPart(self._peak, self._weight, self._value)
        return _MERGE.finish(part).to(self._dtype), _MERGE.lse(part)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, tile: Tile, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one tile: output and lse, which is -inf for queries that see none of its keys."""
    bias, none = mask.bias(tile, q.dtype)
    rows, columns = tile.rows, tile.columns
    groups = q.shape[1] // k.shape[1]
    causal = mask.by_kernel(tile)
    out, lse = _forward(
        q[:, :, rows], _spread(k[:, :, columns], groups), _spread(v[:, :, columns], groups), 0.0, causal,
        attn_mask=bias, scale=scale,
    )  # fmt: skip
    return out, lse if none is None else lse.masked_fill(none, float("-inf"))


def attend_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all keys at hand: output, and lse, -inf for queries that see none. visible: [B or 1, 1, Q or 1, K]."""
    groups = q.shape[1] // k.shape[1]
    bias = none = None
    if visible is not None and not bool(visible.all()):
        bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        none = ~visible.any(-1)
    out, lse = _forward(q, _spread(k, groups), _spread(v, groups), 0.0, False, attn_mask=bias, scale=scale)
    return out, lse if none is None else lse.masked_fill(none, float("-inf"))


def attend_backward(
    grad: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: Mask,
    tiles: list[Tile],
    scale: float,
) -> None:
    """Adds the gradients of (q, k, v) to `sums`. `out` and `lse` are those over all keys, lse 0 where it was -inf."""
    q, k, v = tensors
    groups = q.shape[1] // k.shape[1]
    for tile in tiles:
        bias, _ = mask.bias(tile, q.dtype)
        rows, columns = tile.rows, tile.columns
        keys, values = _spread(k[:, :, columns], groups), _spread(v[:, :, columns], groups)
        dq, dk, dv = _backward(
            grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows].contiguous(), 0.0,
            mask.by_kernel(tile), attn_mask=bias, scale=scale,
        )  # fmt: skip
        sums[0][:, :, rows] += dq
        sums[1][:, :, columns] += _gathered(dk, groups)
        sums[2][:, :, columns] += _gathered(dv, groups)


def _spread(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, M, K, H] -> [B, M * groups, K, H]: the kernel wants a key-value head for each query head."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _gathered(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The gradient's way back."""
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


class Local(torch.autograd.Function):  # type: ignore[misc]
    """Attention where queries and all keys that they see are at hand. Only q, k, v, the output and lse are kept."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, tiles: list[Tile], scale: float
    ) -> torch.Tensor:
        sums = Attended(q, v.shape[-1])
        sums.add(q, k, v, mask, tiles, scale)
        out, lse = sums.finish()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = mask, tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        mask, tiles, scale = ctx.rest
        sums = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        attend_backward(grad, (q, k, v), out, finite(lse), sums, mask, tiles, scale)
        return (*sums, None, None, None)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """0 where no key was seen: the kernel's backward would make NaN of -inf there."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
