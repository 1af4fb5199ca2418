"""The number of distinct values: within its error, the same on any cut."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fanfold.errors import DataError, MissingExtra, PlanError
from fanfold.merge import Distinct, fold
from fanfold.merge.distinct import DistinctPart
from fanfold.testing import laws

DRAW = np.random.default_rng(0)


def over(merge, rows, cuts=()):
    bounds = zip([0, *cuts], [*cuts, len(rows)], strict=True)
    return merge.finish(fold(merge, [merge.lift(rows[a:b], b - a) for a, b in bounds]))


def numbers(seed, count):
    """Distinct 64-bit ints: an odd multiplier permutes them."""
    return np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15 + 2 * seed) + np.uint64(seed)


@pytest.mark.parametrize("error", [0.1, 0.02, 0.01])
@pytest.mark.parametrize("count", [1, 10, 1000, 20_000])
def test_the_estimate_is_within_the_stated_error(error, count):
    """Over 20 seeds: the root mean square within 1.5 errors (below it by chance in 999 of 1000), each within 4."""
    off = [over(Distinct(error), numbers(seed, count).view("i8")) / count - 1 for seed in range(20)]
    assert max(map(abs, off)) <= 4 * error
    assert math.sqrt(sum(one * one for one in off) / len(off)) <= 1.5 * error


@pytest.mark.slow
def test_a_million_values_are_counted_within_the_error():
    off = [over(Distinct(), numbers(seed, 1_000_000).view("i8"), [300_000]) / 1e6 - 1 for seed in range(3)]
    assert max(map(abs, off)) <= 0.03


@pytest.mark.parametrize("count", [0, 1, 10, 100, 1000])
def test_few_values_are_counted_exactly(count):
    assert over(Distinct(), numbers(0, count)) == count


@pytest.mark.parametrize("error", [0.1, 0.01])
@pytest.mark.parametrize("count", [7, 8, 9, 20, 100, 1023, 1024, 1025, 1536, 1537, 5000, 30_000])
def test_the_estimate_does_not_depend_on_cut_order_or_repeats(error, count):
    merge, found = Distinct(error), set()
    for _ in range(8):
        rows = DRAW.permutation(np.concatenate([numbers(1, count), numbers(1, count // 2)]))
        found.add(over(merge, rows, sorted(DRAW.integers(0, len(rows), DRAW.integers(0, 7)))))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ([0.0, -0.0, 1.5], 2),
        ([np.nan, -np.nan, np.float64(np.nan), 1.0], 2),
        ([np.inf, -np.inf, np.nan], 3),
        (["", "a", "a", "\u00e4", "\ud800"], 4),
        ([b"", b"\xff", b"\xff"], 2),
        ([True, False, True], 2),
        (np.array([2**64 - 1, 2**63, 5], "u8"), 3),
        (np.array([[1, 2], [2, 3]]), 3),
    ],
)
def test_values_that_are_equal_count_once(values, count):
    assert over(Distinct(), values) == count
    assert over(Distinct(), values, [1]) == count


def test_widths_of_one_kind_are_counted_together():
    for dtypes in (("i1", "u8"), ("f4", "f8"), ("U1", "U9")):
        parts = [Distinct().lift(np.array([1, 2]).astype(dtype), 2) for dtype in dtypes]
        assert Distinct().finish(fold(Distinct(), parts)) == 2


@pytest.mark.parametrize("other", [[1.0], ["1"], [b"1"], [True]])
def test_other_kinds_in_other_pieces_are_refused(other):
    with pytest.raises(DataError, match="count distinct values") as caught:
        Distinct().join(Distinct().lift([1], 1), Distinct().lift(other, 1))
    assert caught.value.found.startswith("ints, then ")


def test_parts_of_another_error_and_damaged_sketches_are_refused():
    with pytest.raises(DataError, match="count distinct values") as caught:
        Distinct().join(Distinct().empty(), Distinct(0.1).lift([1], 1))
    assert "a part with 2^7 registers" in caught.value.found
    with pytest.raises(DataError, match="cannot be read"):
        Distinct().finish(DistinctPart(14, "ints", b"damaged"))


@pytest.mark.parametrize("error", [0.0, 1e-4, 1.0, math.nan, -1, "1%", None])
def test_impossible_errors_are_refused(error):
    with pytest.raises(PlanError, match="Distinct"):
        Distinct(error)


@pytest.mark.parametrize("value", [np.array([1j]), 3, [1, 2], [[1], [1, 2]], [None]])
def test_values_that_cannot_be_counted_are_refused(value):
    with pytest.raises(DataError, match="count distinct values"):
        Distinct().lift(value, 1)


def test_the_fewest_registers_that_hold_the_error_are_taken():
    assert [Distinct(error).lg_k for error in (0.5, 0.0919, 0.0918, 0.01, 0.001)] == [7, 7, 8, 14, 21]


def test_the_laws_hold_exactly():
    laws.check_all(Distinct(0.1), [(numbers(0, n), n) for n in (3, 0, 200, 9, 40)], laws.exactly)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("fanfold.extras.has", lambda module: False)
    with pytest.raises(MissingExtra, match="distinct values") as caught:
        Distinct().lift([1], 1)
    assert "fanfold[sketch]" in caught.value.do
