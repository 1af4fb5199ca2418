"""Every family and every kind of head gives what transformers' own pipeline gives, row by row."""

from __future__ import annotations

import label_models
import pytest
from checkpoints import POSITIONS, edit_json, mixed_texts

import fanfold as ff
from fanfold.errors import DataError

pytestmark = [pytest.mark.torch, pytest.mark.slow]

TOLERANCE = 2e-6  # of a score
FAMILIES = (
    *("bert", "roberta", "distilbert", "electra", "deberta", "modernbert", "albert"),
    *("gpt2", "gpt2-no-pad", "llama", "qwen3", "bart", "xlnet"),
)
CUT = {"truncation": True, "max_length": POSITIONS}
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
INFERENCE = ("contradiction", "neutral", "entailment")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """labelled(family, ...) -> the folder of a checkpoint that nobody may change."""
    made = {}
    root = tmp_path_factory.mktemp("labelled")

    def build(family, **settings):
        key = (family, *sorted(settings.items()))
        if key not in made:
            made[key] = label_models.write_labels(root / f"{len(made)}-{family}", family, **settings)
        return str(made[key])

    return build


@pytest.fixture(scope="module")
def texts():
    """30 of many lengths and scripts; the empty one has a test of its own."""
    return [text for text in mixed_texts() if text.strip()][:30]


def pipeline(task, folder, **options):
    import transformers

    return transformers.pipeline(task, model=folder, device="cpu", dtype="float32", **options)


def check_scores(ours, theirs):
    """Labels and scores of lists of {label, score}, row by row."""
    assert len(ours) == len(theirs)
    for row, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert len(mine) == len(wanted), row
        for a, b in zip(mine, wanted, strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=TOLERANCE), row
            assert a["label"] == b["label"], row


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_labels_and_scores_of_the_pipeline(family, labelled, texts):
    folder = labelled(family)
    ours = ff.classify(texts, model=folder, on="inline", top_k=3)
    theirs = pipeline("text-classification", folder)(texts, top_k=None, **CUT)
    check_scores([row["labels"] for row in ours], theirs)
    assert [(row["label"], row["score"]) for row in ours] == [tuple(row["labels"][0].values()) for row in ours]
    assert len({round(row["score"], 3) for row in ours}) > 10, "a head that tells texts apart"


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"problem_type": "regression", "labels": ("stars",)}, {}),
        ({"problem_type": "regression", "labels": ("a", "b")}, {}),
        ({"problem_type": "multi_label_classification"}, {}),
        ({"problem_type": "single_label_classification"}, {}),
        ({"labels": ("relevant",)}, {}),
        ({}, {"multi_label": True}),
    ],
    ids=str,
)
def test_scores_mean_what_the_config_says(settings, options, labelled, texts):
    folder = labelled("bert", **settings)
    ours = ff.classify(texts[:12], model=folder, on="inline", top_k=9, **options)
    function = {"function_to_apply": "sigmoid"} if options else {}
    theirs = pipeline("text-classification", folder)(texts[:12], top_k=None, **CUT, **function)
    check_scores([row["labels"] for row in ours], theirs)


def test_multi_label_keeps_what_reaches_the_threshold(labelled, texts):
    folder = labelled("bert")
    every = pipeline("text-classification", folder)(texts[:12], top_k=None, function_to_apply="sigmoid", **CUT)
    for threshold in (None, 0.3):
        ours = ff.classify(texts[:12], model=folder, on="inline", multi_label=True, threshold=threshold)
        wanted = [[entry for entry in row if entry["score"] >= (threshold or 0.5)] for row in every]
        check_scores([row["labels"] for row in ours], wanted)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "bart", "gpt2", "xlnet"])
def test_pairs_give_what_the_pipeline_gives(family, labelled, texts):
    folder = labelled(family)
    rows = [{"question": texts[i][:200], "answer": texts[-i][:300]} for i in range(12)]
    ours = ff.classify(rows, model=folder, on="inline", column="question", pair="answer", top_k=3)
    pairs = [{"text": row["question"], "text_pair": row["answer"]} for row in rows]
    theirs = [pipeline("text-classification", folder)(pair, top_k=None, **CUT) for pair in pairs]
    check_scores([row["labels"] for row in ours], theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sentence_transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning:sentence_transformers")
@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_rerank_scores_are_those_of_a_cross_encoder(activation, labelled, texts, tmp_path, reference_library):
    import shutil

    folder = tmp_path / "reranker"
    shutil.copytree(labelled("bert", labels=("LABEL_0",)), folder)
    if activation:
        edit_json(folder / "config.json", sentence_transformers={"activation_fn": activation})
    rows = [{"question": texts[i][:200], "answer": texts[-i][:900]} for i in range(20)]
    ours = ff.classify(rows, model=str(folder), on="inline", column="question", pair="answer")
    model = reference_library.CrossEncoder(str(folder), device="cpu", local_files_only=True)
    theirs = model.predict([(row["question"], row["answer"]) for row in rows], show_progress_bar=False)
    assert [row["score"] for row in ours] == pytest.approx(theirs.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("family", "aggregation"),
    [
        *(("bert", name) for name in ("none", "simple", "first", "average", "max")),
        *(("roberta", "first"), ("deberta", "simple"), ("xlnet", "simple")),
    ],
)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_entities_are_those_of_the_pipeline(family, aggregation, labelled, texts):
    folder = labelled(family, labels=TAGS, tokens=True)
    told = {} if aggregation == "simple" else {"aggregation": aggregation}
    ours = [row["entities"] for row in ff.classify(texts, model=folder, on="inline", **told)]
    theirs = pipeline("token-classification", folder, aggregation_strategy=aggregation)(texts)
    assert sum(map(len, ours)) > len(texts)
    for row, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert [{**entity, "score": 0} for entity in mine] == [{**entity, "score": 0} for entity in wanted], row
        scores = [float(entity["score"]) for entity in wanted]
        assert [entity["score"] for entity in mine] == pytest.approx(scores, abs=TOLERANCE), row


@pytest.mark.parametrize("family", ["bert", "roberta", "bart", "deberta"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_labels_of_ones_own_are_scored_as_the_zero_shot_pipeline_does(family, multi_label, labelled, texts):
    folder = labelled(family, labels=INFERENCE)
    names = ["urgent", "not urgent", "a computer", "the weather of the day after tomorrow"]
    template = "This text is about {}." if multi_label else "This example is {}."
    ours = ff.classify(
        texts[:12],
        model=folder,
        on="inline",
        labels=names,
        top_k=len(names),
        multi_label=multi_label,
        hypothesis_template=template if multi_label else None,
    )
    theirs = pipeline("zero-shot-classification", folder)(
        texts[:12], names, multi_label=multi_label, hypothesis_template=template
    )
    for mine, wanted in zip(ours, theirs, strict=True):
        found = {entry["label"]: entry["score"] for entry in mine["labels"]}
        assert found == pytest.approx(dict(zip(wanted["labels"], wanted["scores"], strict=True)), abs=TOLERANCE)
        assert mine["label"] == wanted["labels"][0]


def test_one_label_of_ones_own_is_scored_against_its_contradiction(labelled, texts):
    folder = labelled("bert", labels=("Entailment", "neutral", "contradiction"))
    ours = ff.classify(texts[:8], model=folder, on="inline", labels="urgent")
    theirs = pipeline("zero-shot-classification", folder)(texts[:8], ["urgent"])
    assert [row["score"] for row in ours] == pytest.approx([row["scores"][0] for row in theirs], abs=TOLERANCE)


@pytest.mark.parametrize("merge", ["mean", "vote"])
def test_an_ensemble_merges_its_members(merge, labelled, texts):
    labels = ("calm", "urgent", "odd")
    folders = [
        labelled("bert", seed=1),
        labelled("gpt2", seed=2, labels=labels[::-1]),
        labelled("roberta", seed=3),
    ]
    ours = ff.classify(texts, model=folders, merge=merge, on="inline")
    members = [
        [{entry["label"]: entry["score"] for entry in row} for row in
         pipeline("text-classification", folder)(texts, top_k=None, **CUT)]
        for folder in folders
    ]  # fmt: skip
    for row, rows in zip(ours, zip(*members, strict=True), strict=True):
        if merge == "mean":
            means = {label: sum(scores[label] for scores in rows) / 3 for label in labels}
            assert (row["label"], row["score"]) == (
                max(means, key=means.get),
                pytest.approx(max(means.values()), abs=TOLERANCE),
            )
        else:
            votes = [max(scores, key=scores.get) for scores in rows]
            assert row["label"] == max(labels, key=votes.count)
            assert row["score"] == votes.count(row["label"]) / 3


def test_a_text_without_a_token_is_a_failed_row(labelled):
    with pytest.raises(DataError) as error:
        ff.classify(["a", ""], model=labelled("gpt2"), on="inline")
    assert "no token" in str(error.value)
    ours = ff.classify(["a", ""], model=labelled("gpt2"), on="inline", on_error="null")
    assert ours[1] == {"label": None, "score": None}
    assert ours[0]["label"] is not None
