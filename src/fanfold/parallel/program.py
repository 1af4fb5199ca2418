"""What each rank of a split model runs: it loads its share, then does what the caller asks, with all others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split
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
        expert = Comm(groups.along("expert"), comm.ledger)
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
                        expert=expert,
                    )
                    model = share.model
                    world.barrier("load")
                    groups.set_timeout(self.timeout_s)
                    channel.send(("loaded", os.getpid()))
                elif verb == "compare":
                    from fanfold.parallel.equal import compare

                    dtype = getattr(torch, values.pop("dtype"))
                    folder = values.pop("folder")
                    comms = {"context": context, "expert": expert}
                    values |= {"split": split, "world": between, **comms}
                    record = compare(folder, comm, dtype, **values)
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
                        from fanfold.parallel.microbatches import logits_or_nothing

                        model.forward = partial(logits_or_nothing, model.forward, model.config)
                    try:
                        ids = _generate(model, between, lead, self.threads, **values)
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


def _generate(
    model: Any,
    world: TensorGroup | None,
    lead: int,
    threads: int,
    *,
    input_ids: Any,
    attention_mask: Any,
    seed: int | None,
    micro_batches: int,
    options: dict[str, Any],
) -> Any:
    """Token ids [B, prompt + new]. The same on every rank: the lead's choice, or each rank's from the same logits.

    Draws depend on seed, row and position.
    """
    import torch
    from transformers import LogitsProcessorList

    from fanfold.parallel.draws import Draws, take_warpers
    from fanfold.parallel.microbatches import generate_in_turns

    draws = options.pop("do_sample", False)
    warpers = take_warpers(options) if draws else []

    def one(ids: Any, mask: Any, first_row: int = 0, last: Any = None) -> Any:
        drawn = [*warpers, Draws(seed or 0, ids.shape[1], first_row)] if draws else []
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([*drawn, *([] if last is None else [last])]),
            **options,
        )

    if world is None:
        return one(input_ids, attention_mask)
    pad = options.get("pad_token_id", model.generation_config.pad_token_id)
    end = options.get("eos_token_id", model.generation_config.eos_token_id)
    pad = (end[0] if isinstance(end, list) else end) if pad is None else pad
    return generate_in_turns(
        one,
        world,
        lead,
        micro_batches=micro_batches,
        threads=threads,
        pad=pad or 0,
        input_ids=input_ids,
        attention_mask=attention_mask,
    )
