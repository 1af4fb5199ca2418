"""Pipeline stages: consecutive layers of one model on consecutive units, by the model's own forward.

Every stage keeps the model's tree. Blocks of other stages become pass-throughs, what comes before the blocks is a stub
on all stages but the first, what comes after them on all but the last. Ids, mask and positions go to every stage; the
hidden states [B, S, H] travel from the last block of a stage to the first of the next, their gradient back.

An encoder-decoder is one line of blocks, the encoder's first. From the stage that ends the encoder on, its output
travels along with the decoder's hidden states to every further stage, and the sum of its gradients back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fanfold.parallel.stacks import holdings_of
from fanfold.parallel.stubs import pass_for, stub
from fanfold.parallel.tensors import array_of, tensor_of

if TYPE_CHECKING:
    from fanfold.parallel.shared import SharedGroup
    from fanfold.parallel.stacks import Holdings

_HIDDEN, _ENCODED = "hidden states", "encoder's output"


class Stop(Exception):
    """The stage's last block is done; nothing behind it is computed here."""


class Stage:
    """One stage's share of a model, which is changed in place. `world` carries what goes from stage to stage."""

    def __init__(self, model: Any, stage: int, stages: int, world: SharedGroup | None, width: int) -> None:
        self.model, self.stage, self.stages = model, stage, stages
        self._world, self._width = world, width
        rank = 0 if world is None else world.rank
        self._before, self._behind = rank - width, rank + width
        self._received: list[tuple[str, torch.Tensor]] = []
        self._sent: list[tuple[str, torch.Tensor]] = []
        self._encoded: torch.Tensor | None = None
        self._shared: list[tuple[str, list[int]]] = []  # parameters that several stages hold, and which

    def cut(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Stubs and pass-throughs stand where other stages compute; `shapes` of the whole tensors."""
        if self.stages == 1:
            return
        held = holdings_of(self.model, self.stages, shapes)
        mine = held.mine[self.stage]
        self._share(held)
        for number, stack in enumerate(held.stacks):
            for block in range(len(stack.blocks)):
                if block not in mine[number]:
                    makes_bias = block == 0 and self._holds(held, f"{stack.name}.0.")
                    stack.blocks[block] = pass_for(stack.blocks[block], block, makes_bias=makes_bias)
        for name, stages in held.stages.items():
            if self.stage not in stages:
                self._leave(held, *name.rpartition(".")[::2])
        self._connect(held, mine)

    def _holds(self, held: Holdings, prefix: str) -> bool:
        return any(self.stage in stages for name, stages in held.stages.items() if name.startswith(prefix))

    def _share(self, held: Holdings) -> None:
        """Remember, once for each, the parameters that other stages hold as well."""
        every = dict(self.model.named_parameters(remove_duplicate=False))
        by_tensor: dict[int, set[int]] = {}
        for name, stages in held.stages.items():
            by_tensor.setdefault(id(every[name]), set()).update(stages)
        seen: set[int] = set()
        for name, stages in held.stages.items():
            tensor = id(every[name])
            if self.stage in stages and tensor not in seen and len(by_tensor[tensor]) > 1:
                seen.add(tensor)
                self._shared.append((name, sorted(by_tensor[tensor])))

    def _leave(self, held: Holdings, module: str, leaf: str) -> None:
        """A parameter of another stage goes; where its module will be called, a stub stands there."""
        try:
            holder = self.model.get_submodule(module)
        except AttributeError:
            return  # it was in a block
        if holder._parameters.get(leaf) is None:
            return
        number = next((n for n, s in enumerate(held.stacks) if module.startswith(s.owner + ".") or not s.owner), 0)
        inside = len(held.stacks) == 1 or module.startswith(held.stacks[number].owner + ".")
        before = held.stages[f"{module}.{leaf}" if module else leaf][0] < self.stage
        if inside and before and held.mine[self.stage][number]:
            self.model.set_submodule(module, stub(holder))
        else:
            holder._parameters[leaf] = None  # never called here

    def _connect(self, held: Holdings, mine: list[range]) -> None:
        first = next(number for number, blocks in enumerate(mine) if blocks)
        last = max(number for number, blocks in enumerate(mine) if blocks)
        if len(held.stacks) == 2:
            encoder = self.model.get_submodule(held.stacks[0].owner)
            if mine[0]:
                encoder.register_forward_hook(self._end_of_encoder(send=not mine[1]))
            else:
                encoder.forward = self._receive_encoded
        if mine[first].start > 0:
            block = held.stacks[first].blocks[mine[first].start]
            block.register_forward_pre_hook(self._receive, with_kwargs=True)
        if mine[last].stop < len(held.stacks[last].blocks):
            held.stacks[last].blocks[mine[last].stop - 1].register_forward_hook(self._send)

    # -- forward ----------------------------------------------------------------------------------------

    def _receive(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = self._take(_HIDDEN)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _send(self, module: Any, args: Any, out: Any) -> None:
        if self._encoded is not None:
            self._give(_ENCODED, self._encoded)
        self._give(_HIDDEN, out[0] if isinstance(out, tuple) else out)
        raise Stop

    def _end_of_encoder(self, *, send: bool) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            self._encoded = out[0]
            if send:
                self._give(_ENCODED, out[0])
                raise Stop

        return hook

    def _receive_encoded(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        self._encoded = self._take(_ENCODED)
        return BaseModelOutput(last_hidden_state=self._encoded)

    def _take(self, name: str) -> torch.Tensor:
        assert self._world is not None
        x = tensor_of(self._world.recv(self._before, name))
        if torch.is_grad_enabled():
            x.requires_grad_()
        self._received.append((name, x))
        return x

    def _give(self, name: str, x: torch.Tensor) -> None:
        assert self._world is not None
        self._sent.append((name, x))
        self._world.send(array_of(x.detach().contiguous()), self._behind, name)

    def forward(self, **inputs: Any) -> Any:
        """The model's output on the last stage, None on the others."""
        self._received, self._sent, self._encoded = [], [], None
        try:
            return self.model(**inputs)
        except Stop:
            return None

    # -- backward ---------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor | None) -> None:
        """Gradients of this stage: from its loss on the last, else from those that come from behind."""
        if loss is not None:
            loss.backward()
        else:
            assert self._world is not None
            grads = [tensor_of(self._world.recv(self._behind, f"gradient of {name}")) for name, _ in self._sent]
            torch.autograd.backward([x for _, x in self._sent], grads)
        for name, x in self._received:
            assert x.grad is not None
            assert self._world is not None
            self._world.send(array_of(x.grad.contiguous()), self._before, f"gradient of {name}")
        self._received, self._sent, self._encoded = [], [], None
        for name, stages in self._shared:
            self._sum_shared(name, stages)

    def _sum_shared(self, name: str, stages: list[int]) -> None:
        """The gradient of a parameter that several stages hold: added up along them, the sum goes back."""
        assert self._world is not None
        parameter = self.model.get_parameter(name)
        if not parameter.requires_grad:
            return
        total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        place, at = self._world.rank % self._width, stages.index(self.stage)
        told = f"gradient on stages {stages}"
        ranks = [stage * self._width + place for stage in stages]
        if at > 0:
            total = tensor_of(self._world.recv(ranks[at - 1], told)) + total
        if at + 1 < len(ranks):
            self._world.send(array_of(total), ranks[at + 1], told)
            total = tensor_of(self._world.recv(ranks[at + 1], told))
        if at > 0:
            self._world.send(array_of(total), ranks[at - 1], told)
        parameter.grad = total
