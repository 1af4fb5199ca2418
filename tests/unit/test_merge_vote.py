"""Votes, means of probabilities and histograms against NumPy, on any cut."""

from __future__ import annotations

import numpy as np
import pytest

from fanfold.errors import DataError, PlanError
from fanfold.merge import Mean, Weighted, fold
from fanfold.merge.histogram import Histogram
from fanfold.merge.vote import EnsembleMean, Vote
from fanfold.testing import laws

DRAW = np.random.default_rng(0)


def over(merge, rows, cuts):
    bounds = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    return merge.finish(fold(merge, [merge.lift(rows[a:b], b - a) for a, b in bounds]))


def same_bins(left, right):
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in type(left).__slots__)


@pytest.mark.parametrize("cuts", [[], [1], [2, 2, 6], list(range(1, 9))])
def test_the_label_with_the_most_votes_wins_and_the_smallest_of_equals(cuts):
    votes = DRAW.integers(0, 4, (9, 200))
    expected = [np.bincount(column).argmax() for column in votes.T]
    assert over(Vote(), votes, cuts).tolist() == expected
    names = np.array(["ant", "bee", "cat", "dog"])
    assert over(Vote(), names[votes], cuts).tolist() == names[expected].tolist()


def test_weights_decide():
    parts = [Vote().lift(Weighted(["a", "b"], 3.0), 1), Vote().lift(np.array([["b", "b"], ["b", "c"]]), 2)]
    assert Vote().finish(fold(Vote(), parts)).tolist() == ["a", "b"]


def test_fractional_weights_are_exact_in_any_order_of_joins():
    merge = Vote()
    votes = [("a", 0.1)] * 10 + [("b", 1.0), ("a", 1e-30), ("c", 1e300), ("c", 5e-324), ("d", 1e300)]
    for _ in range(20):
        parts = [merge.lift(Weighted([votes[at][0]], votes[at][1]), 1) for at in DRAW.permutation(len(votes))]
        assert merge.finish(fold(merge, parts)).tolist() == ["c"]  # 1e300 + 5e-324 is more than 1e300
    parts = [merge.lift(Weighted([label], weight), 1) for label, weight in votes[:11]]
    assert merge.finish(fold(merge, parts)).tolist() == ["a"]  # ten times the float 0.1 is a little more than 1


@pytest.mark.parametrize("weight", [np.float64(0.5), np.float32(0.5), np.int64(3), np.array(2.0), 10**30])
def test_weights_may_be_numpy_scalars(weight):
    vote = Vote().lift(Weighted(["a", "b"], weight), 1)
    assert Vote().finish(vote).tolist() == ["a", "b"]
    mean = EnsembleMean().lift(Weighted([0.25, 0.75], weight), 1)
    assert np.allclose(EnsembleMean().finish(mean), [0.25, 0.75], rtol=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.float64(np.nan), np.array(np.nan), np.inf, -1, 10**400, "2", None])
@pytest.mark.parametrize("merge", [Vote(), EnsembleMean(), Mean()])
def test_bad_weights_are_refused_everywhere(merge, bad):
    with pytest.raises(DataError):
        merge.lift(Weighted([1, 0] if isinstance(merge, Vote) else np.array([1.0, 0.0]), bad), 1)


def test_many_labels_need_no_cube():
    import tracemalloc

    votes = DRAW.permutation(400 * 50).reshape(400, 50)  # the cube would hold 400 million cells
    tracemalloc.start()
    part = Vote().lift(votes, 400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 20_000 * 50 * 5
    assert Vote().finish(part).tolist() == votes.min(axis=0).tolist()


PROBABILITIES = DRAW.dirichlet(np.ones(3), (9, 20))


@pytest.mark.parametrize("cuts", [[], [1], [2, 2, 6], list(range(1, 9))])
def test_the_mean_of_probabilities_is_the_mean(cuts):
    assert np.allclose(over(EnsembleMean(), PROBABILITIES, cuts), PROBABILITIES.mean(0), rtol=1e-15, atol=0)
    parts = [EnsembleMean().lift(Weighted(one, w), 1) for w, one in enumerate(PROBABILITIES)]
    expected = np.average(PROBABILITIES, axis=0, weights=range(9))
    assert np.allclose(EnsembleMean().finish(fold(EnsembleMean(), parts)), expected, rtol=1e-14)


@pytest.mark.parametrize("bad", [[[0.5, 0.6]], [[-0.1, 1.1]], [[np.nan, 1.0]], [0.5], [["a", "b"]]])
def test_what_are_no_probabilities_is_refused(bad):
    with pytest.raises(DataError, match="mean of probabilities"):
        EnsembleMean().lift(np.array(bad), 1)


@pytest.mark.parametrize("merge", [Vote(), EnsembleMean()])
def test_weights_that_do_not_fit_are_refused(merge):
    for value, rows in ((Weighted([0.5, 0.5], np.nan), 1), (Weighted([0.5, 0.5], -1.0), 1), (Weighted([1, 0], 1.0), 2)):
        with pytest.raises(DataError, match=r"votes|probabilities") as caught:
            merge.lift(value, rows)
        assert "finite and 0 or above" in str(caught.value)
    with pytest.raises(DataError, match=r"votes|mean"):
        merge.finish(merge.empty())


def test_other_items_or_kinds_of_labels_are_refused():
    first = Vote().lift([[1, 2, 3]], 1)
    for other in ([[1, 2]], [["a", "b", "c"]]):
        with pytest.raises(DataError, match="count votes"):
            Vote().join(first, Vote().lift(other, 1))
    with pytest.raises(DataError, match="count votes"):
        Vote().lift([[0.5, 0.1]], 1)


EDGES = (-1.0, 0.0, 0.5, 2.0)
VALUES = np.concatenate([DRAW.standard_normal(500), [-1.0, 2.0, 0.5, np.inf, -np.inf, np.nan]])


@pytest.mark.parametrize("cuts", [[], [1], [500, 503], list(range(1, 500, 7))])
def test_a_histogram_is_numpys(cuts):
    found = over(Histogram(EDGES), VALUES, cuts)
    assert found.counts.tolist() == np.histogram(VALUES[np.isfinite(VALUES)], EDGES)[0].tolist()
    assert (found.below, found.above, found.nan) == ((VALUES < -1).sum(), (VALUES > 2).sum(), 1)


def test_the_laws_hold():
    votes = [(DRAW.integers(0, 3, (n, 6)), n) for n in (2, 0, 1, 4)]
    laws.check_all(Vote(), votes, laws.exactly)
    laws.check_all(EnsembleMean(), [(PROBABILITIES[:n], n) for n in (2, 0, 1, 4)], laws.within(rtol=1e-15))
    laws.check_all(Histogram(EDGES), [(VALUES[: 9 * n], 9 * n) for n in (2, 0, 1, 40)], same_bins)


@pytest.mark.parametrize("edges", [(), (1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, np.nan), "ab", 3])
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(PlanError, match="Histogram"):
        Histogram(edges)


def test_parts_with_other_edges_and_text_are_refused():
    with pytest.raises(DataError, match="bins"):
        Histogram(EDGES).join(Histogram(EDGES).empty(), Histogram((0, 1)).empty())
    with pytest.raises(DataError, match="bins"):
        Histogram(EDGES).lift(["a"], 1)
