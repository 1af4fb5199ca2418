"""Completions by a model that lies on several processes: each decodes the whole piece, on its share of the model.

Prompts go in and completions come out; between them ranks exchange what their layers need, and stages the tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fanfold.parallel.mesh import Split
from fanfold.tasks.parallel_model import ParallelModel, ends_with_its_group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.parallel.program import Here
    from fanfold.parallel.split import HeadKind
    from fanfold.tasks.decode import Completion, Prompt
    from fanfold.tasks.generate import Generate


class SplitDecoder:
    """The same verb as decode.Decoder."""

    def __init__(self, task: Generate) -> None:
        folder = str(task.checkpoint.path)
        head: HeadKind = "own" if task.encodes else "causal"
        steps = not task.encodes and shares_steps(folder)
        with ends_with_its_group():
            self._model = ParallelModel(folder, task.split, dtype=task.dtype, timeout_s=60.0, head=head)
            self._model.apply(_open, task=replace(task, split=Split()), steps=steps)

    def complete(
        self, prompts: Sequence[Prompt], beat: Callable[[int], None] = lambda tokens: None
    ) -> list[Completion]:
        """All completions of the piece, in the order of `prompts`; an error of `beat` ends the group."""
        with ends_with_its_group():
            found: list[Completion] = self._model.apply(_complete, beat=beat, prompts=prompts)
        return found

    def close(self) -> None:
        """Its processes end."""
        self._model.close()


def shares_steps(folder: str) -> bool:
    """Whether sequences of different lengths can share a step: tried on a tiny, whole copy of the architecture."""
    from fanfold.parallel.split import architecture, config_of
    from fanfold.parallel.tiny import tiny_model
    from fanfold.tasks.completer import continuous

    config = config_of(folder)
    return continuous(tiny_model(config, architecture(config, head="causal"), 1))


def _open(here: Here, task: Generate, steps: bool) -> None:
    """On every rank: a decoder for its share of the model."""
    from fanfold.parallel.microbatches import logits_or_nothing
    from fanfold.parallel.ring import Tokens
    from fanfold.tasks.completer import GenerateOnUnit

    share = here.share
    unit = GenerateOnUnit(task, "cpu")
    agree = Tokens(here.world, here.lead).agree
    if here.world is not None and not steps:
        share.model.forward = partial(logits_or_nothing, share.model.forward, share.model.config)
    here.kept["unit"] = unit
    here.kept["decoder"] = unit.make_decoder(share.model, steps=steps, run=share.stage.forward, agree=agree)


def _complete(here: Here, prompts: Sequence[Prompt]) -> list[Completion]:
    guided = [replace(prompt, guide=here.kept["unit"].guide(prompt.filler)) for prompt in prompts]
    found: list[Completion] = here.kept["decoder"].complete(guided, here.beat)
    return found
