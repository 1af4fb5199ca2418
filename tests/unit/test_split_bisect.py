from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.split.bisect import Bisection


def drive(num_rows, fails):
    """Tries needed, and the bisection at its end."""
    bisection = Bisection(num_rows)
    tries = 0
    while (rows := bisection.next()) is not None:
        tries += 1
        bisection.tell(not fails(set(rows)))
        assert tries < 10_000
    return tries, bisection


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 31, 32, 33, 341])
def test_one_culprit_is_found_in_the_promised_number_of_tries(num_rows):
    for culprit in range(num_rows):
        tries, bisection = drive(num_rows, lambda rows, culprit=culprit: culprit in rows)
        assert bisection.bad == {culprit}
        assert bisection.good == set(range(num_rows)) - {culprit}
        assert tries <= math.ceil(math.log2(num_rows)) + 1


def test_a_failure_that_does_not_come_back_has_no_culprit():
    tries, bisection = drive(32, lambda rows: False)
    assert not bisection.bad
    assert bisection.good == set(range(32))
    assert tries <= 6


@given(st.integers(1, 200), st.sets(st.integers(0, 199), max_size=12))
def test_every_culprit_is_found_and_nobody_else(num_rows, culprits):
    culprits = {row for row in culprits if row < num_rows}
    tries, bisection = drive(num_rows, lambda rows: bool(rows & culprits))
    assert bisection.bad == culprits
    assert bisection.good == set(range(num_rows)) - culprits
    assert tries <= max(1, len(culprits)) * (math.ceil(math.log2(num_rows)) + 1) + 1


def test_rows_that_fail_only_together_end_with_every_row_decided():
    _, bisection = drive(16, lambda rows: {3, 12} <= rows)
    assert bisection.good | bisection.bad == set(range(16))
    assert len(bisection.bad) <= 1


def test_a_try_that_nobody_told_about_is_made_again():
    bisection = Bisection(4)
    with pytest.raises(ValueError, match="nothing was tried"):
        bisection.tell(True)
    assert bisection.next() == bisection.next() == (0, 1)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 31, 32, 341])
def test_with_one_a_culprit_must_fail_by_itself(num_rows):
    for culprit in range(num_rows):
        bisection, alone, tries = Bisection(num_rows, one=True), False, 0
        while (rows := bisection.next()) is not None:
            tries += 1
            alone = alone or rows == (culprit,)
            bisection.tell(culprit not in rows)
        assert bisection.bad == {culprit}
        assert alone
        assert tries <= math.ceil(math.log2(num_rows)) + 1


def test_with_one_a_single_failure_by_chance_convicts_nobody():
    for chance in range(8):
        bisection, tries = Bisection(32, one=True), 0
        while bisection.next() is not None:
            bisection.tell(tries != chance or len(bisection.next()) == 1)
            tries += 1
        assert not bisection.bad
