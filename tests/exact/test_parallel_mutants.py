"""No collective is idle: a split model without any single one of them is not the whole model."""

from __future__ import annotations

import pytest
import transformers

from fanfold.parallel import equal
from fanfold.parallel.mesh import Split
from fanfold.parallel.tiny import tiny_model
from fanfold.tasks.parallel_model import start

pytestmark = [pytest.mark.torch, pytest.mark.nightly, pytest.mark.timeout(600)]

MODELS = {
    "bert": (transformers.BertConfig(), transformers.BertForMaskedLM),
    "gpt2": (transformers.GPT2Config(), transformers.GPT2LMHeadModel),
    "qwen3": (transformers.Qwen3Config(num_key_value_heads=1), transformers.Qwen3ForCausalLM),
    "olmo2": (transformers.Olmo2Config(), transformers.Olmo2ForCausalLM),
}


@pytest.mark.parametrize("family", MODELS)
def test_every_collective_is_needed(family, tmp_path):
    config, cls = MODELS[family]
    tiny_model(config, cls, 2).save_pretrained(tmp_path)
    ranks = start(Split(tensor=2), timeout_s=60.0)
    try:
        values = {"folder": str(tmp_path), "dtype": "float64", "gradients": True}
        ranks.ask("compare", values)
        record = equal.worst_of(ranks.answers(120))
        count = sum(record["collectives"].values())
        survivors = []
        for skipped in range(count):
            ranks.ask("compare", {**values, "skip": skipped})
            mutant = equal.worst_of(ranks.answers(120))
            errors = [mutant[key] for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad")]
            if all(error <= equal.promise_of(family, "float64") for error in errors):
                survivors.append(mutant["skipped"])
    finally:
        ranks.close()
    assert count >= 10
    assert survivors == []
