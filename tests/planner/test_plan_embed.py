"""`fanfold plan embed`: the local job, from lengths or from an input."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fanfold.cli.main import run
from fanfold.job import plan_embed as plan_embed_module
from fanfold.job import run as run_module
from fanfold.job.predicting import drawn
from fanfold.machine.discover import discover
from fanfold.machine.rates import Point, Rates, work
from fanfold.plan.numerics import Numerics
from fanfold.tasks.embed import make_embed


@pytest.mark.torch
def test_lengths_are_drawn_with_that_median_and_percentile():
    task = replace(make_embed(), max_length=512)
    sample = drawn(task, "23,120", 100_000, Numerics())
    lengths = sorted(sample.lengths)
    assert sample.rows == 100_000
    assert sample.windows == 25
    assert 1e-8 < sample.token_s < 1e-3
    assert len(lengths) == 4096
    assert abs(lengths[2048] - 23) <= 1
    assert abs(lengths[3686] - 120) <= 2
    assert lengths[-1] <= 512


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--tokens-per-row", "23"],
        ["--tokens-per-row", "120,23", "--rows", "10"],
        ["--tokens-per-row", "23,120"],
        ["--tokens-per-row", "a,b", "--rows", "10"],
        ["--tokens-per-row", "23,120", "--rows", "10", "--on", "cuda"],
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, arguments):
    assert run(["plan", "embed", *arguments]) == 2
    assert "do:" in capsys.readouterr().err


@pytest.mark.torch
def test_an_input_is_planned_with_units_time_and_memory(tmp_path, capsys, measured):
    path = write_docs(tmp_path / "docs.jsonl")
    assert run(["plan", "embed", str(path), "--on", "cpu:1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == 60
    assert record["units"] == ["cpu:0"]
    assert record["tokens"] > 60 * 5
    assert record["elapsed_s"] == pytest.approx(sum(record["terms"].values()), abs=0.01)
    assert record["fits"]
    assert record["reasons"]


def short_rates(cores):
    """A machine that was measured: every operator at one rate."""
    shapes = {kind: (2048, 384) for kind in ("gelu", "gelu_tanh", "silu", "relu", "layer_norm", "add")}
    shapes |= {"gemm": (512, 1024, 1024), "attention": (8, 4, 256, 32)}
    points = tuple(Point(kind=kind, shape=shape, seconds=work(kind, shape) / 1e10) for kind, shape in shapes.items())
    return Rates(
        cores=cores, by="test", points=points, copy_bytes_per_s=1e10, copy_all_bytes_per_s=1e10, issue_s=1e-6,
        own_share=1.0, zygote_bytes=300_000_000, unit_bytes=50_000_000, import_s=5.0,
    )  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """The machine is known, and nothing is measured."""
    rates = short_rates(discover().cores)
    for module in (plan_embed_module, run_module):
        monkeypatch.setattr(module, "rates_for", lambda machine, measure=True: rates)
    return rates


def write_docs(path, count=60):
    path.write_text("".join(json.dumps({"text": "some words " * (i % 30 + 1)}) + "\n" for i in range(count)), "utf-8")
    return path


@pytest.mark.torch
def test_a_job_records_what_it_is_expected_to_take(tmp_path, capsys, measured):
    path = write_docs(tmp_path / "docs.jsonl")
    assert run(["embed", str(path), "-o", str(tmp_path / "out"), "--on", "inline"]) == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())["prediction"]
    done = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["rows"] == done["rows_in"] == 60
    assert told["tokens"] == done["tokens"]
    assert told["padding_share"] == pytest.approx(done["padding_share"], abs=1e-4)
    assert told["units"] == 1
    assert told["elapsed_s"] == pytest.approx(sum(told["terms"].values()), abs=0.01)
    assert told["memory_bytes"] > 350_000_000
    said = capsys.readouterr().err
    assert "expected: " in said
    assert "advice: threads: 1 a unit" in said
    assert run(["show", str(tmp_path / "out")]) == 0
    assert "expected: " in capsys.readouterr().out.split("padding")[1]
    # the plan of the same input says the same
    assert run(["plan", "embed", str(path), "--on", "inline", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    for key in ("rows", "tokens", "padding_share", "advice"):
        assert planned[key] == told[key]
    assert planned["terms"]["compute"] == told["terms"]["compute"]


@pytest.mark.torch
def test_a_machine_that_was_not_measured_is_said_to_be(tmp_path, capsys, monkeypatch):
    path = write_docs(tmp_path / "docs.jsonl", 3)
    monkeypatch.setattr(run_module, "rates_for", lambda machine, measure: None)
    assert run(["embed", str(path), "-o", str(tmp_path / "out"), "--on", "inline"]) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["prediction"] is None
    assert "fanfold machine --probe" in capsys.readouterr().err


@pytest.mark.torch
def test_lengths_alone_are_planned(capsys, measured):
    assert run(["plan", "embed", "--tokens-per-row", "23,120", "--rows", "100000", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == 100_000
    assert 100_000 * 23 < record["tokens"] < 100_000 * 120
    assert record["one_unit_elapsed_s"] >= record["elapsed_s"]


@pytest.mark.torch
def test_a_probe_beside_other_programs_is_said_to_be_one(capsys, monkeypatch):
    rates = replace(short_rates(2), own_share=0.5)
    monkeypatch.setattr(plan_embed_module, "rates_for", lambda machine: rates)
    assert run(["plan", "embed", "--tokens-per-row", "23,120", "--rows", "100"]) == 0
    assert "while other programs took 50% of a core" in capsys.readouterr().out
