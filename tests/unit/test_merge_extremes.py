"""MinMax, ArgMax and TopK are NumPy's, exactly, on any cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.errors import DataError, PlanError
from fanfold.merge import fold
from fanfold.merge.extremes import ArgMax, Extreme, MinMax, Range
from fanfold.merge.top import Top, TopK
from fanfold.testing import laws

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
values = st.lists(
    st.sampled_from([0.0, 1.0, 2.0, -1.0, np.nan, np.inf, -np.inf]) | st.floats(-5, 5), min_size=1, max_size=60
)


def same(left, right):
    pairs = [(getattr(left, name), getattr(right, name)) for name in type(left).__slots__]
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True) for a, b in pairs)


def over(merge, rows, cuts):
    cuts = sorted(min(cut, len(rows)) for cut in cuts)
    bounds = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    return merge.finish(fold(merge, [merge.lift(rows[a:b], b - a) for a, b in bounds]))


@few
@given(values, st.lists(st.integers(0, 60), max_size=5))
def test_extremes_are_numpys_on_any_cut(rows, cuts):
    rows = np.array(rows)
    assert same(over(MinMax(), rows, cuts), Range(rows.min(), rows.max()))
    assert same(over(ArgMax(), rows, cuts), Extreme(rows.argmax(), rows.max()))


@few
@given(values, st.lists(st.integers(0, 60), max_size=5), st.integers(1, 8), st.booleans())
def test_the_top_is_that_of_a_stable_sort(rows, cuts, k, largest):
    rows = np.array(rows)
    order = sorted(
        range(len(rows)),
        key=lambda i: (rows[i] != rows[i], 0 if rows[i] != rows[i] else (-rows[i] if largest else rows[i]), i),
    )
    best = np.array(order[:k])
    assert same(over(TopK(k, largest), rows, cuts), Top(rows[best], best))


@pytest.mark.parametrize("merge", [MinMax(), ArgMax(), TopK(3), TopK(2, largest=False)])
def test_the_laws_hold(merge):
    pieces = [([1.0, 9.0], 2), ([], 0), ([9.0], 1), ([2.0, 2.0, -1.0], 3), ([np.nan, 4.0], 2)]
    laws.check_all(merge, [(np.array(rows, float), count) for rows, count in pieces], same)


def test_strings_have_a_least_and_a_greatest():
    for rows in (np.array(["bb", "a", "ccc", "ab"]), np.array([b"bb", b"a", b"ccc", b"ab"])):
        found = over(MinMax(), rows, [1, 3])
        assert [found.min, found.max] == [min(rows), max(rows)]
    assert over(MinMax(), np.array([["b", "x"], ["a", "y"]]), [1]).min.tolist() == ["a", "x"]
    with pytest.raises(DataError, match="least and greatest"):
        MinMax().join(MinMax().lift(["a"], 1), MinMax().lift([b"a"], 1))


def test_columns_are_looked_at_apart():
    rows = np.random.default_rng(0).standard_normal((100, 4))
    assert same(over(MinMax(), rows, [30, 31]), Range(rows.min(0), rows.max(0)))
    assert same(over(ArgMax(), rows, [30, 31]), Extreme(rows.argmax(0), rows.max(0)))


def test_the_top_of_many_rows_with_ties():
    rows = np.random.default_rng(0).integers(0, 50, 10_000)
    best = np.argsort(-rows, kind="stable")[:20]
    assert same(over(TopK(20), rows, [1, 5000]), Top(rows[best], best))


def test_parts_of_other_parameters_are_refused():
    with pytest.raises(DataError, match="find the top rows") as caught:
        TopK(5).join(TopK(5).empty(), TopK(10).lift([1.0], 1))
    assert "TopK(10" in str(caught.value)


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_impossible_k_is_refused(k):
    with pytest.raises(PlanError, match="TopK"):
        TopK(k)


@pytest.mark.parametrize("merge", [MinMax(), ArgMax()])
def test_no_rows_have_no_extremes(merge):
    with pytest.raises(DataError, match="over rows"):
        merge.finish(merge.empty())
    with pytest.raises(DataError, match="over rows"):
        merge.lift(np.ones(4), 3)
    with pytest.raises(DataError, match="over rows"):
        merge.join(merge.lift(np.ones((3, 2)), 3), merge.lift(np.ones((3, 4)), 3))
