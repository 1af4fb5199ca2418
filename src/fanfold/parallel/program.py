"""What each rank of a split model runs: it loads its share, then does what the caller asks, with all others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanfold.parallel.mesh import Split

LEAD = 0  # the rank that answers
LOAD_S = 600.0  # within which all ranks must have read their shares


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
        from fanfold.parallel.tensors import TensorGroup

        torch.set_num_threads(self.threads)
        _quiet()
        group = TensorGroup(self.path, rank, size, max(LOAD_S, self.timeout_s))
        comm = Comm(group)
        model: Any = None
        try:
            while True:
                verb, values = channel.receive()
                if verb == "load":
                    from fanfold.parallel.split import load_share

                    share = load_share(values["folder"], comm, getattr(torch, values["dtype"]))
                    model = share.model
                    group.barrier("load")
                    group.timeout_s = self.timeout_s
                    channel.send(("loaded", os.getpid()))
                elif verb == "compare":
                    from fanfold.parallel.equal import compare

                    dtype = getattr(torch, values.pop("dtype"))
                    record = compare(values.pop("folder"), comm, dtype, **values)
                    channel.send({**record, "pid": os.getpid()})
                elif verb == "call":
                    answer = _call(model, values)
                    comm.forget()
                    if rank == LEAD:
                        channel.send(answer)
                elif verb == "generate":
                    ids = _generate(model, **values)
                    if rank == LEAD:
                        channel.send(ids)
        finally:
            group.close()


def _quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _call(model: Any, values: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        out = model(**values, return_dict=True)
    return type(out)(**{name: value for name, value in out.items() if name != "past_key_values"})


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
