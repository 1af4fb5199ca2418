"""The collectives of a split model, each with its counterpart for gradients. All of them are called by name.

*copy*: one tensor goes to all ranks' shares; its gradient is the sum over ranks. *reduce*: the sum over ranks; its
gradient goes to each. *gather*: shares side by side; of its gradient each rank takes its own share.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Transport(Protocol):
    """What carries tensors between ranks: in place sums and shares side by side, the same bits on every rank."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor, name: str) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor, name: str, sizes: list[int], dim: int = -1) -> torch.Tensor: ...

    def all_to_all(self, parts: list[torch.Tensor], sizes: list[list[int]], name: str) -> list[torch.Tensor]: ...


class Ledger:
    """What a rank's collectives were: calls and bytes by kind; all its groups may share one."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.skip: int | None = None  # the number of the call that does nothing: for tests of tests
        self.skipped = ""

    def begin(self, skip: int | None = None) -> None:
        """Count from nothing; call number `skip` does nothing."""
        self.calls.clear()
        self.bytes.clear()
        self.skip, self.skipped = skip, ""

    def skips(self, kind: str, num_bytes: int, name: str) -> bool:
        """Count a call; whether it is the one to skip."""
        number = self.calls.total()
        self.calls[kind] += 1
        self.bytes[kind] += num_bytes
        if number == self.skip:
            self.skipped = f"{kind} {name}"
        return number == self.skip


class Comm:
    """The ranks that share layers, or positions, with a count of what travels."""

    def __init__(self, transport: Transport, ledger: Ledger | None = None) -> None:
        self.transport = transport
        self.rank, self.size = transport.rank, transport.size
        self.ledger = ledger or Ledger()
        self._copied: tuple[torch.Tensor, int, bool, torch.Tensor] | None = None

    def copy(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x, for the shares of several layers: asked again for the same tensor, it gives the same copy."""
        if self.size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
            return x
        held = self._copied
        if held is not None and held[0] is x and held[1] == x._version:
            return held[3]
        y: torch.Tensor = _Copy.apply(x, self, name)
        self._copied = (x, x._version, True, y)
        return y

    def reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The sum over ranks."""
        self._copied = None
        if self.size == 1:
            return x
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.sum(x if x.is_contiguous() else x.contiguous(), name)
        y: torch.Tensor = _Reduce.apply(x, self, name)
        return y

    def reduce_both(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The sum over ranks, of which every rank makes something else: its gradient is summed, too."""
        return self.copy(self.reduce(x, name), name)

    def gather(self, x: torch.Tensor, name: str, sizes: list[int]) -> torch.Tensor:
        """[..., sizes[rank]] -> [..., sum(sizes)]."""
        if self.size == 1:
            return x
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.side_by_side(x, name, sizes)
        y: torch.Tensor = _Gather.apply(x, self, name, sizes)
        return y

    def sum(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """In place."""
        if self.ledger.skips("all_reduce", x.numel() * x.element_size(), name):
            return x
        return self.transport.all_reduce(x, name)

    def side_by_side(self, x: torch.Tensor, name: str, sizes: list[int], dim: int = -1) -> torch.Tensor:
        """All ranks' shares along a dimension."""
        num_bytes = x.numel() // max(1, x.shape[dim]) * sum(sizes) * x.element_size()
        if self.ledger.skips("all_gather", num_bytes, name):
            shape = list(x.shape)
            parts = []
            for rank, size in enumerate(sizes):
                shape[dim] = size
                parts.append(x if rank == self.rank else x.new_zeros(shape))
            return torch.cat(parts, dim)
        return self.transport.all_gather(x, name, sizes, dim)

    def exchange(
        self, parts: list[torch.Tensor], sizes: list[list[int]], name: str, kind: str = "all_to_all"
    ) -> list[torch.Tensor]:
        """parts[r], flat, goes to rank r; what each rank has for this one. Rank r gives sizes[r][s] numbers to s."""
        sent = sum(part.numel() for rank, part in enumerate(parts) if rank != self.rank)
        if self.ledger.skips(kind, sent * parts[0].element_size(), name):
            own = parts[self.rank]
            return [own if rank == self.rank else own.new_zeros(sizes[rank][self.rank]) for rank in range(len(parts))]
        return self.transport.all_to_all(parts, sizes, name)

    def sum_gradient(self, parameter: torch.nn.Parameter, name: str, rows: tuple[list[int], int] | None = None) -> None:
        """From now on the parameter's gradient is the sum over ranks. `rows`: which of how many it holds of a whole."""
        if self.size == 1:
            return
        hook: Callable[[torch.Tensor], torch.Tensor]
        if rows is None:

            def hook(grad: torch.Tensor) -> torch.Tensor:
                return self.sum(grad.contiguous().clone(), f"grad {name}")
        else:
            index, count = torch.tensor(rows[0]), rows[1]

            def hook(grad: torch.Tensor) -> torch.Tensor:
                whole = grad.new_zeros((count, *grad.shape[1:]))
                whole[index] = grad
                return self.sum(whole, f"grad {name}")[index]

        parameter.register_hook(hook)

    def forget(self) -> None:
        """Nothing of a forward is held."""
        self._copied = None


class _Copy(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, name: str) -> torch.Tensor:
        ctx.comm, ctx.name = comm, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.comm.sum(grad.contiguous().clone(), f"grad {ctx.name}"), None, None


class _Reduce(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, name: str) -> torch.Tensor:
        return comm.sum(x.contiguous().clone(), name)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None, None


class _Gather(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, comm: Comm, name: str, sizes: list[int]) -> torch.Tensor:
        ctx.start, ctx.count = sum(sizes[: comm.rank]), sizes[comm.rank]
        return comm.side_by_side(x, name, sizes)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad[..., ctx.start : ctx.start + ctx.count], None, None, None
