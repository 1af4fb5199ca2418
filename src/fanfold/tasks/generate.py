"""Generate: a row becomes the text that a language model goes on with, as transformers' `generate` would."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fanfold import extras
from fanfold.errors import PlanError, RequestError
from fanfold.parallel.mesh import Split
from fanfold.quantity import parse_bytes
from fanfold.tasks.checkpoint import Checkpoint, find_checkpoint, first_of, num_matmul_weights, optional_json
from fanfold.tasks.guide import read_schema
from fanfold.tasks.layouts import layout_setting, read_layout, shown_layout
from fanfold.tasks.prompts import Prompting
from fanfold.tasks.sample import Sampling
from fanfold.tasks.task import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.data.reading import Reading
    from fanfold.plan.numerics import Dtype, Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.completer import GenerateOnUnit
    from fanfold.tasks.voting import GenerateVote

NEW_TOKENS = 256
PIECE_TOKENS = 24_576  # of prompts and answers: about two minutes of a GPT-2 on one core
KV_BYTES = 1_500_000_000  # keys and values of all sequences of a unit
_MOST_KV_TOKENS = 65_536
_WHOLE = Split()
_HEADS = {
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForConditionalGeneration": "generate",
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "classify",
    "ForMaskedLM": "embed",
    "Model": "embed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """The task with its settings."""

    checkpoint: Checkpoint
    prompting: Prompting
    sampling: Sampling
    new_tokens: int  # the most tokens of an answer, where its row says nothing
    stop: tuple[str, ...]
    full_text: bool
    schema: str | None
    context: int | None  # tokens that the model has positions for
    kv_tokens: int  # what a unit keeps keys and values of, over all sequences
    kv_token_bytes: int
    kv_memory: str | None  # as it was asked for
    dtype: Dtype
    split: Split = _WHOLE

    @property
    def name(self) -> str:
        return "generate"

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads the prompt and a decoder writes the answer."""
        return bool(self.checkpoint.config.get("is_encoder_decoder"))

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column(name="generated_text", kind="text"),
            Column(name="finish_reason", kind="text"),
            Column(name="prompt_tokens", kind="integer"),
            Column(name="completion_tokens", kind="integer"),
        )

    def reading(self, column: str) -> Reading:
        return self.prompting.reading(column)

    @property
    def numerics(self) -> dict[str, Any]:
        return {"batch_tokens": PIECE_TOKENS, "order": "dealt", **layout_setting(self.split)}

    @property
    def counted(self) -> tuple[str, ...]:
        return ("prompt_tokens", "completion_tokens")

    @property
    def unit_bytes(self) -> int:
        return self.kv_tokens * self.kv_token_bytes

    @property
    def chunking(self) -> None:
        return None

    def merge_parts(self, values: dict[str, Any], tokens: Any) -> dict[str, Any]:
        raise NotImplementedError("prompts are not cut into parts")

    def compiled_for(self, numerics: Numerics) -> bool:
        return False

    def compile(self, numerics: Numerics) -> None:
        raise PlanError(
            "--compile on with fanfold generate",
            found="steps of ever other shapes over a cache",
            allowed="--compile on with fanfold embed",
            do="leave --compile away",
        )

    @property
    def imports(self) -> tuple[str, ...]:
        folder = self.checkpoint.model_type.replace("-", "_")
        return (
            "torch",
            "transformers",
            "transformers.generation.utils",
            "transformers.models.auto.modeling_auto",
            "transformers.models.auto.tokenization_auto",
            f"transformers.models.{folder}.modeling_{folder}",
            "fanfold.tasks.completer",
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
            "prompt": self.prompting.template,
            "chat": self.prompting.chat,
            "system": self.prompting.system,
            "new_tokens": self.new_tokens,
            "limit_column": self.prompting.limit_column,
            "sampling": self.sampling.record,
            "stop": list(self.stop),
            "full_text": self.full_text,
            "schema": self.schema,
            "kv_tokens": self.kv_tokens,
        }

    @property
    def options(self) -> dict[str, Any]:
        column = self.prompting.limit_column
        return {
            "prompt": self.prompting.template,
            "chat": self.prompting.chat,
            "system": self.prompting.system,
            "max_new_tokens": self.new_tokens if column is None else column,
            "stop": list(self.stop),
            **asdict(self.sampling),
            "full_text": self.full_text,
            "json_schema": None if self.schema is None else json.loads(self.schema),
            "kv_memory": self.kv_memory,
            "dtype": self.dtype,
            **layout_setting(self.split),
        }

    @property
    def reference(self) -> str:
        return str(self.checkpoint.path)

    @property
    def weights_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.checkpoint.path.glob("*.safetensors"))

    @property
    def flops_per_token(self) -> float:
        return 2.0 * num_matmul_weights(self.checkpoint.path)

    @property
    def shown(self) -> dict[str, str]:
        column = self.prompting.limit_column
        limit = f"{self.new_tokens}" if column is None else f"column {column}"
        lines = {
            "model": f"{self.checkpoint.shown} ({self.checkpoint.model_type})",
            "choice": self.sampling.shown,
            "length": f"at most {limit} new tokens"
            + ("" if self.context is None or self.encodes else f", {self.context} with the prompt"),
            "cache": f"keys and values of {self.kv_tokens:,} tokens a unit "
            f"({self.kv_tokens * self.kv_token_bytes / 1e6:,.0f} MB)",
        }
        if self.stop:
            lines["stop"] = ", ".join(map(repr, self.stop))
        if self.schema is not None:
            lines["output"] = "JSON that the schema allows"
        if self.split.units > 1:
            lines["layout"] = shown_layout(self.split)
        return lines

    def open(self, unit: Unit, numerics: Numerics) -> GenerateOnUnit:
        from fanfold.tasks.completer import GenerateOnUnit

        return GenerateOnUnit(self, unit.device)


def make_generate(
    *,
    model: str | Sequence[str] | None = None,
    prompt: str | None = None,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int | str | None = None,
    stop: str | Sequence[str] = (),
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    full_text: bool = False,
    json_schema: Any = None,
    merge: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "float32",
    kv_memory: str | None = None,
    layout: str | None = None,
) -> Generate | GenerateVote:
    """The task for one checkpoint, or several that vote; everything checked that can be checked without torch."""
    from fanfold.tasks.voting import GenerateVote, check_merge

    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    new_tokens, limit_column = _limit(max_new_tokens)
    prompting = Prompting(template=prompt, chat=chat, system=system, limit_column=limit_column)
    _ = prompting.names  # a template that cannot be read is refused here
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if dtype not in ("float32", "bfloat16"):
        raise PlanError(
            f"--dtype {dtype}", found="an unknown type", allowed="float32, bfloat16", do="choose one of them"
        )
    if any(not string for string in stop):
        raise RequestError(
            "--stop ''",
            found="an empty text, which every text ends with",
            allowed="one character or more",
            do="leave it away",
        )
    refs = [model] if isinstance(model, str) else list(model or ())
    if not refs:
        raise RequestError(
            "fanfold generate",
            found="no --model",
            allowed="a model folder or a Hugging Face id of a language model",
            do="add --model, for example --model Qwen/Qwen2.5-0.5B-Instruct",
        )
    check_merge(len(refs), merge)
    checkpoints = [_checked(find_checkpoint(ref, revision=revision), chat=chat) for ref in refs]
    split = read_layout(layout, checkpoints, verb="generate")
    schema = None if json_schema is None else read_schema(json_schema)
    kv_bytes = (KV_BYTES if kv_memory is None else parse_bytes(kv_memory, name="--kv-memory")) // len(refs)
    members = []
    for checkpoint in checkpoints:
        token_bytes = _kv_token_bytes(checkpoint.config, dtype)
        members.append(
            Generate(
                checkpoint=checkpoint,
                prompting=prompting,
                sampling=sampling,
                new_tokens=new_tokens,
                stop=stop,
                full_text=full_text,
                schema=schema,
                context=_context(checkpoint.config),
                kv_tokens=max(1, min(_MOST_KV_TOKENS, kv_bytes // token_bytes)),
                kv_token_bytes=token_bytes,
                kv_memory=kv_memory,
                dtype=dtype,
                split=split,
            )
        )
    return members[0] if len(members) == 1 else GenerateVote(members=tuple(members))


def _checked(checkpoint: Checkpoint, *, chat: bool) -> Checkpoint:
    """The checkpoint, of a language model that can be run here."""
    _check_head(checkpoint)
    if chat:
        check_chat(checkpoint)
    for module in ("torch", "transformers"):
        if not extras.has(module):
            extras.need(module, extra="torch", purpose=f"generating with {checkpoint.shown}")
    return checkpoint


def _limit(asked: int | str | None) -> tuple[int, str | None]:
    """--max-new-tokens as a number, or as the name of a column."""
    if asked is None:
        return NEW_TOKENS, None
    if isinstance(asked, str) and not asked.lstrip("-").isdecimal():
        return NEW_TOKENS, asked
    if int(asked) < 1:
        raise RequestError(
            f"--max-new-tokens {asked}",
            found="no token at all",
            allowed="1 or more, or a column that says it for each row",
            do="choose a number",
        )
    return int(asked), None


def _check_head(checkpoint: Checkpoint) -> None:
    """PlanError where the checkpoint's head is for another verb."""
    for architecture in checkpoint.config.get("architectures") or []:
        verb = next((verb for ending, verb in _HEADS.items() if str(architecture).endswith(ending)), None)
        if verb not in ("generate", None):
            raise PlanError(
                f"fanfold generate --model {checkpoint.shown}",
                found=f"its head is {architecture}",
                allowed="a language model (…ForCausalLM, …LMHeadModel, …ForConditionalGeneration)",
                do=f"use fanfold {verb}, or choose another model",
            )


def check_chat(checkpoint: Checkpoint) -> None:
    """PlanError where the tokenizer has no chat template."""
    path = checkpoint.path
    if any(path.glob("*.jinja")) or (path / "chat_template.json").exists():
        return
    settings = optional_json(path / "tokenizer_config.json") or {}
    if not settings.get("chat_template"):
        raise PlanError(
            f"a chat with {checkpoint.shown}",
            found="its tokenizer has no chat template: it was not made for chats",
            allowed="models with chat_template.jinja, or chat_template in tokenizer_config.json",
            do="leave --chat away and write the whole --prompt, or choose an instruct model",
        )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _number(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _context(config: dict[str, Any]) -> int | None:
    """Positions of the model; None where they have no end (relative ones of T5)."""
    if config.get("model_type") in ("t5", "mt5", "umt5", "longt5", "bloom", "mamba", "mamba2"):
        return None
    return _number(
        _text_config(config),
        "max_position_embeddings",
        "n_positions",
        "max_sequence_length",
        "seq_length",
        "max_seq_len",
    )


def _kv_token_bytes(config: dict[str, Any], dtype: Dtype) -> int:
    """Keys and values of one token, all layers."""
    text = _text_config(config)
    layers = _number(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers") or 1
    heads = _number(text, "num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads") or 1
    width = _number(text, "hidden_size", "n_embd", "d_model") or 1
    head_dim = _number(text, "head_dim", "d_kv") or max(1, width // heads)
    kv_heads = _number(text, "num_key_value_heads") or heads
    return 2 * layers * kv_heads * head_dim * (4 if dtype == "float32" else 2)


def vocabulary(config: dict[str, Any]) -> int:
    """Tokens that the model knows."""
    return first_of(_text_config(config), "vocab_size")
