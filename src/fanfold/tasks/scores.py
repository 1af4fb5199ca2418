"""From a head's outputs to labels and scores, as transformers' pipelines do it. NumPy alone.

Shapes: B rows, C labels, M models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fanfold.merge import EnsembleMean, Mean, Vote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.tasks.labels import Function

Merge = Literal["mean", "vote"]


def scores_of(logits_BC: np.ndarray, function: Function) -> np.ndarray:
    """float32 [B, C] -> float32 [B, C].

    Source: transformers 5, pipelines/text_classification.py, sigmoid and softmax.
    """
    if function == "sigmoid":
        with np.errstate(over="ignore"):  # exp(-x) of a very small x is inf, and the score 0
            result: np.ndarray = 1.0 / (1.0 + np.exp(-logits_BC))
        return result
    return softmax(logits_BC) if function == "softmax" else logits_BC


def softmax(values: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return result


def zero_shot_scores(logits_BHC: np.ndarray, entailment: int, *, independent: bool) -> np.ndarray:
    """[B, hypotheses, outputs of inference] -> [B, hypotheses].

    Independent: entailment against contradiction for each; else entailment of each against that of the others.
    Source: transformers 5, pipelines/zero_shot_classification.py, postprocess.
    """
    if independent or logits_BHC.shape[1] == 1:
        contradiction = -1 if entailment == 0 else 0
        return softmax(logits_BHC[..., [contradiction, entailment]])[..., 1]
    return softmax(logits_BHC[..., entailment])


def mean_scores(scores_MBC: np.ndarray, *, independent: bool, probabilities: bool) -> np.ndarray:
    """The mean over models, [B, C]: by EnsembleMean where they are probabilities, each label's own if independent."""
    if not probabilities:
        merge: Any = Mean()
        return np.asarray(merge.finish(merge.lift(scores_MBC.astype(np.float64), len(scores_MBC))))
    merge = EnsembleMean()
    if independent:  # of each label: that it holds, and that it does not
        both = np.stack([scores_MBC, 1 - scores_MBC], axis=-1)
        return np.asarray(merge.finish(merge.lift(both, len(both))))[..., 0]
    return np.asarray(merge.finish(merge.lift(scores_MBC, len(scores_MBC))))


def voted(scores_MBC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The label that most models put first, int [B], and the share of them, float [B]."""
    votes = scores_MBC.argmax(axis=-1)
    merge = Vote()
    label = np.asarray(merge.finish(merge.lift(votes, len(votes))))
    return label, (votes == label).mean(axis=0)


def best(scores_BC: np.ndarray, labels: Sequence[str]) -> tuple[list[str], list[float]]:
    """Of each row the label with the highest score, the first of equals, and its score."""
    places = scores_BC.argmax(axis=-1)
    return [labels[i] for i in places], [float(row[i]) for row, i in zip(scores_BC, places, strict=True)]


def ranked(
    scores_BC: np.ndarray, labels: Sequence[str], *, most: int | None, threshold: float | None
) -> list[list[dict[str, Any]]]:
    """Of each row the labels by falling score, in the order of labels where equal; `most` of them at the most."""
    rows = []
    for scores in scores_BC:
        order = np.argsort(-scores, kind="stable")[:most]
        found = [{"label": labels[i], "score": float(scores[i])} for i in order]
        rows.append([entry for entry in found if threshold is None or entry["score"] >= threshold])
    return rows
