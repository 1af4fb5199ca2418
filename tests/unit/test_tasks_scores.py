"""Outputs of heads become scores, labels and rankings."""

from __future__ import annotations

import numpy as np
import pytest

from fanfold.tasks.scores import best, mean_scores, ranked, scores_of, softmax, voted, zero_shot_scores

LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, -300.0]], dtype=np.float32)


def test_softmax_adds_up_to_one_and_survives_large_outputs():
    found = softmax(np.array([[1e4, 1e4 - 1, -1e4]], dtype=np.float32))
    assert found.sum() == pytest.approx(1)
    assert found[0].tolist() == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0], abs=1e-6)


def test_functions_are_softmax_sigmoid_and_none():
    assert scores_of(LOGITS, "softmax")[1].tolist() == pytest.approx([0.5, 0.5, 0])
    assert scores_of(LOGITS, "sigmoid")[1].tolist() == pytest.approx([0.5, 0.5, 0])
    assert scores_of(LOGITS, "sigmoid").dtype == np.float32
    assert scores_of(LOGITS, "none") is LOGITS


def test_the_first_of_equal_labels_is_the_best():
    assert best(LOGITS, "abc") == (["a", "a"], [2.0, 0.0])


def test_a_ranking_falls_and_keeps_the_order_of_equals():
    rows = ranked(LOGITS, "abc", most=2, threshold=None)
    assert [[entry["label"] for entry in row] for row in rows] == [["a", "c"], ["a", "b"]]


def test_a_threshold_may_leave_nothing():
    rows = ranked(LOGITS, "abc", most=None, threshold=0.5)
    assert [[entry["label"] for entry in row] for row in rows] == [["a", "c"], []]


@pytest.mark.parametrize(("entailment", "against"), [(0, -1), (2, 0)])
def test_independent_labels_are_scored_against_contradiction(entailment, against):
    logits = np.array([[[1.0, 0.0, 3.0], [2.0, 0.0, 2.0]]], dtype=np.float32)
    wanted = [1 / (1 + np.exp(row[against] - row[entailment])) for row in logits[0]]
    assert zero_shot_scores(logits, entailment, independent=True)[0].tolist() == pytest.approx(wanted)


def test_labels_of_which_one_holds_are_scored_against_each_other():
    logits = np.array([[[9.0, 0.0, 0.0], [9.0, 0.0, np.log(3)]]], dtype=np.float32)
    assert zero_shot_scores(logits, 2, independent=False)[0].tolist() == pytest.approx([0.25, 0.75])
    alone = zero_shot_scores(logits[:, :1], 2, independent=False)
    assert alone[0].tolist() == pytest.approx([1 / (1 + np.exp(9))]), "one label is scored against contradiction"


def test_the_mean_of_models_is_taken_label_by_label():
    scores = np.stack([scores_of(LOGITS, "sigmoid"), scores_of(-LOGITS, "sigmoid")])
    found = mean_scores(scores, independent=True, probabilities=True)
    assert found == pytest.approx(np.full((2, 3), 0.5))
    both = np.stack([softmax(LOGITS), softmax(LOGITS[::-1])])
    assert mean_scores(both, independent=False, probabilities=True) == pytest.approx(both.mean(axis=0))
    assert mean_scores(5 * both, independent=False, probabilities=False) == pytest.approx(5 * both.mean(axis=0))


def test_a_vote_is_the_label_of_most_models_and_their_share():
    scores = np.zeros((3, 2, 3), dtype=np.float32)
    for model, labels in enumerate([(2, 1), (2, 0), (0, 2)]):
        scores[model, [0, 1], labels] = 1
    label, share = voted(scores)
    assert label.tolist() == [2, 0], "the first label of equals"
    assert share.tolist() == pytest.approx([2 / 3, 1 / 3])
