"""How texts are cut into parts, and how parts become one."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.errors import PlanError, RequestError
from fanfold.tasks.chunking import Chunking, cut_row, make_chunking, mean_of_parts, spans


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_spans_cover_every_token_and_overlap_as_asked(length, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    found = spans(length, size, overlap)
    assert (found[0][0], found[-1][1]) == (0, length)
    assert all(stop - start <= size for start, stop in found)
    assert all(stop - start == size for start, stop in found[:-1])
    for (_, before), (start, stop) in pairwise(found):
        assert before - start == overlap
        assert stop > before  # every part adds something


def test_a_text_that_fits_stays_as_it_is():
    row = np.arange(8, dtype=np.int32)
    (part,) = cut_row(row, Chunking(tokens=8), head=1, tail=1)
    assert part is row


def test_every_part_has_start_prompt_and_end():
    row = np.array([101, 7, 7, *range(20), 102], dtype=np.int32)
    parts = cut_row(row, Chunking(tokens=10, overlap=2), head=3, tail=1)
    assert [part.tolist() for part in parts] == [
        [101, 7, 7, *range(6), 102],
        [101, 7, 7, *range(4, 10), 102],
        [101, 7, 7, *range(8, 14), 102],
        [101, 7, 7, *range(12, 18), 102],
        [101, 7, 7, *range(16, 20), 102],
    ]
    assert all(part.dtype == np.int32 for part in parts)


def test_no_room_between_the_ends_is_said():
    with pytest.raises(PlanError, match="special tokens and prompt"):
        cut_row(np.arange(30), Chunking(tokens=10, overlap=6), head=3, tail=1)


def test_the_mean_weighs_parts_by_their_tokens():
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    tokens = [128, 128, 128, 128, 9]
    expected = np.average(vectors.astype(np.float64), axis=0, weights=tokens)
    assert np.allclose(mean_of_parts(vectors, tokens, normalize=False), expected, rtol=1e-7, atol=1e-8)
    unit = mean_of_parts(vectors, tokens, normalize=True)
    assert np.allclose(unit, expected / np.linalg.norm(expected), rtol=1e-6)
    assert unit.dtype == np.float32


def test_one_part_keeps_its_bytes():
    vector = np.random.default_rng(1).normal(size=(1, 384)).astype(np.float32)
    assert mean_of_parts(vector, [3], normalize=True).tobytes() == vector.tobytes()


def asked(chunk=None, overlap=None, merge=None, context=512):
    return make_chunking(chunk, overlap, merge, context=context, shown="a model")


def test_what_is_asked_for():
    assert asked() is None
    assert asked(128) == Chunking(tokens=128)
    assert asked(128, 16, "mean") == Chunking(tokens=128, overlap=16, merge="mean")
    assert asked(100_000, context=None) == Chunking(tokens=100_000)


@pytest.mark.parametrize(
    ("words", "error", "found"),
    [
        ({"chunk": 513}, PlanError, "takes 512 tokens"),
        ({"chunk": 2}, PlanError, "takes 512 tokens"),
        ({"chunk": 128, "overlap": 128}, PlanError, "--chunk 128"),
        ({"chunk": 128, "overlap": 200}, PlanError, "--chunk 128"),
        ({"chunk": 128, "overlap": -1}, PlanError, "--chunk 128"),
        ({"overlap": 3}, RequestError, "no --chunk"),
        ({"merge": "mean"}, RequestError, "no --chunk"),
        ({"chunk": 128, "merge": "median"}, RequestError, "no such merge"),
    ],
)
def test_what_is_refused(words, error, found):
    with pytest.raises(error) as caught:
        asked(**words)
    assert found in caught.value.found
    assert caught.value.exit_code == 2
