"""Several merges at once give what each gives alone, and keep the laws."""

from __future__ import annotations

import doctest

import pytest

from fanfold.errors import DataError, PlanError
from fanfold.merge import Count, Mean, Sum, record
from fanfold.merge.record import Record
from fanfold.testing import laws


def test_doctests_in_the_module_hold():
    assert doctest.testmod(record).failed == 0


def test_a_record_keeps_every_law():
    merge = Record({"sum": Sum(), "rows": Count()})
    laws.check_all(merge, [([1, 2], 2), ([5], 1), ([], 0), ([7, 8, 9], 3)], lambda left, right: left == right)


def test_parts_of_another_record_are_refused():
    with pytest.raises(DataError, match="by name"):
        Record({"a": Sum()}).join(Record({"b": Sum()}).empty(), Record({"a": Sum()}).empty())


@pytest.mark.parametrize("merges", [{}, {1: Mean()}, [Mean()]])
def test_what_names_no_merge_is_refused(merges):
    with pytest.raises(PlanError, match="Record"):
        Record(merges)
