"""Completions by transformers' own `generate`, for models that continuous batching does not know.

Encoder-decoders are computed in groups of rows; other decoders one row at a time, so that no padding can tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from fanfold.tasks.decode import Agree, Completion, Prompt, Work, alone
from fanfold.tasks.sample import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fanfold.tasks.sample import Sampling

GROUP_ROWS = 16
_STRUCTURE = (  # of a checkpoint's generation config: what its outputs begin and end with
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
)


class Alone:
    """The same verbs as decode.Decoder."""

    def __init__(
        self,
        model: Any,
        *,
        eos: frozenset[int],
        sampling: Sampling,
        stops: Callable[[list[list[int]]], list[bool]] | None = None,
        agree: Agree = alone,
    ) -> None:
        self._model, self.agree = model, agree
        self._eos, self._sampling, self._stops = eos, sampling, stops
        found = model.generation_config
        self._forced_end = getattr(found, "forced_eos_token_id", None)
        settings = {name: getattr(found, name, None) for name in _STRUCTURE}
        if settings["pad_token_id"] is None:
            settings["pad_token_id"] = min(eos, default=0)
        self._config = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=sorted(eos) or None, **settings)
        model.generation_config = self._config
        self.work = Work()

    def complete(
        self, prompts: Sequence[Prompt], beat: Callable[[int], None] = lambda tokens: None
    ) -> list[Completion]:
        """All completions, in the order of `prompts`; groups are rows of falling limit."""
        order = sorted(range(len(prompts)), key=lambda i: (-prompts[i].limit, -len(prompts[i].ids), i))
        rows = GROUP_ROWS if self._model.config.is_encoder_decoder else 1
        found = [Completion() for _ in prompts]
        for start in range(0, len(order), rows):
            group = order[start : start + rows]
            for number, completion in zip(group, self._group([prompts[i] for i in group]), strict=True):
                found[number] = completion
            beat(sum(len(prompts[i].ids) for i in group))
        return found

    def _group(self, prompts: list[Prompt]) -> list[Completion]:
        width = max(len(prompt.ids) for prompt in prompts)
        pad = self._config.pad_token_id
        ids = torch.tensor([[*prompt.ids, *[pad] * (width - len(prompt.ids))] for prompt in prompts])
        mask = torch.tensor([[1] * len(prompt.ids) + [0] * (width - len(prompt.ids)) for prompt in prompts])
        steps = _Steps(self, prompts)
        with torch.inference_mode():
            self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=self._config,
                max_new_tokens=max(prompt.limit for prompt in prompts),
                logits_processor=[steps],
                stopping_criteria=[_All(steps)],
            )
        self.work.steps += steps.count
        self.work.prompt_tokens += int(mask.sum())
        self.work.completion_tokens += sum(len(found.ids) for found in steps.found)
        return steps.found


class _Steps(LogitsProcessor):  # type: ignore[misc]
    """Chooses every row's token itself, and leaves `generate` nothing else to choose."""

    def __init__(self, alone: Alone, prompts: list[Prompt]) -> None:
        self._alone, self._prompts = alone, prompts
        self.found = [Completion() for _ in prompts]
        self.live = [True] * len(prompts)
        self.count = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        owner = self._alone
        decoder_only = not owner._model.config.is_encoder_decoder
        start = [] if decoder_only else input_ids[0, :1].tolist()
        heads = [list(prompt.ids) if decoder_only else start for prompt in self._prompts]
        live = [number for number, alive in enumerate(self.live) if alive]

        def chosen() -> list[int]:
            logits = scores[live].to(device="cpu", dtype=torch.float32, copy=True)
            for place, number in enumerate(live):
                guide = self._prompts[number].guide
                if guide is not None:
                    guide.restrict(logits[place])
            return choose(
                logits,
                owner._sampling,
                seen=[heads[number] + self.found[number].ids for number in live],
                rows=[self._prompts[number].row for number in live],
                positions=[self.count] * len(live),
            )

        tokens = owner.agree(chosen)
        self.count += 1
        for number, token in zip(live, tokens, strict=True):
            self._take(number, token, heads[number])
        forced = torch.full_like(scores, -float("inf"))
        for number, completion in enumerate(self.found):
            forced[number, completion.ids[-1]] = 0.0
        return forced

    def _take(self, number: int, token: int, head: list[int]) -> None:
        owner, prompt, found = self._alone, self._prompts[number], self.found[number]
        last = len(found.ids) + 1 >= prompt.limit
        if last and owner._forced_end is not None:
            token = owner._forced_end if isinstance(owner._forced_end, int) else owner._forced_end[0]
        found.ids.append(token)
        stop = prompt.guide.accept(token) if prompt.guide is not None else False
        stop = stop or token in owner._eos
        stop = stop or (owner._stops is not None and owner._stops([head + found.ids])[0])
        if stop and not prompt.filler:
            found.reason, self.live[number] = "stop", False
        elif last:
            self.live[number] = False
        found.complete = prompt.guide is None or prompt.guide.complete


class _All(StoppingCriteria):  # type: ignore[misc]
    """Ends the group with its last row."""

    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = not any(self._steps.live)
        return torch.full((len(input_ids),), done, device=input_ids.device)
