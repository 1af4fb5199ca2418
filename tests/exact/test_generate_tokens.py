"""Greedy token ids equal those of transformers' `generate`, family by family, whatever shares a step."""

from __future__ import annotations

import random

import pytest
from checkpoints import VOCAB
from language_models import CONTEXT, END, FAMILIES, SEQ2SEQ, Oracle, write_language_model

pytestmark = [pytest.mark.torch, pytest.mark.slow]

USUAL = ("GPT2", "OPT", "GPTNeoX", "Llama", "Mistral", "Qwen2", "Gemma2", "Mixtral", "T5")  # the others: nightly
KNOWN = [family for family in FAMILIES if family not in (*SEQ2SEQ, "Bloom")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def of(family="GPT2", **settings):
        key = (family, *sorted(settings.items()))
        if key not in made:
            made[key] = write_language_model(tmp_path_factory.mktemp(family), family, **settings)
        return made[key]

    return of


def opened(folder, **settings):
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.generate import make_generate

    task = make_generate(model=str(folder), **settings)
    return task.open(Unit(name="inline"), Numerics())


def piece():
    """Rows of (ids, limit): one token, the whole context, an end token inside, and a beginning shared by three."""
    chance = random.Random(0)

    def some(count):
        return [chance.randrange(5, VOCAB) for _ in range(count)]

    rows = [(some(count), limit) for count, limit in ((1, 20), (CONTEXT, 1), (100, 20), (40, 30), (17, 9), (2, 40))]
    rows.append(([*some(3), END, *some(4)], 25))
    head = some(45)
    return rows + [(head + some(count), 12) for count in (1, 3, 20)]


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in USUAL else pytest.mark.nightly) for family in FAMILIES]
)
def test_greedy_ids_equal_generate(models, family):
    from fanfold.tasks.completer import Asked
    from fanfold.tasks.decode import Decoder

    folder = models(family)
    oracle, unit = Oracle(folder), opened(folder)
    rows = piece()
    unit.load()
    assert isinstance(unit._decoder, Decoder) is (family in KNOWN)
    if family in KNOWN:  # few slots and short steps: admissions, stretches of prompts and holes in the arena
        unit._decoder.slots, unit._decoder.step_tokens = 4, 24
    found = unit.complete([Asked(ids=ids, limit=limit) for ids, limit in rows], range(len(rows)))
    for (ids, limit), completion in zip(rows, found, strict=True):
        assert completion.ids == oracle.ids(ids, limit)
        assert completion.reason == ("stop" if completion.ids[-1] == END else "length")
