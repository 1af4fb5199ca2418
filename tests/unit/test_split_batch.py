"""A cut holds every row once, in batches under the budget, and depends on its arguments alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.split.batch import Batch, cut, deal

LENGTHS = st.lists(st.integers(min_value=0, max_value=600), max_size=60)
BUDGETS = st.integers(min_value=1, max_value=2048)
PIECE_BATCHES = st.integers(min_value=1, max_value=5)


def numbered(lengths):
    """Offsets with gaps, as they are where rows of a window have failed."""
    return [3 * i + 1 for i in range(len(lengths))]


def batches_of(made):
    return [batch for piece in made.pieces for batch in piece]


@settings(max_examples=30)
@given(LENGTHS, BUDGETS, PIECE_BATCHES)
def test_every_row_stands_once(lengths, budget, piece_batches):
    offsets = numbered(lengths)
    made = cut(offsets, lengths, batch_tokens=budget, piece_batches=piece_batches)
    assert sorted(made.order) == offsets
    assert sum(made.rows) == len(lengths)


@settings(max_examples=30)
@given(LENGTHS, BUDGETS, PIECE_BATCHES)
def test_batches_partition_the_order(lengths, budget, piece_batches):
    made = cut(numbered(lengths), lengths, batch_tokens=budget, piece_batches=piece_batches)
    batches = batches_of(made)
    assert [batch.start for batch in batches] == [0, *(batch.stop for batch in batches)][: len(batches)]
    assert all(batch.rows >= 1 for batch in batches)
    assert (batches[-1].stop if batches else 0) == len(lengths)


@settings(max_examples=30)
@given(LENGTHS, BUDGETS)
def test_a_batch_is_within_the_budget_or_a_single_row(lengths, budget):
    for batch in batches_of(cut(numbered(lengths), lengths, batch_tokens=budget)):
        assert batch.padded_tokens <= budget or batch.rows == 1


@settings(max_examples=30)
@given(LENGTHS, BUDGETS)
def test_a_batch_is_as_large_as_the_budget_allows(lengths, budget):
    batches = batches_of(cut(numbered(lengths), lengths, batch_tokens=budget))
    for batch in batches[:-1]:
        assert (batch.rows + 1) * batch.length > budget


@settings(max_examples=30)
@given(LENGTHS, BUDGETS)
def test_the_order_is_by_falling_length_then_by_offset(lengths, budget):
    offsets = numbered(lengths)
    length_of = dict(zip(offsets, lengths, strict=True))
    made = cut(offsets, lengths, batch_tokens=budget)
    keys = [(-length_of[offset], offset) for offset in made.order]
    assert keys == sorted(keys)
    for batch in batches_of(made):
        assert batch.length == max(1, *(length_of[offset] for offset in made.order[batch.start : batch.stop]))


@settings(max_examples=30)
@given(LENGTHS, BUDGETS, PIECE_BATCHES)
def test_pieces_partition_the_batches(lengths, budget, piece_batches):
    made = cut(numbered(lengths), lengths, batch_tokens=budget, piece_batches=piece_batches)
    assert batches_of(made) == batches_of(cut(numbered(lengths), lengths, batch_tokens=budget))
    assert all(len(piece) == piece_batches for piece in made.pieces[:-1])
    assert all(1 <= len(piece) <= piece_batches for piece in made.pieces[-1:])
    assert made.costs == tuple(sum(batch.rows * batch.length for batch in piece) for piece in made.pieces)


@settings(max_examples=30)
@given(LENGTHS, BUDGETS, PIECE_BATCHES, st.randoms(use_true_random=False))
def test_the_cut_does_not_depend_on_the_order_in_which_rows_are_named(lengths, budget, piece_batches, rng):
    rows = list(zip(numbered(lengths), lengths, strict=True))
    straight = cut([o for o, _ in rows], [n for _, n in rows], batch_tokens=budget, piece_batches=piece_batches)
    rng.shuffle(rows)
    shuffled = cut([o for o, _ in rows], [n for _, n in rows], batch_tokens=budget, piece_batches=piece_batches)
    assert shuffled == straight


def test_the_same_arguments_give_the_same_cut_whatever_happened_between():
    lengths = [random.Random(7).randrange(1, 300) for _ in range(500)]
    first = cut(range(500), lengths, batch_tokens=2048)
    random.seed(99)
    cut(range(3), [1, 2, 3], batch_tokens=4)
    assert cut(range(500), lengths, batch_tokens=2048) == first


def test_arguments_stay_as_they_were():
    offsets, lengths = [0, 1, 2], [1, 3, 2]
    cut(offsets, lengths, batch_tokens=4)
    assert (offsets, lengths) == ([0, 1, 2], [1, 3, 2])


def test_a_cut_by_hand():
    made = cut([0, 1, 2, 3, 4], [2, 9, 2, 4, 0], batch_tokens=8, piece_batches=2)
    assert made.order == (1, 3, 0, 2, 4)
    assert made.pieces == (
        (Batch(start=0, stop=1, length=9), Batch(start=1, stop=3, length=4)),
        (Batch(start=3, stop=5, length=2),),
    )
    assert made.costs == (17, 4)
    assert made.rows == (3, 2)


def test_rows_without_a_token_are_batched_as_if_they_had_one():
    made = cut(range(10), [0] * 10, batch_tokens=4)
    assert [batch.rows for batch in batches_of(made)] == [4, 4, 2]
    assert {batch.length for batch in batches_of(made)} == {1}


def test_no_rows_give_no_pieces():
    made = cut([], [], batch_tokens=2048)
    assert (made.order, made.pieces, made.costs, made.rows) == ((), (), (), ())


def test_offsets_and_lengths_must_be_as_many():
    with pytest.raises(ValueError) as refused:
        cut([0, 1], [5], batch_tokens=8)
    assert str(refused.value) == "2 offsets, 1 lengths"


def test_a_larger_budget_gives_no_more_batches():
    lengths = [random.Random(1).randrange(1, 200) for _ in range(300)]
    numbers = [len(batches_of(cut(range(300), lengths, batch_tokens=budget))) for budget in (64, 256, 1024, 4096)]
    assert all(fewer <= more for more, fewer in pairwise(numbers))


def test_dealt_pieces_cost_about_the_same_and_hold_every_row_once():
    costs = [(37 * i) % 500 + 10 for i in range(300)]
    found = deal(range(300), costs, piece_cost=10_000)
    assert sorted(found.order) == list(range(300))
    assert len(found.pieces) == 8  # 77,850 / 10,000, and a multiple of four
    assert sum(found.costs) == sum(costs)
    assert max(found.costs) - min(found.costs) <= 500
    assert sum(found.rows) == 300


@pytest.mark.parametrize(("rows", "pieces"), [(0, 0), (1, 1), (5, 1), (40, 2), (250, 4)])
def test_a_small_job_is_dealt_in_halves_or_quarters(rows, pieces):
    assert len(deal(range(rows), [100] * rows, piece_cost=10_000).pieces) == pieces


def test_a_row_that_costs_more_than_a_piece_is_a_piece_among_others():
    found = deal(range(3), [50_000, 10, 10], piece_cost=10_000)
    assert sorted(found.order) == [0, 1, 2]
    assert len(found.pieces) == 3
