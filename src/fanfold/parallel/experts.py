"""Mixtures of experts: a unit holds some experts (expert=N), a share of each one's inner columns (tensor=N), or both.

Every unit of the two groups has all tokens and the router, so all of them choose alike; a unit computes its experts
for the tokens that chose them, and the outputs [T, H] are summed. The sum stands for two exchanges of
uneven parts: with tokens on all units there is nothing to send there, and what comes back is added anyhow.
Shapes: T tokens, H hidden size, K experts a token, E experts, I inner columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from fanfold.parallel.experts_families import TYPES
from fanfold.parallel.mesh import shares
from fanfold.parallel.weights import Cut

if TYPE_CHECKING:
    from fanfold.parallel.comm import Comm
    from fanfold.parallel.split import Share


class Experts(nn.Module):  # type: ignore[misc]
    """hidden [T, H], chosen [T, K], weights [T, K] -> [T, H]. `load` [E]: tokens of the last call, for all experts."""

    def __init__(self, whole: Any, name: str, held: range, inner: Comm, expert: Comm) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = whole.gate_up_proj, whole.down_proj, whole.act_fn
        self.num_experts = whole.num_experts
        self.load = torch.zeros(self.num_experts, dtype=torch.long)
        self._name, self._held, self._comms = name, held, (inner, expert)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        weights = weights.to(torch.promote_types(weights.dtype, hidden.dtype))  # gradients are summed as precisely
        self.load = torch.bincount(chosen.flatten(), minlength=self.num_experts)
        for comm in self._comms:
            hidden, weights = comm.copy(hidden, self._name), comm.copy(weights, f"{self._name} weights")
        out = torch.zeros_like(hidden)
        for number in self._held:
            token, place = torch.where(chosen == number)
            if len(token):
                local = number - self._held.start
                gate, up = F.linear(hidden[token], self.gate_up_proj[local]).chunk(2, dim=-1)
                found = F.linear(self.act_fn(gate) * up, self.down_proj[local]) * weights[token, place, None]
                out = out.index_add(0, token, found.to(out.dtype))
        if torch.is_grad_enabled() and not out.requires_grad:
            # nobody chose this unit: it still takes part backward, with gradients that are zero
            of_all = hidden[:1].sum() + weights.sum() + self.gate_up_proj[0, 0, 0] + self.down_proj[0, 0, 0]
            out = out + 0 * of_all.to(out.dtype)
        for comm in self._comms:
            out = comm.reduce(out, self._name)
        return out


def cut_experts(share: Share, inner: Comm, expert: Comm) -> None:
    """Replace every module of experts by the unit's share of it."""
    if inner.size == expert.size == 1 or share.model.config.model_type not in TYPES:
        return
    for name, module in list(share.model.named_modules()):
        if getattr(module, "gate_up_proj", None) is None or not hasattr(module, "num_experts"):
            continue
        held = shares(module.num_experts, expert.size)[expert.rank]
        width = module.down_proj.shape[2]
        mine = list(shares(width, inner.size)[inner.rank])
        both = [*mine, *(width + i for i in mine)]
        for leaf, cut in (
            ("gate_up_proj", Cut(0, list(held), Cut(1, both))),
            ("down_proj", Cut(0, list(held), Cut(2, mine))),
        ):
            share.cuts[f"{name}.{leaf}"] = cut
            setattr(module, leaf, nn.Parameter(cut.of(getattr(module, leaf).detach())))
        share.model.set_submodule(name, Experts(module, name, held, inner, expert))


def loads_of(model: Any, context: Comm | None = None) -> dict[str, list[int]]:
    """Tokens of the last call for every expert, by layer; of all positions, where `context` units cut them."""
    found = {name: module.load for name, module in model.named_modules() if isinstance(module, Experts)}
    if context is not None and context.size > 1:
        found = {name: context.transport.all_reduce(load.double(), name).long() for name, load in found.items()}
    return {name: load.tolist() for name, load in found.items()}
