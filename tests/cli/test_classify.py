"""`fanfold classify` as a user gives it: what it refuses, which rows it sets aside, what a job file says."""

from __future__ import annotations

import json
import struct

import pytest


@pytest.fixture
def docs(tmp_path):
    path = tmp_path / "docs.jsonl"
    rows = [{"text": "a text", "other": "b"}, {"text": "c"}, {"text": "d", "other": None}, {"text": "e", "other": 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path):
    """A folder with the files of a checkpoint, whose weights nobody loads."""

    def write(architecture, **config):
        folder = tmp_path / architecture
        folder.mkdir()
        described = {"model_type": "bert", "architectures": [architecture], **config}
        (folder / "config.json").write_text(json.dumps(described))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        return folder

    return write


def refused(done, *words):
    assert done.code == 2, done.err
    assert done.out == ""
    assert all(done.message[part] for part in ("asked", "found", "allowed", "do")), done.err
    for word in words:
        assert word in done.err, done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("architecture", "verb"), [("GPT2LMHeadModel", "generate"), ("BertModel", "embed")])
def test_a_head_that_does_not_fit_is_refused_with_the_verb_that_does(
    architecture, verb, fanfold, docs, model, tmp_path
):
    done = fanfold("classify", docs, "-o", "out", "--model", model(architecture))
    refused(done, architecture, f"use fanfold {verb}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--threshold", "2", "--multi-label"), "0 to 1"),
        (("--labels", "a,b"), "none of them is 'entailment'"),
    ],
)
def test_flags_that_do_not_fit_the_head_are_refused(words, said, fanfold, docs, model):
    folder = model("BertForSequenceClassification", id2label={"0": "no", "1": "yes"})
    refused(fanfold("classify", docs, "-o", "out", "--model", folder, *words), said)


def test_no_model_is_refused(fanfold, docs):
    refused(fanfold("classify", docs, "-o", "out"), "no --model")


@pytest.mark.torch
@pytest.mark.slow
def test_a_job_file_with_a_pair_sets_rows_without_it_aside(fanfold, docs, tmp_path):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    made = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, intermediate_size=8))
    made.save_pretrained(tmp_path / "tiny")
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "text": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "job.toml").write_text(
        'task = "classify"\ninputs = "docs.jsonl"\nout = "out.jsonl"\nmodel = "tiny"\npair = "other"\ntop_k = 2\n'
        'on = "inline"\n'
    )
    done = fanfold("run", "job.toml", "--json")
    assert done.code == 3, done.err
    assert json.loads(done.out)["rows_failed"] == 3
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["row"] == 0
    assert row["labels"][0]["label"] == row["label"]
    assert len(row["labels"]) == 2
    quarantine = (tmp_path / "out.jsonl.run" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] for line in quarantine] == ["MissingColumn", "NullText", "NotText"]
