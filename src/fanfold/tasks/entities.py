"""From a token head's outputs to entities, as transformers' token-classification pipeline groups them.

Source: transformers 5, pipelines/token_classification.py, whose strategies and rules have these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fanfold.tasks.scores import softmax

if TYPE_CHECKING:
    from collections.abc import Sequence

Aggregation = Literal["none", "simple", "first", "average", "max"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
_OUTSIDE = "O"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of a text: its place among the model's input, its piece of a word, the label's scores, its characters.

    start and end are None where the tokenizer does not tell them. goes_on: it continues the word before.
    """

    index: int
    word: str
    scores: np.ndarray  # float32 [labels]
    start: int | None
    end: int | None
    goes_on: bool


def tokens_of(
    text: str,
    ids: Sequence[int],
    logits_LC: np.ndarray,
    *,
    special: Sequence[int],
    offsets: Sequence[tuple[int, int]] | None,
    tokenizer: Any,
) -> list[Token]:
    """The tokens that stand for a piece of the text; special ones are left out."""
    scores_LC = softmax(logits_LC)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    has_prefix = bool(getattr(model, "continuing_subword_prefix", None))  # "##" tells what continues a word
    found = []
    for index, token in enumerate(ids):
        if special[index]:
            continue
        word = tokenizer.convert_ids_to_tokens(int(token))
        start = end = None
        goes_on = False
        if offsets is not None:
            start, end = offsets[index]
            there = text[start:end]
            goes_on = len(word) != len(there) if has_prefix else start > 0 and " " not in text[start - 1 : start + 1]
            if token == tokenizer.unk_token_id:
                word, goes_on = there, False
        found.append(Token(index=index, word=word, scores=scores_LC[index], start=start, end=end, goes_on=goes_on))
    return found


def entities_of(
    tokens: Sequence[Token], labels: Sequence[str], aggregation: Aggregation, tokenizer: Any
) -> list[dict[str, Any]]:
    """The entities in the order of the text, without those of the label O."""
    if aggregation in ("none", "simple"):
        found = [_of_token(token, labels) for token in tokens]
    else:
        found = [_of_word(word, labels, aggregation, tokenizer) for word in _words(tokens)]
    if aggregation == "none":
        return [entity for entity in found if entity["entity"] != _OUTSIDE]
    groups = (_of_group(group, tokenizer) for group in _groups(found))
    return [entity for entity in groups if entity["entity_group"] != _OUTSIDE]


def _of_token(token: Token, labels: Sequence[str]) -> dict[str, Any]:
    best = int(token.scores.argmax())
    return {
        "entity": labels[best],
        "score": float(token.scores[best]),
        "index": token.index,
        "word": token.word,
        "start": token.start,
        "end": token.end,
    }


def _words(tokens: Sequence[Token]) -> list[list[Token]]:
    words: list[list[Token]] = []
    for token in tokens:
        if words and token.goes_on:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _of_word(word: list[Token], labels: Sequence[str], aggregation: Aggregation, tokenizer: Any) -> dict[str, Any]:
    """All tokens of a word under one label: of the first, of the surest, or of the mean."""
    if aggregation == "first":
        scores = word[0].scores
    elif aggregation == "max":
        scores = max(word, key=lambda token: float(token.scores.max())).scores
    else:
        scores = np.nanmean(np.stack([token.scores for token in word]), axis=0)
    best = int(scores.argmax())
    return {
        "entity": labels[best],
        "score": float(scores[best]),
        "word": tokenizer.convert_tokens_to_string([token.word for token in word]),
        "start": word[0].start,
        "end": word[-1].end,
    }


def _groups(entities: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours of one kind belong together, until one begins anew (B-)."""
    groups: list[list[dict[str, Any]]] = []
    for entity in entities:
        begins, kind = _tag(entity["entity"])
        if groups and kind == _tag(groups[-1][-1]["entity"])[1] and not begins:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return groups


def _tag(label: str) -> tuple[bool, str]:
    """Whether the label begins an entity, and its kind."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _of_group(group: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    scores = np.array([entity["score"] for entity in group], dtype=np.float32)
    return {
        "entity_group": group[0]["entity"].split("-", 1)[-1],
        "score": float(np.nanmean(scores)),
        "word": tokenizer.convert_tokens_to_string([entity["word"] for entity in group]),
        "start": group[0]["start"],
        "end": group[-1]["end"],
    }
