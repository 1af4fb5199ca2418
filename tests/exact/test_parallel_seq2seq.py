"""Encoder-decoders and ViT, split against whole in float64: outputs, loss and every gradient; ids and refusals."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch
import transformers
from tiny_models import config_named
from transformers import AutoConfig

import fanfold as ff
from fanfold.errors import PlanError
from fanfold.parallel import equal
from fanfold.parallel.comm import Comm
from fanfold.parallel.families import check_split
from fanfold.parallel.mesh import Split, parse_split
from fanfold.parallel.split import architecture, cut_model, empty_model
from fanfold.parallel.stacks import holdings_of
from fanfold.parallel.tiny import tiny_config, tiny_model

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quiet"), pytest.mark.timeout(300)]

# name -> class, settings that differ from the family's defaults, blocks of encoder and decoder (None: as they come)
MODELS = {
    "t5": ("T5ForConditionalGeneration", {}, None),
    "t5 gated": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, None),
    "t5 base": ("T5Model", {}, None),
    "t5 encoder": ("T5EncoderModel", {}, None),
    "mt5": ("MT5ForConditionalGeneration", {}, None),
    "umt5": ("UMT5ForConditionalGeneration", {}, None),
    "bart": ("BartForConditionalGeneration", {"scale_embedding": True}, (4, 2)),
    "bart base": ("BartModel", {}, None),
    "mbart": ("MBartForConditionalGeneration", {}, None),
    "whisper": ("WhisperForConditionalGeneration", {}, (5, 1)),
    "whisper base": ("WhisperModel", {}, None),
    "vit": ("ViTForImageClassification", {}, None),
    "vit base": ("ViTModel", {}, None),
}
IN_CI = {(2, 1): ["t5", "bart", "whisper", "vit"], (1, 2): ["t5", "bart", "whisper", "vit"]}
LAYOUTS = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2)]


def tiny_named(name, ways, stages):
    cls, settings, blocks = MODELS[name]
    tiny = tiny_config(config_named(name, cls, settings), ways, stages)
    if blocks is not None and sum(blocks) >= stages:
        tiny.encoder_layers, tiny.decoder_layers = blocks
    return tiny


def saved(name, folder, ways, stages):
    """A tiny checkpoint: tiny_config of a tiny config keeps its sizes but the blocks."""
    config = tiny_named(name, ways, stages)
    torch.manual_seed(0)
    model = architecture(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
    model.save_pretrained(folder)


def check(ranks, folder, name, ways, stages):
    saved(name, folder, ways, stages)
    record = equal_to_whole(ranks(Split(tensor=ways, pipeline=stages)), folder)
    assert record["bitwise"] or ways > 1
    assert record["collectives"].get("all_reduce", 0) >= (4 if ways > 1 else 0)


def equal_to_whole(group, folder):
    record = tiny_models.compared(group, folder)
    errors = [record[key] for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad")]
    assert all(not math.isnan(error) and error <= equal.FLOAT64_PROMISE for error in errors), record
    assert record["num_grads"] == record["num_grads_whole"] >= 20
    return record


@pytest.mark.parametrize(("ways", "stages", "name"), [(*layout, name) for layout in IN_CI for name in IN_CI[layout]])
def test_two_ranks_are_the_whole_model(ranks, tmp_path, ways, stages, name):
    check(ranks, tmp_path, name, ways, stages)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("ways", "stages"), LAYOUTS)
def test_all_layouts_are_the_whole_model(ranks, tmp_path, ways, stages, name):
    check(ranks, tmp_path, name, ways, stages)


@pytest.mark.parametrize(
    ("name", "method"), [("t5", "ring"), ("bart", "ulysses"), ("whisper", "allgather"), ("vit", "ring")]
)
def test_cut_sequences_are_the_whole_ones(ranks, tmp_path, name, method):
    saved(name, tmp_path, 2, 1)
    equal_to_whole(ranks(parse_split(f"context=2:{method}")), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["allgather", "ulysses", "ring"])
@pytest.mark.parametrize(("ways", "tensor"), [(2, 1), (3, 1), (2, 2)])
def test_sequences_are_cut_by_every_variant(ranks, tmp_path, name, method, ways, tensor):
    saved(name, tmp_path, ways * tensor, 1)
    equal_to_whole(ranks(parse_split(f"context={ways}:{method},tensor={tensor}")), tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["tensor=2", "context=2", "context=2:ulysses", "context=2:ring"])
@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "whisper", "vit"])
def test_every_collective_is_needed(ranks, tmp_path, name, layout):
    saved(name, tmp_path, 2, 1)
    count, idle = tiny_models.idle_collectives(ranks(parse_split(layout)), tmp_path, equal.FLOAT64_PROMISE)
    assert count >= 8
    assert idle == []


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("t5", [[range(3), range(1)], [range(0), range(1, 3)]]),
        ("bart", [[range(4), range(0)], [range(0), range(2)]]),
        ("whisper", [[range(4), range(0)], [range(4, 5), range(1)]]),
    ],
)
def test_two_stages_are_cut_in_the_decoder_between_the_two_and_in_the_encoder(name, cut):
    config = tiny_named(name, 2, 2)
    held = holdings_of(empty_model(config, architecture(config), torch.float32), 2)
    assert held.mine == cut


def test_every_weight_has_a_stage_and_only_shared_ones_have_several():
    config = tiny_named("t5", 2, 2)
    model = empty_model(config, architecture(config), torch.float32)
    held = holdings_of(model, 2)
    assert held.stages.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    several = {name for name, stages in held.stages.items() if stages == [0, 1]}
    assert several == {
        "shared.weight",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    }
    assert held.stages["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == [0]
    assert held.stages["lm_head.weight"] == [1]


class Nobody:
    """A transport that is never used."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def test_ranks_with_uneven_shares_cut_the_stages_alike():
    config = tiny_named("t5 base", 2, 2)
    cuts = []
    for rank in range(2):
        model = empty_model(config, architecture(config), torch.float32)
        share = cut_model(model, Comm(Nobody(rank, 2)))
        cuts.append(holdings_of(share.model, 2, share.shapes).mine)
    assert cuts[0] == cuts[1]


# -- as a user has them -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bart")
    config = AutoConfig.for_model("bart", forced_bos_token_id=None, forced_eos_token_id=None)
    tiny_model(config, transformers.BartForConditionalGeneration, 2).save_pretrained(folder)
    return folder


def test_an_encoder_decoder_answers_and_generates_as_the_whole_one(bart):
    whole = transformers.BartForConditionalGeneration.from_pretrained(bart).eval()
    ids = torch.randint(5, 101, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = whole(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5])
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 1}
    with ff.parallel(str(bart), layout="tensor=2") as model:
        found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5])
        new = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert type(found) is type(expected)
    assert (found.logits - expected.logits).abs().max() <= 1e-5 * expected.logits.abs().max()
    assert new.tolist() == whole.generate(ids, **options, do_sample=False).tolist()


@pytest.mark.parametrize("layout", ["pipeline=2", "context=2"])
def test_generate_of_an_encoder_decoder_over_stages_or_positions_is_refused(bart, layout):
    with ff.parallel(str(bart), layout=layout) as model, pytest.raises(PlanError) as caught:
        model.generate(torch.tensor([[5, 6, 7]]))
    assert caught.value.found == f"an encoder-decoder in layout {layout}"


def test_stages_and_cut_sequences_of_an_encoder_decoder_together_are_refused():
    with pytest.raises(PlanError) as caught:
        check_split(AutoConfig.for_model("t5"), Split(pipeline=2, context=2))
    assert caught.value.found == "a t5, whose first and last block cut the sequence and put it together"
    assert caught.value.do == "use context=2 and tensor=2"


def test_the_sequence_of_a_decoder_without_its_encoder_is_not_cut():
    with pytest.raises(PlanError) as caught:
        check_split(config_named("bart", "BartForCausalLM", {}), Split(context=2))
    assert caught.value.found == "BartForCausalLM, a decoder without its encoder"


def test_a_decoder_input_that_is_not_given_is_the_shifted_labels(bart):
    whole = transformers.BartForConditionalGeneration.from_pretrained(bart, dtype=torch.float64).eval()
    ids = torch.randint(5, 101, (3, 9), generator=torch.Generator().manual_seed(4))
    labels = ids[:, :7].masked_fill(ids[:, :7] % 5 == 0, -100)
    expected = whole(input_ids=ids, labels=labels)
    with ff.parallel(str(bart), layout="context=2:ring", dtype="float64") as model:
        found = model(input_ids=ids, labels=labels)
    assert equal.relative(found.logits, expected.logits) <= equal.FLOAT64_PROMISE
    assert equal.relative(found.loss, expected.loss) <= equal.FLOAT64_PROMISE
    assert equal.relative(found.encoder_last_hidden_state, expected.encoder_last_hidden_state) <= 1e-10


def test_encoder_and_decoder_of_different_heads_are_refused_in_tensor():
    config = AutoConfig.for_model("bart", encoder_attention_heads=4, decoder_attention_heads=2, d_model=32)
    with pytest.raises(PlanError) as caught:
        check_split(config, Split(tensor=2))
    assert caught.value.found == "4 attention heads in the encoder, 2 in the decoder"


def test_more_stages_than_blocks_of_both_sides_are_refused():
    config = AutoConfig.for_model("t5", num_layers=2, num_decoder_layers=3)
    check_split(config, Split(pipeline=5))
    with pytest.raises(PlanError) as caught:
        check_split(config, Split(pipeline=6))
    assert caught.value.found == "5 layers"
