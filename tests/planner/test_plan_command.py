"""`fanfold plan train` and `infer`, as a user calls them."""

from __future__ import annotations

import csv
import io
import json
from xml.etree import ElementTree

import pytest

import fanfold as ff
from fanfold.cli.main import run
from fanfold.errors import PlanError

TRAIN = ["plan", "train", "--model", "gpt3-175b", "--on", "1024xA100-80GB-SXM", "--global-batch", "1536"]
INFER = [
    *("plan", "infer", "--model", "llama-3-70b", "--on", "8xH100-80GB-SXM", "--input-tokens", "1000"),
    *("--output-tokens", "200", "--concurrency", "64"),
]
KEYS = [
    *("layout", "step_time_s", "tokens_per_s", "ttft_s", "itl_s", "memory_bytes_per_device", "fits", "mfu", "terms"),
    *("bound", "interval", "alternatives"),
]


def called(capsys, arguments):
    code = run(arguments)
    return code, capsys.readouterr()


def test_training_is_planned_with_what_was_fixed(capsys):
    code, out = called(capsys, [*TRAIN, "--seq", "2048", "--fix", "tensor=8,pipeline=16", "--json"])
    record = json.loads(out.out)
    assert code == 0
    assert [key for key in KEYS if key not in record] == []
    layout = record["layout"]
    assert (layout["tensor"], layout["pipeline"], layout["data"]) == (8, 16, 8)
    assert record["fits"]
    assert len(record["alternatives"]) == 3
    assert sum(record["terms"].values()) == pytest.approx(record["step_time_s"], rel=1e-6)
    assert record["interval"][0] < record["step_time_s"] < record["interval"][1]


def test_serving_is_planned_with_its_latencies(capsys):
    code, out = called(capsys, [*INFER, "--json"])
    record = json.loads(out.out)
    assert code == 0
    assert [key for key in KEYS if key not in record] == []
    assert record["step_time_s"] is None
    assert 0.01 < record["itl_s"] < 0.1
    assert record["ttft_s"] > record["itl_s"]


def test_the_text_says_what_a_reader_asks(capsys):
    code, out = called(capsys, TRAIN)
    assert code == 0
    for words in ("a step, bound by", "MFU", "memory", "next best", "what would change", "nearest published"):
        assert words in out.out


def test_layouts_are_csv_on_demand(capsys):
    _, out = called(capsys, [*TRAIN, "--csv"])
    rows = list(csv.DictReader(io.StringIO(out.out)))
    assert len(rows) == 4
    assert float(rows[0]["step_time_s"]) <= float(rows[1]["step_time_s"])


@pytest.mark.parametrize("arguments", [TRAIN, INFER])
def test_the_plot_is_an_svg_with_a_line_for_scaling(tmp_path, capsys, arguments):
    path = tmp_path / "plan.svg"
    assert called(capsys, [*arguments, "--plot", str(path)])[0] == 0
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    assert len(root.findall(".//{*}polyline")) == 2


def test_a_cluster_file_goes_before_the_name(tmp_path, capsys):
    slow, fast = tmp_path / "slow.toml", tmp_path / "fast.toml"
    slow.write_text("network_cards_per_node = 1\nnetwork_card_gbit_per_s = 25\n", encoding="utf-8")
    fast.write_text("network_cards_per_node = 8\nnetwork_card_gbit_per_s = 400\n", encoding="utf-8")
    times = []
    for path in (slow, fast):
        _, out = called(capsys, [*TRAIN, "--cluster", str(path), "--json"])
        times.append(json.loads(out.out)["step_time_s"])
    assert times[0] > 1.05 * times[1]


def test_a_config_file_is_a_model(tmp_path, capsys):
    config = {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, out = called(
        capsys, ["plan", "train", "--model", str(tmp_path), "--on", "8xA100", "--global-batch", "64", "--json"]
    )
    assert code == 0
    assert json.loads(out.out)["num_params"] > 1e8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TRAIN[:3], "gpt3-17b", *TRAIN[4:]], "gpt3-175b"),
        ([*TRAIN[:5], "1024xA101", *TRAIN[6:]], "closest"),
        ([*TRAIN[:5], "A100", *TRAIN[6:]], "1024xA100-80GB-SXM"),
        ([*TRAIN, "--fix", "tensor=8,pipeline=8,data=7"], "tensor 8 x pipeline 8 x data 7 = 448"),
        ([*TRAIN, "--fix", "tenser=8"], "tensor=N"),
        ([*TRAIN, "--precision", "fp7"], "bf16"),
        ([*TRAIN[:5], "8xA100-80GB-SXM", *TRAIN[6:]], "too much"),
        ([*TRAIN, "--plot", "plan.png"], ".svg"),
        ([*INFER[:3], "bert-large", *INFER[4:]], "encoder"),
        ([*INFER[:5], "1xA100-40GB-SXM", *INFER[6:]], "too much"),
    ],
)
def test_what_cannot_be_planned_says_why(capsys, arguments, words):
    code, out = called(capsys, arguments)
    assert code == 2
    assert words in out.err
    assert out.err.count("\n") == 4


def test_python_gives_the_same_plan(capsys):
    _, out = called(capsys, [*TRAIN, "--json"])
    choice = ff.plan("gpt3-175b", "1024xA100-80GB-SXM", global_batch=1536)
    assert choice.record() == json.loads(out.out)
    assert ff.plan("llama-3-8b", "1xH100", input_tokens=100).best.tokens_per_s > 0
    with pytest.raises(PlanError, match="neither global_batch"):
        ff.plan("llama-3-8b", "1xH100")
