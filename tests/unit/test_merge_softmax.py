"""Attention over keys in pieces equals attention over all keys, on any cut, at any scores."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from fanfold.errors import DataError
from fanfold.merge import fold, softmax
from fanfold.merge.softmax import SoftmaxPart, SoftmaxParts
from fanfold.testing import laws

MERGE = SoftmaxParts()


def whole(scores, values):
    scores, values = scores.astype("longdouble"), values.astype("longdouble")
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ values


def pieces(scores, values, cuts):
    bounds = zip([0, *cuts], [*cuts, scores.shape[-1]], strict=True)
    return [((scores[..., a:b], values[..., a:b, :]), b - a) for a, b in bounds]


def merged(scores, values, cuts):
    return MERGE.finish(fold(MERGE, [MERGE.lift(*piece) for piece in pieces(scores, values, cuts)]))


def drawn(dtype="float64", scale=3.0, keys=61):
    draw = np.random.default_rng(0)
    scores = (draw.standard_normal((2, 3, 5, keys)) * scale).astype(dtype)
    return scores, draw.standard_normal((2, 3, keys, 4)).astype(dtype)


def test_doctests_in_the_module_hold():
    assert doctest.testmod(softmax).failed == 0


@pytest.mark.parametrize("cuts", [[], [1], [30], [0, 0, 17, 60, 61], list(range(1, 61))])
@pytest.mark.parametrize(
    ("dtype", "scale", "atol"), [("float64", 3, 1e-14), ("float64", 1e4, 1e-11), ("float32", 3, 1e-5)]
)
def test_any_cut_of_the_keys_gives_the_whole(cuts, dtype, scale, atol):
    scores, values = drawn(dtype, scale)
    found = merged(scores, values, cuts)
    assert found.dtype == dtype
    assert np.abs(found - whole(scores, values)).max() <= atol


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_scores_neither_overflow_nor_vanish(shift):
    scores, values = drawn()
    assert np.abs(merged(scores + shift, values, [7, 20]) - whole(scores + shift, values)).max() <= 1e-11


def test_masked_keys_weigh_nothing_and_a_query_without_keys_gives_0():
    scores, values = drawn()
    scores[..., 10:40] = -np.inf
    scores[0, 0, 1] = -np.inf
    keep = [*range(10), *range(40, 61)]
    found = merged(scores, values, [20, 30])
    expected = whole(np.where(np.isinf(scores), -1e9, scores)[..., keep], values[..., keep, :])
    expected[0, 0, 1] = 0
    assert np.abs(found - expected).max() <= 1e-14
    assert not found[0, 0, 1].any()


def test_the_laws_hold():
    scores, values = drawn()
    laws.check_all(MERGE, pieces(scores, values, [1, 1, 9, 30, 44]), laws.within(rtol=1e-13, atol=1e-14))


def test_outputs_of_a_kernel_with_their_log_sum_exp_are_parts():
    scores, values = drawn()
    parts = [MERGE.lift(*piece) for piece in pieces(scores, values, [25])]
    again = [SoftmaxPart.of(MERGE.finish(part), MERGE.lse(part)) for part in parts]
    assert np.allclose(MERGE.finish(fold(MERGE, again)), whole(scores, values).astype(float), atol=1e-14)
    exact = np.log(np.exp(scores).sum(-1))
    assert np.allclose(MERGE.lse(fold(MERGE, again)), exact, atol=1e-13)


def test_a_kernels_output_where_all_keys_are_masked_weighs_nothing():
    for undefined in (np.nan, 0.0, 7.0):
        output, lse = np.array([[1.0, 2.0], [undefined, undefined]]), np.array([0.5, -np.inf])
        part = SoftmaxPart.of(output, lse)
        assert MERGE.finish(part).tolist() == [[1.0, 2.0], [0.0, 0.0]]
        assert MERGE.lse(part).tolist() == lse.tolist()
        assert MERGE.finish(MERGE.join(part, SoftmaxPart.of(np.ones((2, 2)), np.zeros(2))))[1].tolist() == [1.0, 1.0]


def test_nan_propagates():
    scores, values = drawn()
    scores[0, 0, 0, 3] = np.nan
    found = merged(scores, values, [20])
    assert np.isnan(found[0, 0, 0]).all()
    assert not np.isnan(found[1]).any()


@pytest.mark.parametrize(
    "value", [3.0, (np.ones((2, 3)),), (np.ones((2, 3)), np.ones((4, 2))), (np.ones((2, 4), int),) * 2]
)
def test_what_is_no_pair_of_scores_and_values_is_refused(value):
    with pytest.raises(DataError, match="softmax of scores"):
        MERGE.lift(value, 3)


def test_other_queries_are_refused_and_no_keys_have_no_result():
    parts = [MERGE.lift((np.ones((queries, 3)), np.ones((3, 2))), 3) for queries in (2, 4)]
    with pytest.raises(DataError, match="pieces of keys"):
        MERGE.join(*parts)
    with pytest.raises(DataError, match="attend to keys"):
        MERGE.finish(MERGE.empty())


@pytest.mark.torch
def test_torch_gives_the_whole_and_every_gradient():
    import torch

    scores, values = (torch.from_numpy(array).requires_grad_() for array in drawn())
    expected = torch.softmax(scores, -1) @ values
    wanted = torch.autograd.grad((expected * expected.detach()).sum(), [scores, values])
    found = merged(scores, values, [7, 8, 40])
    got = torch.autograd.grad((found * expected.detach()).sum(), [scores, values])
    assert torch.allclose(found, expected, atol=1e-14)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-14)
