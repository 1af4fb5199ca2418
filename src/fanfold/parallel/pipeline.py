"""Pipeline stages: consecutive layers of one model on consecutive units, by the model's own forward.

Every stage keeps the model's tree. Blocks of other stages become pass-throughs, what comes before the blocks is a stub
on all stages but the first, what comes after them on all but the last. Ids, mask and positions go to every stage; the
hidden states [B, S, H] travel from the last block of a stage to the first of the next, their gradient back.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fanfold.errors import PlanError
from fanfold.parallel.signature import returns_tuple
from fanfold.parallel.tensors import array_of, tensor_of

if TYPE_CHECKING:
    from fanfold.parallel.shared import SharedGroup

_AFTER = ("final_layer_norm", "project_out")  # OPT names them before its layers
_TIED = "tied embedding"


class Stop(Exception):
    """The stage's last block is done; nothing behind it is computed here."""


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The blocks: the longest list of modules of one class."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1
    ]
    if not lists:
        raise PlanError(
            f"pipeline stages of a {type(model).__name__}",
            found="no list of blocks of one kind",
            allowed="models of consecutive blocks",
            do="leave pipeline away",
        )
    return max(lists, key=lambda item: len(item[1]))


def cut_blocks(costs: list[float], first: float, last: float, stages: int) -> list[range]:
    """Consecutive blocks for each stage, so that the dearest stage is as cheap as can be.

    `first` and `last` are what the embedding adds to the first stage and the head to the last.
    """
    count = len(costs)
    if stages > count:
        raise PlanError(
            f"--layout pipeline={stages}",
            found=f"{count} blocks",
            allowed=f"pipeline=1 to pipeline={count}: a stage holds a block at the least",
            do=f"use pipeline={count}",
        )
    sums = np.concatenate([[0.0], np.cumsum(costs)])

    def price(start: int, stop: int, stage: int) -> float:
        return float(sums[stop] - sums[start]) + (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)

    best = {0: (0.0, [0])}  # blocks taken so far -> (dearest stage, ends)
    for stage in range(stages):
        found: dict[int, tuple[float, list[int]]] = {}
        for start, (dearest, ends) in best.items():
            for stop in range(start + 1, count - (stages - stage - 1) + 1):
                value = max(dearest, price(start, stop, stage))
                if stop not in found or value < found[stop][0]:
                    found[stop] = (value, [*ends, stop])
        best = found
    ends = best[count][1]
    return [range(start, stop) for start, stop in pairwise(ends)]


class Stage:
    """One stage's share of a model, which is changed in place. `world` carries what goes from stage to stage."""

    def __init__(self, model: Any, stage: int, stages: int, world: SharedGroup | None, width: int) -> None:
        self.model, self.stage, self.stages = model, stage, stages
        self._world, self._width = world, width
        rank = 0 if world is None else world.rank
        self._before, self._behind = rank - width, rank + width
        self.received: torch.Tensor | None = None
        self.sent: torch.Tensor | None = None
        self._tied: nn.Parameter | None = None  # held by the first and the last stage

    def cut(self) -> None:
        """Stubs and pass-throughs stand where other stages compute."""
        if self.stages == 1:
            return
        name, blocks = blocks_of(self.model)
        every = [sum(p.numel() for p in block.parameters()) for block in blocks]
        tail = _output_weights(self.model)
        mine = cut_blocks([float(cost) for cost in every], 0.0, float(tail), self.stages)[self.stage]
        first, last = self.stage == 0, self.stage == self.stages - 1
        if first or last:
            self._tied = _tied_weight(self.model)
        for number in range(len(blocks)):
            if number not in mine:
                blocks[number] = _Pass(blocks[number], number)
        before, behind = _around(self.model, name)
        if not first:
            for leaf in before:
                self.model.set_submodule(leaf, _stub(self.model.get_submodule(leaf)))
        if not last:
            for leaf in behind:
                weights = self.model.get_submodule(leaf)._parameters  # never called here
                weights.update(dict.fromkeys(weights))
        if not first:
            blocks[mine.start].register_forward_pre_hook(self._receive, with_kwargs=True)
        if not last:
            blocks[mine.stop - 1].register_forward_hook(self._send)

    def _receive(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        assert self._world is not None
        hidden = tensor_of(self._world.recv(self._before, "hidden states"))
        if torch.is_grad_enabled():
            hidden.requires_grad_()
        self.received = hidden
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _send(self, module: Any, args: Any, out: Any) -> None:
        assert self._world is not None
        self.sent = out[0] if isinstance(out, tuple) else out
        self._world.send(array_of(self.sent.detach().contiguous()), self._behind, "hidden states")
        raise Stop

    def forward(self, **inputs: Any) -> Any:
        """The model's output on the last stage, None on the others."""
        try:
            return self.model(**inputs)
        except Stop:
            return None

    def backward(self, loss: torch.Tensor | None) -> None:
        """Gradients of this stage: from its loss on the last, else from those that come from behind."""
        if loss is not None:
            loss.backward()
        else:
            assert self._world is not None
            assert self.sent is not None
            self.sent.backward(tensor_of(self._world.recv(self._behind, "gradient of hidden states")))
        if self.received is not None:
            grad = self.received.grad
            assert grad is not None
            assert self._world is not None
            self._world.send(array_of(grad.contiguous()), self._before, "gradient of hidden states")
        self.received = self.sent = None
        self._sum_tied()

    def _sum_tied(self) -> None:
        """The gradient of a tied embedding: lookups on the first stage, the head on the last, added in that order."""
        parameter = self._tied_now()
        if parameter is None or parameter.grad is None:
            return
        assert self._world is not None
        own = parameter.grad.contiguous()
        far = self._world.rank + (self.stages - 1) * self._width * (1 if self.stage == 0 else -1)
        if self.stage == 0:
            self._world.send(array_of(own), far, _TIED)
            theirs = tensor_of(self._world.recv(far, _TIED))
            parameter.grad = own + theirs
        else:
            theirs = tensor_of(self._world.recv(far, _TIED))
            self._world.send(array_of(own), far, _TIED)
            parameter.grad = theirs + own

    def _tied_now(self) -> Any:
        if self._tied is None:
            return None
        module = self.model.get_input_embeddings() if self.stage == 0 else self.model.get_output_embeddings()
        return module.weight


class _Pass(nn.Module):  # type: ignore[misc]
    """Another stage's block: hidden states go through; a cache learns how many tokens there were, and no more."""

    def __init__(self, block: Any, number: int) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type", "is_sliding", "layer_idx"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))
        self._number = number
        self._tuple = returns_tuple(type(block))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and hasattr(cache, "update"):
            nothing = hidden_states.new_zeros((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
            cache.update(nothing, nothing, self._number)
        return (hidden_states,) if self._tuple else hidden_states


class _Zeros(nn.Module):  # type: ignore[misc]
    """An embedding of another stage: the shape of its result, without its values."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding_dim, self._dtype = width, dtype

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((*ids.shape, self.embedding_dim), dtype=self._dtype)


class _Same(nn.Module):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x


def _stub(module: Any) -> Any:
    if isinstance(module, nn.Embedding) or hasattr(module, "embedding_dim"):
        return _Zeros(module.weight.shape[1], module.weight.dtype)
    return _Same()


def _around(model: Any, blocks: str) -> tuple[list[str], list[str]]:
    """The leaves with weights before and behind the blocks, in the order in which the model names them."""
    before: list[str] = []
    behind: list[str] = []
    seen = False
    for name, module in model.named_modules():
        if name == blocks:
            seen = True
        if name == blocks or name.startswith(blocks + "."):
            continue
        if any(True for _ in module.parameters(recurse=False)):
            late = seen or name.rpartition(".")[2] in _AFTER
            (behind if late else before).append(name)
    return before, behind


def _tied_weight(model: Any) -> Any:
    """The word embedding's weight where the output head has the same; None where it has not."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    embedding = model.get_input_embeddings()
    return embedding.weight if head is not None and head.weight is embedding.weight else None


def _output_weights(model: Any) -> int:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    return 0 if head is None else int(head.weight.numel())
