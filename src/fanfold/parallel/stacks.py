"""Which stage holds what of a model: its blocks in one stack, or in an encoder's and then a decoder's.

Weights before a stack's blocks live with its first block, those behind with its last; weights outside of all stacks
(the output head) with the last block of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from fanfold.errors import PlanError

_AFTER = ("final_layer_norm", "project_out")  # OPT names them before its layers
_BEFORE = ("layernorm_embedding",)  # BART names it behind
BIAS = "layer.0.SelfAttention.relative_attention_bias"  # of T5: in a stack's first block, for all of its blocks


@dataclass(frozen=True, slots=True)
class Stack:
    """Consecutive blocks: the list's name, and the name of the module around it ("" is the model)."""

    name: str
    owner: str
    blocks: nn.ModuleList


@dataclass(slots=True)
class Holdings:
    """For every stage, which of all blocks are its own; for every parameter's name, the stages that hold it."""

    stacks: list[Stack]
    mine: list[list[range]]  # [stage][stack], as numbers within the stack
    stages: dict[str, list[int]] = field(default_factory=dict)

    def of_stack(self, number: int) -> list[int]:
        """The stages that hold blocks of a stack."""
        return [stage for stage, ranges in enumerate(self.mine) if len(ranges[number])]


def stacks_of(model: Any) -> list[Stack]:
    """An encoder's and a decoder's blocks, or the longest list of modules of one class."""
    lists = [
        Stack(name, name.rpartition(".")[0], module)
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
    if getattr(model.config, "is_encoder_decoder", False):
        sides = [[one for one in lists if one.owner.rpartition(".")[2] == side] for side in ("encoder", "decoder")]
        if all(sides):
            return [max(side, key=lambda one: len(one.blocks)) for side in sides]
    return [max(lists, key=lambda item: len(item.blocks))]


def behind(model: Any) -> set[str]:
    """Names of the parameters behind the last stack's blocks: norms, poolers, output heads."""
    last = stacks_of(model)[-1]
    seen = False
    found = set()
    for name, module in model.named_modules():
        seen = seen or name == last.name
        inside, leaf = module is last.blocks or name.startswith(f"{last.name}."), name.rpartition(".")[2]
        if not inside and _is_late(leaf, seen) and (seen or name.startswith(f"{last.owner}.")):
            found |= {f"{name}.{one}" for one, _ in module.named_parameters(recurse=False)}
    return found


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


def holdings_of(model: Any, stages: int, shapes: dict[str, tuple[int, ...]] | None = None) -> Holdings:
    """The same on every rank: a function of the model's tree and its `shapes`, those of whole tensors.

    A rank's own sizes would not do: shares are uneven, and ranks of one stage must hold the same blocks.
    """
    stacks = stacks_of(model)
    shapes = shapes or {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    costs = [
        float(sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(f"{stack.name}.{number}.")))
        for stack in stacks
        for number in range(len(stack.blocks))
    ]
    ranges = cut_blocks(costs, 0.0, float(_output_weights(model, shapes)), stages)
    starts = np.cumsum([0, *(len(stack.blocks) for stack in stacks)]).tolist()
    mine = [
        [
            range(min(max(one.start - start, 0), stop - start), max(0, min(one.stop, stop) - start))
            for start, stop in pairwise(starts)
        ]
        for one in ranges
    ]
    found = Holdings(stacks, [[part if len(part) else range(0) for part in parts] for parts in mine])
    _place(model, found)
    return found


def _place(model: Any, found: Holdings) -> None:
    """Fill `stages`. What lies in front of all stacks and is nowhere used itself (T5's `shared`) goes with its tie."""
    alone: list[str] = []
    seen = -1  # the last stack whose list has come
    for name, module in model.named_modules():
        here = next((n for n, stack in enumerate(found.stacks) if stack.name == name), None)
        seen = seen if here is None else here
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter is not None:
                full = f"{name}.{leaf}" if name else leaf
                stages = _stages_of(found, name, seen)
                found.stages[full] = stages
                if not stages:
                    alone.append(full)
    by_tensor: dict[int, set[int]] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, stages in found.stages.items():
        by_tensor.setdefault(id(every[name]), set()).update(stages)
    for name in alone:
        found.stages[name] = sorted(by_tensor[id(every[name])])


def _stages_of(found: Holdings, module: str, seen: int) -> list[int]:
    several = len(found.stacks) > 1
    for number, stack in enumerate(found.stacks):
        holding = found.of_stack(number)
        if module.startswith(stack.name + "."):
            block, _, rest = module[len(stack.name) + 1 :].partition(".")
            if block == "0" and rest == BIAS and not _every_block_has_it(stack):
                return holding
            return [next(stage for stage in holding if int(block) in found.mine[stage][number])]
        if not several or module.startswith(stack.owner + "."):
            leaf = module.rpartition(".")[2]
            return [holding[-1] if _is_late(leaf, seen >= number) else holding[0]]
    return [len(found.mine) - 1] if seen >= 0 else []


def _is_late(leaf: str, seen: bool) -> bool:
    """Whether a module outside of the blocks works behind them. seen: it is named behind them."""
    return (seen or leaf in _AFTER) and leaf not in _BEFORE


def _every_block_has_it(stack: Stack) -> bool:
    return len(stack.blocks) > 1 and any(name == BIAS for name, _ in stack.blocks[1].named_modules())


def _output_weights(model: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return 0
    name = next((name for name, module in model.named_modules() if module is head), None)
    return 0 if head is None else math.prod(shapes[f"{name}.weight"])
