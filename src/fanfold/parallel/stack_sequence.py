"""A model whose blocks work on a cut sequence, and the rest of it on whole ones: encoder-decoders and ViT.

What comes before a stack's blocks (embeddings, convolutions, patches) is computed for all positions on every unit, as
it cannot be told which positions to make; the first block gets this unit's share, and behind the last one the shares
are put side by side. A decoder gets its share of the encoder's output, too: attention to it is over another cut.
Of a model with an output head the decoder's share stays cut up to the logits, as their weights may be the embedding's.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.parallel.positions import Positions, cut_positions
from fanfold.parallel.sequence_attention import RUN, Run, called, every_position, mean_loss, use_attention
from fanfold.parallel.stacks import Stack, behind, stacks_of
from fanfold.parallel.tiles import Bias

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fanfold.parallel.comm import Comm
    from fanfold.parallel.mesh import ContextMethod

_LM = "ForConditionalGeneration"
_KEPT = ("logits", "last_hidden_state", "pooler_output", "encoder_last_hidden_state")


class StackSequence:
    """This unit's part in a model over `comm.size` units that cut its sequences. The model is changed in place."""

    def __init__(self, model: Any, comm: Comm, method: ContextMethod) -> None:
        self.model, self.comm, self.method = model, comm, method
        self._names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
        self._lm = type(model).__name__.endswith(_LM)
        self._last: Positions | None = None  # how the last stack of the forward was cut
        use_attention(model)
        stacks = stacks_of(model)
        for stack in stacks:
            self._cut(stack, stays_cut=self._lm and stack is stacks[-1])
        for module in model.modules():
            if hasattr(module, "compute_bias"):
                module.compute_bias = _bias_of(module)

    def name_of(self, module: Any) -> str:
        return self._names.get(id(module), "attention")

    def sum_gradients(self) -> None:
        """From now on: gradients of what worked on own positions only are summed over units."""
        if self.comm.size == 1:
            return
        whole = set() if self._lm else behind(self.model)
        for name, parameter in self.model.named_parameters():
            if name not in whole:
                self.comm.sum_gradient(parameter, name)

    def forward(self, call: Callable[..., Any], **inputs: Any) -> Any:
        """The whole model's output on every unit, from whole inputs."""
        labels = inputs.pop("labels", None) if self._lm else None
        if self.model.config.is_encoder_decoder:
            inputs["use_cache"] = False
        if labels is not None and inputs.get("decoder_input_ids") is None:
            inputs["decoder_input_ids"] = self._shifted(labels)
        out = call(**inputs)
        found = {name: value for name, value in out.items() if name in _KEPT}
        if self._lm:
            assert self._last is not None
            if labels is not None:
                found["loss"] = mean_loss(found["logits"], labels, self.comm, self._last)
            found["logits"] = every_position(found["logits"], self.comm, self._last, "logits")
        return type(out)(**found)

    def _shifted(self, labels: torch.Tensor) -> torch.Tensor:
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise PlanError(
                f"a {type(self.model).__name__} with context={self.comm.size}",
                found="labels without decoder_input_ids",
                allowed="both of them",
                do="pass decoder_input_ids: the labels, shifted to the right",
            )
        ids: torch.Tensor = shift(labels)
        return ids

    # -- stacks ---------------------------------------------------------------------------------------

    def _cut(self, stack: Stack, *, stays_cut: bool) -> None:
        owner = self.model.get_submodule(stack.owner)
        decodes = stack.owner.rpartition(".")[2] == "decoder"
        inner = owner.forward

        def forward(*args: Any, encoder_hidden_states: Any = None, **inputs: Any) -> Any:
            run = Run(self, sees_all=not decodes)
            if encoder_hidden_states is not None:
                run.keys = cut_positions(encoder_hidden_states.shape[1], self.comm.size, balanced=False)
                inputs["encoder_hidden_states"] = encoder_hidden_states[:, run.keys.of_rank[self.comm.rank]]
            return called(functools.partial(inner, *args), run, inputs)

        owner.forward = forward

        def enter(module: Any, args: Any) -> Any:
            run = RUN.get()
            assert run is not None
            run.cut = self._last = cut_positions(args[0].shape[1], self.comm.size, balanced=decodes)
            return (args[0][:, run.cut.of_rank[self.comm.rank]], *args[1:])

        def leave(module: Any, args: Any, out: Any) -> Any:
            run = RUN.get()
            assert run is not None
            assert run.cut is not None
            hidden, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            hidden = every_position(hidden, self.comm, run.cut, f"{stack.name} output")
            return hidden if rest is None else (hidden, *rest)

        stack.blocks[0].register_forward_pre_hook(enter)
        if not stays_cut:
            stack.blocks[-1].register_forward_hook(leave)


def _bias_of(module: Any) -> Callable[..., Bias]:
    """In place of T5's table of every query and key: what tells it of any of them."""
    settings = {
        "bidirectional": not module.is_decoder,
        "num_buckets": module.relative_attention_num_buckets,
        "max_distance": module.relative_attention_max_distance,
    }
    if "num_buckets" not in inspect.signature(module._relative_position_bucket).parameters:
        settings = {}  # UMT5's reads them itself
    bucket = functools.partial(module._relative_position_bucket, **settings)
    return lambda *lengths, **rest: Bias(module.relative_attention_bias.weight, bucket)
