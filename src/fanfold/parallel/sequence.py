"""A model whose input sequence is cut over units: by its own forward, on this unit's positions.

What works on tokens one by one sees own positions only; what needs the sequence (a pooler, a classifier, the caller)
gets the hidden states of all, put side by side. Models that cannot be given their positions: `stack_sequence.py`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from fanfold.errors import PlanError
from fanfold.parallel.positions import Positions, cut_positions
from fanfold.parallel.sequence_attention import RUN, Run, called, every_position, mean_loss, use_attention
from fanfold.parallel.sequence_families import sees_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.decoding import Decoding
    from fanfold.parallel.mesh import ContextMethod

_LM = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
_SHIFTED = ("ForCausalLM", "LMHeadModel")
_FLOAT_LOSS = ("modernbert",)
_CUT = ("input_ids", "token_type_ids", "position_ids")
_OF_GENERATE = ("logits_to_keep", "return_dict", "use_cache", "cache_position")
_WHOLE = ("attention_mask", "labels", "use_cache", "return_dict")


class Sequence:
    """This unit's part in a model over `comm.size` units that cut the sequence. The model is changed in place."""

    def __init__(self, model: Any, comm: Comm, method: ContextMethod) -> None:
        self.model, self.comm, self.method = model, comm, method
        self._base = model.base_model
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._lm = type(model).__name__.endswith(_LM)
        self._balanced = not sees_all(model.config)
        self._gathered: tuple[torch.Tensor, torch.Tensor] | None = None
        use_attention(model)
        self._pooler = getattr(self._base, "pooler", None)
        if self._pooler is not None:
            self._pooler.register_forward_pre_hook(self._whole_for_pooler)
        if not self._lm and self._base is not model:
            inner = self._base.forward
            self._base.forward = lambda *args, **inputs: self._forward(inner, _named(inner, args, inputs))

    def name_of(self, module: Any) -> str:
        return self._names.get(id(module), "attention")

    def sum_gradients(self) -> None:
        """From now on: gradients of what worked on own positions only are summed over units."""
        if self.comm.size == 1:
            return
        whole = {id(p) for p in self._pooler.parameters()} if self._pooler is not None else set()
        scope = self.model if self._lm else self._base
        for name, parameter in scope.named_parameters():
            if id(parameter) not in whole:
                self.comm.sum_gradient(parameter, name)

    def forward(self, call: Callable[..., Any], **inputs: Any) -> Any:
        """The whole model's output on every unit: inputs [B, S] of all positions in, outputs of all positions back."""
        if not self._lm and self._base is not self.model:
            return call(**inputs)  # its base model cuts
        return self._forward(call, inputs)

    def _forward(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        labels = inputs.pop("labels", None)
        out, cut = self._cut(call, inputs, None)
        return None if out is None else self._whole(out, cut, labels)

    def _cut(self, call: Callable[..., Any], inputs: dict[str, Any], cache: Any) -> tuple[Any, Positions]:
        """The output on this unit's positions, and how they were cut."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        ids = inputs.get("input_ids")
        unknown = [name for name in inputs if name not in (*_CUT, *_WHOLE) and inputs[name] is not False]
        if ids is None or unknown:
            raise PlanError(
                f"a {type(self.model).__name__} with context={self.comm.size}",
                found=f"inputs {', '.join(sorted(inputs))}",
                allowed=", ".join((*_CUT, *_WHOLE)),
                do="leave the others away, or use --layout tensor",
            )
        cut = cut_positions(ids.shape[1], self.comm.size, balanced=self._balanced)
        given_mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if given_mask is None else given_mask
        if mask.dim() != 2:
            raise PlanError(
                f"an attention mask of {mask.dim()} axes with context={self.comm.size}",
                found=f"shape {tuple(mask.shape)}",
                allowed="[rows, positions], 1 for tokens and 0 for padding",
                do="use --layout tensor for masks of your own",
            )
        whole = {**inputs, "position_ids": self._positions(inputs, ids, mask, packed=given_mask is None)}
        mine = cut.of_rank[self.comm.rank]
        own = {name: value[:, mine] if name in _CUT else value for name, value in whole.items()}
        if own["position_ids"] is None or not _takes(self._base, "position_ids"):
            raise PlanError(
                f"a {type(self.model).__name__} with context={self.comm.size}",
                found="its positions cannot be given",
                allowed="models that take position_ids",
                do="use --layout tensor",
            )
        if _takes(self._base, "use_cache"):
            own["use_cache"] = cache is not None
        more = {} if cache is None else {"past_key_values": cache}
        out = called(call, Run(self, cut), {**own, **more, "attention_mask": mask})
        return out, cut

    # -- tokens one by one ----------------------------------------------------------------------------

    def prompt(self, call: Callable[..., Any], inputs: dict[str, Any], decoding: Decoding) -> Any:
        """The last position's logits [B, 1, V] on every unit; each keeps its positions' keys and values."""
        inputs = {name: value for name, value in inputs.items() if name not in _OF_GENERATE}
        cache = inputs.pop("past_key_values")
        out, cut = self._cut(call, inputs, cache)
        decoding.prompt(cut.of_rank[self.comm.rank], cut.length)
        last = next(rank for rank, mine in enumerate(cut.runs) if mine[-1].stop == cut.length)
        every = self.comm.side_by_side(out.logits[:, -1:].contiguous(), "logits", [1] * self.comm.size, 1)
        return type(out)(logits=every[:, last : last + 1], past_key_values=cache)

    def token(self, call: Callable[..., Any], inputs: dict[str, Any], decoding: Decoding) -> Any:
        """One more token, on every unit; its attention is over the keys of all."""
        decoding.begin_token()
        inputs = {name: value for name, value in inputs.items() if value is not None}
        inputs.setdefault("position_ids", torch.full_like(inputs["input_ids"], decoding.length))
        cut = Positions([[range(decoding.length, decoding.length + 1)]] * self.comm.size)
        out = called(call, Run(self, cut, decoding=decoding), inputs)
        decoding.end_token()
        return out

    def _positions(
        self, inputs: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor, *, packed: bool
    ) -> torch.Tensor:
        """As the whole model would number its tokens, [B, S]. packed: numbers that go down would begin a sequence."""
        given: torch.Tensor | None = inputs.get("position_ids")
        if given is not None:
            if packed and bool((given.diff(dim=-1) < 0).any()):
                raise PlanError(
                    f"position_ids with context={self.comm.size}",
                    found="several sequences in one row",
                    allowed="positions that do not go down",
                    do="give every sequence a row of its own",
                )
            return given.expand(ids.shape[0], -1)
        pad = getattr(getattr(self._base, "embeddings", None), "padding_idx", None)
        if hasattr(getattr(self._base, "embeddings", None), "create_position_ids_from_input_ids"):
            real = ids.ne(pad).int()
            return (torch.cumsum(real, 1) * real).long() + pad
        if self.model.config.model_type == "opt":
            return (torch.cumsum(mask, 1) * mask - 1).long()
        return torch.arange(ids.shape[1]).expand(ids.shape[0], -1)

    # -- outputs --------------------------------------------------------------------------------------

    def _whole(self, out: Any, cut: Positions, labels: torch.Tensor | None) -> Any:
        """The output with all positions, and the loss over all of them."""
        found = {name: value for name, value in out.items() if name in ("logits", "last_hidden_state", "pooler_output")}
        if labels is not None:
            found["loss"] = self._loss(found["logits"], labels, cut)
        for name in ("logits", "last_hidden_state"):
            if name in found:
                found[name] = self.side_by_side(found[name], cut, name)
        self._gathered = None
        return type(out)(**found)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, cut: Positions) -> torch.Tensor:
        """Labels [B, S] are shifted before they are cut."""
        if type(self.model).__name__.endswith(_SHIFTED):
            labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if type(self.model).__name__.endswith(_SHIFTED) or self.model.config.model_type in _FLOAT_LOSS:
            logits = logits.float()  # as the model's own loss does
        return mean_loss(logits, labels, self.comm, cut)

    def side_by_side(self, x: torch.Tensor, cut: Positions, name: str) -> torch.Tensor:
        """[B, s, ...] -> [B, S, ...]; the same tensor is gathered once."""
        if self._gathered is not None and self._gathered[0] is x:
            return self._gathered[1]
        whole = every_position(x, self.comm, cut, name)
        self._gathered = (x, whole)
        return whole

    def _whole_for_pooler(self, module: Any, args: Any) -> Any:
        run = RUN.get()
        if run is None or run.cut is None:
            return None
        return (self.side_by_side(args[0], run.cut, "last_hidden_state"), *args[1:])


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _named(function: Any, args: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Positional inputs by name."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **inputs}
