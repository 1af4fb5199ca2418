"""What the sentence-transformers files of a checkpoint say: pooling, projections, normalisation, prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fanfold.errors import InputError, PlanError, SafetyError
from fanfold.tasks.checkpoint import check_safetensors, damaged_file, first_of, optional_json

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.tasks.checkpoint import Checkpoint

MODES = ("cls", "max", "mean", "lasttoken")
_LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_LENGTH_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet", "transformer")
)
# Families whose position ids start behind the padding id: they have that many positions fewer.
_OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "longformer",
    "data2vec-text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A projection behind the pooling: out = activation(W x + b)."""

    folder: str
    out_features: int
    bias: bool
    activation: str  # the class name in torch.nn, e.g. Tanh


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Everything between the encoder's hidden states and the embedding."""

    modes: tuple[str, ...]
    include_prompt: bool
    dense: tuple[Dense, ...]
    normalize: bool
    width: int
    max_length: int
    lower_case: bool
    prompts: dict[str, str] = field(hash=False)
    default_prompt: str | None = None


def read_head(checkpoint: Checkpoint) -> Head:
    """As `_read_head`; InputError where one of the files holds something else than its format says."""
    try:
        head = _read_head(checkpoint)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"model {checkpoint.shown}",
            found=f"its sentence-transformers files cannot be read: {type(error).__name__}: {error}",
            allowed="modules.json and module folders as sentence-transformers writes them",
            do="save or download the model again",
        ) from None
    for dense in head.dense:
        _check_module(checkpoint, dense.folder)
    return head


def _check_module(checkpoint: Checkpoint, folder: str) -> None:
    """A module's weights are there, sound and no pickle."""
    path = weights_of(checkpoint.path / folder)
    if path.exists():
        check_safetensors(path)
    elif (path.parent / "pytorch_model.bin").exists():
        raise SafetyError(
            f"model {checkpoint.shown}",
            found=f"the weights of {folder} are pickled: loading them could run any code",
            allowed="weights in safetensors files",
            do="convert them once where you trust them, with sentence-transformers' save",
        )
    else:
        raise InputError(
            f"model {checkpoint.shown}",
            found=f"no weights in {path.parent}",
            allowed="a complete model folder",
            do="save or download the model again",
        )


def _read_head(checkpoint: Checkpoint) -> Head:
    """From modules.json and its neighbours; mean pooling, not normalised, where there are none.

    Same reading as sentence-transformers 5 and 6 (its two formats of 1_Pooling/config.json).
    """
    path = checkpoint.path
    hidden = first_of(checkpoint.config, "hidden_size", "d_model", "dim", "n_embd")
    names = checkpoint.config.get("architectures") or [""]
    decoder = str(names[0]).endswith("ForCausalLM")
    modes: tuple[str, ...] = ("lasttoken",) if decoder else ("mean",)
    include_prompt, normalize, lower_case = True, False, False
    dense: list[Dense] = []
    max_length: int | None = None
    for module in optional_json(path / "modules.json", list) or []:
        named = str(module.get("type", ""))
        kind = named.rsplit(".", 1)[-1]
        folder = str(module.get("path", ""))
        if not named.startswith("sentence_transformers."):
            raise SafetyError(
                f"model {checkpoint.shown}",
                found=f"module {named}: Python code that comes with the model",
                allowed="modules of sentence-transformers itself",
                do="choose another checkpoint",
            )
        if folder.startswith("/") or ".." in folder.split("/"):
            raise SafetyError(
                f"model {checkpoint.shown}",
                found=f"a module outside the model's folder: {folder}",
                allowed="folders inside it",
                do="choose another checkpoint",
            )
        if kind == "Transformer":
            for name in _LENGTH_FILES:
                settings = optional_json(path / folder / name) or {}
                max_length = settings.get("max_seq_length") or max_length
                lower_case = bool(settings.get("do_lower_case", lower_case))
        elif kind == "Pooling":
            settings = optional_json(path / folder / "config.json") or {}
            modes, include_prompt = _modes(settings), bool(settings.get("include_prompt", True))
        elif kind == "Dense":
            if normalize:
                _unsupported(checkpoint, "a projection behind the normalisation", "projections before it")
            if (optional_json(path / folder / "config.json") or {}).get("use_residual"):
                _unsupported(checkpoint, "a projection with a residual", "plain projections")
            dense.append(_dense(folder, path / folder / "config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Dropout":
            _unsupported(checkpoint, f"module {kind}", "Transformer, Pooling, Dense, Normalize")
    for mode in modes:
        if mode not in MODES:
            _unsupported(checkpoint, f"pooling {mode}", "pooling " + ", ".join(MODES))
    prompts_file = optional_json(path / "config_sentence_transformers.json") or {}
    if not isinstance(prompts_file.get("prompts") or {}, dict):
        raise damaged_file(path / "config_sentence_transformers.json", "prompts is not an object")
    if prompts_file.get("truncate_dim"):
        _unsupported(checkpoint, f"vectors cut to {prompts_file['truncate_dim']} values", "whole vectors")
    return Head(
        modes=modes,
        include_prompt=include_prompt,
        dense=tuple(dense),
        normalize=normalize,
        width=dense[-1].out_features if dense else hidden * len(modes),
        max_length=max_length or _model_length(checkpoint),
        lower_case=lower_case,
        prompts={str(name): str(text or "") for name, text in (prompts_file.get("prompts") or {}).items()},
        default_prompt=prompts_file.get("default_prompt_name"),
    )


def num_positions(checkpoint: Checkpoint) -> int | None:
    """How many tokens the model can take at the most; None where positions are relative and unbounded."""
    if checkpoint.model_type in ("t5", "mt5", "umt5", "longt5"):
        return None
    positions = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    if not isinstance(positions, int) or positions <= 0:
        return None
    if checkpoint.model_type in _OFFSET_POSITIONS:
        padding = checkpoint.config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    return positions


def _model_length(checkpoint: Checkpoint) -> int:
    """As sentence-transformers: the tokenizer's limit, at most the model's positions; 512 where neither is said."""
    tokenizer = optional_json(checkpoint.path / "tokenizer_config.json") or {}
    said = tokenizer.get("model_max_length")
    limits = [value for value in (said, num_positions(checkpoint)) if isinstance(value, int) and value < 10**9]
    return min(limits, default=512)


def _modes(settings: dict[str, Any]) -> tuple[str, ...]:
    named = settings.get("pooling_mode")
    if isinstance(named, str):
        return (named,)
    if named:
        return tuple(str(mode) for mode in named)
    return tuple(mode for key, mode in _LEGACY.items() if settings.get(key)) or ("mean",)


def _dense(folder: str, path: Path) -> Dense:
    settings = optional_json(path) or {}
    try:
        return Dense(
            folder=folder,
            out_features=int(settings["out_features"]),
            bias=bool(settings.get("bias", True)),
            activation=str(settings.get("activation_function", "torch.nn.Tanh")).rsplit(".", 1)[-1],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise damaged_file(path, f"no usable out_features: {error!r}") from None


def _unsupported(checkpoint: Checkpoint, found: str, allowed: str) -> None:
    raise PlanError(
        f"embedding with {checkpoint.shown}",
        found=f"its sentence-transformers files ask for {found}",
        allowed=allowed,
        do="choose another checkpoint",
    )


def weights_of(path: Path) -> Path:
    """The safetensors file of a module's folder."""
    return path / "model.safetensors"
