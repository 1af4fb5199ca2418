"""The arena of keys and values: places are taken first fit and holes grow together again."""

from __future__ import annotations

import random

import pytest

pytestmark = pytest.mark.torch


def test_places_are_taken_first_fit_and_grow_together():
    from fanfold.tasks.kv import Places

    places = Places(10)
    a, b, c = places.take(3), places.take(4), places.take(3)
    assert [region.start for region in (a, b, c)] == [0, 3, 7]
    assert places.take(1) is None
    places.give_back(a)
    places.give_back(c)
    assert places.free_tokens == 6
    assert places.take(4) is None  # two holes of three
    places.give_back(b)
    assert places.take(10).start == 0


def test_no_place_is_taken_twice_and_none_is_lost():
    from fanfold.tasks.kv import Places

    chance = random.Random(0)
    places, held = Places(200), []
    for _ in range(2000):
        if held and chance.random() < 0.5:
            places.give_back(held.pop(chance.randrange(len(held))))
        elif (region := places.take(chance.randint(1, 40))) is not None:
            held.append(region)
        taken = [place for region in held for place in range(region.start, region.start + region.tokens)]
        assert len(taken) == len(set(taken)) == 200 - places.free_tokens
