"""Every merge keeps the laws on data drawn by Hypothesis; and the laws catch merges that break them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fanfold
from fanfold.errors import DataError, DifferenceFound
from fanfold.merge import (
    ArgMax,
    Concat,
    Count,
    Distinct,
    EnsembleMean,
    Histogram,
    Mean,
    MinMax,
    Moments,
    Quantiles,
    Record,
    SoftmaxPart,
    SoftmaxParts,
    Sum,
    TopK,
    Vote,
    Weighted,
    codec,
)
from fanfold.testing import laws

# No deadline: the machine may be busy. Derandomised: the same examples in every run.
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)

U64, U32 = 2.0**-53, 2.0**-24
LIMIT, MAX_PIECES = 1e6, 12
ints = st.integers(-(10**30), 10**30)
floats = st.floats(-LIMIT, LIMIT)
any_floats = floats | st.sampled_from([float("nan"), float("inf"), float("-inf")])
few_floats = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0])  # ties, and edges of bins
labels = st.integers(-3, 3)
weights = st.sampled_from([0, 1, 3, 0.1, 0.2, 0.3, np.float64(0.7), np.int64(2), np.array(0.25), 1e-9])
rows = st.integers(0, 50)
small_ints = st.integers(-100, 100)


def pieces(values, rows=rows):
    return st.lists(st.tuples(values, rows), max_size=MAX_PIECES)


def within(u, max_rows=1):
    """The stated bound for two cuts: 2 u |s| + 6 (h u)^2 sum|x|."""
    height, sum_abs = MAX_PIECES + 1, max_rows * MAX_PIECES * LIMIT
    return laws.within(rtol=2 * u, atol=6 * (height * u) ** 2 * sum_abs)


def arrays(dtype, elements):
    return st.lists(elements, min_size=3, max_size=3).map(lambda row: np.array(row, dtype))


def row_pieces(make, elements=floats, max_rows=6):
    """Pieces of unequal numbers of rows, 0 among them: what `make` makes of a list of one element for each."""
    return st.lists(st.lists(elements, max_size=max_rows), max_size=MAX_PIECES).map(
        lambda drawn: [(make(rows), len(rows)) for rows in drawn]
    )


def columns(rows):
    """Two columns: the values, and their negatives in reverse."""
    values = np.array(rows, float)
    return np.stack([values, -values[::-1]], axis=1)


def same_moments(left, right):
    """The stated bound for two cuts: 2e-12 of the moment of the distances without signs, for central moments.

    That of power 3 is at most sqrt(m2 m4). Equal rows leave rounding of rounding: 4 u^2 of the mean.
    """
    if left.count != right.count:
        return False
    if not np.isfinite(left.mean).all():
        return laws.exactly(left.mean, right.mean) and all(
            np.isnan(both.variance).tolist() == (~np.isfinite(left.mean)).tolist() for both in (left, right)
        )
    tiny = 4 * U64**2 * np.abs(left.mean)
    m2, m3, m4 = ([moment(both) for both in (left, right)] for moment in (second, third, fourth))
    close = np.abs(left.mean - right.mean) <= 2 * U64 * np.abs(left.mean) + 2e-12 * np.sqrt(m2[0])
    close &= np.abs(m2[0] - m2[1]) <= 2e-12 * m2[0] + tiny**2
    close &= ~(np.abs(m3[0] - m3[1]) > 2e-12 * np.sqrt(m2[0] * m4[0]) + tiny**3)
    close &= ~(np.abs(m4[0] - m4[1]) > 2e-12 * m4[0] + tiny**4)
    return bool(np.all(close))


def second(found):
    return found.variance


def third(found):
    return found.skewness * found.variance**1.5


def fourth(found):
    return (found.kurtosis + 3) * found.variance**2


def probabilities(rows):
    """Three classes for each member, from one number in 0 to 1."""
    first = np.array(rows, float)[:, None] if rows else np.empty((0, 1))
    return np.concatenate([first / 2, (1 - first) / 3, 1 - first / 2 - (1 - first) / 3], axis=1)


def members(make, weights, elements):
    """Members of weight 1 in pieces of several, and weighted ones in pieces of their own."""
    one = st.tuples(elements, weights).map(lambda drawn: (Weighted(make([drawn[0]])[0], drawn[1]), 1))
    several = st.lists(elements, max_size=5).map(lambda rows: (make(rows), len(rows)))
    return st.lists(one | several, max_size=MAX_PIECES)


def ballots(rows):
    """What each member says of four items."""
    return np.array([[row, row // 2, -row, 7] for row in rows], np.int64).reshape(-1, 4)


def text_ballots(rows):
    return ballots(rows).astype("U3")


def scores_and_values(dtype, as_array=np.asarray):
    """Pieces of keys: scores [2 queries, keys] to +-1e4, some masked, and values [keys, 2] in -1 to 1."""
    score = st.floats(-1e4, 1e4, width=32) | st.floats(-5, 5, width=32) | st.just(float("-inf"))
    key = st.tuples(score, score, st.floats(-1, 1, width=32), st.floats(-1, 1, width=32))

    def piece(keys):
        table = np.array(keys, dtype).reshape(-1, 4)
        return as_array(np.ascontiguousarray(table[:, :2].T)), as_array(np.ascontiguousarray(table[:, 2:]))

    return row_pieces(piece, key, max_rows=4)


def attention(u):
    """Twice the stated bound, u (2 S + K + 8) max|value|, with S = 1e4, K = 4 keys a piece and values to 1."""
    return laws.within(rtol=0, atol=2 * u * (2 * 1e4 + 4 * MAX_PIECES + 8))


def from_kernel(piece):
    """The same keys as an attention kernel reports them, with NaN where all are masked."""
    (scores, values), keys = piece
    part = SoftmaxParts().lift((scores, values), keys)
    if not keys:
        return part, keys
    output = part.value / np.where(part.weight == 0, np.nan, part.weight)
    return SoftmaxPart.of(output, SoftmaxParts().lse(part)), keys


def by_name(**equals):
    """Equality of records: each name by its own."""

    def same(left, right):
        return left.keys() == right.keys() == equals.keys() and all(
            equal(left[name], right[name]) for name, equal in equals.items()
        )

    return same


def blocks(make, elements=small_ints):
    return pieces(st.lists(elements, max_size=4).map(make), rows=st.just(1)).map(
        lambda drawn: [(block, len(block)) for block, _ in drawn]
    )


MERGES = {
    "count": (Count(), pieces(floats), laws.exactly),
    "sum of ints": (Sum(of="pieces"), pieces(ints), laws.exactly),
    "sum of floats": (Sum(of="pieces"), pieces(floats), within(U64)),
    "sum of ints and floats": (Sum(of="pieces"), pieces(floats | st.integers(-(10**6), 10**6)), within(U64)),
    "sum with nan and inf": (Sum(of="pieces"), pieces(any_floats), within(U64)),
    "sum of complex": (Sum(of="pieces"), pieces(st.builds(complex, floats, floats)), within(2 * U64)),
    "sum of float64 arrays": (Sum(of="pieces"), pieces(arrays("float64", any_floats)), within(U64)),
    "sum of float32 arrays": (Sum(of="pieces"), pieces(arrays("float32", floats)), within(U32)),
    "sum of int arrays": (Sum(of="pieces"), pieces(arrays("int8", st.integers(-128, 127))), laws.exactly),
    "mean of ints": (Mean(of="pieces"), pieces(ints), laws.exactly),
    "mean of floats": (Mean(of="pieces"), pieces(floats), within(2 * U64, max_rows=50)),
    "mean with nan and inf": (Mean(of="pieces"), pieces(any_floats), within(2 * U64, max_rows=50)),
    "mean of arrays": (Mean(of="pieces"), pieces(arrays("float32", floats)), within(4 * U32, max_rows=50)),
    "mean of weighted": (
        Mean(of="pieces"),
        pieces(st.builds(Weighted, floats, st.floats(0.01, 10)), rows=st.integers(1, 50)),
        within(4 * U64, max_rows=1000),
    ),
    "concat of lists": (Concat(), blocks(list, floats), laws.exactly),
    "concat of tuples": (Concat(), blocks(tuple), laws.exactly),
    "concat of arrays": (Concat(), blocks(lambda b: np.array(b, "int16")), laws.exactly),
    "concat of matrices": (Concat(), blocks(lambda b: np.ones((len(b), 2)) * 7), laws.exactly),
    "concat of strings": (Concat(), blocks(lambda b: np.array(list(map(str, b)), "U")), laws.exactly),
    "concat of arrow arrays": (Concat(), blocks(lambda b: pa.array(b, pa.int64())), laws.exactly),
    "concat of chunked": (Concat(), blocks(lambda b: pa.chunked_array([b], pa.int64())), laws.exactly),
    "concat of tables": (Concat(), blocks(lambda b: pa.table({"a": pa.array(b, pa.int64())})), laws.exactly),
    "sum over rows": (Sum(), row_pieces(columns), within(2 * U64, max_rows=6)),
    "mean over rows": (Mean(), row_pieces(columns), within(4 * U64, max_rows=6)),
    "moments": (Moments(), row_pieces(np.array), same_moments),
    "moments of columns far from 0": (Moments(), row_pieces(lambda rows: columns(rows) + 1e8), same_moments),
    "moments with nan and inf": (Moments(), row_pieces(columns, any_floats), same_moments),
    "least and greatest": (MinMax(), row_pieces(columns, any_floats), laws.exactly),
    "least and greatest strings": (MinMax(), row_pieces(np.array, st.text("ab", min_size=1)), laws.exactly),
    "where the greatest stands": (ArgMax(), row_pieces(columns, any_floats | few_floats), laws.exactly),
    "top": (TopK(5), row_pieces(np.array, any_floats | few_floats), laws.exactly),
    "bottom": (TopK(3, largest=False), row_pieces(np.array, any_floats | few_floats), laws.exactly),
    "vote": (Vote(), row_pieces(ballots, labels), laws.exactly),
    "vote of strings": (Vote(), row_pieces(text_ballots, labels), laws.exactly),
    "weighted vote": (Vote(), members(ballots, weights | st.floats(0, 1e300), labels), laws.exactly),
    "mean of an ensemble": (EnsembleMean(), row_pieces(probabilities, st.floats(0, 1)), laws.within(rtol=16 * U64)),
    "weighted mean of an ensemble": (
        EnsembleMean(),
        members(probabilities, weights, st.floats(0, 1)),
        laws.within(rtol=16 * U64),
    ),
    "histogram": (Histogram((-1.0, 0.0, 0.5, 2.0)), row_pieces(columns, any_floats | few_floats), laws.exactly),
    "quantile": (Quantiles(0.5), row_pieces(columns, any_floats), laws.exactly),
    "quantiles": (Quantiles((0.0, 0.3, 0.99, 1.0), error=0.01), row_pieces(columns), laws.exactly),
    "distinct floats": (Distinct(0.1), row_pieces(columns, any_floats | few_floats), laws.exactly),
    "distinct strings": (Distinct(), row_pieces(np.array, st.text("ab\u00e4", max_size=3)), laws.exactly),
    "softmax in float64": (SoftmaxParts(), scores_and_values("float64"), attention(U64)),
    "softmax in float32": (SoftmaxParts(), scores_and_values("float32"), attention(U32)),
    "softmax from kernels": (
        SoftmaxParts(),
        scores_and_values("float64").map(lambda drawn: list(map(from_kernel, drawn))),
        attention(2 * U64),
    ),
    "record": (
        Record({"top": TopK(2), "bins": Histogram((0, 1)), "mean": Sum(), "rows": Count(), "kinds": Distinct(0.05)}),
        row_pieces(np.array),
        by_name(
            top=laws.exactly,
            bins=laws.exactly,
            mean=within(2 * U64, max_rows=6),
            rows=laws.exactly,
            kinds=laws.exactly,
        ),
    ),
}


@pytest.mark.parametrize("name", MERGES)
def test_merge_keeps_every_law(name):
    merge, drawn, equal = MERGES[name]

    @few
    @given(drawn)
    def keeps(values):
        laws.check_all(merge, values, equal)

    keeps()


@pytest.mark.torch
@pytest.mark.parametrize(("dtype", "u"), [("float64", U64), ("float32", U32)])
def test_softmax_of_tensors_keeps_every_law(dtype, u):
    import torch

    equal = attention(u)

    @few
    @given(scores_and_values(dtype, torch.from_numpy))
    def keeps(values):
        laws.check_all(SoftmaxParts(), values, lambda a, b: a.dtype == b.dtype and equal(a.numpy(), b.numpy()))

    keeps()


def test_every_merge_stands_in_the_table():
    kinds = {type(merge).__name__ for merge, _, _ in MERGES.values()}
    merges = {name for name in fanfold.__all__ if hasattr(getattr(fanfold, name), "join")}
    assert kinds == merges


@pytest.mark.parametrize(
    ("merge", "other"),
    [
        (TopK(3), TopK(4)),
        (TopK(3), TopK(3, largest=False)),
        (Histogram((0, 1)), Histogram((0, 2))),
        (Quantiles(0.5), Quantiles(0.5, error=0.1)),
        (Distinct(), Distinct(0.1)),
        (Record({"a": Count()}), Record({"b": Count()})),
        (Record({"a": TopK(3)}), Record({"a": TopK(4)})),
    ],
)
def test_parts_made_with_other_parameters_are_refused(merge, other):
    value = np.array([0.5, 0.25])
    own, foreign = (one.lift(value, 2) for one in (merge, other))
    for pair in ((own, foreign), (foreign, own), (merge.empty(), foreign), (other.empty(), own)):
        with pytest.raises(DataError) as caught:
            merge.join(*pair)
        assert "part" in caught.value.found
        assert "join parts of" in caught.value.do
    merge.finish(merge.join(own, codec.load(codec.save(own))))


@dataclass(frozen=True)
class Broken:
    """A sum of lists of ints that goes wrong in one way."""

    how: str

    def empty(self) -> Any:
        return [1] if self.how == "identity" else []

    def lift(self, value: int, rows: int) -> Any:
        if self.how == "save_load":
            return Forgetful([value] if rows else [])
        return [value] if rows or self.how == "empty_pieces" else []

    def join(self, left: Any, right: Any) -> Any:
        if self.how == "associativity" and left and right:
            return [(sum(left) + sum(right)) / 2]
        if self.how == "any_split":
            return [*left, *right] if len(left) >= len(right) else [*right, *left]
        if self.how == "arrival_order":  # remembers how often join was called
            CALLS.append(1)
            return [*left, *right, len(CALLS)] if left and right else [*left, *right]
        if self.how == "joins_change_nothing":
            left.extend(right)
            return left
        return type(left)([*left, *right]) if self.how == "save_load" else [*left, *right]

    def finish(self, part: Any) -> Any:
        return list(part)


class Forgetful(list):
    def __reduce__(self):
        return (Forgetful, ())


CALLS: list[int] = []
PIECES = [(3, 1), (1, 2), (4, 1), (1, 0), (5, 2), (9, 1), (2, 6)]


@pytest.mark.parametrize("law", [law.__name__ for law in laws.LAWS])
def test_each_law_catches_a_merge_that_breaks_it(law):
    with pytest.raises(DifferenceFound, match="keep the law of") as caught:
        getattr(laws, law)(Broken(law), PIECES, laws.exactly)
    assert "Broken" in str(caught.value)


def test_the_unbroken_merge_keeps_every_law():
    laws.check_all(Broken("not at all"), PIECES)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (float("nan"), float("nan"), True),
        ([1.0, float("nan")], [1.0, float("nan")], True),
        ([1], [1, 2], False),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.array([1]), np.array([1.0]), False),
        (np.ones(2), np.ones((2, 1)), False),
        (pa.array([1]), pa.array([2]), False),
    ],
)
def test_exactly_compares_type_and_value(left, right, same):
    assert laws.exactly(left, right) is same


def test_within_holds_to_its_tolerance():
    close = laws.within(rtol=1e-3, atol=1e-6)
    assert close(1000.0, 1000.9)
    assert close(0.0, 1e-6)
    assert not close(1000.0, 1002.0)
    assert not close(1.0, float("nan"))
    assert not close(float("inf"), 1.0)
    assert close(np.array([1.0, np.inf]), np.array([1.0005, np.inf]))
    assert not close(np.array([1.0, 1.0]), np.array([1.0, 1.1]))
    assert not close(np.ones(2, "float32"), np.ones(2))
