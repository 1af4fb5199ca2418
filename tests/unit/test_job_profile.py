"""The profile: where each unit's time went, what bounds it, and advice only where something stands out."""

from __future__ import annotations

import json
import re

import pytest

from fanfold.errors import ResumeError
from fanfold.job import profile as profile_module
from fanfold.job.profile import advise, profile, unit_shares
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

TOTALS = {"elapsed_s": 10.0, "seconds": {"cpu:0": {"load": 1.0, "prepare": 2.0, "compute": 6.0, "write": 0.5}}}
EAGER = {"compiled": False}


@pytest.fixture
def out(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"row {i} " + "x" * (i % 9)}) + "\n" for i in range(500)))
    task = FakeTask(flops_per_token=1e6, token_s=1e-5)
    run_job(task, Request(inputs=(str(source),), out=tmp_path / "out", on="inline", sync=False))
    return tmp_path / "out"


def test_shares_of_a_unit_are_of_the_whole_time_and_the_rest_is_waiting():
    (share,) = unit_shares(TOTALS).values()
    assert share == pytest.approx(
        {"load": 0.1, "prepare": 0.2, "compute": 0.6, "write": 0.05, "assemble": 0.0, "wait": 0.05}
    )


def test_a_page_names_units_padding_and_the_share_of_the_rate(out, monkeypatch):
    rate = {"probe": {"gemm_one_thread_flop_per_s": 5e11}}
    monkeypatch.setattr(profile_module, "machine_record", lambda measure: rate)
    page = profile(out)
    (line,) = [line for line in page.splitlines() if line.startswith("inline")]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "padding:" in page
    # 10 microseconds a token of 1e6 FLOP are 1e11 FLOP/s: at most a fifth of the rate, less what else it does.
    (share,) = [int(found) for found in re.findall(r"while computing, (\d+)% of", page)]
    assert 10 <= share <= 20


def test_a_task_that_does_not_know_its_work_has_no_bound(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n')
    run_job(FakeTask(), Request(inputs=(str(source),), out=tmp_path / "out", on="inline", sync=False))
    assert "bound" not in profile(tmp_path / "out")


def test_a_job_that_is_not_finished_has_no_profile(out):
    (out / "summary.json").unlink()
    with pytest.raises(ResumeError, match="not finished"):
        profile(out)


@pytest.mark.parametrize(
    ("seconds", "padding", "gemm", "numerics", "words"),
    [
        ({"compute": 9.5}, 0.01, 0.8, EAGER, []),
        ({"compute": 5.0}, 0.01, 0.8, EAGER, ["waiting"]),
        ({"load": 4.0, "compute": 6.0}, 0.01, 0.8, EAGER, ["loading"]),
        ({"prepare": 3.0, "compute": 7.0}, 0.2, 0.8, EAGER, ["preparing", "padding"]),
        ({"compute": 9.5}, 0.01, 0.4, EAGER, ["computing"]),
        ({"compute": 9.5}, 0.01, 0.4, {"compiled": True}, []),
        ({"compute": 9.5}, 0.01, None, EAGER, []),
    ],
)
def test_advice_is_given_where_something_stands_out_the_largest_first(seconds, padding, gemm, numerics, words):
    shares = unit_shares({"elapsed_s": 10.0, "seconds": {"cpu:0": seconds}})
    found = advise(shares, {"padding_share": padding}, gemm, numerics)
    assert [line.split(":")[0].removeprefix("- ") for line in found] == words
