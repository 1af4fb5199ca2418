"""Attention of some queries over some keys, tile by tile, and its gradient; tiles are joined by `fanfold.merge`.

Shapes: q [B, N, Q, H]; k, v [B, M, K, H]; B rows, N query heads, M key-value heads, H head size; lse [B, N, Q].
The kernel is torch's own for CPUs. It gives log-sum-exp with the output, and its backward takes the output and
log-sum-exp over all keys, so a tile's share of the gradient needs nothing of the other tiles. A bias that is learned
(T5's, by distance) gets its gradient here, as the kernel has none for what is added to scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fanfold.merge.softmax import SoftmaxPart, SoftmaxParts

if TYPE_CHECKING:
    from fanfold.parallel.tiles import Bias, Mask, Tile

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
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Mask,
        tiles: list[Tile],
        scale: float,
        bias: Bias | None = None,
    ) -> None:
        for tile in tiles:
            out, lse = attend(q, k, v, mask, tile, scale, bias)
            rows = (slice(None), slice(None), tile.rows)
            before = SoftmaxPart(self._peak[rows], self._weight[rows], self._value[rows])
            after = _MERGE.join(before, SoftmaxPart.of(out.to(lse.dtype), lse))
            self._peak[rows], self._weight[rows], self._value[rows] = after.peak, after.weight, after.value

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, N, Q, H], 0 for queries without a key, and lse."""
        part = SoftmaxPart(self._peak, self._weight, self._value)
        return _MERGE.finish(part).to(self._dtype), _MERGE.lse(part)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, tile: Tile, scale: float, bias: Bias | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one tile: output and lse, which is -inf for queries that see none of its keys."""
    added, none = _added(q, mask, tile, bias)
    rows, columns = tile.rows, tile.columns
    groups = q.shape[1] // k.shape[1]
    causal = bias is None and mask.by_kernel(tile)
    out, lse = _forward(
        q[:, :, rows], _spread(k[:, :, columns], groups), _spread(v[:, :, columns], groups), 0.0, causal,
        attn_mask=added, scale=scale,
    )  # fmt: skip
    return out, lse if none is None else lse.masked_fill(none, float("-inf"))


def _added(
    q: torch.Tensor, mask: Mask, tile: Tile, bias: Bias | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """To add to scores, [B or 1, N or 1, Q, K], and which queries see no key."""
    added, none = mask.bias(tile, q.dtype, complete=bias is not None)
    if bias is not None:
        learned = bias.of(tile)
        added = learned.expand(q.shape[0], -1, -1, -1) if added is None else added + learned
    return added, none


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
    bias: Bias | None = None,
) -> None:
    """Adds the gradients of (q, k, v) to `sums`, and the bias' to its own. `out` and `lse` are those over all keys,
    lse 0 where it was -inf."""
    q, k, v = tensors
    groups = q.shape[1] // k.shape[1]
    for tile in tiles:
        added, _ = _added(q, mask, tile, bias)
        rows, columns = tile.rows, tile.columns
        keys, values = _spread(k[:, :, columns], groups), _spread(v[:, :, columns], groups)
        dq, dk, dv = _backward(
            grad[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows].contiguous(), 0.0,
            bias is None and mask.by_kernel(tile), attn_mask=added, scale=scale,
        )  # fmt: skip
        sums[0][:, :, rows] += dq
        sums[1][:, :, columns] += _gathered(dk, groups)
        sums[2][:, :, columns] += _gathered(dv, groups)
        if bias is not None and added is not None:
            scores = q[:, :, rows] @ keys.mT * scale + added
            weights = torch.exp(scores - lse[:, :, rows, None])
            delta = (grad[:, :, rows] * out[:, :, rows]).sum(-1, keepdim=True)
            bias.add_gradient(tile, weights * (grad[:, :, rows] @ values.mT - delta))


def _spread(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, M, K, H] -> [B, M * groups, K, H]: the kernel wants a key-value head for each query head."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _gathered(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The gradient's way back."""
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


class Local(torch.autograd.Function):  # type: ignore[misc]
    """Attention where queries and all keys that they see are at hand. Only q, k, v, the output and lse are kept.

    `table` is the bias' own weights, for their gradient; None where there is no bias.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor | None, bias: Bias | None,
        mask: Mask, tiles: list[Tile], scale: float,
    ) -> torch.Tensor:  # fmt: skip
        sums = Attended(q, v.shape[-1])
        sums.add(q, k, v, mask, tiles, scale, bias)
        out, lse = sums.finish()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = mask, tiles, scale, bias
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        mask, tiles, scale, bias = ctx.rest
        bias = None if bias is None else bias.for_backward()
        sums = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        attend_backward(grad, (q, k, v), out, finite(lse), sums, mask, tiles, scale, bias)
        return (*sums, None if bias is None else bias.grad, None, None, None, None)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """0 where no key was seen: the kernel's backward would make NaN of -inf there."""
    return lse.masked_fill(lse == float("-inf"), 0.0)
