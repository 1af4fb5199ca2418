"""What each rank of a split model runs: it loads its share, then does what the caller asks, with all others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split
    from fanfold.parallel.pipeline import Stage
    from fanfold.parallel.split import Share
    from fanfold.parallel.tensors import TensorGroup

LOAD_S = 600.0  # within which all ranks must have read their shares


@dataclass(frozen=True, slots=True, kw_only=True)
class Here:
    """What a function finds that every rank calls at once (`apply`); the lead's result goes to the caller."""

    share: Share
    world: TensorGroup | None  # all ranks, where there are pipeline stages
    lead: int
    rank: int
    kept: dict[str, Any]  # from call to call
    channel: Any

    def beat(self, tokens: int) -> None:
        """The caller learns that work goes on."""
        if self.rank == self.lead:
            self.channel.send(Beat(tokens))


@dataclass(frozen=True, slots=True)
class Beat:
    """Not a result: so many tokens are done."""

    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """`Ranks(...)(rank, size, channel)` is the program of a group; messages are (verb, values), answers of rank 0."""

    path: str  # of the shared file
    split: Split
    threads: int = 1
    timeout_s: float = 60.0

    def __call__(self, rank: int, size: int, channel: Any) -> None:
        import torch

        from fanfold.parallel.comm import Comm
        from fanfold.parallel.groups import Groups

        torch.set_num_threads(self.threads)
        _quiet()
        split = self.split
        if split.table is not None:
            from fanfold.parallel.families import use_derived

            use_derived(split.table)
        groups = Groups(self.path, rank, split, max(LOAD_S, self.timeout_s))
        world = groups.world
        comm = Comm(groups.along("tensor"))
        context = Comm(groups.along("context"), comm.ledger)
        between = world if split.pipeline > 1 else None
        lead = (split.pipeline - 1) * split.width
        model: Any = None
        kept: dict[str, Any] = {}
        try:
            while True:
                verb, values = channel.receive()
                if verb == "load":
                    from fanfold.parallel.split import load_share

                    share = load_share(
                        values["folder"],
                        comm,
                        getattr(torch, values["dtype"]),
                        split=split,
                        world=between,
                        head=values["head"],
                        context=context,
                    )
                    model = share.model
                    world.barrier("load")
                    groups.set_timeout(self.timeout_s)
                    channel.send(("loaded", os.getpid()))
                elif verb == "compare":
                    from fanfold.parallel.equal import compare

                    dtype = getattr(torch, values.pop("dtype"))
                    folder = values.pop("folder")
                    record = compare(folder, comm, dtype, split=split, world=between, context=context, **values)
                    channel.send({**record, "pid": os.getpid()})
                elif verb == "call":
                    answer = _call(share.forward, values)
                    comm.forget()
                    if rank == lead:
                        channel.send(answer)
                elif verb == "apply":
                    here = Here(share=share, world=between, lead=lead, rank=rank, kept=kept, channel=channel)
                    found = values["function"](here, **values["values"])
                    comm.forget()
                    if rank == lead:
                        channel.send(found)
                elif verb == "generate":
                    sequence = share.sequence
                    if sequence is not None:
                        from fanfold.parallel.decoding import Decoding, cut_cache, stepping

                        decoding = Decoding(sequence.comm)
                        model.forward = stepping(model.forward, sequence, decoding)
                        values["options"]["past_key_values"] = cut_cache(decoding, model.config.num_hidden_layers)
                    elif between is not None:
                        model.forward = partial(_everywhere, model.forward, share.stage, between, lead)
                    try:
                        ids = _generate(model, **values)
                    finally:
                        model.__dict__.pop("forward", None)
                    if rank == lead:
                        channel.send(ids)
        finally:
            groups.close()


def _quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _call(forward: Any, values: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        out = forward(**values, return_dict=True)
    if out is None:
        return None
    return type(out)(**{name: value for name, value in out.items() if name != "past_key_values"})


def _everywhere(forward: Any, stage: Stage, world: TensorGroup, lead: int, *args: Any, **inputs: Any) -> Any:
    """The last position's logits on every stage, so that all of them take the same token."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from fanfold.parallel.pipeline import Stop
    from fanfold.parallel.tensors import array_of, tensor_of

    try:
        out = forward(*args, **inputs)
        logits = out.logits[:, -1:].contiguous()
    except Stop:
        ids, config = inputs["input_ids"], stage.model.config
        logits = torch_zeros((ids.shape[0], 1, config.vocab_size), stage.model.dtype)
    logits = tensor_of(world.broadcast(array_of(logits), lead, "logits"))
    return CausalLMOutputWithPast(logits=logits, past_key_values=inputs.get("past_key_values"))


def torch_zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    import torch

    return torch.zeros(shape, dtype=dtype)


def _generate(model: Any, input_ids: Any, attention_mask: Any, seed: int | None, options: dict[str, Any]) -> Any:
    """Token ids [B, prompt + new]. The same on every rank: logits are, and draws depend on seed, row and position."""
    import torch
    from transformers import LogitsProcessorList

    from fanfold.parallel.draws import Draws, take_warpers

    processors = LogitsProcessorList()
    if options.pop("do_sample", False):
        processors = LogitsProcessorList([*take_warpers(options), Draws(seed or 0, input_ids.shape[1])])
    return model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        do_sample=False,
        num_beams=1,
        logits_processor=processors,
        **options,
    )
