"""Generate on one unit: prompts as token ids, and a piece of them through the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.errors import cause_line
from fanfold.tasks.generate import check_chat, vocabulary
from fanfold.tasks.guide import Guides
from fanfold.tasks.loading import open_model, open_tokenizer
from fanfold.tasks.prompts import BadRow
from fanfold.tasks.task import BadRows, Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from fanfold.tasks.decode import Completion
    from fanfold.tasks.generate import Generate
    from fanfold.tasks.task import ModelBatch

_CHECK_TOLERANCE = 1e-3  # of logits, as a share of their spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A row ready to be computed: the prompt's ids, the most tokens of its answer, whether the prompt was cut."""

    ids: list[int]
    limit: int
    truncated: bool = False


class GenerateOnUnit:
    """The task on one unit: tokenizer at the first use, model at `load`."""

    def __init__(self, task: Generate, device: str) -> None:
        self.task = task
        self.device = device
        self._tokenizer: Any = None
        self._decoder: Any = None
        self._guides: Guides | None = None
        self._model: Any = None

    # -- prompts ----------------------------------------------------------------------------------------

    def ask(self, row: Mapping[str, Any]) -> Asked:
        """The row's prompt in tokens. Raises BadRow."""
        task = self.task
        tokenizer = self._open_tokenizer()
        limit = self._limit(row)
        if task.prompting.is_chat(row):
            ids = self._chat_ids(task.prompting.messages(row))
        else:
            ids = list(tokenizer(task.prompting.text(row), return_attention_mask=False, verbose=False)["input_ids"])
        if not ids:
            ids = self._start(tokenizer)
        unknown = [token for token in ids if token >= self._vocabulary]
        if unknown:
            name = tokenizer.convert_ids_to_tokens(unknown[0])
            raise BadRow(
                "UnknownToken",
                f"the tokenizer makes {name!r} the token {unknown[0]}, the model knows {self._vocabulary}",
            )
        if task.context is None:
            asked = Asked(ids=ids, limit=limit)
            return asked if task.encodes else self._fitting(asked)
        truncated = len(ids) > task.context
        if task.encodes:  # prompt and answer have positions of their own
            limit = min(limit, task.context - 1)
            ids = [*ids[: task.context - 1], ids[-1]] if truncated else ids
            return Asked(ids=ids, limit=limit, truncated=truncated)
        if truncated:
            ids = self._cut(ids, max(1, task.context - limit))
        return self._fitting(Asked(ids=ids, limit=min(limit, task.context + 1 - len(ids)), truncated=truncated))

    def _fitting(self, asked: Asked) -> Asked:
        """A row that the cache can hold. Raises BadRow."""
        needed = len(asked.ids) + asked.limit - 1
        if needed > self.task.kv_tokens:
            most = f"the cache holds {self.task.kv_tokens} (--kv-memory)"
            raise BadRow("TooLarge", f"keys and values of {needed} tokens, {most}")
        return asked

    def _limit(self, row: Mapping[str, Any]) -> int:
        task = self.task
        own = task.prompting.limit(row)
        return task.new_tokens if own is None else own

    def _chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        if not self._tokenizer.chat_template:
            check_chat(self.task.checkpoint)
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates raise what their authors thought of
            raise BadRow("BadMessages", f"the chat template refuses them: {cause_line(error)}") from error
        return list(ids)

    def _start(self, tokenizer: Any) -> list[int]:
        """What an empty prompt stands for: the token that texts begin with."""
        start = tokenizer.bos_token_id
        if start is None:
            start = self.task.checkpoint.config.get("bos_token_id")
        if not isinstance(start, int):
            raise BadRow("EmptyPrompt", "the prompt has no token, and the model none that texts begin with")
        return [start]

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The last tokens of a prompt that is too long; the token that texts begin with stays in front."""
        if length > 1 and ids[0] == self._tokenizer.bos_token_id:
            return [ids[0], *ids[1 - length :]]
        return ids[-length:]

    @property
    def _vocabulary(self) -> int:
        return vocabulary(self.task.checkpoint.config)

    def _open_tokenizer(self) -> Any:
        if self._tokenizer is None:
            import transformers

            transformers.utils.logging.set_verbosity_error()
            self._tokenizer = open_tokenizer(self.task.checkpoint)
        return self._tokenizer

    def prepare(self, texts: Sequence[str], rows: Sequence[int]) -> Prepared:
        """Rows as JSON objects -> prompts as token ids."""
        import numpy as np

        ids: list[np.ndarray] = []
        more: list[tuple[int, ...]] = []
        costs, truncated = [], []
        failed: dict[int, tuple[str, str]] = {}
        for place, (text, row) in enumerate(zip(texts, rows, strict=True)):
            try:
                asked = self.ask(json.loads(text))
            except BadRow as error:
                failed[place] = (error.error, str(error))
                asked = Asked(ids=[], limit=1)
            ids.append(np.asarray(asked.ids, dtype=np.int32))
            more.append((len(asked.ids), asked.limit, row))
            costs.append(len(asked.ids) + asked.limit)
            if asked.truncated:
                truncated.append(place)
        return Prepared(ids=ids, truncated=truncated, failures=failed, more=more, costs=costs)

    def filler(self) -> np.ndarray:
        """One harmless token."""
        import numpy as np

        return np.asarray([min(5, self._vocabulary - 1)], dtype=np.int32)

    # -- the model --------------------------------------------------------------------------------------

    def load(self) -> None:
        """The model stands in memory; twice is fine."""
        if self._decoder is None:
            self._open_tokenizer()
            if self.task.split.units > 1:
                from fanfold.tasks.split_decode import SplitDecoder

                self._decoder = SplitDecoder(self.task)
            else:
                self._model = self._load_model()
                self._decoder = self.make_decoder(self._model, steps=continuous(self._model))

    def close(self) -> None:
        """The processes of a split model end."""
        if self._decoder is not None and hasattr(self._decoder, "close"):
            self._decoder.close()

    def _load_model(self) -> Any:
        import torch
        import transformers

        from fanfold.tasks.products import quicken

        task = self.task
        loader = transformers.AutoModelForSeq2SeqLM if task.encodes else transformers.AutoModelForCausalLM
        dtype = torch.float32 if task.dtype == "float32" else torch.bfloat16
        return quicken(open_model(loader, task.checkpoint, dtype=dtype).to(self.device))

    def make_decoder(self, model: Any, *, steps: bool, run: Any = None, agree: Any = None) -> Any:
        """What completes prompts with this model; `steps`: whether sequences may share a step. Else as of Decoder."""
        from fanfold.tasks.alone import Alone
        from fanfold.tasks.decode import Decoder
        from fanfold.tasks.kv import ATTENTION
        from fanfold.tasks.stops import StopStrings

        task = self.task
        self._open_tokenizer()
        eos = end_tokens(model)
        settings: dict[str, Any] = {
            "eos": eos,
            "sampling": task.sampling,
            "stops": StopStrings(self._tokenizer, task.stop) if task.stop else None,
            **({} if agree is None else {"agree": agree}),
        }
        if task.schema is not None:
            self._guides = Guides(self._tokenizer, task.schema, vocabulary=self._vocabulary, eos=eos)
        if steps:
            model.set_attn_implementation(ATTENTION)
            return Decoder(model, kv_tokens=task.kv_tokens, run=run, **settings)
        return Alone(model, **settings)

    def compute(self, batch: ModelBatch) -> dict[str, Any]:
        """A piece of prompts -> the result columns. Raises BadRows for rows whose output is no whole one."""
        import numpy as np

        asked = []
        for place, (ids, (num_tokens, limit, _)) in enumerate(zip(batch.ids, batch.more, strict=True)):
            own = np.resize(ids, num_tokens) if place in batch.left_out else ids
            asked.append(Asked(ids=own.tolist(), limit=limit))
        rows = [row for _, _, row in batch.more]
        found = self.complete(asked, rows, batch.left_out, lambda tokens: batch.alive())
        values = [self._values(one.ids, completion) for one, completion in zip(asked, found, strict=True)]
        results = {column.name: [value[column.name] for value in values] for column in self.task.columns}
        failed = {
            place: ("IncompleteJson", f"{one.limit} tokens hold no whole JSON that the schema allows")
            for place, (one, completion) in enumerate(zip(asked, found, strict=True))
            if not completion.complete
        }
        if failed:
            raise BadRows(failed, results)
        return results

    def complete(
        self,
        asked: Sequence[Asked],
        rows: Sequence[int],
        fillers: frozenset[int] = frozenset(),
        beat: Callable[[int], None] = lambda tokens: None,
    ) -> list[Completion]:
        """One piece: prompts and the rows that draws depend on. `fillers` are places computed for nobody."""
        from fanfold.tasks.decode import Prompt

        self.load()
        prompts = [
            Prompt(ids=one.ids, limit=one.limit, row=row, filler=place in fillers, guide=self.guide(place in fillers))
            for place, (one, row) in enumerate(zip(asked, rows, strict=True))
        ]
        try:
            found: list[Completion] = self._decoder.complete(prompts, beat)
        except BaseException:
            if self.task.split.units > 1:
                self._decoder = None  # the group ends with what it was doing
            raise
        return found

    def guide(self, is_filler: bool) -> Any:
        return None if self._guides is None or is_filler else self._guides.new()

    def _values(self, prompt: Sequence[int], completion: Completion) -> dict[str, Any]:
        ids = [*prompt, *completion.ids] if self.task.full_text else completion.ids
        return {
            "generated_text": self._tokenizer.decode(ids, skip_special_tokens=True),
            "finish_reason": completion.reason,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(completion.ids),
        }


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end an answer, as the checkpoint's generation config (or its config) says."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)


def continuous(model: Any) -> bool:
    """Whether sequences of different lengths can share a step: known families, checked on a few tokens."""
    import torch

    from fanfold.tasks.decode import Decoder, Prompt
    from fanfold.tasks.kv import ATTENTION
    from fanfold.tasks.sample import Sampling

    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if model.config.is_encoder_decoder or not getattr(type(model), "_supports_attention_backend", False):
        return False
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(one.get("rope_type") in ("dynamic", "longrope") for one in ropes):
        return False  # their angles depend on the longest sequence of the step
    usual = model.config._attn_implementation
    lines = [[1 + (7 * i + 3 * n) % min(50, config.vocab_size - 1) for i in range(n)] for n in (6, 3)]
    try:
        model.set_attn_implementation(ATTENTION)
        decoder = Decoder(model, kv_tokens=16, eos=frozenset(), sampling=Sampling(), slots=2, step_tokens=4)
        decoder.trace = []
        found = decoder.complete([Prompt(ids=line, limit=2) for line in lines])
    except Exception:  # what a family does not know may fail in any way
        return False
    finally:
        model.set_attn_implementation(usual)
    for number, line in enumerate(lines):
        with torch.inference_mode():
            whole = torch.tensor([line + found[number].ids[:1]], device=model.device)
            wanted = model(input_ids=whole).logits[0, -2:].float().cpu()
        seen = torch.stack([logits for row, logits in decoder.trace if row == number])
        if not float((wanted - seen).abs().max()) <= _CHECK_TOLERANCE * max(1.0, float(wanted.std())):
            return False
    return True
