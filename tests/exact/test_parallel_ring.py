"""Micro-batches of a model in stages: whose turn it is, and that the tokens are the whole model's."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

import fanfold as ff
from fanfold.errors import PlanError
from fanfold.parallel.ring import take_turns
from fanfold.parallel.tiny import tiny_model

pytestmark = [pytest.mark.torch, pytest.mark.timeout(200)]


def test_jobs_take_turns_in_their_order_until_each_is_done():
    seen = []

    def job(name, turns):
        def run(turn):
            for number in range(turns):
                seen.append(f"{name}{number}")
                turn()
            return name

        return run

    assert take_turns([job("a", 2), job("b", 4), job("c", 1)], begin=lambda: None) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "b1", "b2", "b3"]


def test_the_first_error_ends_all_jobs():
    def good(turn):
        while True:
            turn()

    def bad(turn):
        turn()
        raise ValueError("no more")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no more"):
        take_turns([good, bad, good], begin=lambda: None)
    assert threading.active_count() == before


def test_two_micro_batches_in_a_ring_give_the_ids_of_the_whole_model_on_the_same_micro_batches(tmp_path):
    transformers.utils.logging.disable_progress_bar()
    whole = tiny_model(transformers.LlamaConfig(), transformers.LlamaForCausalLM, 2)
    whole.save_pretrained(tmp_path)
    ids = torch.randint(5, 101, (5, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 7}
    expected = [
        whole.generate(ids[rows], attention_mask=mask[rows], do_sample=False, **options)
        for rows in (slice(0, 3), slice(3, 5))
    ]
    width = max(part.shape[1] for part in expected)
    expected = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in expected])
    drawn = {**options, "do_sample": True, "temperature": 1.5, "seed": 3}
    with ff.parallel(str(tmp_path), layout="pipeline=2") as model:
        assert torch.equal(model.generate(ids, attention_mask=mask, micro_batches=2, **options), expected)
        one, two = (model.generate(ids, attention_mask=mask, micro_batches=count, **drawn) for count in (1, 2))
        assert one.tolist() == two.tolist()  # a row's draws do not depend on the rows beside it
        with pytest.raises(PlanError, match="a micro-batch has a row"):
            model.generate(ids[:1], micro_batches=2)
