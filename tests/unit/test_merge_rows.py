"""Values of one per row: sums and means over axis 0 of the pieces, against exact arithmetic, on any cut."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fanfold.errors import DataError, PlanError
from fanfold.merge import Mean, Sum, Weighted, fold


def over(merge, values, cuts):
    bounds = zip([0, *cuts], [*cuts, len(values)], strict=True)
    return merge.finish(fold(merge, [merge.lift(values[a:b], b - a) for a, b in bounds]))


CUTS = [[], [1], [500], [0, 0, 3, 997, 1000], list(range(1, 1000, 7))]
DRAW = np.random.default_rng(0)
WILD = DRAW.standard_normal(1000) * 10.0 ** DRAW.integers(-12, 12, 1000)


@pytest.mark.parametrize("cuts", CUTS)
def test_a_sum_over_rows_is_the_exact_one_to_the_last_bit(cuts):
    assert abs(over(Sum(), WILD, cuts) - math.fsum(WILD)) <= math.ulp(math.fsum(WILD))


@pytest.mark.parametrize("cuts", CUTS)
def test_what_cancels_is_not_lost_in_a_piece_or_between(cuts):
    values = np.concatenate([WILD, -WILD, [1e-9]])[DRAW.permutation(2001)]
    assert over(Sum(), values, cuts) == pytest.approx(1e-9, rel=1e-9)


@pytest.mark.parametrize("cuts", CUTS)
def test_a_mean_over_rows_is_the_exact_one(cuts):
    exact = sum(map(Fraction, WILD.tolist())) / 1000
    assert abs(Fraction(over(Mean(), WILD, cuts)) - exact) <= 2 * Fraction(math.ulp(float(exact)))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "uint64", "bool"])
@pytest.mark.parametrize("cuts", CUTS)
def test_columns_of_an_array_are_summed_apart(dtype, cuts):
    values = (DRAW.random((1000, 3)) * 100).astype(dtype)
    found = over(Sum(), values, cuts)
    exact = [math.fsum(column) for column in values.T.tolist()]
    assert found.shape == (3,)
    assert np.allclose(found, exact, rtol=2e-7 if dtype == "float32" else 1e-15)
    assert found.dtype == {"int8": "int64", "bool": "int64"}.get(dtype, dtype)


def test_rows_of_ints_are_exact_beyond_64_bits():
    assert over(Sum(), np.array([2**62, 2**62, 2**62, 1]), [2]) == 3 * 2**62 + 1
    assert over(Sum(), np.array([True, False, True]), [1]) == 2
    assert over(Mean(), np.array([2**62 + 1, 2**62 + 3]), [1]) == float(2**62 + 2)


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([1.0, math.inf], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([1e16, 1.0, -1e16], 1.0),
        ([1e308, 1e300, -1e300], 1e308),
        ([0.0, 0.0], 0.0),
        ([5e-324, 5e-324], 1e-323),
    ],
)
def test_nan_infinities_and_extremes_of_the_range(values, total):
    for cuts in ([], [1]):
        found = over(Sum(), np.array(values), cuts)
        assert found == total or (math.isnan(found) and math.isnan(total))


def test_lists_are_values_of_one_per_row_too():
    assert over(Sum(), [1, 2, 3], [1]) == 6
    assert over(Mean(), [1.0, 2.0, 6.0], [2]) == 3.0
    assert over(Sum(), [1 + 2j, 3j], [1]) == 1 + 5j


@pytest.mark.parametrize("merge", [Sum(), Mean()])
@pytest.mark.parametrize("value", [3.0, np.ones(4), np.ones((5, 3)), [[1], [1, 2]]])
def test_other_lengths_than_the_rows_are_refused(merge, value):
    with pytest.raises(DataError, match="over rows") as caught:
        merge.lift(value, 3)
    assert "one value for each row" in str(caught.value)


def test_a_value_for_each_piece_is_declared():
    assert Mean(of="pieces").finish(Mean(of="pieces").lift(3.0, 7)) == 3.0
    with pytest.raises(PlanError, match="Mean"):
        Mean(of="columns")


def test_weights_for_each_row():
    values, weights = np.array([1.0, 2.0, np.nan, 4.0]), np.array([1.0, 1.0, 0.0, 2.0])
    merge = Mean()
    whole = merge.finish(merge.lift(Weighted(values, weights), 4))
    parts = [merge.lift(Weighted(values[:1], weights[:1]), 1), merge.lift(Weighted(values[1:], weights[1:]), 3)]
    assert whole == merge.finish(fold(merge, parts)) == 11 / 4
    for bad in (np.array([1.0, 2.0]), np.array([1.0, np.nan, 1.0, 1.0]), np.array([1.0, -1.0, 1.0, 1.0])):
        with pytest.raises(DataError, match="weigh"):
            merge.lift(Weighted(values, bad), 4)


@pytest.mark.torch
def test_torch_tensors_give_what_numpy_gives():
    import torch

    values = WILD.reshape(500, 2)
    assert over(Sum(), torch.from_numpy(WILD), [300]) == over(Sum(), WILD, [300])
    assert over(Sum(), torch.ones((3, 0), dtype=torch.int64), [1]).shape == (0,)
    assert np.array_equal(over(Sum(), torch.from_numpy(values), [300]).numpy(), over(Sum(), values, [300]))
    narrow = values.astype("float32")
    found = over(Mean(), torch.from_numpy(narrow), [300])
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), over(Mean(), narrow, [300]))
