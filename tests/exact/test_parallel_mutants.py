"""No collective is idle: a split model without any single one of them is not the whole model."""

from __future__ import annotations

import pytest
import transformers
from tiny_models import idle_collectives

from fanfold.parallel import equal
from fanfold.parallel.mesh import parse_split
from fanfold.parallel.tiny import tiny_model
from fanfold.tasks.parallel_model import start

pytestmark = [pytest.mark.torch, pytest.mark.nightly, pytest.mark.timeout(600)]

MODELS = {
    "bert": (transformers.BertConfig(), transformers.BertForMaskedLM),
    "gpt2": (transformers.GPT2Config(), transformers.GPT2LMHeadModel),
    "qwen3": (transformers.Qwen3Config(num_key_value_heads=1), transformers.Qwen3ForCausalLM),
    "olmo2": (transformers.Olmo2Config(), transformers.Olmo2ForCausalLM),
    "mixtral": (transformers.MixtralConfig(num_key_value_heads=8), transformers.MixtralForCausalLM),
}


LAYOUTS = {
    "bert": ("tensor=2", "context=2", "context=2:ulysses", "context=2:ring", "context=2:ring,tensor=2"),
    "gpt2": ("tensor=2", "context=2:ring"),
    "qwen3": ("tensor=2", "context=2", "context=2:ulysses", "context=3:ring"),
    "olmo2": ("tensor=2",),
    "mixtral": ("context=2:ring,expert=2",),
}


@pytest.mark.parametrize(("family", "layout"), [(name, layout) for name in LAYOUTS for layout in LAYOUTS[name]])
def test_every_collective_is_needed(family, layout, tmp_path):
    config, cls = MODELS[family]
    split = parse_split(layout)
    tiny_model(config, cls, 2).save_pretrained(tmp_path)
    ranks = start(split, timeout_s=60.0)
    try:
        count, idle = idle_collectives(ranks, tmp_path, equal.promise_of(family, "float64", context=split.context))
    finally:
        ranks.close()
    assert count >= 10
    assert idle == []
