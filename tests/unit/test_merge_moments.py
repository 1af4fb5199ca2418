"""Moments against SciPy's formulas, quantiles against NumPy's, on any cut."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fanfold.errors import DataError, PlanError
from fanfold.merge import fold
from fanfold.merge.moments import Moments
from fanfold.merge.quantiles import Quantiles
from fanfold.testing import laws

DRAW = np.random.default_rng(0)
CUTS = [[], [1], [700], [0, 0, 5, 999, 1000], list(range(1, 1000, 13))]


def over(merge, rows, cuts):
    bounds = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    return merge.finish(fold(merge, [merge.lift(rows[a:b], b - a) for a, b in bounds]))


def close(left, right):
    names = ("count", "mean", "variance", "skewness", "kurtosis")
    pairs = [(getattr(left, name), getattr(right, name)) for name in names]
    return all(np.allclose(a, b, rtol=1e-11, atol=1e-11, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_moments_are_those_of_all_rows_in_high_precision(cuts, shift):
    rows = DRAW.lognormal(size=(1000, 2)) + shift
    found = over(Moments(), rows, cuts)
    exact = rows.astype("longdouble")
    apart = exact - exact.mean(0)
    variance = (apart**2).mean(0)
    rtol = 1e-12 if not shift else 1e-8
    assert found.count == 1000
    assert np.allclose(found.mean, exact.mean(0).astype(float), rtol=1e-15)
    assert np.allclose(found.variance, variance.astype(float), rtol=rtol)
    assert np.allclose(found.skewness, ((apart**3).mean(0) / variance**1.5).astype(float), rtol=rtol)
    assert np.allclose(found.kurtosis, ((apart**4).mean(0) / variance**2 - 3).astype(float), rtol=rtol)
    assert np.allclose(found.sample_variance, rows.var(0, ddof=1), rtol=rtol)


def test_equal_rows_have_no_variance_and_no_shape():
    found = over(Moments(), np.full(100, 0.1), [3, 50])
    assert (found.mean, found.variance) == (0.1, 0.0)
    assert math.isnan(found.skewness)
    assert math.isnan(over(Moments(), [3.0], []).sample_variance)


@pytest.mark.parametrize("cuts", [[], [1], [100, 100, 299], list(range(1, 300))])
@pytest.mark.parametrize("shift", [0.0, 1e8, -1e12, 1e15])
def test_no_digits_are_lost_far_from_0(cuts, shift):
    rows = DRAW.standard_normal(300) + shift
    exact = [Fraction(row) for row in rows.tolist()]
    mean = sum(exact) / 300
    m2, m3, m4 = (float(sum((row - mean) ** power for row in exact) / 300) for power in (2, 3, 4))
    without_signs = float(sum(abs(row - mean) ** 3 for row in exact) / 300)
    found = over(Moments(), rows, cuts)
    assert abs(Fraction(float(found.mean)) - mean) <= Fraction(math.ulp(abs(shift) + 0.25))
    assert abs(found.variance - m2) <= 1e-14 * m2
    assert abs(found.skewness * found.variance**1.5 - m3) <= 1e-14 * without_signs
    assert abs((found.kurtosis + 3) * found.variance**2 - m4) <= 1e-14 * m4


@pytest.mark.parametrize(
    ("bad", "mean"), [([np.nan], np.nan), ([np.inf], np.inf), ([-np.inf] * 2, -np.inf), ([np.inf, -np.inf], np.nan)]
)
@pytest.mark.parametrize("cuts", [[], [1], [1, 2]])
def test_infinities_give_the_mean_that_mean_gives_and_no_higher_moments(bad, mean, cuts):
    found = over(Moments(), np.array([*bad, 2.0, 5.0]), cuts)
    assert found.mean == mean or (math.isnan(found.mean) and math.isnan(mean))
    assert np.isnan([found.variance, found.skewness, found.kurtosis]).all()


def test_the_buckets_are_joined_once_for_all_quantiles(monkeypatch):
    part, calls, join = Quantiles(0.5).lift(np.arange(-5.0, 5.0), 10), [], np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda arrays: calls.append(1) or join(arrays))
    Quantiles(tuple(np.linspace(0, 1, 50))).finish(part)
    assert len(calls) == 2  # middles and counts


PIECES = [(DRAW.standard_normal(n), n) for n in (3, 0, 1, 40, 7)]


def test_moments_keep_the_laws():
    laws.check_all(Moments(), PIECES, close)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.99, 1.0, (0.1, 0.9)])
def test_quantiles_keep_the_laws_exactly(q):
    laws.check_all(Quantiles(q), PIECES, laws.exactly)


@pytest.mark.parametrize("error", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("cuts", CUTS)
def test_quantiles_are_within_their_error(error, cuts):
    rows = DRAW.standard_normal(1000) * 10.0 ** DRAW.integers(-20, 20, 1000)
    rows[:50] = 0
    at = tuple(np.linspace(0, 1, 101))
    exact = np.quantile(rows, at, method="lower")
    found = over(Quantiles(at, error=error), rows, cuts)
    assert (np.abs(found - exact) <= error * np.abs(exact) * (1 + 1e-9)).all()
    assert (found[0], found[-1]) == (rows.min(), rows.max())


def test_quantiles_of_infinities_and_nan():
    rows = np.array([-np.inf, -np.inf, 1.0, np.inf, np.inf])
    assert over(Quantiles((0.25, 0.75)), rows, [2]).tolist() == [-np.inf, np.inf]
    assert math.isnan(over(Quantiles(0.5), np.array([1.0, np.nan]), [1]))


@pytest.mark.parametrize(
    ("q", "error"), [(1.1, 0.01), (-0.1, 0.01), ((), 0.01), (0.5, 0.0), (math.nan, 0.01), (True, 0.01)]
)
def test_impossible_quantiles_are_refused(q, error):
    with pytest.raises(PlanError, match="Quantiles"):
        Quantiles(q, error=error)


@pytest.mark.parametrize("merge", [Moments(), Quantiles(0.5)])
def test_no_rows_text_and_other_lengths_are_refused(merge):
    for value in (np.ones(4), ["a", "b", "c"]):
        with pytest.raises(DataError, match="over rows"):
            merge.lift(value, 3)
    with pytest.raises(DataError, match="over rows") as caught:
        merge.finish(merge.empty())
    assert "at least one row" in str(caught.value)


def test_parts_of_another_error_or_shape_are_refused():
    with pytest.raises(DataError, match="quantiles") as caught:
        Quantiles(0.5).join(Quantiles(0.5).empty(), Quantiles(0.5, error=0.1).empty())
    assert "error=0.1" in str(caught.value)
    with pytest.raises(DataError, match="moments"):
        Moments().join(Moments().lift(np.ones((1, 2)), 1), Moments().lift(np.ones((1, 3)), 1))
