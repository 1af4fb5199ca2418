"""Continuous batching over one piece: a finished sequence is replaced at once by the next.

Every step feeds the model one line of tokens: the next token of each sequence that decodes, then stretches of
prompts up to STEP_TOKENS. So nothing is padded, and the weights are read once for all. Which sequences a step
holds depends on the piece alone: rows are admitted by falling token limit, as far as slots and the arena of keys
and values have room; what a row computes then is the same on any unit, after any crash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from fanfold.tasks.kv import ArenaCache, Places, Segment, Segments, active
from fanfold.tasks.prefixes import shared_prefixes
from fanfold.tasks.sample import choose

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fanfold.tasks.guide import Guide
    from fanfold.tasks.kv import Region
    from fanfold.tasks.sample import Sampling

Agree = Callable[[Callable[[], list[int]]], list[int]]


def alone(choose: Callable[[], list[int]]) -> list[int]:
    """Nobody else has to know."""
    return choose()


SLOTS = 64  # sequences at a time; more gain little, as keys and values are read for each of them alone
STEP_TOKENS = 256  # where a product with the weights reaches its full rate (docs/log.md)

Reason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row to complete: at most `limit` tokens after `ids`. `row` is what draws depend on.

    A filler is never finished before its limit, so that it takes the time of the longest row in its place.
    """

    ids: Sequence[int]
    limit: int
    row: int = 0
    filler: bool = False
    guide: Guide | None = None  # what its output must keep to


@dataclass(slots=True)
class Completion:
    """The tokens after the prompt, the one that ended it included, and why it ended."""

    ids: list[int] = field(default_factory=list)
    reason: Reason = "length"
    complete: bool = True  # False: a guide's output was cut off


@dataclass(slots=True)
class Work:
    """What was computed for a piece, in tokens through the model."""

    steps: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0  # copied instead of computed
    completion_tokens: int = 0


class TooLarge(ValueError):
    """A row needs more keys and values than the arena holds."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """A prompt, or a beginning shared by several, on its way through the model."""

    number: int  # of the row; -1: a shared beginning
    ids: list[int]  # grows by what is chosen
    prompt: int  # how many of them are the prompt
    region: Region
    done: int = 0  # tokens whose keys and values are there
    wanted: _Sequence | None = None  # the shared beginning to copy first

    @property
    def read(self) -> bool:
        return self.done >= self.prompt


def places_needed(prompt: Prompt) -> int:
    """Tokens of the arena that a row takes: the last token chosen is never fed."""
    return len(prompt.ids) + prompt.limit - 1


class Decoder:
    """A causal model loaded with kv.ATTENTION, and the arena for its keys and values.

    stops(histories) says which sequences, prompt included, now end with a stop string. Where the model lies on
    several processes, each of them decodes all: `run` computes a step, with None on a stage that has no logits, and
    `agree` makes the tokens of the one that chooses those of all.
    """

    def __init__(
        self,
        model: Any,
        *,
        kv_tokens: int,
        eos: frozenset[int],
        sampling: Sampling,
        stops: Callable[[list[list[int]]], list[bool]] | None = None,
        slots: int = SLOTS,
        step_tokens: int = STEP_TOKENS,
        run: Callable[..., Any] | None = None,
        agree: Agree = alone,
    ) -> None:
        self._model, self.agree = model, agree
        self._run = model if run is None else run
        self._device = model.device
        self.cache = ArenaCache(model.config.get_text_config(decoder=True).num_hidden_layers, kv_tokens)
        self.eos, self.sampling, self.stops = eos, sampling, stops
        self.slots, self.step_tokens = slots, max(step_tokens, slots + 1)
        self.work = Work()
        self.trace: list[tuple[int, torch.Tensor]] | None = None  # rows and their logits, where a list is set

    def complete(
        self, prompts: Sequence[Prompt], beat: Callable[[int], None] = lambda tokens: None
    ) -> list[Completion]:
        """All completions of the piece, in the order of `prompts`; `beat` is told of the tokens of each step.

        Raises TooLarge, before anything is computed, where a row alone does not fit the arena.
        """
        capacity = self.cache.places.tokens
        for prompt in prompts:
            if places_needed(prompt) > capacity:
                raise TooLarge(
                    f"{len(prompt.ids)} tokens of prompt and {prompt.limit} to come, the cache holds {capacity}"
                )
        self.cache.places = Places(capacity)
        with torch.inference_mode():
            return _Piece(self, prompts, beat).run()

    def forward(self, line: _Line, last: list[int]) -> torch.Tensor:
        """Logits float32 [len(last), V] behind the tokens of the line that `last` names."""
        self.cache.segments = Segments(line.segments)
        with active(self.cache):
            out = self._run(
                input_ids=torch.tensor([line.ids], device=self._device),
                position_ids=torch.tensor([line.positions], device=self._device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=torch.tensor(last, device=self._device),
            )
            if out is None:
                return torch.empty((len(last), 0))
            logits: torch.Tensor = out.logits[0].to(device="cpu", dtype=torch.float32, copy=True)
        return logits


class _Line:
    """The tokens of one step, and whose they are."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.taken: list[tuple[_Sequence, int]] = []

    def put(self, sequence: _Sequence, count: int) -> None:
        """The sequence's next `count` tokens."""
        done = sequence.done
        self.segments.append(Segment(first=len(self.ids), length=count, past=done, region=sequence.region))
        self.taken.append((sequence, count))
        self.ids += sequence.ids[done : done + count]
        self.positions += range(done, done + count)

    def ends(self) -> list[tuple[_Sequence, int]]:
        """The rows that get a token after this step, and where in the line their logits come from."""
        return [
            (sequence, segment.first + segment.length - 1)
            for (sequence, count), segment in zip(self.taken, self.segments, strict=True)
            if sequence.number >= 0 and sequence.done + count == len(sequence.ids)
        ]


class _Piece:
    """The state of one piece: who waits, who is read in, who decodes."""

    def __init__(self, decoder: Decoder, prompts: Sequence[Prompt], beat: Callable[[int], None]) -> None:
        self._d = decoder
        self._prompts, self._beat = prompts, beat
        self._found = [Completion() for _ in prompts]
        self._waiting = deque(sorted(range(len(prompts)), key=lambda i: (-prompts[i].limit, -len(prompts[i].ids), i)))
        self._reading: deque[_Sequence] = deque()
        self._decoding: list[_Sequence] = []
        self._prefixes, self._begins = shared_prefixes([prompt.ids for prompt in prompts])
        self._shared: dict[int, _Sequence] = {}  # prefixes in the arena
        self._users = [0] * len(self._prefixes)  # rows that may still copy each
        for number in range(len(prompts)):
            for prefix in self._chain(number):
                self._users[prefix] += 1

    def run(self) -> list[Completion]:
        while self._waiting or self._reading or self._decoding:
            self._admit()
            self._step()
        return self._found

    # -- admission --------------------------------------------------------------------------------------

    def _admit(self) -> None:
        places = self._d.cache.places
        while self._waiting and self._num_rows() < self._d.slots:
            number = self._waiting[0]
            prompt = self._prompts[number]
            wanted = self._ensure_prefix(self._begins[number])
            region = places.take(places_needed(prompt))
            if region is None and not (self._reading or self._decoding):
                # Only beginnings that nobody reads are in the way: from here on rows go without.
                for shared in self._shared.values():
                    places.give_back(shared.region)
                self._shared.clear()
                self._begins = [None] * len(self._begins)
                wanted, region = None, places.take(places_needed(prompt))
            if region is None:
                return
            self._waiting.popleft()
            ids = list(prompt.ids)
            self._reading.append(_Sequence(number, ids, len(ids), region, wanted=wanted))
            if wanted is None:
                self._leave(number)

    def _num_rows(self) -> int:
        return len(self._decoding) + sum(sequence.number >= 0 for sequence in self._reading)

    def _chain(self, number: int) -> Iterator[int]:
        """The prefixes that a row begins with, the longest first."""
        prefix = self._begins[number]
        while prefix is not None:
            yield prefix
            prefix = self._prefixes[prefix].parent

    def _ensure_prefix(self, number: int | None) -> _Sequence | None:
        """The prefix, being read or there; a shorter one or None where there is no room for it."""
        if number is None or number in self._shared:
            return None if number is None else self._shared[number]
        prefix = self._prefixes[number]
        parent = self._ensure_prefix(prefix.parent)
        places = self._d.cache.places
        region = places.take(prefix.length) if 2 * prefix.length <= places.free_tokens else None
        if region is None:
            return parent
        ids = list(self._prompts[prefix.first].ids[: prefix.length])
        self._shared[number] = _Sequence(-1, ids, len(ids), region, wanted=parent)
        self._reading.append(self._shared[number])
        return self._shared[number]

    def _leave(self, number: int) -> None:
        """The row needs its beginnings no more; what nobody needs is given back."""
        for prefix in self._chain(number):
            self._users[prefix] -= 1
            if not self._users[prefix] and prefix in self._shared:
                self._d.cache.places.give_back(self._shared.pop(prefix).region)

    # -- a step -----------------------------------------------------------------------------------------

    def _step(self) -> None:
        line = _Line()
        for sequence in self._decoding:
            line.put(sequence, 1)
        for sequence in self._reading:
            room = self._d.step_tokens - len(line.ids)
            if room <= 0:
                break
            if sequence.wanted is None or self._copy(sequence, sequence.wanted):
                line.put(sequence, min(room, sequence.prompt - sequence.done))
        ends = line.ends()
        logits = self._d.forward(line, [place for _, place in ends] or [len(line.ids) - 1])
        work = self._d.work
        work.steps += 1
        work.prompt_tokens += len(line.ids) - len(self._decoding)
        for sequence, count in line.taken:
            sequence.done += count
        self._reading = deque(sequence for sequence in self._reading if not sequence.read)
        if ends:
            self._extend([sequence for sequence, _ in ends], logits)
        self._beat(len(line.ids))

    def _copy(self, sequence: _Sequence, shared: _Sequence) -> bool:
        """The shared beginning stands in the sequence's region; False: it is not computed yet."""
        if not shared.read:
            return False
        self._d.cache.copy(shared.region, sequence.region, shared.prompt)
        self._d.work.shared_tokens += shared.prompt
        sequence.done = shared.prompt
        sequence.wanted = None
        if sequence.number >= 0:
            self._leave(sequence.number)
        return True

    def _extend(self, ready: list[_Sequence], logits: torch.Tensor) -> None:
        """Choose a token for each, and let go of those that are finished."""
        d = self._d
        if d.trace is not None:
            d.trace += [(s.number, logits[i].clone()) for i, s in enumerate(ready)]
        guides = [self._prompts[s.number].guide for s in ready]

        def chosen() -> list[int]:
            for number, guide in enumerate(guides):
                if guide is not None:
                    guide.restrict(logits[number])
            return choose(
                logits,
                d.sampling,
                seen=[s.ids for s in ready],
                rows=[self._prompts[s.number].row for s in ready],
                positions=[len(s.ids) - s.prompt for s in ready],
            )

        tokens = d.agree(chosen)
        d.work.completion_tokens += len(tokens)
        for sequence, token in zip(ready, tokens, strict=True):
            sequence.ids.append(token)
        stopped = d.stops([s.ids for s in ready]) if d.stops else [False] * len(ready)
        self._decoding = []
        for sequence, token, stop, guide in zip(ready, tokens, stopped, guides, strict=True):
            prompt = self._prompts[sequence.number]
            stop = (guide is not None and guide.accept(token)) or stop
            if not prompt.filler and (stop or token in d.eos):
                self._finish(sequence, "stop")
            elif len(sequence.ids) - sequence.prompt >= prompt.limit:
                self._finish(sequence, "length")
            else:
                self._decoding.append(sequence)

    def _finish(self, sequence: _Sequence, reason: Reason) -> None:
        guide = self._prompts[sequence.number].guide
        complete = guide is None or guide.complete
        self._found[sequence.number] = Completion(sequence.ids[sequence.prompt :], reason, complete)
        self._d.cache.places.give_back(sequence.region)
