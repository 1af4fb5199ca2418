"""What a checkpoint's head is for: its labels, what its outputs mean, and which verb fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fanfold.errors import InputError, PlanError
from fanfold.tasks.checkpoint import damaged_file, optional_json
from fanfold.tasks.pooling import num_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.tasks.checkpoint import Checkpoint

Function = Literal["softmax", "sigmoid", "none"]  # what makes scores of a head's outputs

_VERBS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "classify",
    "ForCausalLM": "generate",
    "LMHeadModel": "generate",
    "ForConditionalGeneration": "generate",
    "ForMaskedLM": "embed",
    "ForPreTraining": "embed",
    "Model": "embed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelHead:
    """A head of classification as config.json describes it. labels: by output, in order."""

    kind: Literal["sequence", "token"]
    labels: tuple[str, ...]
    function: Function
    max_length: int

    @property
    def entailment(self) -> int | None:
        """Which output of a model of inference says that the second text follows from the first."""
        return next((i for i, label in enumerate(self.labels) if label.lower().startswith("entail")), None)


def read_label_head(checkpoint: Checkpoint) -> LabelHead:
    """From config.json and the tokenizer's files, with the pipeline's defaults; PlanError for other heads."""
    config = checkpoint.config
    names = [str(name) for name in config.get("architectures") or []]
    if names and not any(_verb(name) == "classify" for name in names):
        raise _other_head(checkpoint, names)
    labels = _labels(checkpoint)
    return LabelHead(
        kind="token" if any(name.endswith("ForTokenClassification") for name in names) else "sequence",
        labels=labels,
        function=_function(config, labels),
        max_length=_max_length(checkpoint),
    )


def _verb(architecture: str) -> str | None:
    return next((verb for ending, verb in _VERBS.items() if architecture.endswith(ending)), None)


def _other_head(checkpoint: Checkpoint, names: Sequence[str]) -> PlanError:
    verb = _verb(names[0])
    return PlanError(
        f"fanfold classify --model {checkpoint.shown}",
        found=f"its head is {names[0]}",
        allowed="a head of classification (…ForSequenceClassification, …ForTokenClassification)",
        do=(f"use fanfold {verb} with it, or " if verb else "") + "choose a model that was trained to classify",
    )


def _labels(checkpoint: Checkpoint) -> tuple[str, ...]:
    config = checkpoint.config
    found = config.get("id2label")
    if isinstance(found, dict) and found:
        try:
            by_id = {int(key): str(label) for key, label in found.items()}
            return tuple(by_id[i] for i in range(len(by_id)))
        except (ValueError, KeyError):
            raise damaged_file(
                checkpoint.path / "config.json", f"id2label has the keys {', '.join(map(str, found))[:80]}"
            ) from None
    count = config.get("num_labels", 2)
    if not isinstance(count, int) or count < 1:
        raise damaged_file(checkpoint.path / "config.json", f"num_labels is {count!r}")
    return tuple(f"LABEL_{i}" for i in range(count))


def _function(config: dict[str, Any], labels: Sequence[str]) -> Function:
    """As transformers' text-classification pipeline chooses it (pipelines/text_classification.py, postprocess)."""
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    if kind == "multi_label_classification" or len(labels) == 1:
        return "sigmoid"
    return "softmax"


def reranker_function(checkpoint: Checkpoint, function: Function) -> Function:
    """What a cross-encoder's own files ask for (sentence-transformers names a module of torch), else `function`."""
    told = checkpoint.config.get("sentence_transformers")
    name = told.get("activation_fn") if isinstance(told, dict) else None
    name = name or checkpoint.config.get("sbert_ce_default_activation_function")
    if not isinstance(name, str):
        return function
    short = name.rsplit(".", 1)[-1]
    known: dict[str, Function] = {"Identity": "none", "Sigmoid": "sigmoid"}
    if short not in known:
        raise PlanError(
            f"reranking with {checkpoint.shown}",
            found=f"its config.json asks for the activation {name}",
            allowed="Identity, Sigmoid",
            do="choose another checkpoint",
        )
    return known[short]


def _max_length(checkpoint: Checkpoint) -> int:
    """The tokenizer's limit, at most the model's positions; 512 where neither is said."""
    said = (optional_json(checkpoint.path / "tokenizer_config.json") or {}).get("model_max_length")
    limits = [value for value in (said, num_positions(checkpoint)) if isinstance(value, int) and 0 < value < 10**9]
    return min(limits, default=512)


def checked_length(checkpoint: Checkpoint, head: LabelHead, asked: int | None) -> int:
    """--max-length, or the head's own; PlanError where the model has fewer positions."""
    if asked is None:
        return head.max_length
    positions = num_positions(checkpoint)
    if asked < 3 or (positions is not None and asked > positions):
        raise PlanError(
            f"--max-length {asked}",
            found=f"{checkpoint.shown} has {positions or 'unbounded'} positions",
            allowed=f"3 to {positions or 'any number of'} tokens",
            do=f"leave --max-length away to use {head.max_length}",
        )
    return asked


def same_labels(heads: Sequence[LabelHead], shown: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """For each head the order of its outputs that gives the labels of the first; InputError where they differ."""
    first = heads[0].labels
    orders = []
    for head, name in zip(heads, shown, strict=True):
        if sorted(head.labels) != sorted(first) or len(set(first)) != len(first):
            raise InputError(
                f"an ensemble of {' and '.join(shown)}",
                found=f"labels {', '.join(first)} of {shown[0]}, {', '.join(head.labels)} of {name}",
                allowed="models with the same labels, each once",
                do="leave the other model away, or set id2label in its config.json",
            )
        orders.append(tuple(head.labels.index(label) for label in first))
    return tuple(orders)
