"""Embed: a text becomes one vector, as sentence-transformers' `encode` would give it.

Shapes: B rows of the batch, L padded length, H hidden size, D width of the embedding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold import extras
from fanfold.errors import InputError, InternalError, PlanError, RequestError, cause_line
from fanfold.machine.discover import discover
from fanfold.parallel.mesh import Split
from fanfold.tasks import compiled
from fanfold.tasks.checkpoint import Checkpoint, find_checkpoint, first_of, num_matmul_weights
from fanfold.tasks.chunking import Chunking, make_chunking, mean_of_parts, prepared_parts
from fanfold.tasks.layouts import layout_setting, read_layout, shown_layout
from fanfold.tasks.loading import open_model, open_tokenizer
from fanfold.tasks.parallel_model import ParallelModel, ends_with_its_group
from fanfold.tasks.pooling import Head, num_positions, read_head, weights_of
from fanfold.tasks.task import Column, ModelBatch, Prepared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np

    from fanfold.data.reading import Reading
    from fanfold.plan.numerics import Dtype, Numerics
    from fanfold.plan.plan import Unit

_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
_ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid")


_WHOLE = Split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """The task with its settings."""

    checkpoint: Checkpoint
    head: Head
    max_length: int
    prompt: str  # put before every text
    dtype: Dtype
    chunking: Chunking | None = None
    split: Split = _WHOLE

    @property
    def name(self) -> str:
        return "embed"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="embedding", kind="vector", width=self.head.width),)

    @property
    def imports(self) -> tuple[str, ...]:
        folder = self.checkpoint.model_type.replace("-", "_")
        return (
            "torch",
            "transformers",
            "transformers.models.auto.modeling_auto",
            "transformers.models.auto.tokenization_auto",
            f"transformers.models.{folder}.modeling_{folder}",
            "fanfold.tasks.embed",
        )

    @property
    def key(self) -> str:
        return repr((sorted(self.record.items()), str(self.checkpoint.path)))

    @property
    def record(self) -> dict[str, Any]:
        return {
            "task": self.name,
            "model_files": self.checkpoint.hashes,
            "commit": self.checkpoint.commit,
            "pooling": list(self.head.modes),
            "normalize": self.head.normalize,
            "max_length": self.max_length,
            "prompt": self.prompt,
            **({"chunk": self.chunking.record} if self.chunking else {}),
        }

    def reading(self, column: str) -> Reading:
        return column

    @property
    def options(self) -> dict[str, Any]:
        chunk = self.chunking.record if self.chunking else {}
        return {
            "dtype": self.dtype,
            "prefix_text": self.prompt,
            **({"chunk": chunk["tokens"], "overlap": chunk["overlap"], "merge": chunk["merge"]} if chunk else {}),
            **({} if chunk else {"max_length": self.max_length}),
            **layout_setting(self.split),
        }

    @property
    def numerics(self) -> dict[str, Any]:
        return layout_setting(self.split)

    @property
    def reference(self) -> str:
        return str(self.checkpoint.path)

    @property
    def weights_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.checkpoint.path.glob("*.safetensors"))

    @property
    def counted(self) -> tuple[str, ...]:
        return ()

    @property
    def unit_bytes(self) -> int:
        return 0

    @property
    def flops_per_token(self) -> float:
        return 2.0 * num_matmul_weights(self.checkpoint.path)

    @property
    def shown(self) -> dict[str, str]:
        normal = ", normalised" if self.head.normalize else ""
        lines = {
            "model": f"{self.checkpoint.shown} ({self.checkpoint.model_type}, {self.head.width} dimensions)",
            "pooling": "+".join(self.head.modes) + normal,
            "length": self.chunking.shown if self.chunking else f"at most {self.max_length} tokens a text",
        }
        if self.split.units > 1:
            lines["layout"] = shown_layout(self.split)
        if self.prompt:
            lines["prompt"] = repr(self.prompt)
        return lines

    def open(self, unit: Unit, numerics: Numerics) -> EmbedOnUnit:
        return EmbedOnUnit(self, unit.device, self._library(numerics) if numerics.compiled else None)

    def merge_parts(self, values: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        return {"embedding": mean_of_parts(values["embedding"], tokens, normalize=self.head.normalize)}

    def compiled_for(self, numerics: Numerics) -> bool:
        return self._library(numerics).exists()

    def compile(self, numerics: Numerics) -> None:
        """Make the library that units load where numerics.compiled, and compare it with eager on a few batches."""
        path = self._library(numerics)
        compiled.check_compiler()
        eager = EmbedOnUnit(self, "cpu", None)
        eager.load()
        new = path.with_suffix(f".{os.getpid()}.new")
        compiled.build(eager.traced(), new, max_rows=numerics.batch_tokens, max_length=self.max_length)
        _compare(eager, EmbedOnUnit(self, "cpu", new), numerics)
        new.replace(path)

    def _library(self, numerics: Numerics) -> Path:
        machine = discover()
        settings = {
            "model_files": self.checkpoint.hashes,
            "dtype": numerics.dtype,
            "threads": numerics.threads_per_unit,
            "max_rows": numerics.batch_tokens,
            "max_length": self.max_length,
            "cpu": [machine.cpu_name, machine.isa],
        }
        return compiled.library_path(settings)


def make_embed(
    *,
    model: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    prefix_text: str | None = None,
    prompt_name: str | None = None,
    layout: str | None = None,
    chunk: int | None = None,
    overlap: int | None = None,
    merge: str | None = None,
) -> Embed:
    """The task for a checkpoint, everything checked that can be checked without torch."""
    if dtype not in ("float32", "bfloat16"):
        raise PlanError(
            f"--dtype {dtype}", found="an unknown type", allowed="float32, bfloat16", do="choose one of them"
        )
    checkpoint = find_checkpoint(model, revision=revision)
    for module in ("torch", "transformers"):
        if not extras.has(module):
            extras.need(module, extra="torch", purpose=f"embedding with {checkpoint.shown}")
    head = read_head(checkpoint)
    split = read_layout(layout, [checkpoint], verb="embed", context=True)
    chunking = make_chunking(chunk, overlap, merge, context=num_positions(checkpoint), shown=checkpoint.shown)
    if chunking is not None and max_length is not None:
        raise RequestError(
            f"--max-length {max_length} with --chunk {chunk}",
            found="one cuts texts off, the other cuts them into parts",
            allowed="one of the two",
            do="leave --max-length away",
        )
    return Embed(
        checkpoint=checkpoint,
        head=head,
        split=split,
        chunking=chunking,
        max_length=chunking.tokens if chunking else _checked_length(checkpoint, head, max_length),
        prompt=_prompt(checkpoint, head, prefix_text, prompt_name),
        dtype=dtype,
    )


def _checked_length(checkpoint: Checkpoint, head: Head, asked: int | None) -> int:
    positions = num_positions(checkpoint)
    if asked is None:
        return min(head.max_length, positions) if positions else head.max_length
    if asked < 3 or (positions is not None and asked > positions):
        raise PlanError(
            f"--max-length {asked}",
            found=f"{checkpoint.shown} has {positions or 'unbounded'} positions",
            allowed=f"3 to {positions or 'any number of'} tokens",
            do=f"leave --max-length away to use {head.max_length}",
        )
    return asked


def _prompt(checkpoint: Checkpoint, head: Head, prefix_text: str | None, prompt_name: str | None) -> str:
    if prefix_text is not None and prompt_name is not None:
        raise RequestError(
            "--prefix-text with --prompt-name",
            found="both say what stands before every text",
            allowed="one of the two",
            do="leave one away",
        )
    if prefix_text is not None:
        return prefix_text
    name = prompt_name if prompt_name is not None else head.default_prompt
    if name is None:
        return ""
    if name not in head.prompts:
        raise PlanError(
            f"--prompt-name {name}",
            found=f"{checkpoint.shown} names "
            + (", ".join(head.prompts) if head.prompts else "no prompts in config_sentence_transformers.json"),
            allowed="a name from that file",
            do="use --prefix-text to give the words themselves",
        )
    return head.prompts[name]


def _compare(eager: EmbedOnUnit, other: EmbedOnUnit, numerics: Numerics) -> None:
    """PlanError where the compiled model gives other vectors than level T allows: 1e-5, in bfloat16 cosine 0.999."""
    import numpy as np

    chance = np.random.default_rng(0)
    vocabulary = first_of(eager.task.checkpoint.config, "vocab_size")
    longest = min(eager.task.max_length, numerics.batch_tokens)
    for num_rows, length in ((1, min(3, longest)), (7, min(33, longest)), (numerics.batch_tokens // longest, longest)):
        ids = [chance.integers(0, vocabulary, max(1, length - row), dtype=np.int32) for row in range(num_rows)]
        batch = ModelBatch(ids=ids, length=length)
        a = eager.compute(batch)["embedding"]
        try:
            b = other.compute(batch)["embedding"]
        except Exception as error:  # a library raises what its author thought of
            raise PlanError(
                f"--compile on with {eager.task.checkpoint.shown}",
                found=f"compiled, it fails on {num_rows} rows of {length} tokens: {cause_line(error)}",
                allowed="a library that takes every shape",
                do="leave --compile away",
            ) from error
        norms = np.linalg.norm(a, axis=1)
        if numerics.dtype == "float32":
            found, same = float((np.abs(a - b).max(axis=1) / norms).max()), 1e-5
        else:
            found, same = float(1 - ((a * b).sum(axis=1) / norms / np.linalg.norm(b, axis=1)).min()), 1e-3
        if not found <= same:  # not a number differs, too
            raise PlanError(
                f"--compile on with {eager.task.checkpoint.shown}",
                found=f"compiled, {num_rows} rows of {length} tokens differ from eager by {found:.2g}",
                allowed=f"a difference of {same:g}",
                do="leave --compile away",
            )


class EmbedOnUnit:
    """The task on one unit: tokenizer at the first use, model at `load` (from `library`, where it is compiled)."""

    def __init__(self, task: Embed, device: str, library: Path | None) -> None:
        self.task = task
        self.device = device
        self._library = library
        self._forward: Callable[[Any, Any], Any] | None = None
        self._tokenizer: Any = None
        self._model: Any = None
        self._dense: list[tuple[Any, Any]] = []
        self._prompt_tokens = 0  # left out of the pooling
        self._ends = (0, 0)  # tokens before (start, prompt) and behind every text

    # -- tokens ---------------------------------------------------------------------------------------

    def prepare(self, texts: Sequence[str], rows: Sequence[int] = ()) -> Prepared:
        """Texts -> token ids with special tokens, cut to the length limit or into parts."""
        import numpy as np

        tokenizer = self._open_tokenizer()
        prompt, limit = self.task.prompt, self.task.max_length
        texts = [prompt + text for text in texts] if prompt else list(texts)
        if self.task.chunking is not None:
            whole = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
            head, tail = self._ends
            uncut = (np.asarray(row, dtype=np.int32) for row in whole["input_ids"])
            return prepared_parts(uncut, self.task.chunking, head=head, tail=tail)
        found = tokenizer(
            texts, truncation=True, max_length=limit, return_attention_mask=False, return_token_type_ids=False
        )
        ids = [np.asarray(row, dtype=np.int32) for row in found["input_ids"]]
        full = [i for i, row in enumerate(ids) if len(row) >= limit]
        return Prepared(ids=ids, truncated=[i for i in full if self._is_cut(found, texts, i)])

    def _is_cut(self, found: Any, texts: list[str], index: int) -> bool:
        if found.is_fast:
            return bool(found.encodings[index].overflowing)
        return len(self._tokenizer(texts[index])["input_ids"]) > self.task.max_length

    def _open_tokenizer(self) -> Any:
        if self._tokenizer is None:
            tokenizer = open_tokenizer(self.task.checkpoint)
            if self.task.head.lower_case:
                _lower_case(tokenizer)
            if self.task.prompt and not self.task.head.include_prompt:
                # A closing special token belongs to the text, not to the prompt.
                tokens = tokenizer(self.task.prompt)["input_ids"]
                self._prompt_tokens = len(tokens) - (bool(tokens) and tokens[-1] in tokenizer.all_special_ids)
            if self.task.chunking is not None:
                special = tokenizer(self.task.prompt + "a", return_special_tokens_mask=True)["special_tokens_mask"]
                first, behind = special.index(0), special[::-1].index(0)
                before = len(tokenizer(self.task.prompt, add_special_tokens=False)["input_ids"])
                self._ends = (first + before, behind)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer

    def filler(self) -> np.ndarray:
        """The special tokens of an empty text; the padding token where there are none."""
        import numpy as np

        tokenizer = self._open_tokenizer()
        return np.asarray(tokenizer("")["input_ids"] or [tokenizer.pad_token_id], dtype=np.int32)

    # -- model ----------------------------------------------------------------------------------------

    def load(self) -> None:
        """The model is in memory: weights mapped from the file where its dtype is the one asked for."""
        if self._forward is not None:
            return
        import torch

        dtype = getattr(torch, self.task.dtype)
        if self.task.split.units > 1:
            forward: Callable[[Any, Any], Any] = self._over_processes
            self._model = ParallelModel(
                str(self.task.checkpoint.path), self.task.split, dtype=self.task.dtype, timeout_s=60.0, head="none"
            )
        elif self._library is not None:
            forward = compiled.load(self._library)
        else:
            self._model = self._load_model(dtype)
            forward = self._eager
        self._dense = [self._checked_dense(dense, dtype) for dense in self.task.head.dense]
        self._open_tokenizer()
        self._forward = forward  # last: what failed above fails again

    def _eager(self, ids_BL: Any, mask_BL: Any) -> Any:
        return self._model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

    def _over_processes(self, ids_BL: Any, mask_BL: Any) -> Any:
        with ends_with_its_group():
            return self._model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

    def close(self) -> None:
        """The processes of a split model end."""
        if isinstance(self._model, ParallelModel):
            self._model.close()

    def traced(self) -> Any:
        """The loaded model as a module of (ids, mask) -> hidden states, for torch.export."""
        import torch

        class Forward(torch.nn.Module):  # type: ignore[misc]
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids_BL: Any, mask_BL: Any) -> Any:
                return self.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state

        return Forward(self._model)

    def _load_model(self, dtype: Any) -> Any:
        import transformers

        checkpoint = self.task.checkpoint
        loader = getattr(transformers, _ENCODERS.get(checkpoint.model_type, "AutoModel"))
        model = open_model(loader, checkpoint, dtype=dtype, spare=lambda name: name.startswith("pooler."))
        if model.config.is_encoder_decoder:
            raise PlanError(
                f"embedding with {checkpoint.shown}",
                found=f"{checkpoint.model_type} is an encoder-decoder",
                allowed="encoders, decoders used as encoders, and the encoders of " + ", ".join(_ENCODERS),
                do="choose an embedding model",
            )
        return model.to(self.device)

    def _checked_dense(self, dense: Any, dtype: Any) -> tuple[Any, Any]:
        try:
            return self._open_dense(dense, dtype)
        except (RuntimeError, KeyError, IndexError) as error:
            raise InputError(
                f"loading {self.task.checkpoint.shown}",
                found=f"weights of {dense.folder} missing or of another shape: {cause_line(error)}",
                allowed="a checkpoint that holds every weight of its config",
                do="save or download the model again",
            ) from error

    def _open_dense(self, dense: Any, dtype: Any) -> tuple[Any, Any]:
        import torch
        from safetensors.torch import load_file

        if dense.activation not in _ACTIVATIONS:
            raise PlanError(
                f"embedding with {self.task.checkpoint.shown}",
                found=f"activation {dense.activation} in {dense.folder}",
                allowed=", ".join(_ACTIVATIONS),
                do="choose another checkpoint",
            )
        state = load_file(weights_of(self.task.checkpoint.path / dense.folder), device=self.device)
        weight = state["linear.weight"].to(dtype)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=dense.bias, device=self.device, dtype=dtype)
        linear.load_state_dict({name.removeprefix("linear."): value.to(dtype) for name, value in state.items()})
        return linear.eval(), getattr(torch.nn, dense.activation)()

    def compute(self, batch: ModelBatch) -> dict[str, Any]:
        """Rows of token ids -> {"embedding": float32 [B, D]}. Padding stands on the right."""
        import numpy as np
        import torch

        ids, length = batch.ids, batch.length
        if self._forward is None:
            self.load()
        assert self._forward is not None
        least = 1 if self._library is None else compiled.LEAST
        shape = (max(len(ids), least), max(length, least, self.task.split.context))
        ids_BL = np.full(shape, self._tokenizer.pad_token_id, dtype=np.int64)
        mask_BL = np.zeros(shape, dtype=np.int64)
        mask_BL[len(ids) :, 0] = 1  # rows that fill the batch up
        for row, tokens in enumerate(ids):
            ids_BL[row, : len(tokens)] = tokens
            mask_BL[row, : len(tokens)] = 1
        with torch.inference_mode():
            mask = torch.from_numpy(mask_BL).to(self.device)
            hidden_BLH = self._forward(torch.from_numpy(ids_BL).to(self.device), mask)
            pooled = self._pool(hidden_BLH, mask)
            for linear, activation in self._dense:
                pooled = activation(linear(pooled))
            if self.task.head.normalize:
                pooled = torch.nn.functional.normalize(pooled, p=2.0, dim=-1)
            embedding = pooled[: len(ids)].to(torch.float32).cpu().numpy()
        if embedding.shape != (len(ids), self.task.head.width):
            raise InternalError(
                f"an embedding of {self.task.head.width} dimensions a row",
                found=f"shape {embedding.shape} for {len(ids)} rows",
                allowed="what the checkpoint's files say",
                do="report this with the model's name",
            )
        return {"embedding": embedding}

    def _pool(self, hidden_BLH: Any, mask_BL: Any) -> Any:
        """[B, L, H], [B, L] -> [B, D]. The prompt's tokens are left out where the checkpoint says so."""
        import torch

        last_B = mask_BL.sum(dim=1) - 1
        if self._prompt_tokens:
            mask_BL = mask_BL.clone()
            mask_BL[:, : self._prompt_tokens] = 0
        parts = []
        for mode in self.task.head.modes:
            if mode == "mean":
                weight_BL1 = mask_BL.unsqueeze(-1).to(hidden_BLH.dtype)
                wide = torch.promote_types(hidden_BLH.dtype, torch.float32)
                total = (hidden_BLH * weight_BL1).sum(dim=1, dtype=wide)
                part = total / weight_BL1.sum(dim=1, dtype=wide).clamp(min=1e-9)
            elif mode == "max":
                part = hidden_BLH.masked_fill(mask_BL.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
            elif mode == "lasttoken":
                part = hidden_BLH[torch.arange(len(last_B), device=last_B.device), last_B.clamp(min=0)]
                part = part * mask_BL.any(dim=1).unsqueeze(-1)  # a text without a token is the zero vector
            else:  # cls: the first token that counts
                first_B = mask_BL.to(torch.int32).argmax(dim=1)
                part = hidden_BLH[torch.arange(len(first_B), device=first_B.device), first_B]
            parts.append(part.to(hidden_BLH.dtype))
        return torch.cat(parts, dim=-1)


def _lower_case(tokenizer: Any) -> None:
    """Texts are lower-cased before the tokenizer's own normalisation, as sentence-transformers does."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    present = backend.normalizer
    several = isinstance(present, normalizers.Sequence)
    steps: list[Any] = [*present] if several else [present] if present else []
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
