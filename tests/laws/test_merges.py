"""Every merge keeps the laws on data drawn by Hypothesis; and the laws catch merges that break them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.errors import DifferenceFound
from fanfold.merge import Concat, Count, Mean, Sum, Weighted
from fanfold.testing import laws

# No deadline: the machine may be busy. Derandomised: the same examples in every run.
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)

U64, U32 = 2.0**-53, 2.0**-24
LIMIT, MAX_PIECES = 1e6, 12
ints = st.integers(-(10**30), 10**30)
floats = st.floats(-LIMIT, LIMIT)
any_floats = floats | st.sampled_from([float("nan"), float("inf"), float("-inf")])
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
}


@pytest.mark.parametrize("name", MERGES)
def test_merge_keeps_every_law(name):
    merge, drawn, equal = MERGES[name]

    @few
    @given(drawn)
    def keeps(values):
        laws.check_all(merge, values, equal)

    keeps()


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
