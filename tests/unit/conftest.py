"""What several unit tests need."""

from __future__ import annotations

from dataclasses import replace

import pytest


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of 10 rows, two windows a part."""
    from fanfold.job import run as run_module

    real = run_module._numerics
    monkeypatch.setattr(
        run_module,
        "_numerics",
        lambda task, kind: replace(real(task, kind), window_rows=10, batch_tokens=64, windows_per_part=2),
    )
