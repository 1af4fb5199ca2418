"""The fold tree is a function of the number of parts alone."""

from __future__ import annotations

import math
import random

import pytest

from fanfold.errors import InternalError
from fanfold.merge import OrderedFold, fold


class Tree:
    """A merge whose parts are the brackets they were joined in."""

    def empty(self):
        return "()"

    def lift(self, value, rows):
        return value

    def join(self, left, right):
        return f"({left} {right})"

    def finish(self, part):
        return part


def by_definition(parts):
    """RFC 6962, section 2.1: the left subtree holds the largest power of two below n."""
    if len(parts) == 1:
        return parts[0]
    k = 1 << ((len(parts) - 1).bit_length() - 1)
    return f"({by_definition(parts[:k])} {by_definition(parts[k:])})"


def numbered(num_parts):
    return [str(index) for index in range(num_parts)]


def depth(tree):
    level = deepest = 0
    for char in tree:
        level += {"(": 1, ")": -1}.get(char, 0)
        deepest = max(deepest, level)
    return deepest


@pytest.mark.parametrize("num_parts", [*range(1, 34), 100, 255, 256, 257])
def test_fold_joins_in_the_stated_tree(num_parts):
    tree = fold(Tree(), iter(numbered(num_parts)))
    assert tree == by_definition(numbered(num_parts))
    assert depth(tree) == math.ceil(math.log2(num_parts))


def test_fold_of_seven_is_the_tree_in_the_docstring():
    assert fold(Tree(), numbered(7)) == "(((0 1) (2 3)) ((4 5) 6))"


def test_fold_of_nothing_is_empty():
    assert fold(Tree(), []) == "()"


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 8, 13, 64, 100])
def test_arrival_order_does_not_change_the_tree(num_parts):
    draw = random.Random(num_parts)
    parts = numbered(num_parts)
    for _ in range(20):
        ordered = OrderedFold(Tree())
        for index in draw.sample(range(num_parts), num_parts):
            ordered.add(index, parts[index])
        assert ordered.part(num_parts) == by_definition(parts)


def test_parts_in_order_hold_at_most_log2_n_plus_one():
    ordered = OrderedFold(Tree())
    for index in range(1000):
        ordered.add(index, "x")
        assert ordered.num_waiting == (index + 1).bit_count() <= math.log2(index + 1) + 1


def test_aligned_subtrees_are_joined_before_the_gap_is_filled():
    ordered = OrderedFold(Tree())
    for index in (4, 7, 5, 6):
        ordered.add(index, str(index))
    assert ordered.num_waiting == 1
    for index in (1, 2):  # neighbours, but not in one subtree
        ordered.add(index, str(index))
    assert ordered.num_waiting == 3


def test_a_part_can_be_asked_for_again_after_more_pieces_came():
    ordered = OrderedFold(Tree())
    for index in range(3):
        ordered.add(index, str(index))
    assert ordered.part(3) == ordered.part(3) == "((0 1) 2)"
    ordered.add(3, "3")
    assert ordered.part(4) == "((0 1) (2 3))"


@pytest.mark.parametrize("arrived", [[0], [1], [0, 1], [2, 3, 1, 0]])
def test_the_same_piece_twice_is_refused(arrived):
    ordered = OrderedFold(Tree())
    for index in arrived:
        ordered.add(index, str(index))
    with pytest.raises(InternalError, match=f"part of piece {arrived[0]} ") as caught:
        ordered.add(arrived[0], "twin")
    assert caught.value.found == "a part of this piece came before"


def test_a_negative_piece_index_is_refused():
    with pytest.raises(InternalError, match="negative piece index"):
        OrderedFold(Tree()).add(-1, "x")


def test_missing_and_surplus_pieces_are_refused():
    ordered = OrderedFold(Tree())
    for index in (0, 1, 3):
        ordered.add(index, str(index))
    with pytest.raises(InternalError, match="2 did not come, the first is piece 2"):
        ordered.part(5)
    with pytest.raises(InternalError, match="parts of pieces beyond 1"):
        ordered.part(2)
    with pytest.raises(InternalError, match="1 did not come, the first is piece 0"):
        OrderedFold(Tree()).part(1)
