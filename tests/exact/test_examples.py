"""The examples run and find what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_attention_over_pieces_of_keys_is_the_whole():
    assert "512 keys in 5 pieces" in run("attention.py", "5")


@pytest.mark.slow
def test_the_pool_and_the_fold_find_the_same_mean():
    lines = run("article.py", "20000").splitlines()
    pooled, folded = (float(line.split(":")[1].split()[0]) for line in lines[1:3])
    assert abs(pooled - folded) < 1e-14


@pytest.mark.slow
def test_the_ensemble_is_right_more_often_than_each_member():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: the ensemble is not tried")
    assert "their vote" in run("ensemble.py")


@pytest.mark.slow
@pytest.mark.torch
def test_a_sequence_that_does_not_fit_one_unit_runs_on_two():
    _, whole, cut, equal = run("long_context.py").splitlines()
    assert whole == "tensor=1, 1 unit: does not fit (can't allocate memory)"
    assert cut == "context=2:ring, 2 units: logits (1, 8192, 256)"
    assert float(equal.split()[2]) < 1e-5
