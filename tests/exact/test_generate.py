"""`fanfold generate`: texts equal transformers', bytes equal on any units and after a crash, bad input is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from checkpoints import docstrings, edit_json
from language_models import CONTEXT, Oracle, write_language_model

import fanfold as ff
from fanfold.cli.main import run as cli
from fanfold.errors import DataError, PlanError, RequestError

pytestmark = [pytest.mark.torch, pytest.mark.slow]
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 3}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("llama"), "Llama", start=True, chat=True, padding_side="left")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """300 rows in several pieces: prompts of 1 to 60 words, answers of 1 to 40 tokens."""
    docs = docstrings()
    words = [docs[(37 * i) % len(docs)].split() for i in range(300)]
    records = [
        {"id": f"r{i}", "text": " ".join(words[i][: 1 + (7 * i) % 12]), "n": 1 + (11 * i) % 40} for i in range(300)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(out):
    return pq.read_table(out / "data").column("generated_text").to_pylist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_equal_transformers(tmp_path, side):
    folder = write_language_model(tmp_path / "model", "Qwen3", padding_side=side)
    oracle = Oracle(folder)
    prompts = ["a", "Return the sum of", "one two three " * 8]
    found = ff.generate(prompts, model=str(folder), on="inline", max_new_tokens=12)
    assert [row["generated_text"] for row in found] == [oracle.text(prompt, 12) for prompt in prompts]
    assert [row["prompt_tokens"] for row in found] == [len(oracle.tokenizer(p)["input_ids"]) for p in prompts]


def test_the_checkpoints_own_sampling_is_not_used(tmp_path, gpt2):
    folder = write_language_model(tmp_path, generation={"do_sample": True, "temperature": 0.4, "top_k": 3})
    plain = ff.generate(["Return the"], model=str(gpt2), on="inline", max_new_tokens=9)
    assert ff.generate(["Return the"], model=str(folder), on="inline", max_new_tokens=9) == plain
    zero = ff.generate(["Return the"], model=str(folder), on="inline", max_new_tokens=9, temperature=0, top_k=2)
    assert zero == plain


def test_stop_strings_end_where_transformers_ends(gpt2):
    oracle = Oracle(gpt2)
    ids = oracle.ids(oracle.tokenizer("Return the sum")["input_ids"], 30)
    tokens = [oracle.tokenizer.decode([token]) for token in ids]
    stop = tokens[4][-1] + tokens[5][:1]  # the last letter of one token and the first of the next
    wanted = oracle.text("Return the sum", 30, stop_strings=[stop], tokenizer=oracle.tokenizer)
    found = ff.generate(["Return the sum"], model=str(gpt2), on="inline", max_new_tokens=30, stop=stop)[0]
    assert (found["generated_text"], found["finish_reason"]) == (wanted, "stop")
    assert found["completion_tokens"] <= 6


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_an_encoder_reads_and_a_decoder_writes(tmp_path, family):
    folder = write_language_model(tmp_path / "model", family)
    oracle = Oracle(folder)
    prompts = ["a", "Return the sum of", "one two three " * 8, "x y"]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text, "n": 4 + 3 * i}) + "\n" for i, text in enumerate(prompts)))
    run = ff.generate(str(source), tmp_path / "out", model=str(folder), on="inline", max_new_tokens="n")
    wanted = [oracle.text(prompt, 4 + 3 * i) for i, prompt in enumerate(prompts)]
    assert run.table().column("generated_text").to_pylist() == wanted
    long = ff.generate(["one two " * 200], model=str(folder), on="inline", max_new_tokens=3)[0]
    assert long["prompt_tokens"] == (CONTEXT if family == "Bart" else len(oracle.tokenizer("one two " * 200).input_ids))


def test_peek_shows_the_first_finished_rows(tmp_path, gpt2, capsys):
    run = ff.generate(["Return the", "a list"], model=str(gpt2), on="inline", max_new_tokens=3)
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "Return the"}\n{"text": "a list"}\n')
    ff.generate(str(source), tmp_path / "out.jsonl", model=str(gpt2), on="inline", max_new_tokens=3)
    assert cli(["peek", str(tmp_path / "out.jsonl"), "--rows", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"row": 0, **run[0]}]


def test_full_text_is_prompt_and_answer(gpt2):
    plain = ff.generate(["Return the"], model=str(gpt2), on="inline", max_new_tokens=5)[0]["generated_text"]
    full = ff.generate(["Return the"], model=str(gpt2), on="inline", max_new_tokens=5, full_text=True)[0]
    assert full["generated_text"] == "Return the" + plain


def test_chats_equal_the_tokenizers_template(llama):
    oracle = Oracle(llama)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
    ids = oracle.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    wanted = oracle.tokenizer.decode(oracle.ids(list(ids), 10), skip_special_tokens=True)
    asked = {"model": str(llama), "on": "inline", "max_new_tokens": 10}
    by_text = ff.generate(["What is a list?"], chat=True, system="Be brief.", **asked)
    by_messages = ff.generate([{"messages": messages}], column="messages", chat=True, **asked)
    request = {"custom_id": "one", "url": "/v1/chat/completions", "body": {"messages": messages, "max_tokens": 10}}
    by_request = ff.generate([request], model=str(llama), on="inline", max_new_tokens=3)
    assert by_text == by_messages == by_request
    assert by_text[0]["generated_text"] == wanted


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_units_never_change_a_byte(tmp_path, gpt2, rows, settings):
    hashes = set()
    for on in ("inline", "cpu:1", "cpu:2"):
        run = ff.generate(str(rows), tmp_path / on, model=str(gpt2), max_new_tokens="n", on=on, **settings)
        hashes.add(run.summary["output_sha256"])
        assert run.summary["padding_share"] == 0
    assert len(hashes) == 1
    assert ff.verify(tmp_path / "cpu:2", sample=10).max_difference == 0


def test_threads_by_measurement_are_kept_when_the_job_goes_on(tmp_path, two, gpt2):
    asked = {"model": str(gpt2), "on": "inline", "max_new_tokens": 3}
    first = ff.generate(two, tmp_path / "out", threads="auto", **asked)
    assert any(reason.startswith("recommended: ") for reason in first.plan["reasons"])
    (tmp_path / "out" / "_SUCCESS").unlink()
    again = ff.generate(two, tmp_path / "out", threads="auto", **asked)
    assert any("as when the job was begun" in reason for reason in again.plan["reasons"])
    assert again.summary["output_sha256"] == first.summary["output_sha256"]


@pytest.mark.faults
@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_killed_job_goes_on_to_the_same_bytes(tmp_path, gpt2, rows, settings):
    whole = ff.generate(str(rows), tmp_path / "whole", model=str(gpt2), max_new_tokens="n", on="inline", **settings)
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "fanfold.cli.main", "generate", str(rows), "-o", str(tmp_path / "cut")]
    command += ["--model", str(gpt2), "--max-new-tokens", "n", "--on", "cpu:2", *flags]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as job:
        log = tmp_path / "cut" / "commits.log"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and job.poll() is None:
            if log.exists() and b'"lease"' in log.read_bytes():
                break
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGKILL)
    again = subprocess.run([*command, "--json"], capture_output=True, timeout=200, check=True)
    assert json.loads(again.stdout)["output_sha256"] == whole.summary["output_sha256"]


def test_a_draw_knows_its_row_and_not_its_neighbours(gpt2):
    asked = {"model": str(gpt2), "on": "inline", "max_new_tokens": 12, "temperature": 1.0}
    alone = ff.generate(["Return the"], **asked)
    among = ff.generate(["Return the", "Return the", "x y z"], **asked)
    assert among[0] == alone[0]
    assert among[1] != among[0]
    assert ff.generate(["Return the"], **asked, seed=1) != alone


def test_a_row_left_out_keeps_its_neighbours_bytes(gpt2):
    from test_generate_tokens import opened

    from fanfold.tasks.completer import Asked

    unit = opened(gpt2)
    ids = unit._open_tokenizer()(["Return the sum", "a list of", "one two three"])["input_ids"]
    asked = [Asked(ids=one, limit=15) for one in ids]
    filled = [asked[0], Asked(ids=[5] * len(ids[1]), limit=15), asked[2]]
    first = unit.complete(filled, [0, 1, 2], frozenset([1]))
    second = unit.complete(filled, [0, 1, 2], frozenset([1]))
    assert [c.ids for c in first] == [c.ids for c in second]
    assert len(first[1].ids) == 15
    whole = unit.complete(asked, [0, 1, 2])
    assert first[0].ids == whole[0].ids


def test_a_row_that_raises_is_found_and_the_others_verify(tmp_path, gpt2, rows, monkeypatch):
    from fanfold.tasks import decode

    run = decode._Piece.run

    def poisoned(piece):
        if any(prompt.row == 7 and not prompt.filler for prompt in piece._prompts):
            raise ValueError("this row is poison")
        return run(piece)

    monkeypatch.setattr(decode._Piece, "run", poisoned)
    done = ff.generate(str(rows), tmp_path / "out", model=str(gpt2), on="inline", max_new_tokens="n", limit=40)
    assert (done.summary["rows_ok"], done.summary["rows_failed"]) == (39, 1)
    assert "this row is poison" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert ff.verify(tmp_path / "out").max_difference == 0


def test_the_cache_bounds_what_is_held(gpt2):
    """One prompt far longer than the others, and room for little more: rows wait, results stay."""
    from test_generate_tokens import opened

    from fanfold.tasks.completer import Asked

    unit, small = opened(gpt2), opened(gpt2, kv_memory="200KB")
    asked = [Asked(ids=[7 + i] * (100 if i == 3 else 1 + i % 4), limit=9) for i in range(12)]
    assert small.task.kv_tokens < 200
    found = small.complete(asked, range(12))
    assert [c.ids for c in found] == [c.ids for c in unit.complete(asked, range(12))]
    layer = small._decoder.cache.layers[0]
    assert layer.keys.shape[0] == small.task.kv_tokens * 4


def test_answers_keep_to_a_schema(gpt2):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    asked = {"model": str(gpt2), "on": "inline", "json_schema": schema}
    for row in ff.generate(["one", "two", "three"], max_new_tokens=60, **asked):
        value = json.loads(row["generated_text"])
        assert set(value) == {"ok", "n"}
        assert isinstance(value["ok"], bool)
        assert value["n"] in (1, 2, 3)
        assert row["finish_reason"] == "stop"
    with pytest.raises(DataError, match="no whole JSON"):
        ff.generate(["one"], max_new_tokens=2, **asked)


def test_several_models_vote(tmp_path, gpt2, llama):
    other = write_language_model(tmp_path / "other", "OPT")
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("Return the", "a list", "x")))
    asked = {"on": "inline", "max_new_tokens": 6}
    alone = ff.generate(["Return the", "a list", "x"], model=str(llama), **asked)
    models = [str(gpt2), str(llama), str(other), str(llama)]
    run = ff.generate(str(source), tmp_path / "out", model=models, merge="vote", **asked)
    assert run.table().column("generated_text").to_pylist() == [row["generated_text"] for row in alone]
    assert ff.verify(tmp_path / "out").max_difference == 0
    with pytest.raises(RequestError, match="answers, which have no mean"):
        ff.generate(["a"], model=models, merge="mean", **asked)
    with pytest.raises(RequestError, match="add --merge vote"):
        ff.generate(["a"], model=models, **asked)


# -- bad input ------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "Return the", "n": 3}\n{"text": "a list", "n": "many"}\n')
    return str(path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--temperature", "-1"], "0 (greedy) or more"),
        (["--top-p", "0"], "above 0, at most 1"),
        (["--chat"], "its tokenizer has no chat template"),
        (["--prompt", "Say {missing}"], "column 'missing' of the input"),
        (["--prompt", "Say {text:>5}"], "names of columns in braces"),
        (["--max-new-tokens", "0"], "no token at all"),
        (["--stop", ""], "an empty text"),
    ],
)
def test_a_request_that_cannot_be_met_is_told(capsys, tmp_path, two, gpt2, flags, told):
    code = cli(["generate", two, "-o", str(tmp_path / "out"), "--model", str(gpt2), "--on", "inline", *flags])
    assert code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_for_another_verb_names_the_verb(tmp_path, gpt2):
    edit_json(gpt2 / "config.json", architectures=["GPT2ForSequenceClassification"])
    try:
        with pytest.raises(PlanError, match="use fanfold classify"):
            ff.generate(["a"], model=str(gpt2), on="inline")
    finally:
        edit_json(gpt2 / "config.json", architectures=["GPT2LMHeadModel"])


def test_a_bad_limit_fails_its_row_alone(tmp_path, two, gpt2):
    run = ff.generate(two, tmp_path / "out", model=str(gpt2), on="inline", max_new_tokens="n")
    assert (run.summary["rows_ok"], run.summary["rows_failed"]) == (1, 1)
    assert "column n is 'many'" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_long_prompts_are_cut_in_front_and_counted_or_set_aside(tmp_path, gpt2):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "one two " * 200}) + "\n" + json.dumps({"text": "short"}) + "\n")
    asked = {"model": str(gpt2), "on": "inline", "max_new_tokens": 8}
    run = ff.generate(str(path), tmp_path / "cut", **asked)
    assert run.summary["truncated"] == 1
    assert run.table().column("prompt_tokens").to_pylist()[0] == CONTEXT - 8
    run = ff.generate(str(path), tmp_path / "aside", too_long="quarantine", **asked)
    assert (run.summary["rows_ok"], run.summary["rows_failed"]) == (1, 1)


def test_an_empty_prompt_begins_with_the_start_token(gpt2):
    found = ff.generate([""], model=str(gpt2), on="inline", max_new_tokens=4)[0]
    assert (found["prompt_tokens"], found["completion_tokens"]) == (1, 4)


def test_a_token_that_the_model_does_not_know_fails_its_row(tmp_path):
    folder = write_language_model(tmp_path, extra_tokens=("<extra>",))
    with pytest.raises(DataError, match="<extra>"):
        ff.generate(["a <extra> b"], model=str(folder), on="inline")


def test_a_schema_that_cannot_be_read_is_refused(gpt2):
    pytest.importorskip("llguidance")
    with pytest.raises(RequestError, match="json-schema"):
        ff.generate(["a"], model=str(gpt2), on="inline", json_schema={"type": "nothing"})
