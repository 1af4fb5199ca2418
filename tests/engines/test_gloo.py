"""Ranks over gloo: the same bits as over shared memory, and the same words where something goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fanfold.engine.supervisor import child_environment

pytest.importorskip("torch")
pytestmark = pytest.mark.torch
RANKS = Path(__file__).with_name("shared_ranks.py")


@pytest.fixture
def run(tmp_path):
    """Runs a program of shared_ranks.py; exit code and last words of every rank."""
    started = []

    def start(program, size, timeout_s=20.0):
        words = [sys.executable, str(RANKS), program, str(tmp_path / "gloo")]
        processes = [
            subprocess.Popen(
                [*words, str(rank), str(size), str(timeout_s)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=child_environment(threads=1),
                text=True,
            )
            for rank in range(size)
        ]
        started.extend(processes)
        ends = []
        for process in processes:
            out, err = process.communicate(timeout=60)
            last = out.splitlines()[-1:]
            ends.append((process.returncode, json.loads(last[0]) if last not in ([], ["joined"]) else err))
        return ends

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_rank_gets_the_bytes_that_one_process_would_compute(run, size):
    ends = run("exchanges", size)
    assert [code for code, _ in ends] == [0] * size, ends
    (first, *others) = [said["result"] for _, said in ends]
    assert first[1:] == ["gathered", "exchanged", "sent"]
    assert others == [first] * (size - 1)


@pytest.mark.parametrize(
    ("program", "mine", "theirs"),
    [
        ("other_dtype", "all_reduce#4 layers.3.mlp float64 (4,)", "all_reduce#4 layers.3.mlp float32 (4,)"),
        ("forgets_one", "all_reduce#5 layers.3.mlp float64 (4,)", "barrier#5 end"),
    ],
)
def test_ranks_that_call_different_things_are_told_what_both_called(run, program, mine, theirs):
    for rank, (code, said) in enumerate(run(program, 2)):
        asked, found = (mine, theirs) if rank == 0 else (theirs, mine)
        assert code == 1, said
        assert said["error"] == "InternalError"
        assert said["asked"] == f"rank {rank} of 2 in {asked}"
        assert said["found"] == f"rank {1 - rank} is in {found}"


def test_a_killed_rank_is_named(run):
    code, said = run("killed", 2)[0]
    assert code == 1
    assert said["error"] == "UnitLost"
    assert said["asked"] == "rank 0 of 2 in all_reduce#4 layers.0.mlp.down float32 (1, 8)"
    assert said["found"].startswith("rank 1 is gone (process ")


def test_a_rank_that_sleeps_is_waited_for_so_long_only(run):
    code, said = run("asleep", 2, timeout_s=1.0)[0]
    assert code == 1
    assert said["error"] == "UnitLost"
    assert "is waited for since 1 s" in said["found"]


def test_an_error_of_one_rank_is_the_first_cause_on_all(run):
    (code, said), (other, theirs) = run("raises", 2)
    assert (code, other) == (1, 1)
    assert theirs["error"] == "ValueError"
    assert "a bad weight" in said["found"]
    assert said["asked"].startswith("rank 0 of 2 in all_reduce#4 layers.0.mlp.down")
