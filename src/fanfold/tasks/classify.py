"""Classify: a text, or a pair of texts, becomes labels with scores, as transformers' pipelines would give them.

One head gives a label a text, or entities inside it; a model of inference takes labels of the user's own (zero-shot).
Several models of the same labels give one answer (an ensemble).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from fanfold import extras
from fanfold.errors import PlanError, RequestError
from fanfold.parallel.mesh import Split
from fanfold.tasks.checkpoint import Checkpoint, find_checkpoint, num_matmul_weights
from fanfold.tasks.entities import AGGREGATIONS, Aggregation
from fanfold.tasks.labels import Function, LabelHead, checked_length, read_label_head, reranker_function, same_labels
from fanfold.tasks.layouts import layout_setting, read_layout, shown_layout
from fanfold.tasks.scores import Merge
from fanfold.tasks.task import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.data.reading import Reading
    from fanfold.plan.numerics import Dtype, Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.labeller import ClassifyOnUnit

TEMPLATE = "This example is {}."
THRESHOLD = 0.5  # of independent scores
_MERGES = get_args(Merge)
_WHOLE = Split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A model, the only one or one of an ensemble. order: its outputs in the order of the first member's labels."""

    checkpoint: Checkpoint
    head: LabelHead
    max_length: int
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Classify:
    """The task with its settings."""

    members: tuple[Member, ...]
    function: Function
    dtype: Dtype
    pair: str | None = None  # the column of the second text
    candidates: tuple[str, ...] = ()  # labels of the user's own
    template: str = TEMPLATE
    top_k: int | None = None
    multi_label: bool = False
    threshold: float | None = None
    aggregation: Aggregation = "simple"
    merge: Merge | None = None
    asked_length: int | None = None
    split: Split = _WHOLE

    @property
    def name(self) -> str:
        return "classify"

    @property
    def head(self) -> LabelHead:
        return self.members[0].head

    @property
    def labels(self) -> tuple[str, ...]:
        """What the scores are of."""
        return self.candidates or self.head.labels

    @property
    def ranks(self) -> bool:
        """Whether a text has a list of labels beside its best one."""
        return self.top_k is not None or self.multi_label

    @property
    def columns(self) -> tuple[Column, ...]:
        if self.head.kind == "token":
            return (Column(name="entities", kind="records", fields=_entity_fields(self.aggregation)),)
        best = (Column(name="label", kind="text"), Column(name="score", kind="float"))
        return (*best, Column(name="labels", kind="records", fields=best)) if self.ranks else best

    def reading(self, column: str) -> Reading:
        if self.pair == column:
            raise RequestError(
                f"--pair {self.pair}",
                found=f"--column {column}: the same column",
                allowed="two columns",
                do="name the column of the second text with --pair",
            )
        return column if self.pair is None else ((column, self.pair),)

    @property
    def imports(self) -> tuple[str, ...]:
        folders = dict.fromkeys(member.checkpoint.model_type.replace("-", "_") for member in self.members)
        return (
            "torch",
            "transformers",
            "transformers.models.auto.modeling_auto",
            "transformers.models.auto.tokenization_auto",
            *(f"transformers.models.{folder}.modeling_{folder}" for folder in folders),
            "fanfold.tasks.labeller",
        )

    @property
    def key(self) -> str:
        return repr((sorted(self.record.items()), [str(member.checkpoint.path) for member in self.members]))

    @property
    def record(self) -> dict[str, Any]:
        several = [member.checkpoint.hashes for member in self.members]
        return {
            "task": self.name,
            "model_files": several[0] if len(several) == 1 else several,
            "commit": [member.checkpoint.commit for member in self.members],
            "max_length": [member.max_length for member in self.members],
            "function": self.function,
            "pair": self.pair,
            "labels": list(self.candidates),
            "template": self.template if self.candidates else None,
            "top_k": self.top_k,
            "multi_label": self.multi_label,
            "threshold": self.threshold,
            "aggregation": self.aggregation if self.head.kind == "token" else None,
            "merge": self.merge,
        }

    @property
    def options(self) -> dict[str, Any]:
        zero_shot = {"labels": list(self.candidates), "hypothesis_template": self.template}
        return {
            "pair": self.pair,
            **(zero_shot if self.candidates else {}),
            "top_k": self.top_k,
            "multi_label": self.multi_label,
            "threshold": self.threshold,
            **({"aggregation": self.aggregation} if self.head.kind == "token" else {}),
            "merge": self.merge,
            "max_length": self.asked_length,
            "dtype": self.dtype,
            **layout_setting(self.split),
        }

    @property
    def numerics(self) -> dict[str, Any]:
        return layout_setting(self.split)

    @property
    def reference(self) -> str | list[str]:
        found = [str(member.checkpoint.path) for member in self.members]
        return found[0] if len(found) == 1 else found

    @property
    def weights_bytes(self) -> int:
        files = (file for member in self.members for file in member.checkpoint.path.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files)

    @property
    def counted(self) -> tuple[str, ...]:
        return ()

    @property
    def unit_bytes(self) -> int:
        return 0

    @property
    def flops_per_token(self) -> float:
        """Of a row's tokens, which are those of all members: the mean over members."""
        counts = [num_matmul_weights(member.checkpoint.path) for member in self.members]
        return 2.0 * sum(counts) / len(counts)

    @property
    def chunking(self) -> None:
        return None

    @property
    def shown(self) -> dict[str, str]:
        models = (f"{member.checkpoint.shown} ({member.checkpoint.model_type})" for member in self.members)
        lines = {"model": " and ".join(models) + (f", merged by {self.merge}" if self.merge else "")}
        if self.head.kind == "token":
            lines["labels"] = f"{_named(self.labels)} of tokens, grouped by '{self.aggregation}'"
        elif self.candidates:
            kind = "each for itself" if self.multi_label or len(self.candidates) == 1 else "one of them"
            lines["labels"] = f"{_named(self.labels)} in {self.template!r}, {kind}"
        else:
            lines["labels"] = f"{_named(self.labels)}, scores by {self.function}"
        if self.split.units > 1:
            lines["layout"] = shown_layout(self.split)
        lines["length"] = f"at most {self.members[0].max_length} tokens a {'pair' if self.pair else 'text'}"
        return lines

    def open(self, unit: Unit, numerics: Numerics) -> ClassifyOnUnit:
        from fanfold.tasks.labeller import ClassifyOnUnit

        return ClassifyOnUnit(self, unit.device, numerics.batch_tokens)

    def merge_parts(self, values: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        raise NotImplementedError("texts are not cut into parts")

    def compiled_for(self, numerics: Numerics) -> bool:
        return False

    def compile(self, numerics: Numerics) -> None:
        raise PlanError(
            "--compile on with fanfold classify",
            found="a head of classification, which is computed eagerly",
            allowed="--compile on with fanfold embed",
            do="leave --compile away",
        )


def _entity_fields(aggregation: Aggregation) -> tuple[Column, ...]:
    places = (Column(name="start", kind="integer"), Column(name="end", kind="integer"))
    word = Column(name="word", kind="text")
    score = Column(name="score", kind="float")
    if aggregation == "none":
        return (Column(name="entity", kind="text"), score, Column(name="index", kind="integer"), word, *places)
    return (Column(name="entity_group", kind="text"), score, word, *places)


def _named(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 8} more" if len(labels) > 8 else ""
    return ", ".join(labels[:8]) + more


def make_classify(
    *,
    model: str | Sequence[str] | None = None,
    revision: str | None = None,
    dtype: Dtype = "float32",
    max_length: int | None = None,
    pair: str | None = None,
    labels: str | Sequence[str] | None = None,
    hypothesis_template: str | None = None,
    top_k: int | None = None,
    multi_label: bool = False,
    threshold: float | None = None,
    aggregation: str | None = None,
    merge: str | None = None,
    layout: str | None = None,
) -> Classify:
    """The task for one or several checkpoints, everything checked that can be checked without torch."""
    if dtype not in ("float32", "bfloat16"):
        raise PlanError(
            f"--dtype {dtype}", found="an unknown type", allowed="float32, bfloat16", do="choose one of them"
        )
    refs = [model] if isinstance(model, str) else list(model or ())
    if not refs:
        raise RequestError(
            "fanfold classify",
            found="no --model",
            allowed="a model folder or a Hugging Face id of a model with a head of classification",
            do="add --model, for example --model distilbert-base-uncased-finetuned-sst-2-english",
        )
    candidates = _candidates(labels, hypothesis_template)
    _check_flags(refs, top_k, aggregation, merge)
    members = _members(refs, revision, max_length, zero_shot=bool(candidates))
    first = members[0]
    if first.head.kind == "token":
        _check_token_head(first, pair=pair, top_k=top_k, multi_label=multi_label, models=len(refs))
    elif aggregation is not None:
        allowed = "a model with a head of token classification"
        raise _misfit(first.checkpoint, first.head, f"--aggregation {aggregation}", allowed)
    if candidates and pair is not None:
        raise RequestError(
            f"--labels with --pair {pair}",
            found="both say what the second text is",
            allowed="one of the two",
            do="leave --pair away",
        )
    function: Function = first.head.function
    if multi_label:
        function = "sigmoid"
    elif pair is not None and len(first.head.labels) == 1:
        function = reranker_function(first.checkpoint, function)
    if merge == "vote" and (top_k is not None or multi_label or len(candidates or first.head.labels) == 1):
        raise RequestError(
            "--merge vote",
            found="one label" if top_k is None and not multi_label else "--top-k or --multi-label",
            allowed="vote where models choose one of several labels",
            do="use --merge mean",
        )
    if threshold is not None and function != "none" and not 0 <= threshold <= 1:
        raise RequestError(
            f"--threshold {threshold:g}", found="no probability", allowed="0 to 1", do="choose such a number"
        )
    ranks = top_k is not None or multi_label
    if threshold is not None and first.head.kind == "sequence" and not ranks:
        raise RequestError(
            f"--threshold {threshold:g}",
            found="one label a text",
            allowed="with --multi-label, --top-k, or a head of token classification",
            do="add --multi-label or --top-k, or filter the column score",
        )
    if multi_label and top_k is None and threshold is None:
        threshold = THRESHOLD
    for module in ("torch", "transformers"):
        if not extras.has(module):
            extras.need(module, extra="torch", purpose=f"classifying with {first.checkpoint.shown}")
    return Classify(
        members=members,
        function=function,
        dtype=dtype,
        pair=pair,
        candidates=candidates,
        template=TEMPLATE if hypothesis_template is None else hypothesis_template,
        top_k=top_k,
        multi_label=multi_label,
        threshold=threshold,
        aggregation=aggregation or "simple",  # type: ignore[arg-type]
        merge=merge,  # type: ignore[arg-type]
        asked_length=max_length,
        split=read_layout(layout, [member.checkpoint for member in members], verb="classify"),
    )


def _check_flags(refs: Sequence[str], top_k: int | None, aggregation: str | None, merge: str | None) -> None:
    if top_k is not None and top_k < 1:
        raise RequestError(f"--top-k {top_k}", found="no label", allowed="1 or more", do="choose a number")
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise RequestError(
            f"--aggregation {aggregation}",
            found="no such strategy",
            allowed=", ".join(AGGREGATIONS),
            do="choose one of them",
        )
    if merge is not None and merge not in _MERGES:
        raise RequestError(
            f"--merge {merge}", found="no such merge", allowed=", ".join(_MERGES), do="choose one of them"
        )
    if (merge is None) != (len(refs) == 1):
        raise RequestError(
            f"--merge {merge}" if merge else f"{len(refs)} times --model",
            found="one --model" if merge else "no --merge",
            allowed="several --model with --merge mean or --merge vote",
            do="name a second --model, or leave --merge away" if merge else "add --merge mean",
        )


def _members(
    refs: Sequence[str], revision: str | None, max_length: int | None, *, zero_shot: bool
) -> tuple[Member, ...]:
    checkpoints = [find_checkpoint(ref, revision=revision) for ref in refs]
    heads = [read_label_head(checkpoint) for checkpoint in checkpoints]
    shown = [checkpoint.shown for checkpoint in checkpoints]
    if zero_shot:
        for checkpoint, head in zip(checkpoints, heads, strict=True):
            _check_inference(checkpoint, head)
        orders = tuple(tuple(range(len(head.labels))) for head in heads)
    else:
        orders = same_labels(heads, shown)
        functions = sorted({head.function for head in heads})
        if len(functions) > 1:
            raise PlanError(
                f"an ensemble of {' and '.join(shown)}",
                found=f"scores by {' and by '.join(functions)} (problem_type in config.json)",
                allowed="models whose scores mean the same",
                do="choose models that were trained for one kind of problem",
            )
    return tuple(
        Member(checkpoint=checkpoint, head=head, max_length=checked_length(checkpoint, head, max_length), order=order)
        for checkpoint, head, order in zip(checkpoints, heads, orders, strict=True)
    )


def _check_inference(checkpoint: Checkpoint, head: LabelHead) -> None:
    if head.kind == "token":
        raise _misfit(checkpoint, head, "--labels", "a model of natural language inference")
    if head.entailment is not None and len(head.labels) > 1:
        return
    raise PlanError(
        f"--labels with {checkpoint.shown}",
        found=f"its labels are {_named(head.labels)}: none of them is 'entailment'",
        allowed="a model of natural language inference, whose config.json (id2label) names its entailment",
        do="leave --labels away to use the model's own labels, or choose a model of inference",
    )


def _check_token_head(member: Member, *, pair: str | None, top_k: int | None, multi_label: bool, models: int) -> None:
    given = {
        "--pair": pair is not None,
        "--top-k": top_k is not None,
        "--multi-label": multi_label,
        "several --model": models > 1,
    }
    for flag, is_given in given.items():
        if is_given:
            raise _misfit(member.checkpoint, member.head, flag, "a model with a head of sequence classification")


def _misfit(checkpoint: Checkpoint, head: LabelHead, flag: str, allowed: str) -> PlanError:
    return PlanError(
        f"{flag} with {checkpoint.shown}",
        found=f"a head of {head.kind} classification",
        allowed=allowed,
        do=f"leave {flag.split(' ')[0]} away, or choose another model",
    )


def _candidates(labels: str | Sequence[str] | None, template: str | None) -> tuple[str, ...]:
    """--labels and --hypothesis-template, checked."""
    if labels is None:
        if template is not None:
            raise RequestError(
                "--hypothesis-template", found="no --labels", allowed="together with --labels", do="add --labels"
            )
        return ()
    names = [name.strip() for name in labels.split(",")] if isinstance(labels, str) else [str(name) for name in labels]
    names = [name for name in names if name]
    if not names or len(set(names)) != len(names):
        raise RequestError(
            f"--labels {json.dumps(names, ensure_ascii=False)}",
            found="the same label twice" if names else "no label",
            allowed="one or more labels with commas between them, each once",
            do="for example --labels 'urgent,not urgent'",
        )
    if template is not None:
        try:
            good = template.format("a") != template.format("b")
        except (IndexError, KeyError, ValueError, AttributeError):
            good = False
        if not good:
            raise RequestError(
                f"--hypothesis-template {template!r}",
                found="no place for the label",
                allowed="a text with {} where the label stands",
                do=f"for example --hypothesis-template {TEMPLATE!r}",
            )
    return tuple(names)
