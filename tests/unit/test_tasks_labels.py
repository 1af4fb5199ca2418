"""What a checkpoint's files say of its head, and which flags go with it; no torch."""

from __future__ import annotations

import json
import struct

import pytest

from fanfold import extras
from fanfold.errors import FanfoldError, InputError, PlanError, RequestError
from fanfold.tasks.classify import make_classify


@pytest.fixture(autouse=True)
def _no_torch_needed(monkeypatch):
    monkeypatch.setattr(extras, "has", lambda module: True)


@pytest.fixture
def model(tmp_path):
    """model(**config) -> a folder with the files of a tiny checkpoint, whose weights nobody loads."""

    def write(name="model", tokenizer=None, **config):
        folder = tmp_path / name
        folder.mkdir()
        usual = {"model_type": "bert", "max_position_embeddings": 64}
        head = {"architectures": ["BertForSequenceClassification"]}
        (folder / "config.json").write_text(json.dumps({**usual, **head, **config}))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        return str(folder)

    return write


def names(*labels):
    return {"id2label": {str(i): label for i, label in enumerate(labels)}}


INFERENCE = names("contradiction", "neutral", "entailment")
TOKENS = {"architectures": ["BertForTokenClassification"], **names("O", "B-PER")}


def refused(kind, *words, **options):
    with pytest.raises(FanfoldError) as error:
        make_classify(**options)
    assert type(error.value) is kind
    shown = str(error.value)
    for word in words:
        assert word in shown, shown
    return error.value


@pytest.mark.parametrize(
    ("config", "function", "labels"),
    [
        ({}, "softmax", ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, "softmax", ("LABEL_0", "LABEL_1", "LABEL_2")),
        (names("a"), "sigmoid", ("a",)),
        ({**names("b", "a"), "problem_type": "multi_label_classification"}, "sigmoid", ("b", "a")),
        ({**names("x"), "problem_type": "regression"}, "none", ("x",)),
        ({"id2label": {"1": "b", "0": "a"}}, "softmax", ("a", "b")),
    ],
)
def test_labels_and_function_are_read_as_the_pipeline_reads_them(config, function, labels, model):
    task = make_classify(model=model(**config))
    assert (task.function, task.labels) == (function, labels)
    assert [column.name for column in task.columns] == ["label", "score"]


@pytest.mark.parametrize(
    ("architecture", "verb"),
    [
        *(("GPT2LMHeadModel", "generate"), ("LlamaForCausalLM", "generate"), ("BertModel", "embed")),
        *(("T5ForConditionalGeneration", "generate"), ("BertForMaskedLM", "embed")),
    ],
)
def test_another_head_is_refused_with_the_verb_that_fits(architecture, verb, model):
    refused(PlanError, architecture, f"use fanfold {verb}", model=model(architectures=[architecture]))


def test_no_model_is_refused():
    refused(RequestError, "no --model")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, ["--top-k 0", "1 or more"]),
        ({"threshold": 1.5, "multi_label": True}, ["--threshold 1.5", "0 to 1"]),
        ({"threshold": 0.5}, ["one label a text", "--multi-label"]),
        ({"merge": "mean"}, ["one --model"]),
        ({"merge": "median"}, ["mean, vote"]),
        ({"aggregation": "simple"}, ["a head of sequence classification"]),
        ({"labels": "urgent,not urgent"}, ["none of them is 'entailment'", "LABEL_0, LABEL_1"]),
        ({"hypothesis_template": "It is {}."}, ["no --labels"]),
        ({"labels": " , "}, ["no label"]),
        ({"labels": "a,b,a"}, ["the same label twice"]),
        ({"labels": "a,b", "hypothesis_template": "It is."}, ["{}"]),
        ({"labels": "a,b", "hypothesis_template": "It is {name}."}, ["{}"]),
        ({"max_length": 65}, ["--max-length 65", "64 positions"]),
        ({"dtype": "float16"}, ["--dtype float16"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(options, words, model):
    with pytest.raises(FanfoldError) as error:
        make_classify(model=model(), **options)
    assert error.value.exit_code == 2
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "options",
    [{"pair": "b"}, {"labels": "a,b"}, {"top_k": 2}, {"multi_label": True}],
    ids=lambda value: next(iter(value)),
)
def test_a_head_of_tokens_takes_no_flags_of_sequences(options, model):
    refused(PlanError, "a head of token classification", model=model(**TOKENS), **options)


def test_a_pair_of_one_column_is_refused(model):
    task = make_classify(model=model(), pair="text")
    with pytest.raises(RequestError) as error:
        task.reading("text")
    assert "the same column" in str(error.value)
    assert task.reading("a") == (("a", "text"),)


def test_columns_follow_the_flags(model):
    folder = model(**INFERENCE)
    found = make_classify(model=folder, labels="a, b ,c", top_k=2)
    assert found.labels == ("a", "b", "c")
    assert [column.name for column in found.columns] == ["label", "score", "labels"]
    (entities,) = make_classify(model=model("tokens", **TOKENS)).columns
    assert [field.name for field in entities.fields] == ["entity_group", "score", "word", "start", "end"]


def test_the_options_make_the_same_task_again(model):
    task = make_classify(model=model(**INFERENCE), labels=["a", "b"], multi_label=True, top_k=2, max_length=32)
    assert make_classify(model=task.reference, **json.loads(json.dumps(task.options))) == task


def test_the_length_is_the_tokenizers_within_the_models(model):
    assert make_classify(model=model()).members[0].max_length == 64
    assert make_classify(model=model("b", tokenizer={"model_max_length": 32})).members[0].max_length == 32
    assert make_classify(model=model("c", tokenizer={"model_max_length": 10**30})).members[0].max_length == 64


def test_a_rerankers_activation_counts_for_pairs_of_one_label(model):
    told = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    folder = model(**names("x"), **told)
    assert make_classify(model=folder, pair="b").function == "none"
    assert make_classify(model=folder).function == "sigmoid"
    odd = model("odd", **names("x"), sentence_transformers={"activation_fn": "torch.nn.Tanh"})
    refused(PlanError, "torch.nn.Tanh", model=odd, pair="b")


def test_members_of_an_ensemble_have_the_same_labels(model):
    first = model("first", **names("yes", "no"))
    second = model("second", **names("no", "yes"))
    task = make_classify(model=[first, second], merge="mean")
    assert [member.order for member in task.members] == [(0, 1), (1, 0)]
    assert task.reference == [first, second]
    other = model("other", **names("yes", "maybe"))
    refused(InputError, "yes, no", "yes, maybe", model=[first, other], merge="vote")
    refused(RequestError, "2 times --model", model=[first, second])
    kind = model("kind", **names("yes", "no"), problem_type="multi_label_classification")
    refused(PlanError, "softmax", "sigmoid", model=[first, kind], merge="mean")


def test_a_vote_needs_models_that_choose(model):
    two = [model("first"), model("second")]
    refused(RequestError, "--merge vote", model=two, merge="vote", top_k=2)


def test_damaged_labels_are_refused(model):
    refused(InputError, "id2label", model=model(id2label={"a": "b"}))
    refused(InputError, "num_labels", model=model("b", num_labels=0))
