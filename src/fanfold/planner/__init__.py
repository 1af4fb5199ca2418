"""Chooses and never runs: units for a job, layouts for a cluster, and what they will take."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`fanfold.planner.predict`, `cluster`, ... when they are first used: jobs need `planner.units` alone."""
    if name == "predict":
        from fanfold.planner.prediction import predict

        return predict
    raise AttributeError(f"module 'fanfold.planner' has no attribute {name!r}")
