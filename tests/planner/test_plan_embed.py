"""`fanfold plan embed`: the local job, from lengths or from an input."""

from __future__ import annotations

import json

import pytest

from fanfold.cli.main import run
from fanfold.job.plan_embed import _drawn
from fanfold.plan.numerics import Numerics


def test_lengths_are_drawn_with_that_median_and_percentile():
    lengths, rows = _drawn("23,120", 100_000, Numerics(), 512)
    lengths.sort()
    assert rows == 100_000
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
def test_an_input_is_planned_with_units_time_and_memory(tmp_path, capsys):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": "some words " * (i % 30 + 1)}) + "\n" for i in range(60)), "utf-8")
    assert run(["plan", "embed", str(path), "--on", "cpu:1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == 60
    assert record["units"] == ["cpu:0"]
    assert record["tokens"] > 60 * 5
    assert record["elapsed_s"] == pytest.approx(sum(record["terms"].values()))
    assert record["fits"]
    assert record["reasons"]
