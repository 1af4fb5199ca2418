"""Attention over a sequence that is cut over units: three ways for queries to meet the keys of other units.

*allgather*: keys and values of all positions on every unit, each unit its own queries. *ulysses*: every unit gets all
positions of some heads, and gives the outputs back. *ring*: keys and values go round, a unit's share at a time, and
the outputs over shares are joined by `fanfold.merge.softmax`.

Queries may be those of another sequence than keys (a decoder's attention to its encoder), which is cut by itself.

Shapes: q [B, N, s, H]; k, v [B, M, s, H]; s positions of this unit, S of all, n and m heads of one unit.
Sources: Llama 3 (arXiv 2407.21783, 3.3.2); Ulysses (arXiv 2309.14509); Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fanfold.parallel.attention import Attended, Local, attend_backward, finite
from fanfold.parallel.mesh import head_shares
from fanfold.parallel.tiles import Bias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.positions import Positions
    from fanfold.parallel.tiles import Mask

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """What attention is over: how queries and keys are cut, which pairs count, and the bias of their scores."""

    cut: Positions
    keys: Positions  # the same as `cut` but in attention to another sequence
    mask: Mask
    scale: float
    bias: Bias | None = None

    @property
    def table(self) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.table


def allgather(comm: Comm, over: Over, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    k, v = _Gathered.apply(k, v, comm, over.keys, name)
    return _over_all_keys(over, q, k, v, over.cut.runs[comm.rank])


def ulysses(comm: Comm, over: Over, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    heads, kv = zip(*head_shares(q.shape[1], k.shape[1], comm.size), strict=True)
    if over.keys is over.cut:
        q, k, v = _Heads.apply(comm, over.cut, (heads, kv, kv), name, q, k, v)
    else:
        (q,) = _Heads.apply(comm, over.cut, (heads,), name, q)
        k, v = _Heads.apply(comm, over.keys, (kv, kv), f"{name} keys", k, v)
    if over.bias is not None:
        mine = heads[comm.rank]
        over = replace(over, bias=Bias(over.bias.table[:, mine.start : mine.stop], over.bias.bucket))
    out = _over_all_keys(over, q, k, v, [range(over.cut.length)])
    back: torch.Tensor = _Tokens.apply(out, comm, over.cut, heads, name)
    return back


def _over_all_keys(over: Over, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: list[range]) -> torch.Tensor:
    tiles = over.mask.tiles(queries, [range(over.keys.length)], over.bias)
    out: torch.Tensor = Local.apply(q, k, v, over.table, over.bias, over.mask, tiles, over.scale)
    return out


def ring(comm: Comm, over: Over, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str) -> torch.Tensor:
    out: torch.Tensor = _Ring.apply(q, k, v, over.table, comm, over, name)
    return out


METHODS = {"allgather": allgather, "ulysses": ulysses, "ring": ring}


class _Gathered(torch.autograd.Function):  # type: ignore[misc]
    """[B, M, s, H] -> [B, M, S, H], keys and values in one call; each position's gradients are summed where it lies."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, comm: Comm, cut: Positions, name: str) -> Any:
        ctx.rest = comm, cut, name, k.shape[-1]
        packed = torch.cat([k, v], -1).permute(2, 0, 1, 3).contiguous()
        whole = comm.side_by_side(packed, name, cut.sizes, 0)
        if cut.back is not None:
            whole = whole[cut.back]
        whole = whole.permute(1, 2, 0, 3)
        return whole[..., : k.shape[-1]].contiguous(), whole[..., k.shape[-1] :].contiguous()

    @staticmethod
    def backward(ctx: Any, dk: torch.Tensor, dv: torch.Tensor) -> Any:
        comm, cut, name, width = ctx.rest
        packed = torch.cat([dk, dv], -1)
        parts = [packed[:, :, of].reshape(-1) for of in cut.of_rank]
        each = [part.numel() for part in parts]
        got = comm.exchange(parts, [each] * comm.size, f"grad {name}")
        total = got[0].clone()
        for part in got[1:]:
            total += part
        total = total.view(*packed.shape[:2], -1, packed.shape[-1])
        return total[..., :width], total[..., width:], None, None, None


def _to_heads(
    comm: Comm, cut: Positions, tensors: Tensors, heads: Sequence[Sequence[range]], name: str
) -> list[torch.Tensor]:
    """Each [B, all heads, s, H] -> [B, own heads, S, H]. heads[i][r]: those of tensor i that rank r works on."""
    batch, rank = tensors[0].shape[0], comm.rank
    widths = [batch * x.shape[-1] for x in tensors]
    parts = [
        torch.cat([x[:, of[r].start : of[r].stop].reshape(-1) for x, of in zip(tensors, heads, strict=True)])
        for r in range(comm.size)
    ]
    each = [sum(width * len(of[r]) for width, of in zip(widths, heads, strict=True)) for r in range(comm.size)]
    got = comm.exchange(parts, [[size * n for n in each] for size in cut.sizes], name)
    whole = []
    for x, of in zip(tensors, heads, strict=True):
        whole.append(x.new_empty((batch, len(of[rank]), cut.length, x.shape[-1])))
    for r, flat in enumerate(got):
        places = [(batch, len(of[rank]), cut.sizes[r], x.shape[-1]) for x, of in zip(tensors, heads, strict=True)]
        for into, piece in zip(whole, _unpacked(flat, places), strict=True):
            into[:, :, cut.of_rank[r]] = piece
    return whole


def _to_tokens(
    comm: Comm, cut: Positions, tensors: Tensors, heads: Sequence[Sequence[range]], totals: list[int], name: str
) -> list[torch.Tensor]:
    """Each [B, own heads, S, H] -> [B, all heads, s, H]; what several ranks have of a head is summed, in rank order."""
    batch, rank = tensors[0].shape[0], comm.rank
    parts = [torch.cat([x[:, :, of].reshape(-1) for x in tensors]) for of in cut.of_rank]
    widths = [batch * x.shape[-1] for x in tensors]
    sizes = [
        [sum(width * len(of[r]) for width, of in zip(widths, heads, strict=True)) * s for s in cut.sizes]
        for r in range(comm.size)
    ]
    got = comm.exchange(parts, sizes, name)
    mine = cut.sizes[rank]
    whole = [x.new_zeros((batch, total, mine, x.shape[-1])) for x, total in zip(tensors, totals, strict=True)]
    for r, flat in enumerate(got):
        places = [(batch, len(of[r]), mine, x.shape[-1]) for x, of in zip(tensors, heads, strict=True)]
        for into, piece, of in zip(whole, _unpacked(flat, places), heads, strict=True):
            into[:, of[r].start : of[r].stop] += piece
    return whole


def _unpacked(flat: torch.Tensor, shapes: list[tuple[int, int, int, int]]) -> list[torch.Tensor]:
    sizes = [a * b * c * d for a, b, c, d in shapes]
    return [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]


class _Heads(torch.autograd.Function):  # type: ignore[misc]
    """All heads of own positions -> all positions of own heads; one exchange each way."""

    @staticmethod
    def forward(ctx: Any, comm: Comm, cut: Positions, heads: Any, name: str, *tensors: torch.Tensor) -> Any:
        ctx.rest = comm, cut, heads, [x.shape[1] for x in tensors], name
        return tuple(_to_heads(comm, cut, tensors, heads, name))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        comm, cut, heads, totals, name = ctx.rest
        return (None, None, None, None, *_to_tokens(comm, cut, grads, heads, totals, f"grad {name}"))


class _Tokens(torch.autograd.Function):  # type: ignore[misc]
    """All positions of own heads -> all heads of own positions."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, comm: Comm, cut: Positions, heads: Any, name: str) -> torch.Tensor:
        ctx.rest = comm, cut, heads, name
        return _to_tokens(comm, cut, (out,), (heads,), [sum(map(len, heads))], f"{name} out")[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        comm, cut, heads, name = ctx.rest
        return _to_heads(comm, cut, (grad,), (heads,), f"grad {name} out")[0], None, None, None, None


class _Ring(torch.autograd.Function):  # type: ignore[misc]
    """Keys and values go round; backward they go round again, with the sums of their gradients, which end at home."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: Any, comm: Comm, over: Over, name: str
    ) -> torch.Tensor:
        sums = Attended(q, v.shape[-1])
        at = k, v
        for step in range(comm.size):
            source = (comm.rank - step) % comm.size
            tiles = over.mask.tiles(over.cut.runs[comm.rank], over.keys.runs[source], over.bias)
            sums.add(q, *at, over.mask, tiles, over.scale, over.bias)
            if step < comm.size - 1:
                at = _passed_on(comm, over.keys, at, source, name)
        out, lse = sums.finish()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = comm, over, name
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        comm, over, name = ctx.rest
        bias = None if over.bias is None else over.bias.for_backward()
        dq, lse = torch.zeros_like(q), finite(lse)
        at: Any = (k, v, torch.zeros_like(k), torch.zeros_like(v))
        for step in range(comm.size):
            source = (comm.rank - step) % comm.size
            tiles = over.mask.tiles(over.cut.runs[comm.rank], over.keys.runs[source], bias)
            sums = dq, at[2], at[3]
            attend_backward(grad, (q, at[0], at[1]), out, lse, sums, over.mask, tiles, over.scale, bias)
            if step == comm.size - 1:
                at = at[2:]  # keys and values are not needed any more
            at = _passed_on(comm, over.keys, at, source, f"grad {name}")
        return (dq, *at, None if bias is None else bias.grad, None, None, None)


def _passed_on(comm: Comm, cut: Positions, tensors: Tensors, source: int, name: str) -> Tensors:
    """Rank `source`'s share goes to the next rank; of the one before comes the share of the rank before `source`."""
    size, rank = comm.size, comm.rank
    each = sum(x.shape[0] * x.shape[1] * x.shape[3] for x in tensors)
    empty = tensors[0].new_empty(0)
    parts = [empty] * size
    parts[(rank + 1) % size] = torch.cat([x.reshape(-1) for x in tensors])
    behind = [(source - rank + r) % size for r in range(size)]  # whose share rank r holds
    sizes = [[each * cut.sizes[behind[r]] if s == (r + 1) % size else 0 for s in range(size)] for r in range(size)]
    got = comm.exchange(parts, sizes, name, "shift")[(rank - 1) % size]
    tokens = cut.sizes[(source - 1) % size]
    return tuple(_unpacked(got, [(*x.shape[:2], tokens, x.shape[3]) for x in tensors]))
