"""Inline, threads or processes: the shortest predicted time, the simplest where others gain little."""

from __future__ import annotations

import pytest

from fanfold.errors import PlanError
from fanfold.planner.carrier import Carrier, Measured, choose_carrier, parse_on


def measured(**changes):
    settings = {"row_s": 1e-6, "thread_speedup": 1.9, "bytes_per_row": 16, "portable": True, "start_s": 0.6}
    return Measured(**{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "rows", "kind"),
    [
        ({}, 100, "inline"),
        ({}, 10_000_000, "threads"),
        ({"thread_speedup": 1.0}, 100_000, "inline"),
        ({"thread_speedup": 1.0}, 10_000_000, "cpu"),
        ({"thread_speedup": 1.0, "portable": False}, 10_000_000, "inline"),
        ({"thread_speedup": 1.0, "bytes_per_row": 10_000}, 10_000_000, "inline"),
        ({"thread_speedup": 0.5}, 10_000_000, "cpu"),
    ],
)
def test_the_shortest_predicted_time_is_chosen_and_says_why(changes, rows, kind):
    chosen = choose_carrier(measured(**changes), rows, 2)
    assert chosen.kind == kind
    assert "predicted inline" in chosen.reason


def test_one_core_runs_inline():
    assert choose_carrier(measured(), 10**9, 1).kind == "inline"


def test_places_are_read_as_asked():
    assert parse_on("auto", 4) is None
    assert parse_on("threads", 4) == Carrier("threads", 4, "as asked")
    assert parse_on("cpu:3", 2) == Carrier("cpu", 3, "as asked")
    assert parse_on("inline", 2) == Carrier("inline", 1, "as asked")
    with pytest.raises(PlanError, match="cpu:17") as caught:
        parse_on("cpu:17", 2)
    assert "cpu:1 to cpu:16" in str(caught.value)
