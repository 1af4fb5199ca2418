"""Sampling: flags, draws, and transformers' own processors as the oracle."""

from __future__ import annotations

import pytest

from fanfold.errors import RequestError
from fanfold.tasks.sample import Sampling, uniform


@pytest.mark.parametrize(
    ("settings", "greedy"),
    [
        ({}, True),
        ({"seed": 5}, True),
        ({"repetition_penalty": 1.2}, True),
        ({"temperature": 0, "top_p": 0.5}, True),
        ({"temperature": 0.7}, False),
        ({"top_k": 3}, False),
        ({"min_p": 0.1}, False),
    ],
)
def test_greedy_unless_a_flag_asks_for_a_draw(settings, greedy):
    assert Sampling(**settings).greedy is greedy
    assert Sampling(**settings).shown.startswith("greedy" if greedy else "sampled")


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 1.5}, {"min_p": -0.1}]
)
def test_numbers_that_mean_nothing_are_refused(settings):
    with pytest.raises(RequestError, match="choose such a number"):
        Sampling(**settings)


def test_draws_are_spread_evenly_and_differ_in_every_number():
    drawn = [uniform(seed, row, position) for seed in range(10) for row in range(10) for position in range(20)]
    assert len(set(drawn)) == 2000
    assert sum(drawn) / 2000 == pytest.approx(0.5, abs=0.03)
    assert [sum(low / 4 <= u < (low + 1) / 4 for u in drawn) for low in range(4)] == pytest.approx([500] * 4, rel=0.15)


@pytest.mark.torch
def test_formulas_and_their_order_are_transformers():
    import torch
    import transformers

    from fanfold.tasks.sample import _penalise, filtered

    sampling = Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300, generator=chance) * 3
    seen = torch.randint(0, 300, (6, 12), generator=chance)
    wanted = transformers.RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(50),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.02),
    ):
        wanted = warper(seen, wanted)
    found = logits.clone()
    _penalise(found, seen.tolist(), 1.3)
    torch.testing.assert_close(filtered(found, sampling), wanted, rtol=0, atol=0)


@pytest.mark.torch
def test_draws_have_the_models_distribution():
    import torch

    from fanfold.tasks.sample import choose

    logits = torch.tensor([[0.0, 1.0, 2.0, -float("inf")]])
    rows = range(4000)
    drawn = choose(
        logits.repeat(4000, 1), Sampling(temperature=1.0), seen=[[]] * 4000, rows=[*rows], positions=[0] * 4000
    )
    shares = [drawn.count(token) / 4000 for token in range(4)]
    assert shares == pytest.approx(torch.softmax(logits[0], 0).tolist(), abs=0.03)
    assert shares[3] == 0
