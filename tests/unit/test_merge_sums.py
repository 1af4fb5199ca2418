"""Count, Sum and Mean against exact arithmetic (Fraction), math.fsum and NumPy, on any cut."""

from __future__ import annotations

import doctest
import math
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.errors import DataError
from fanfold.merge import Count, Mean, Sum, Weighted, fold, sums

few = settings(max_examples=50, deadline=None, derandomize=True, database=None)
U64, U32 = 2.0**-53, 2.0**-24
NAN, INF = float("nan"), float("inf")


def result(merge, values, rows=1):
    return merge.finish(fold(merge, [merge.lift(value, rows) for value in values]))


def cut_into_runs(merge, values, num_cuts, draw):
    """The result when consecutive runs of values are folded first, and the height of that tree."""
    cuts = sorted(draw.choices(range(len(values) + 1), k=num_cuts))
    runs = [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    parts = [fold(merge, [merge.lift(value, 1) for value in run]) for run in runs]
    height = (num_cuts + 1).bit_length() + max(map(len, runs)).bit_length()
    return merge.finish(fold(merge, parts)), height


def sum_bound(values, height, u):
    exact, sum_abs = sum(map(Fraction, values)), sum(abs(Fraction(v)) for v in values)
    return u * abs(exact) + 3 * Fraction((height + 1) * u) ** 2 * sum_abs


def test_doctests_in_the_module_hold():
    assert doctest.testmod(sums).failed == 0


def test_count_is_the_number_of_rows():
    merge = Count()
    assert merge.finish(fold(merge, [merge.lift("x", 3), merge.lift(None, 0), merge.lift([], 4)])) == 7
    assert result(merge, []) == 0


@few
@given(st.lists(st.floats(-1e300, 1e300), max_size=40), st.integers(0, 2**32))
def test_sum_of_floats_is_within_its_bound_on_any_cut(values, seed):
    found, height = cut_into_runs(Sum(of="pieces"), values, 4, random.Random(seed))
    assert abs(Fraction(found) - sum(map(Fraction, values))) <= sum_bound(values, height, U64)


@pytest.mark.parametrize("num_values", [10, 1000, 5000])
def test_sum_equals_fsum_to_the_last_bit_where_values_do_not_cancel(num_values):
    draw = random.Random(num_values)
    values = [draw.lognormvariate(0, 8) for _ in range(num_values)]
    exact = math.fsum(values)
    for num_cuts in (0, 1, 7, 60):
        found, _ = cut_into_runs(Sum(of="pieces"), values, num_cuts, draw)
        assert abs(found - exact) <= math.ulp(exact)
    assert result(Sum(of="pieces"), [1e16, 1.0, 1.0, -1e16]) == 2.0


def test_sum_of_float32_arrays_is_within_its_bound():
    draw = np.random.default_rng(0)
    values = (draw.standard_normal((500, 6)) * 10.0 ** draw.integers(-6, 6, (500, 6))).astype("float32")
    found, height = cut_into_runs(Sum(of="pieces"), list(values), 5, random.Random(0))
    assert found.dtype == np.float32
    assert found.shape == (6,)
    for column, total in zip(values.T.tolist(), found.tolist(), strict=True):
        assert abs(Fraction(total) - sum(map(Fraction, column))) <= sum_bound(column, height, U32)


def test_sum_of_ints_is_exact_and_stays_int():
    values = [10**40, -1, 3, -(10**40), True, np.int8(5)]
    assert result(Sum(of="pieces"), values) == 8
    assert type(result(Sum(of="pieces"), values)) is int
    assert result(Sum(of="pieces"), []) == 0


def test_ints_and_floats_together_lose_nothing_that_a_float_can_hold():
    assert result(Sum(of="pieces"), [2**53, 1, 0.5, -(2**53)]) == 1.5
    assert result(Sum(of="pieces"), [0.5, 2**60 + 1, -(2**60)]) == 1.5
    with pytest.raises(DataError, match="an int too large for its type"):
        result(Sum(of="pieces"), [10**400, 0.5])


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint32", "int64"])
def test_arrays_of_small_ints_are_summed_in_int64(dtype):
    largest = 1 if dtype == "bool" else np.iinfo(dtype).max // (4 if dtype == "int64" else 1)
    found = result(Sum(of="pieces"), [np.array([largest, 0, 1], dtype)] * 3)
    assert found.dtype == np.int64
    assert found.tolist() == [3 * int(largest), 0, 3]


def test_arrays_of_ints_that_would_overflow_are_refused():
    for value in (np.int64(2**62), np.int64(-(2**62) - 1), np.uint64(2**63)):
        with pytest.raises(DataError, match=r"a sum beyond u?int64 too large") as caught:
            result(Sum(of="pieces"), [np.array([0, value], value.dtype)] * 2)
        assert caught.value.do == "scale the values down, or return float64 values"
    assert result(Sum(of="pieces"), [np.array([2**63], "uint64"), np.array([5], "uint64")]).tolist() == [2**63 + 5]


def test_float16_is_summed_in_float32():
    found = result(Sum(of="pieces"), [np.array([60000.0], "float16")] * 4)
    assert found.dtype == np.float32
    assert found.tolist() == [4 * float(np.float16(60000.0))]


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "longdouble", ">f8"])
def test_other_float_dtypes_keep_their_dtype(dtype):
    found = result(Sum(of="pieces"), [np.array([1.5, 2], dtype)] * 3)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert found.tolist() == [4.5, 6]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, NAN, INF], NAN),
        ([INF, 1.0, -INF], NAN),
        ([1.0, INF, 2.0, INF], INF),
        ([-INF, 1e308], -INF),
        ([1e308, 1e308], INF),
    ],
)
def test_nan_and_infinity_propagate(values, expected):
    np.testing.assert_equal(result(Sum(of="pieces"), values), expected)
    np.testing.assert_equal(result(Mean(of="pieces"), values), expected)
    arrays = [np.array([value, 1.0, 1e16]) for value in values]
    np.testing.assert_equal(result(Sum(of="pieces"), arrays), [expected, len(values), len(values) * 1e16])


def test_infinity_in_one_element_leaves_the_others_compensated():
    arrays = [np.array([INF, 1e16]), np.array([1.0, 1.0]), np.array([1.0, -1e16])]
    assert result(Sum(of="pieces"), arrays).tolist() == [INF, 1.0]


def test_the_sign_of_zero_is_not_kept_whatever_the_cut():
    for values in ([-0.0], [-0.0, -0.0]):
        assert math.copysign(1, result(Sum(of="pieces"), values)) == 1


@few
@given(
    st.lists(st.tuples(st.floats(-1e200, 1e200), st.integers(1, 10**9)), min_size=1, max_size=30),
    st.floats(0.01, 100),
)
def test_mean_is_within_its_bound_of_the_exact_weighted_mean(pairs, scale):
    for weighted in (False, True):
        merge = Mean(of="pieces")
        weights = [rows * scale if weighted else rows for _, rows in pairs]
        parts = [
            merge.lift(Weighted(value, w) if weighted else value, rows)
            for (value, rows), w in zip(pairs, weights, strict=True)
        ]
        total = sum(map(Fraction, weights))
        terms = [Fraction(value) * Fraction(w) for (value, _), w in zip(pairs, weights, strict=True)]
        found = Fraction(merge.finish(fold(merge, parts)))
        assert abs(found - sum(terms) / total) <= 8 * Fraction(U64) * sum(map(abs, terms)) / total


def test_mean_of_unequal_pieces_is_the_mean_of_all_rows():
    draw = np.random.default_rng(1)
    table = draw.standard_normal((1000, 4))
    merge = Mean(of="pieces")
    pieces = np.split(table, [1, 17, 400, 401, 999])
    found = merge.finish(fold(merge, [merge.lift(piece.mean(axis=0), len(piece)) for piece in pieces]))
    np.testing.assert_allclose(found, table.mean(axis=0), rtol=1e-13)


def test_mean_of_float32_arrays_is_float32_within_its_bound():
    draw = np.random.default_rng(2)
    values, rows = draw.standard_normal((200, 3)).astype("float32"), draw.integers(1, 2**26, 200)
    merge = Mean(of="pieces")
    parts = [merge.lift(value, int(n)) for value, n in zip(values, rows, strict=True)]
    found = merge.finish(fold(merge, parts))
    assert found.dtype == np.float32
    for column, mean in zip(values.T.tolist(), found.tolist(), strict=True):
        terms = [Fraction(value) * int(n) for value, n in zip(column, rows, strict=True)]
        total = int(rows.sum())
        assert abs(Fraction(mean) - sum(terms) / total) <= 8 * Fraction(U32) * sum(map(abs, terms)) / total


def test_mean_of_ints_is_the_float_nearest_to_the_exact_mean():
    values = [2**60 + 1, 2**60 + 3, 5]
    assert result(Mean(of="pieces"), values, rows=7) == float(Fraction(sum(values), 3))
    assert result(Mean(of="pieces"), [np.array([1, 2], "uint8"), np.array([200, 250], "uint8")]).tolist() == [
        100.5,
        126,
    ]


def test_weight_zero_adds_nothing_whatever_the_value():
    merge = Mean(of="pieces")
    parts = [merge.lift(NAN, 0), merge.lift(3.0, 2), merge.lift(Weighted(INF, 0.0), 5)]
    assert merge.finish(fold(merge, parts)) == 3.0
    assert Sum(of="pieces").finish(Sum(of="pieces").lift(NAN, 0)) == 0


@pytest.mark.parametrize("values", [[], [Weighted(1.0, 0)]])
def test_mean_of_nothing_says_so_in_four_parts(values):
    with pytest.raises(DataError, match="take the mean") as caught:
        result(Mean(of="pieces"), values)
    assert caught.value.found == "no rows, or no weight above 0"
    assert caught.value.allowed == "at least one row"
    assert "check that the input is not empty" in caught.value.do


@pytest.mark.parametrize("weight", [NAN, INF, -1.0, -1, 10**400, "2", None, 1j, np.ones(2), np.float64("nan")])
def test_a_weight_that_is_not_one_finite_number_is_refused(weight):
    with pytest.raises(DataError, match="the weight"):
        Mean(of="pieces").lift(Weighted(1.0, weight), 1)


def test_weights_and_values_too_large_for_a_mean_are_refused():
    with pytest.raises(DataError, match="too large"):
        result(Mean(of="pieces"), [Weighted(1.0, 1e308), Weighted(1.0, 1e308)])
    with pytest.raises(DataError, match="too large"):
        result(Mean(of="pieces"), [10**400])
    with pytest.raises(DataError, match="too large"):
        result(Mean(of="pieces"), [Weighted(10**400, 0.5)])


@pytest.mark.parametrize(
    "value", ["text", None, [1.0], {"a": 1}, np.array(["a"]), np.array([None]), np.array(["2020"], "M8[D]")]
)
@pytest.mark.parametrize("merge", [Sum(of="pieces"), Mean(of="pieces")])
def test_values_that_are_no_numbers_are_refused(merge, value):
    with pytest.raises(DataError, match=f"a piece gave a {type(value).__name__}"):
        merge.lift(value, 1)


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        (np.ones(2), np.ones(3), r"float64 of shape \(2,\), then float64 of shape \(3,\)"),
        (np.ones((1, 3)), np.ones(3), r"shape \(1, 3\), then"),
        (np.ones(2), np.ones(2, "float32"), "then float32"),
        (np.ones(2), 1.0, "then a number"),
        (np.ones(2), np.ones(2, int), "then int64"),
    ],
)
def test_pieces_of_different_shape_or_dtype_are_refused(left, right, found):
    with pytest.raises(DataError, match=found):
        result(Sum(of="pieces"), [left, right])


def test_zero_dimensional_arrays_are_numbers():
    assert result(Sum(of="pieces"), [np.array(1.5), np.float32(0.25), 1]) == 2.75
    assert type(result(Mean(of="pieces"), [np.array(2)])) is float


def test_lifted_arrays_are_not_written_to():
    values = [np.array([1e16, 1.0]), np.array([1.0, INF])]
    for value in values:
        value.flags.writeable = False
    assert result(Sum(of="pieces"), values) is not values[0]
    assert result(Sum(of="pieces"), values[:1]) is not values[0]


@pytest.mark.torch
def test_torch_tensors_are_summed_like_arrays():
    torch = pytest.importorskip("torch")
    values = [torch.tensor([1e8, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([-1e8, float("inf")])]
    assert result(Sum(of="pieces"), values).tolist() == [1.0, INF]
    assert result(Mean(of="pieces"), values[:2], rows=3).dtype == torch.float32
    assert result(Sum(of="pieces"), [torch.tensor([200], dtype=torch.uint8)] * 2).tolist() == [400]
    assert result(Sum(of="pieces"), [torch.tensor([3e38], dtype=torch.bfloat16)]).dtype == torch.float32
    assert result(Mean(of="pieces"), [torch.tensor([1, 2])] * 2).tolist() == [1.0, 2.0]
    assert result(Sum(of="pieces"), [torch.tensor(1.5), torch.tensor(2)]) == 3.5
    with pytest.raises(DataError, match="a sum beyond int64"):
        result(Sum(of="pieces"), [torch.tensor([2**62])] * 2)


def test_floats_are_merged_without_numpy():
    code = (
        "import sys; from fanfold.merge import Mean, Sum, fold; m = Mean(of='pieces');"
        "assert m.finish(fold(m, [m.lift(1.0, 1), m.lift(2, 3)])) == 1.75; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
