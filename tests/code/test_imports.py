"""Importing fanfold, and asking it for help, stays light."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
HEAVY = ["torch", "transformers", "pyspark", "pyarrow", "rich", "numpy", "pandas", "polars", "pydantic"]
HELP = """
import contextlib, io, runpy, sys
sys.argv = ["fanfold", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        runpy.run_module("fanfold.cli.main", run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None), end.code
assert "embed" in out.getvalue()
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with this source tree first; no user site, whose .pth files may import anything."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [sys.executable, "-s", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def loaded_by(code: str) -> set[str]:
    """The top-level packages in sys.modules after the code ran, less those that Python starts with."""
    show = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    return set(python("-c", code + show).stderr.split()) - set(python("-c", show).stderr.split())


def best_of_five_s(*arguments: str) -> float:
    def once() -> float:
        start = time.perf_counter()
        python(*arguments)
        return time.perf_counter() - start

    return min(once() for _ in range(5))


@pytest.mark.parametrize("module", ["fanfold", "fanfold.merge", "fanfold.merge.gather", "fanfold.testing.laws"])
def test_import_loads_nothing_heavy(module):
    loaded = loaded_by(f"import {module}")
    assert "fanfold" in loaded
    assert sorted(loaded & {*HEAVY, "hypothesis", "pytest"}) == []


def test_the_check_for_heavy_modules_can_fail():
    assert "numpy" in loaded_by("import numpy")


def test_help_loads_no_torch_arrow_or_numpy():
    loaded = loaded_by(HELP)
    assert sorted(loaded & {"torch", "transformers", "pyspark", "pyarrow", "numpy", "pandas", "polars"}) == []


@pytest.mark.slow
def test_import_adds_at_most_100_ms():
    assert best_of_five_s("-c", "import fanfold") - best_of_five_s("-c", "pass") <= 0.100


@pytest.mark.slow
def test_help_takes_at_most_250_ms():
    assert best_of_five_s("-m", "fanfold.cli.main", "--help") <= 0.250
