"""Families that no table is for: a table is derived from the layers, and used only where a tiny copy agrees."""

from __future__ import annotations

import pytest
import transformers

import fanfold as ff
from fanfold.errors import PlanError
from fanfold.job.parallel import certificate, equal
from fanfold.parallel.derive import derived_tables
from fanfold.parallel.families import has_table
from fanfold.parallel.mesh import Split
from fanfold.parallel.tiny import tiny_model

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(200)]
ACCEPTED = ("StableLm", "Cohere", "Granite", "Starcoder2", "BioGpt", "Olmo", "Persimmon", "Albert")
REFUSED = {"Mpt": "passes the check", "CodeGen": "passes the check"}


def saved(folder, name):
    config = getattr(transformers, f"{name}Config")()
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    cls = mapping[type(config)] if type(config) in mapping else transformers.MODEL_FOR_MASKED_LM_MAPPING[type(config)]
    model = tiny_model(config, cls, 2)
    assert not has_table(model.config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "name", [ACCEPTED[0], *(pytest.param(name, marks=pytest.mark.nightly) for name in ACCEPTED[1:])]
)
def test_a_derived_table_that_passes_the_check_is_used_and_said(tmp_path, name):
    folder = saved(tmp_path, name)
    record = equal(folder, layout="tensor=2")
    assert record["table"] == "derived"
    assert max(record["max_rel_logits"], record["max_rel_loss"], record["max_rel_grad"]) <= 1e-6
    assert record["collectives"]["all_reduce"] >= 4
    assert "no table: one was derived" in certificate(record, name)
    with pytest.warns(UserWarning, match="a table derived for"), ff.parallel(folder, layout="tensor=2") as model:
        assert len(model.pids) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(REFUSED))
def test_a_family_whose_tables_all_fail_the_check_is_refused(tmp_path, name):
    with pytest.raises(PlanError) as caught:
        ff.parallel(saved(tmp_path, name), layout="tensor=2")
    assert REFUSED[name] in caught.value.found


@pytest.mark.parametrize(
    ("name", "said"),
    [("MobileBert", "no linear layers of attention"), ("Glm", "'rowwise_split_input'")],
)
def test_architectures_that_nothing_can_be_derived_for_are_refused(name, said):
    config = getattr(transformers, f"{name}Config")()
    model = tiny_model(config, transformers.MODEL_MAPPING[type(config)], 2)
    with pytest.raises(PlanError) as caught:
        list(derived_tables(model))
    assert said in caught.value.found


def test_a_layout_equals_another_whatever_was_found_out_about_it():
    assert Split(tensor=2, shown_check="checked") == Split(tensor=2)
