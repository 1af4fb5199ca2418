"""`plan validate`: what is scored, how, and that docs/validation.md says what the code gives."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from fanfold.cli.main import run
from fanfold.planner.published import COLUMNS
from fanfold.planner.validate import quantile, spearman

ROOT = Path(__file__).parents[2]
KEYS = [
    *("source", "kind", "metric", "n_rows", "n_predicted", "skipped", "median_ape", "mape", "p90_ape", "bias"),
    *("null_mape", "null_loso_mape", "memory_mape", "memory_worst_under", "false_fits", "spearman"),
    *("regret_median", "regret_max"),
]
ROW = {
    "source": "a paper never seen",
    "config_id": "one",
    "accelerator": "H100-80GB-SXM (cloud, 8x200Gb/s NIC)",
    "n_devices": "64",
    "model": "Some 13B",
    "n_params": "1.3e10",
    "layers": "40",
    "hidden": "5120",
    "heads": "40",
    "kv_heads": "40",
    "ffn": "13824",
    "vocab": "32000",
    "seq": "4096",
    "global_batch": "256",
    "micro_batch": "1",
    "tp": "2",
    "pp": "1",
    "dp": "32",
    "precision": "bf16",
    "framework": "Megatron-Core",
    "metric": "step_time",
    "value": "4.0",
    "unit": "s",
    "confidence": "high",
}


def table(path, *rows):
    with path.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def validated(capsys, *paths):
    code = run(["plan", "validate", *paths, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_table_never_seen_is_predicted(tmp_path, capsys):
    path = table(tmp_path / "a.csv", ROW, {**ROW, "config_id": "two", "tp": "4", "dp": "16", "value": "4.4"})
    code, (record,) = validated(capsys, path)
    assert code == 0
    assert [key for key in KEYS if key not in record] == []
    assert (record["n_rows"], record["n_predicted"]) == (2, 2)
    assert 0 < record["median_ape"] < 0.5
    assert record["regret_max"] >= 0


def test_what_is_no_measurement_is_not_scored(tmp_path, capsys):
    path = table(
        tmp_path / "a.csv",
        ROW,
        {**ROW, "config_id": "b", "metric": "mfu", "unit": "%"},
        {**ROW, "config_id": "c", "confidence": "derived"},
        {**ROW, "config_id": "d", "metric": "peer_step_time"},
        {**ROW, "config_id": "f", "notes": "INFERENCE SQuAD forward only"},
        {**ROW, "config_id": "e", "confidence": "digitised-figure(+-2%)"},
        {**ROW, "metric": "tokens_per_s", "value": "1", "unit": "tok/s"},  # the same run as ROW's
    )
    _, records = validated(capsys, path)
    assert [(record["metric"], record["n_rows"]) for record in records] == [("step_time", 1)]


def test_rows_that_cannot_be_resolved_are_named_and_cost_coverage(tmp_path, capsys):
    unknown = {**ROW, "config_id": "two", "accelerator": "Quantum-9000"}
    code, (record,) = validated(capsys, table(tmp_path / "a.csv", ROW, unknown))
    assert code == 1
    assert record["skipped"][0]["config_id"] == "two"
    assert "Quantum-9000" in record["skipped"][0]["why"]


def test_serving_under_load_is_scored_where_the_load_does_not_say_it(tmp_path, capsys):
    base = {
        **ROW,
        "seq": "",
        "global_batch": "",
        "n_devices": "2",
        "tp": "2",
        "dp": "1",
        "isl": "500",
        "osl": "100",
        "framework": "vLLM",
        "concurrency": "qps 2",
    }
    rows = [
        {**base, "metric": "ttft_mean", "value": "60", "unit": "ms"},
        {**base, "metric": "itl_mean", "value": "10", "unit": "ms"},
        {**base, "metric": "output_tokens_per_s", "value": "200", "unit": "tok/s"},  # follows the offered rate
        {**base, "config_id": "x", "concurrency": "inf (max)", "metric": "output_tokens_per_s", "unit": "tok/s"},
        {**base, "config_id": "y", "concurrency": "8", "metric": "request_latency", "value": "1.2"},
    ]
    code, records = validated(capsys, table(tmp_path / "a.csv", *rows))
    assert code == 0
    assert {record["kind"] for record in records} == {"infer"}
    counts = {record["metric"]: record["n_predicted"] for record in records}
    assert counts == {"ttft_mean": 1, "itl_mean": 1, "output_tokens_per_s": 1, "request_latency": 1}


def test_a_run_that_ran_out_of_memory_and_was_said_to_fit_is_a_false_fit(tmp_path, capsys):
    small = {**ROW, "config_id": "oom", "metric": "memory", "value": "OOM", "unit": ""}
    _, records = validated(capsys, table(tmp_path / "a.csv", ROW, small))
    assert sum(record["false_fits"] for record in records) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"unit": "furlongs"}, "furlongs"), ({"metric": "tokens_per_s", "unit": "s"}, "tokens_per_s in 's'")],
)
def test_a_unit_that_cannot_be_is_refused(tmp_path, capsys, change, words):
    assert run(["plan", "validate", table(tmp_path / "a.csv", {**ROW, **change})]) == 2
    assert words in capsys.readouterr().err


def test_missing_columns_are_named(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("source,model\na,b\n", encoding="utf-8")
    assert run(["plan", "validate", str(path)]) == 2
    assert "config_id" in capsys.readouterr().err


def test_no_file_is_an_error_with_its_name(tmp_path, capsys):
    assert run(["plan", "validate", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


def test_rank_correlation_is_that_of_its_definition():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
    assert spearman([1, 1], [1, 2]) is None


def test_a_quantile_lies_between_its_neighbours():
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2
    assert quantile([0.0, 1.0], 0.9) == pytest.approx(0.9)
    assert quantile([], 0.9) is None


@pytest.mark.slow
def test_the_page_of_results_is_not_stale():
    place = importlib.util.spec_from_file_location("validation_report", ROOT / "benchmarks" / "validation.py")
    report = importlib.util.module_from_spec(place)
    place.loader.exec_module(report)
    assert report.report() == (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
